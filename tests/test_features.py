"""What users of transformers do with a model, with every variant: features change the way, never the answer."""

import copy

import pytest
import torch
from accelerate.utils import send_to_device
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    CompileConfig,
    DataCollatorWithFlattening,
    DynamicCache,
    GenerationConfig,
    StaticCache,
    Trainer,
    TrainingArguments,
    cache_utils,
    pipeline,
)

from cases import DECODERS, MODELS, Decoder, logits_in_chunks, padded, random_ids, random_model, small_config
from multimatrix import MultimatrixForCausalLM
from multimatrix.attention.module import RotaryTables
from multimatrix.data import load_tokenizer
from multimatrix.evaluate.cache_bytes import stored_bytes
from multimatrix.ops.rotary import RopeParameters
from multimatrix.plan.numbers import kv_bytes_per_token

TIGHT = {"rtol": 1e-10, "atol": 1e-10}
TOKENS, NEW = 9, 6
every_model = pytest.mark.parametrize("specs", MODELS.values(), ids=MODELS.keys())


def generate(model, ids, **options):
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    return model.generate(ids, **settings | options)[:, ids.shape[1] :]


# ---- packed documents --------------------------------------------------------------------------------------------


def packed(*lengths):
    """Documents, the row that holds them all [1, T], and its position_ids."""
    documents = [random_ids(length) for length in lengths]
    return documents, torch.cat(documents)[None], torch.cat([torch.arange(length) for length in lengths])[None]


@every_model
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("chunks", [None, [14], [4, 5, 1, 4], [1] * 14], ids=str)
def test_packed_documents_are_separate_rows(specs, backend, chunks):
    model = random_model(specs)
    documents, row, positions = packed(5, 2, 7)
    expected = torch.cat([model(document[None]).logits[0] for document in documents]).detach()
    model.set_attn_implementation(backend)
    if chunks is None:
        assert_close(model(row, position_ids=positions).logits[0], expected, **TIGHT)
        return
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=20)):
        done, logits = 0, []
        for chunk in chunks:
            step = slice(done, done := done + chunk)
            logits.append(model(row[:, step], position_ids=positions[:, step], cache=cache).logits)
        assert_close(torch.cat(logits, dim=1)[0].detach(), expected, **TIGHT)


@every_model
def test_packed_documents_never_see_each_other(specs):
    model = random_model(specs)
    _, row, positions = packed(5, 2, 7)
    before = model(row, position_ids=positions).logits
    other = row.clone()
    other[:, 5:7] = other[:, 5:7] % 60 + 1
    after = model(other, position_ids=positions).logits
    # Experts take the rows of all documents together, and a product of more rows rounds otherwise.
    tolerance = 1e-12 if isinstance(specs, Decoder) else 0.0
    for part in (slice(0, 5), slice(7, 14)):
        assert_close(after[:, part], before[:, part], rtol=tolerance, atol=tolerance)
    assert not torch.isclose(after[:, 5:7], before[:, 5:7]).all(-1).any()
    assert not torch.isclose(model(row).logits[:, 5:], before[:, 5:]).all(-1).any()  # one document is another function


@every_model
def test_packed_rows_may_be_padded_and_differ(specs):
    model = random_model(specs)
    rows = [packed(5, 4), packed(2, 3, 1)]
    ids, mask = padded([row[0] for _, row, _ in rows])
    positions = torch.zeros_like(ids)
    for number, (_, row, position) in enumerate(rows):
        positions[number, ids.shape[1] - row.shape[1] :] = position
    logits = model(ids, attention_mask=mask, position_ids=positions).logits
    for number, (documents, row, _) in enumerate(rows):
        expected = torch.cat([model(document[None]).logits[0] for document in documents])
        assert_close(logits[number, -row.shape[1] :], expected, **TIGHT)


@every_model
def test_a_packed_prompt_continues_its_last_document(specs):
    model = random_model(specs)
    documents, row, positions = packed(5, 2, 4)
    expected = generate(model, documents[-1][None])
    assert torch.equal(generate(model, row, position_ids=positions), expected)


@every_model
def test_trainer_with_packed_rows(specs, tmp_path):
    """The collator that flattens a batch into one row trains like the padded batch."""
    if specs[0].hidden_size == 6:
        specs = specs[:1]
    documents = [{"input_ids": random_ids(length).tolist()} for length in (5, 2, 7, 3)]
    plain, flat = random_model(specs, torch.float32), random_model(specs, torch.float32)
    flat.load_state_dict(plain.state_dict())

    def pad(rows):
        ids, mask = padded([torch.tensor(row["input_ids"]) for row in rows], side="right")
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

    for model, collate in ((plain, pad), (flat, DataCollatorWithFlattening(return_tensors="pt"))):
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            optim="sgd",
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        Trainer(model=model, args=arguments, train_dataset=documents, data_collator=collate).train()
    for p, q in zip(plain.parameters(), flat.parameters(), strict=True):
        assert_close(q, p, rtol=1e-3, atol=1e-4)


