"""The decoder around every variant: every way of running it agrees, and what is stated is what is built."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

from cases import (
    ALL_DECODERS,
    CASES,
    DECODERS,
    logits_in_chunks,
    padded,
    random_ids,
    random_model,
    small_config,
)
from multimatrix import MultimatrixConfig, MultimatrixForCausalLM
from multimatrix.attention import make_spec
from multimatrix.errors import InputError
from multimatrix.evaluate.cache_bytes import stored_bytes
from multimatrix.model.layer import DecoderLayer
from multimatrix.ops.rotary import RopeParameters, Rotation
from multimatrix.plan.numbers import decoder_parameters, kv_bytes_per_token, match_intermediate_size

TIGHT = {"rtol": 1e-10, "atol": 1e-10}
TOKENS = 9
every_case = pytest.mark.parametrize("specs", ALL_DECODERS.values(), ids=ALL_DECODERS.keys())
every_decoder = pytest.mark.parametrize("specs", DECODERS.values(), ids=DECODERS.keys())


def new_cache(model, kind):
    if kind == "dynamic":
        return DynamicCache(config=model.config)
    return StaticCache(config=model.config, max_cache_len=TOKENS + 5)


@every_case
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_training_decoding_and_chunked_prefill_agree(specs, kind):
    model = random_model(specs)
    ids = random_ids(2, TOKENS)
    expected = model.train()(ids, use_cache=False).logits.detach()
    model.eval()
    for chunks in ([TOKENS], [1] * TOKENS, [4, 1, 3, 1], [1, TOKENS - 1]):
        actual = logits_in_chunks(model, ids, chunks, new_cache(model, kind))
        assert_close(actual, expected, **TIGHT, msg=lambda text, chunks=chunks: f"chunks {chunks}: {text}")


@every_case
@pytest.mark.parametrize("kind", ["none", "dynamic", "static"])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_left_padded_batch_equals_single_sequences(specs, kind, backend):
    model = random_model(specs)
    rows = [random_ids(length) for length in (TOKENS, 4, 6)]
    expected = [model(row[None], use_cache=False).logits[0].detach() for row in rows]
    ids, mask = padded(rows)
    model.set_attn_implementation(backend)
    if kind == "none":
        logits = model(ids, attention_mask=mask, use_cache=False).logits
    else:
        logits = logits_in_chunks(model, ids, [TOKENS - 3, 1, 1, 1], new_cache(model, kind), mask)
    # A NaN at a padded token would reach the others one layer later.
    assert logits.isfinite().all()
    for row in range(len(rows)):
        assert_close(logits[row, -len(rows[row]) :], expected[row], **TIGHT)


@every_decoder
def test_right_padding_changes_nothing(specs):
    model = random_model(specs)
    rows = [random_ids(length) for length in (TOKENS, 4, 1)]
    ids, mask = padded(rows, side="right")
    logits = model(ids, attention_mask=mask).logits
    for row in range(len(rows)):
        assert_close(logits[row, : len(rows[row])], model(rows[row][None]).logits[0], **TIGHT)


@every_decoder
def test_causality(specs):
    model = random_model(specs)
    ids = random_ids(1, TOKENS)
    before = model(ids).logits
    for t in range(1, TOKENS):
        future = ids.clone()
        future[:, t:] = future[:, t:] % 60 + 1
        after = model(future).logits
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.isclose(after[:, t:], before[:, t:]).all(-1).any()
    first = ids.clone()
    first[:, 0] = first[:, 0] % 60 + 1
    assert not torch.isclose(model(first).logits, before).all(-1).any()  # and the past is seen


@every_decoder
def test_eager_runs_and_equals_sdpa(specs, monkeypatch):
    model = random_model(specs)
    ids = random_ids(2, TOKENS)
    expected = model(ids).logits
    eager = MultimatrixForCausalLM._from_config(model.config, attn_implementation="eager").double().eval()
    eager.load_state_dict(model.state_dict())
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)
    assert_close(eager(ids).logits, expected, **TIGHT)
    assert_close(logits_in_chunks(eager, ids, [5, 1, 3], DynamicCache()), expected.detach(), **TIGHT)


@every_decoder
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)], ids=str)
def test_half_precision_is_near_float32(specs, dtype, tolerance):
    model = random_model(specs, torch.float32)
    ids, mask = padded([random_ids(TOKENS), random_ids(5)])
    expected = model(ids, attention_mask=mask).logits[mask == 1]
    model.to(dtype)
    for logits in (
        model(ids, attention_mask=mask).logits,
        logits_in_chunks(model, ids, [6, 1, 1, 1], DynamicCache(), mask),
    ):
        assert logits.dtype == dtype
        assert logits.isfinite().all()
        assert (logits[mask == 1].float() - expected).norm() / expected.norm() < tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_turns_far_tokens_right(dtype):
    far = torch.tensor([4001, 32_001])  # neither is a bfloat16, and the second is not a float16
    half, exact = (Rotation.at(far, 8, RopeParameters(), precision) for precision in (dtype, torch.float64))
    for table, expected in ((half.cos, exact.cos), (half.sin, exact.sin)):
        assert (table.double() - expected).abs().max() < torch.finfo(dtype).eps + 3e-3


@every_decoder
def test_embeddings_in_place_of_ids_and_kept_logits(specs):
    model = random_model(specs)
    ids = random_ids(2, TOKENS)
    expected = model(ids).logits
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, expected)
    assert_close(model(ids, logits_to_keep=2).logits, expected[:, -2:], **TIGHT)
    indices = torch.tensor([0, 4, 5])
    assert_close(model(ids, logits_to_keep=indices).logits, expected[:, indices], **TIGHT)
    assert torch.equal(model(ids, return_dict=False)[0], expected)


def test_inputs_that_cannot_be_honoured_are_refused():
    model = random_model(DECODERS["mfa"])
    ids = random_ids(1, 3)
    # Ignored, packed rows would see each other.
    with pytest.raises(ValueError, match="position_ids"):
        model(ids, cu_seq_lens_q=torch.tensor([0, 2, 3]))
    with pytest.raises(ValueError, match="row 0 goes from 1 to 4 at token 2"):
        model(ids, position_ids=torch.tensor([[0, 1, 4]]))
    with pytest.raises(ValueError, match="two names of one argument"):
        model(ids, cache=DynamicCache(), past_key_values=DynamicCache())
    for inputs in ({}, {"input_ids": ids, "inputs_embeds": model.get_input_embeddings()(ids)}):
        with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
            model(**inputs)


@every_decoder
def test_loss_is_the_cross_entropy_of_the_next_token(specs):
    model = random_model(specs)
    ids = random_ids(3, TOKENS)
    labels = ids.clone()
    labels[0, :4] = labels[1, 6:] = -100
    output = model(ids, labels=labels)
    log_p = output.logits.detach().log_softmax(-1)
    terms = [-log_p[b, t, labels[b, t + 1]] for b in range(3) for t in range(TOKENS - 1) if labels[b, t + 1] != -100]
    # The loss function of transformers works in float32.
    assert_close(output.loss.double(), torch.stack(terms).mean(), rtol=1e-5, atol=0)
    summed = model(ids, labels=labels, num_items_in_batch=7).loss
    assert_close(summed.double(), torch.stack(terms).sum() / 7, rtol=1e-5, atol=0)
    output.loss.backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters())


@every_decoder
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(specs, use_reentrant):
    plain = random_model(specs).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    runs = []
    checkpointed.model.layers[0].self_attn.register_forward_hook(lambda *_: runs.append(1))
    ids, mask = padded([random_ids(TOKENS), random_ids(5)])
    for model in (plain, checkpointed):
        logits = model(ids, attention_mask=mask).logits
        (logits * mask[..., None]).square().mean().backward()
    assert len(runs) == 2  # forward once more during backward
    for p, q in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert_close(q.grad, p.grad, **TIGHT)


@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_stated_bytes_are_stored(specs, dtype):
    model = random_model(specs, dtype)
    ids = random_ids(3, TOKENS)
    for kind, slots in (("dynamic", TOKENS), ("static", TOKENS + 5)):
        cache = new_cache(model, kind)
        logits_in_chunks(model, ids, [TOKENS - 2, 1, 1], cache)
        assert stored_bytes(cache) == 3 * slots * kv_bytes_per_token(specs, bits=8 * dtype.itemsize)
        assert len(cache.layers) == len(specs)
        for spec, layer in zip(specs, cache.layers, strict=True):
            shapes = [tuple(tensor.shape) for tensor in (layer.keys, layer.values) if tensor.numel()]
            stated = [spec.cache.key, spec.cache.value] if spec.cache.value else [spec.cache.key]
            assert shapes == [(3, heads, slots, dim) for heads, dim in stated]


@every_case
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layers", ["dense", None, [1]], ids=["dense", "experts", "experts-in-one"])
def test_stated_parameters_are_built(specs, tied, layers):
    sizes = {"num_experts": 7, "experts_per_token": 3, "intermediate_size": 5, "shared_intermediate_size": 9}
    mixture = None if layers == "dense" else sizes | {"layers": layers}
    config = small_config(specs, tie_word_embeddings=tied, intermediate_size=23, mixture_of_experts=mixture)
    with torch.device("meta"):
        model = MultimatrixForCausalLM(config)
    stated = decoder_parameters(
        specs, vocab_size=61, intermediate_size=23, tie_word_embeddings=tied, experts=config.experts_spec()
    )
    assert model.num_parameters() == stated
    assert sum(p.numel() for p in model.parameters()) == stated
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


@every_decoder
@pytest.mark.parametrize("tolerance", [1e-9, 0.002, 0.05])
def test_matched_feed_forward_meets_its_tolerance(specs, tolerance):
    sizes = {"vocab_size": 61, "tie_word_embeddings": True}
    target = decoder_parameters(specs, intermediate_size=1234, **sizes)
    width = match_intermediate_size(specs, target, tolerance=tolerance, **sizes)
    assert abs(decoder_parameters(specs, intermediate_size=width, **sizes) / target - 1) <= tolerance
    # The roundest width within the tolerance is taken.
    for multiple in (128, 64, 32, 16, 8, 4, 2):
        nearest = round(1234 / multiple) * multiple
        if abs(decoder_parameters(specs, intermediate_size=nearest, **sizes) / target - 1) <= tolerance:
            break
    assert width == nearest


@every_decoder
def test_matching_what_cannot_match_is_refused(specs):
    sizes = {"vocab_size": 61, "tie_word_embeddings": True}
    nothing = decoder_parameters(specs, intermediate_size=0, **sizes)
    with pytest.raises(InputError, match=f"{nothing:,} .*{nothing - 1:,}"):
        match_intermediate_size(specs, nothing - 1, tolerance=0.01, **sizes)
    # 24 parameters and 6 for every unit of width.
    tiny = [make_spec(2, {"variant": "mha", "num_heads": 1, "head_dim": 2})]
    with pytest.raises(InputError, match=r"within 0.5 % of 35 parameters: the nearest, 2, gives 36"):
        match_intermediate_size(tiny, 35, vocab_size=1, tie_word_embeddings=True, tolerance=0.01)


@every_decoder
@pytest.mark.parametrize("tied", [False, True])
def test_saved_and_loaded_to_the_bit(specs, tied, tmp_path):
    # Initialization rules that ran after loading would overwrite weights.
    model = random_model(specs, tie_word_embeddings=tied, zero_init_output=True, depth_scaled_init=True)
    ids, mask = padded([random_ids(TOKENS), random_ids(5)])
    expected = model(ids, attention_mask=mask).logits
    model.save_pretrained(tmp_path)
    for auto in (MultimatrixForCausalLM, AutoModelForCausalLM):
        loaded = auto.from_pretrained(tmp_path, dtype=torch.float64)
        assert type(loaded) is MultimatrixForCausalLM
        assert loaded.config.layer_specs() == list(specs)
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
        for parameter in loaded.parameters():
            # Loaded weights lie at any address in the file, and the last bit of a product depends on it.
            parameter.data = parameter.data.clone()
        assert torch.equal(loaded(ids, attention_mask=mask).logits, expected)
        assert logits_in_chunks(loaded, ids, [6, 1, 1, 1], StaticCache(loaded.config, TOKENS), mask).isfinite().all()


@every_case
def test_config_survives_json(specs, tmp_path):
    config = small_config(specs, rope_parameters={"rope_type": "default", "rope_theta": 5e5}, eos_token_id=[3, 4])
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, MultimatrixConfig)
    assert loaded.to_json_string() == config.to_json_string()
    assert loaded.layer_specs() == list(specs)
    assert loaded.rope == RopeParameters(rope_theta=5e5)


def test_rope_theta_is_taken_in_both_spellings_of_transformers():
    parameters = {"rope_type": "default", "rope_theta": 5e5}
    for spelling in ({"rope_theta": 5e5}, {"rope_parameters": {"rope_theta": 5e5}}, {"rope_parameters": parameters}):
        assert MultimatrixConfig(**spelling).rope_parameters == parameters


def test_rope_theta_reaches_the_layers():
    model = random_model(DECODERS["mfa_kr"])
    ids = random_ids(1, TOKENS)
    before = model(ids).logits
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 100.0}
    assert not torch.allclose(model(ids).logits, before)


MHA = {"variant": "mha", "num_heads": 4, "head_dim": 8}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": [MHA]}, "lists 1 layers but num_hidden_layers is 2"),
        ({"attention": [MHA] * 3}, "lists 3 layers but num_hidden_layers is 2"),
        ({"attention": MHA | {"variant": "mfa_kv"}}, "mfa_kv.*did you mean mfa_kr"),
        ({"attention": {"num_heads": 4}}, "variant"),
        ({"attention": MHA | {"rotary_dim": 3}}, "even and between 2 and 8, got 3; use 2"),
        ({"attention": MHA | {"rotary_dim": 10}}, "even and between 2 and 8, got 10; use 8"),
        ({"attention": MHA | {"head_dim": 7}}, "even and between 2 and 7, got 7; use 6"),
        ({"attention": MHA | {"head_dims": 7}}, "head_dims.*num_heads, position"),
        ({"attention": MHA | {"position": "learned"}}, "learned"),
        ({"attention": MHA | {"num_heads": 2.5}}, "2.5"),
        ({"attention": MHA | {"softmax_scale": -1.0}}, "-1.0"),
        ({"attention": MHA | {"variant": "gqa", "num_kv_heads": 3}}, "4 heads .* 3 groups.*: 2"),
        ({"attention": {"variant": "gqa", "num_heads": 4, "head_dim": 8}}, "gqa needs num_kv_heads"),
        ({"attention": {"variant": "mfa", "num_heads": 4, "head_dim": 0, "query_rank": 8}}, "head_dim .* got 0"),
        ({"attention": {"variant": "mfa", "num_heads": 4, "head_dim": 8, "query_rank": 0}}, "query_rank .* got 0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers .* got 0"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, "default, linear, yarn; got 'dynamic'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "linear need factor"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0.5}}, "factor must be at least 1, got 0.5"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "mscale": 1.0}}, "yarn have no 'mscale'; they are"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2, "beta_fast": 1}}, "above beta_slow, got 1 and 1.0"),
        ({"rope_parameters": {"rope_theta": -1.0}}, "rope_theta must be a positive number, got -1.0"),
    ],
)
def test_bad_configs_are_refused_in_words(changes, message):
    with pytest.raises(InputError, match=message):
        MultimatrixConfig(**{"hidden_size": 32, "num_hidden_layers": 2, "attention": MHA} | changes)


@every_decoder
def test_initial_weights(specs):
    config = small_config(specs, initializer_range=0.03, intermediate_size=128, rms_norm_eps=0.125)
    model = MultimatrixForCausalLM(config)
    kinds = {weight.name: weight.kind for spec in specs for weight in spec.weights}
    for name, p in model.named_parameters():
        kind = kinds.get(name.removesuffix(".weight").rpartition(".")[2], "norm" if "norm" in name else "linear")
        if kind == "linear":
            assert p.mean().abs() < 5 * 0.03 / p.numel() ** 0.5, name
            assert abs(p.std() / 0.03 - 1) < 5 / (2 * p.numel()) ** 0.5, name
        else:
            assert (p == (1 if kind == "norm" else 0)).all(), name
    norms = [module for module in model.modules() if "RMSNorm" in type(module).__name__]
    assert len(norms) > 2 * len(specs)
    assert all(norm.eps == 0.125 for norm in norms)


@every_decoder
def test_depth_scaled_initialization(specs):
    config = small_config(specs, depth_scaled_init=True, intermediate_size=512)
    for number, layer in enumerate(MultimatrixForCausalLM(config).model.layers, start=1):
        weight = layer.mlp.down_proj.weight
        near = {"rtol": 5 / (2 * weight.numel()) ** 0.5, "atol": 0}
        assert_close(weight.std(), torch.tensor(0.02 / (2 * number) ** 0.5), **near)
        assert_close(layer.mlp.up_proj.weight.std(), torch.tensor(0.02), **near)


@every_case
def test_zero_initialized_output_silences_attention(specs):
    model = MultimatrixForCausalLM(small_config(specs, zero_init_output=True))
    zeros = {name for name, p in model.named_parameters() if (p == 0).all() and not name.endswith("value_gate")}
    assert zeros == {f"model.layers.{n}.self_attn.{spec.output_weight}.weight" for n, spec in enumerate(specs)}
    contributions = []
    for layer in model.modules():
        if isinstance(layer, DecoderLayer):
            layer.self_attn.register_forward_hook(lambda _module, _args, output: contributions.append(output))
    model(random_ids(2, TOKENS)).logits.sum().backward()
    assert len(contributions) == len(specs)
    assert all((output == 0).all() for output in contributions)
    outputs = [getattr(layer.self_attn, layer.self_attn.spec.output_weight) for layer in model.model.layers]
    assert all(output.weight.grad.abs().max() > 0 for output in outputs)  # and it can learn


@pytest.mark.parametrize("spec", CASES.values(), ids=CASES.keys())
def test_latent_scaling_multiplies_every_low_rank_latent(spec):
    """Scaling a latent by sqrt(H / rank) is scaling the up-projection that reads it."""
    scaled = random_model([make_spec(spec.hidden_size, spec.to_dict() | {"latent_scaling": True})])
    plain = random_model([make_spec(spec.hidden_size, spec.to_dict() | {"latent_scaling": False})])
    plain.load_state_dict(scaled.state_dict())
    ids = random_ids(2, TOKENS)
    low_rank = [w for w in spec.weights if w.name in ("q_b_proj", "kv_b_proj") and w.shape[1] != spec.hidden_size]
    assert torch.allclose(plain(ids).logits, scaled(ids).logits) == (not low_rank)
    with torch.no_grad():
        for weight in low_rank:
            getattr(plain.model.layers[0].self_attn, weight.name).weight *= (spec.hidden_size / weight.shape[1]) ** 0.5
    assert_close(plain(ids).logits, scaled(ids).logits, **TIGHT)