# ---- generation --------------------------------------------------------------------------------------------------


@every_model
def test_assisted_generation(specs):
    model = random_model(specs)
    helpful, useless = copy.deepcopy(model), random_model(DECODERS["mqa"])
    with torch.no_grad():
        helpful.lm_head.weight += 0.05 * torch.randn_like(helpful.lm_head.weight)
    ids = random_ids(1, 5)
    for assistant in (helpful, useless):
        assert torch.equal(generate(model, ids, assistant_model=assistant), generate(model, ids))


@every_model
@pytest.mark.skipif(not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="this transformers has no FP8 cache")
def test_quantized_cache(specs):
    model = random_model(specs, torch.float32)
    ids = random_ids(2, TOKENS)
    exact = logits_in_chunks(model, ids, [5, 1, 3], DynamicCache(config=model.config))
    cache = cache_utils.QuantizedCache(backend="fp8", config=model.config)
    quantized = logits_in_chunks(model, ids, [5, 1, 3], cache)
    assert_close(quantized[:, :5], exact[:, :5])  # the prompt is not read back from the cache
    error = (quantized - exact).norm() / exact.norm()
    assert 0 < error < 0.3
    assert generate(model, ids, cache_implementation="quantized", cache_config={"backend": "fp8"}).shape == (2, NEW)


@every_model
def test_static_cache_with_a_prompt_in_chunks(specs):
    model = random_model(specs)
    ids = random_ids(2, TOKENS)
    options = {"cache_implementation": "static", "prefill_chunk_size": 4, "disable_compile": True}
    assert torch.equal(generate(model, ids, **options), generate(model, ids))


@every_model
def test_compiled_decoding_is_one_graph(specs):
    """fullgraph, and no compilation after the first step of the first answer."""
    model = random_model(specs)
    rows, ids = padded([random_ids(7), random_ids(3)]), random_ids(2, 7)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile_config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    compile_config._compile_all_devices = True
    torch._dynamo.reset()
    for prompt, mask in (rows, (ids, torch.ones_like(ids))):
        expected = generate(model, prompt, attention_mask=mask)
        options = {"cache_implementation": "static", "compile_config": compile_config, "attention_mask": mask}
        assert torch.equal(generate(model, prompt, **options), expected)
    assert len(graphs) == 1


@every_model
def test_pipeline(specs, tmp_path):
    tokenizer = load_tokenizer("bytes", [])
    model = random_model(specs, torch.float32, vocab_size=len(tokenizer))
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    generator = pipeline("text-generation", model=str(tmp_path), dtype=torch.float32)
    prompts = ["Once upon", "A"]
    answers = generator(prompts, max_new_tokens=NEW, do_sample=False, return_full_text=False)
    for prompt, [answer] in zip(prompts, answers, strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        expected = generate(model, ids, eos_token_id=tokenizer.eos_token_id)[0]
        assert answer["generated_text"] == tokenizer.decode(expected, skip_special_tokens=True)


# ---- the weights -------------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("tied", [False, True])
def test_resized_embeddings(specs, tied, tmp_path):
    model = random_model(specs, tie_word_embeddings=tied)
    ids = random_ids(2, TOKENS)
    expected = model(ids).logits
    for size in (70, 61):
        model.resize_token_embeddings(size, mean_resizing=False)
        assert model.config.vocab_size == model.lm_head.out_features == model.vocab_size == size
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
        assert_close(model(ids).logits[..., :61], expected, **TIGHT)
        assert model(ids, labels=ids).loss.isfinite()
    model.resize_token_embeddings(70)
    model.save_pretrained(tmp_path)
    loaded = MultimatrixForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert_close(loaded(ids).logits, model(ids).logits, **TIGHT)


@every_model
@pytest.mark.parametrize("tied", [False, True])
def test_empty_weights_and_device_maps(specs, tied, tmp_path):
    model = random_model(specs, tie_word_embeddings=tied)
    ids = random_ids(2, TOKENS)
    expected = logits_in_chunks(model, ids, [6, 1, 2], DynamicCache(config=model.config))
    model.save_pretrained(tmp_path / "model")
    with torch.device("meta"):
        empty = MultimatrixForCausalLM(model.config)
    empty = empty.to_empty(device="cpu").double().eval()
    empty.tie_weights()
    empty.load_state_dict(model.state_dict())
    split = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"} | {
        f"model.layers.{number}": "disk" if number == len(specs) - 1 else "cpu" for number in range(len(specs))
    }
    for device_map in (None, "cpu", "auto", split):
        loaded = empty
        if device_map is not None:
            loaded = AutoModelForCausalLM.from_pretrained(
                tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "disk", dtype=torch.float64
            )
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
        actual = logits_in_chunks(loaded, ids, [6, 1, 2], DynamicCache(config=model.config))
        assert_close(actual, expected, **TIGHT)
    assert any(p.device.type == "meta" for p in loaded.parameters())  # the last one really lay on the disk


def test_rotations_follow_a_layer_to_its_device():
    """accelerate moves what a layer is called with; the real thing needs two GPUs, so meta stands for the second."""
    spec = MODELS["mfa"][0]
    here = RotaryTables(torch.arange(3), torch.float64, RopeParameters(rope_theta=5.0))
    there = send_to_device((here,), "meta")[0]
    assert there is not here
    assert there.new(spec).cos.device.type == there.length.device.type == there.slots(spec, 4).cos.device.type == "meta"
    assert there.parameters == here.parameters
    assert send_to_device((here,), "meta")[0] is there
    assert send_to_device((here,), "cpu")[0] is here


@every_model
def test_lora_merges_and_unmerges(specs):
    base = random_model(specs)
    ids = random_ids(2, TOKENS)
    plain = base(ids).logits.detach()
    names = {weight.name for spec in specs for weight in spec.weights if weight.kind == "linear"}
    model = get_peft_model(base, LoraConfig(r=3, target_modules=sorted(names))).eval()
    adapters = [p for p in model.parameters() if p.requires_grad]
    assert len(adapters) == 2 * sum(weight.kind == "linear" for spec in specs for weight in spec.weights)
    with torch.no_grad():
        for parameter in adapters:
            parameter.normal_(0.0, 0.2)

    def both_ways():
        whole = model(input_ids=ids, use_cache=False).logits
        stepped = logits_in_chunks(base, ids, [5, 1, 1, 2], DynamicCache(config=base.config))
        assert_close(stepped, whole.detach(), **TIGHT)
        return whole

    adapted = both_ways()
    assert not torch.isclose(adapted, plain).all(-1).any()
    adapted.square().mean().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in adapters)
    model.merge_adapter()
    assert_close(both_ways(), adapted, rtol=1e-6, atol=1e-6)
    model.unmerge_adapter()
    assert_close(both_ways(), adapted, rtol=1e-6, atol=1e-6)
    with model.disable_adapter():
        assert_close(both_ways(), plain, rtol=1e-6, atol=1e-6)
    merged = model.merge_and_unload()
    assert type(merged) is MultimatrixForCausalLM
    assert_close(merged(ids).logits, adapted, rtol=1e-6, atol=1e-6)


# ---- export ------------------------------------------------------------------------------------------------------


@every_model
def test_export_of_a_whole_sequence(specs):
    model = random_model(specs)
    batch, tokens = torch.export.Dim("batch", min=2, max=8), torch.export.Dim("tokens", min=2, max=64)
    shape = {0: batch, 1: tokens}
    example = random_ids(3, TOKENS)
    program = torch.export.export(
        model,
        (),
        {"input_ids": example, "attention_mask": torch.ones_like(example), "use_cache": False},
        dynamic_shapes={"input_ids": shape, "attention_mask": shape, "use_cache": None},
        strict=False,
    )
    for lengths in ((TOKENS, 4, 6), (12, 7)):
        ids, mask = padded([random_ids(length) for length in lengths])
        actual = program.module()(input_ids=ids, attention_mask=mask, use_cache=False).logits
        expected = model(ids, attention_mask=mask, use_cache=False).logits
        assert_close(actual[mask == 1], expected[mask == 1], **TIGHT)


class DecodeStep(torch.nn.Module):
    """One token through a static cache whose memory belongs to the module."""

    def __init__(self, model, batch_size, max_cache_len):
        super().__init__()
        self.model = model
        self.cache = model.static_cache(batch_size, max_cache_len)
        for number, layer in enumerate(self.cache.layers):
            self.register_buffer(f"keys_{number}", layer.keys)
            self.register_buffer(f"values_{number}", layer.values)
            self.register_buffer(f"length_{number}", layer.cumulative_length)

    def forward(self, ids):
        return self.model(ids, cache=self.cache).logits


@every_model
def test_export_of_a_decode_step(specs):
    model = random_model(specs)
    ids = random_ids(2, TOKENS)
    with torch.no_grad():
        expected = model(ids).logits
        step = DecodeStep(model, 2, TOKENS + 3)
        assert stored_bytes(step.cache) == 2 * (TOKENS + 3) * kv_bytes_per_token(specs, bits=64)
        program = torch.export.export(step, (ids[:, :1],), strict=False).module()
        for buffer in program.buffers():
            buffer.zero_()
        for token in range(TOKENS):
            assert_close(program(ids[:, token : token + 1])[:, 0], expected[:, token], **TIGHT)


def test_small_config_is_what_is_saved():
    """Fields that transformers sets on an instance do not travel."""
    config = small_config(DECODERS["mfa"])
    assert "base_model_tp_plan" not in config.to_dict()
