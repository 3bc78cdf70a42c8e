"""Step-3's checkpoints in and out: the same function, the same bits, and one sentence where that cannot be."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from command import multimatrix
from multimatrix import MultimatrixConfig, MultimatrixForCausalLM
from multimatrix.convert import checkpoint
from multimatrix.convert.step3 import export_step3, import_step3
from multimatrix.convert.step3_config import loads_exactly, to_step3
from multimatrix.errors import InputError
from step3 import (
    EXPERTS,
    KINDS,
    read_fields,
    read_tensors,
    step3_fields,
    step3_logits,
    step3_tensors,
    write_step3,
)

ATTENTION = {"variant": "mfa", "num_heads": 5, "head_dim": 16, "query_rank": 24, "query_norm": True}
MIXTURE = {"num_experts": 6, "experts_per_token": 2, "intermediate_size": 12, "shared_intermediate_size": 20}
TOKENS = 11
every_kind = pytest.mark.parametrize("kind", KINDS)


def random_ids() -> torch.Tensor:
    return torch.randint(0, 61, (TOKENS,))


def our_config(**changes) -> MultimatrixConfig:
    settings = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "max_position_embeddings": 128,
        "attention": ATTENTION,
    }
    return MultimatrixConfig(**settings | changes)


def our_model(dtype: torch.dtype = torch.float64, **changes) -> MultimatrixForCausalLM:
    """Every weight random, norms included."""
    model = MultimatrixForCausalLM(our_config(**changes)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.4)
    return model.eval()


def saved(folder: Path, model: MultimatrixForCausalLM, **options) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def loaded(folder: Path, dtype: torch.dtype) -> MultimatrixForCausalLM:
    model, found = MultimatrixForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(found.values()), found
    return model.eval()


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    assert a.keys() == b.keys()
    return all(
        a[name].dtype == b[name].dtype
        and a[name].shape == b[name].shape
        and torch.equal(a[name].flatten().view(torch.uint8), b[name].flatten().view(torch.uint8))
        for name in a
    )


def refusal(function, *arguments, tmp_path: Path) -> str:
    """The sentence of the InputError; nothing may have been written."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError) as caught:
        function(*arguments)
    assert sorted(tmp_path.rglob("*")) == before
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


# ---- the same function -------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("shards", [1, 3])
def test_an_imported_checkpoint_is_the_function_of_the_description(kind, shards, tmp_path):
    fields = step3_fields(**KINDS[kind])
    tensors = step3_tensors(fields)
    import_step3(write_step3(tmp_path / "step3", fields, tensors, shards), tmp_path / "ours")
    ids = random_ids()
    expected = step3_logits(fields, tensors, ids)
    with torch.no_grad():
        exact = loaded(tmp_path / "ours", torch.float64)(ids[None]).logits[0]
        single = loaded(tmp_path / "ours", torch.float32)(ids[None]).logits[0]
    assert expected.std() > 0.1  # something to compare
    assert_close(exact, expected, rtol=1e-10, atol=1e-10)
    assert_close(single.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "mixture", [None, {**MIXTURE, "layers": [1]}, {**MIXTURE, "normalize_weights": False}], ids=["dense", "one", "all"]
)
def test_an_exported_model_is_the_function_of_the_description(mixture, tmp_path):
    model = our_model(mixture_of_experts=mixture)
    export_step3(saved(tmp_path / "ours", model), tmp_path / "step3", max_shard_size=20_000)
    ids = random_ids()
    expected = step3_logits(read_fields(tmp_path / "step3"), read_tensors(tmp_path / "step3"), ids)
    with torch.no_grad():
        assert_close(model(ids[None]).logits[0], expected, rtol=1e-10, atol=1e-10)


# ---- the same bits -----------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("max_shard_size", [10**9, 20_000], ids=["whole", "sharded"])
def test_step3_to_ours_to_step3_keeps_every_bit(kind, dtype, max_shard_size, tmp_path):
    fields = step3_fields(**KINDS[kind], torch_dtype=str(dtype).removeprefix("torch."), eos_token_id=[2, 3])
    tensors = step3_tensors(fields, dtype)
    # Every bit pattern there is in 16 bits, NaNs with their payloads, infinities and negative zero among them.
    patterns = torch.arange(2**15, dtype=torch.int32)[: 61 * 32 // 2] * 67 + 0x7F80
    tensors["lm_head.weight"].flatten().view(torch.int16)[: len(patterns)] = patterns.to(torch.int16)
    write_step3(tmp_path / "step3", fields, tensors, shards=2)
    done = import_step3(tmp_path / "step3", tmp_path / "ours", max_shard_size)
    export_step3(tmp_path / "ours", tmp_path / "back", max_shard_size)
    assert same_bits(read_tensors(tmp_path / "back"), tensors)
    assert read_fields(tmp_path / "back") == fields
    files = sorted(path.name for path in (tmp_path / "ours").glob("*.safetensors"))
    assert (len(files) > 1) == (max_shard_size < 10**9)
    assert set(files) < set(done.files)
    assert (tmp_path / "ours" / "model.safetensors.index.json").exists() == (len(files) > 1)


@pytest.mark.parametrize("mixture", [None, {**MIXTURE, "layers": [0, 2]}, MIXTURE], ids=["dense", "some", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
def test_ours_to_step3_to_ours_keeps_every_bit(mixture, dtype, shard_size, tmp_path):
    model = our_model(dtype, mixture_of_experts=mixture, bos_token_id=1, pad_token_id=0)
    saved(tmp_path / "ours", model, max_shard_size=shard_size)
    export_step3(tmp_path / "ours", tmp_path / "step3")
    import_step3(tmp_path / "step3", tmp_path / "back")
    assert same_bits(read_tensors(tmp_path / "back"), read_tensors(tmp_path / "ours"))
    assert read_fields(tmp_path / "back") == read_fields(tmp_path / "ours")


def test_tensors_of_several_dtypes_stay_what_they_are(tmp_path):
    fields = step3_fields(**KINDS["experts"])
    tensors = step3_tensors(fields, torch.bfloat16)
    for name in ("model.layers.1.moe.gate.weight", "model.norm.weight"):
        tensors[name] = tensors[name].float()
    import_step3(write_step3(tmp_path / "step3", fields, tensors), tmp_path / "ours")
    export_step3(tmp_path / "ours", tmp_path / "back")
    assert same_bits(read_tensors(tmp_path / "back"), tensors)


def test_tied_embeddings_are_written_twice(tmp_path):
    model = our_model(tie_word_embeddings=True)
    done = export_step3(saved(tmp_path / "ours", model), tmp_path / "step3")
    assert "second copy of the tied embedding" in done.lines[-1]
    tensors, fields = read_tensors(tmp_path / "step3"), read_fields(tmp_path / "step3")
    assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    assert fields["tie_word_embeddings"] is False
    import_step3(tmp_path / "step3", tmp_path / "back")
    ids = random_ids()[None]
    with torch.no_grad():
        assert_close(loaded(tmp_path / "back", torch.float64)(ids).logits, model(ids).logits, rtol=1e-12, atol=1e-12)


def test_tokenizer_and_generation_settings_come_along(tmp_path):
    write_step3(tmp_path / "step3", step3_fields(), step3_tensors(step3_fields()))
    texts = {"generation_config.json": '{"eos_token_id": 7}', "tokenizer.json": "{}", "chat_template.jinja": "{{x}}"}
    for name, text in texts.items():
        (tmp_path / "step3" / name).write_text(text)
    (tmp_path / "step3" / "modeling_step3.py").write_text("raise SystemExit")
    import_step3(tmp_path / "step3", tmp_path / "ours")
    export_step3(tmp_path / "ours", tmp_path / "back")
    for folder in ("ours", "back"):
        assert {name: (tmp_path / folder / name).read_text() for name in texts} == texts
        assert sorted(p.name for p in (tmp_path / folder).iterdir()) == sorted(
            [*texts, "config.json", "model.safetensors"]
        )


def test_the_language_model_of_a_vision_checkpoint(tmp_path):
    text = step3_fields(**KINDS["experts"])
    tensors = step3_tensors(text)
    vision = {"vision_model.embeddings.weight": torch.ones(3), "vit_large_projector.bias": torch.ones(2)}
    outside = {"model_type": "step3_vl", "architectures": ["Step3VLForConditionalGeneration"], "vision_config": {}}
    write_step3(tmp_path / "vl", outside | {"text_config": text, "eos_token_id": 5}, tensors | vision)
    done = import_step3(tmp_path / "vl", tmp_path / "ours")
    assert done.notes == ("2 tensors of the vision part are left out",)
    assert read_fields(tmp_path / "ours")["eos_token_id"] == 5
    write_step3(tmp_path / "text", text | {"eos_token_id": 5}, tensors)
    import_step3(tmp_path / "text", tmp_path / "expected")
    assert read_fields(tmp_path / "ours") == read_fields(tmp_path / "expected")
    assert same_bits(read_tensors(tmp_path / "ours"), read_tensors(tmp_path / "expected"))
    write_step3(tmp_path / "none", outside, tensors)
    assert "has no text_config" in refusal(import_step3, tmp_path / "none", tmp_path / "no", tmp_path=tmp_path)
    write_step3(tmp_path / "fp8", outside | {"text_config": text, "quantization_config": {"bits": 8}}, tensors)
    sentence = refusal(import_step3, tmp_path / "fp8", tmp_path / "no", tmp_path=tmp_path)
    assert "quantization_config = {'bits': 8}" in sentence


def test_memory_stays_below_one_shard(tmp_path):
    """50 MB shards, 200 MB in all, through a process whose largest memory is compared before and after."""
    fields = step3_fields(vocab_size=2 * 49_152, hidden_size=512, num_hidden_layers=1)
    write_step3(tmp_path / "small", step3_fields(), step3_tensors(step3_fields()))
    tensors = step3_tensors(fields, torch.bfloat16)
    write_step3(tmp_path / "step3", fields, tensors, shards=4)
    code = """
import resource, sys
from multimatrix.convert.step3 import export_step3, import_step3
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
import_step3(sys.argv[1] + "/small", sys.argv[1] + "/small-ours")
before = peak()
import_step3(sys.argv[1] + "/step3", sys.argv[1] + "/ours", 50 * 10**6)
export_step3(sys.argv[1] + "/ours", sys.argv[1] + "/back", 50 * 10**6)
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    total = sum(t.nbytes for t in tensors.values())
    assert total > 200 * 10**6
    assert int(done.stdout.split()[-1]) < 50 * 10**6
    assert same_bits(read_tensors(tmp_path / "back"), tensors)


# ---- what engines read -------------------------------------------------------------------------------------------

# Read without a default, or with one that is Step-3's own size, by vLLM's step3_text model, its config class and its
# description of architectures (vLLM 0.11 to 0.33), and by SGLang's model.
ENGINE_FIELDS = {
    "architectures": list,
    "model_type": str,
    "vocab_size": int,
    "hidden_size": int,
    "intermediate_size": int,
    "num_hidden_layers": int,
    "num_attention_heads": int,
    "num_attention_groups": int,
    "head_dim": int,
    "share_q_dim": int,
    "max_seq_len": int,
    "max_position_embedding": int,
    "rope_theta": float,
    "rms_norm_eps": float,
    "moe_layers_enum": str,
    "moe_num_experts": int,
    "moe_top_k": int,
    "moe_intermediate_size": int,
    "share_expert_dim": int,
    "norm_expert_weight": bool,
    "tie_word_embeddings": bool,
    "torch_dtype": str,
}


@pytest.mark.parametrize("mixture", [None, MIXTURE, {**MIXTURE, "layers": [2, 0]}], ids=["dense", "all", "some"])
def test_config_has_every_field_that_engines_read(mixture, tmp_path):
    export_step3(saved(tmp_path / "ours", our_model(mixture_of_experts=mixture)), tmp_path / "step3")
    fields = read_fields(tmp_path / "step3")
    assert {name: type(fields.get(name)) for name in ENGINE_FIELDS} == ENGINE_FIELDS
    assert fields["architectures"] == ["Step3TextForCausalLM"]
    assert fields["model_type"] == "step3_text"
    assert fields["max_seq_len"] == fields["max_position_embedding"] == 128
    assert not fields["tie_word_embeddings"]
    listed = {None: "-1"}.get(mixture) if mixture is None else "0,2" if "layers" in mixture else "0,1,2"
    assert fields["moe_layers_enum"] == listed


def rows_as_loaded(rank: int, dim: int) -> list[int]:
    """Which row of q, k, v (numbered through) a loader puts where; -1 is left as it was, an error where none fits."""
    total = rank + 2 * dim
    filled = [-1] * total
    for first, size in ((0, rank), (rank, dim), (rank + dim, dim)):
        begin, end = int(first / total * total), int((first + size) / total * total)
        if end - begin != size:
            return []
        filled[begin:end] = range(first, first + size)
    return filled


def test_sizes_that_loaders_round_are_known():
    bad = [(1984, 256), (1472, 512), (4032, 192)]
    assert not any(loads_exactly(*sizes) for sizes in bad)
    assert loads_exactly(2048, 256)
    for rank in [*range(1, 130), *range(192, 4097, 64)]:
        for dim in (2, 16, 24, 38, 64, 128, 192, 256, 512):
            right = rows_as_loaded(rank, dim) == list(range(rank + 2 * dim))
            assert loads_exactly(rank, dim) == right, (rank, dim)
    assert {(rank, dim) for rank in range(64, 4097, 64) for dim in (192, 256) if not loads_exactly(rank, dim)} == {
        (1984, 256),
        (4032, 192),
    }


@pytest.mark.parametrize(("rank", "dim"), [(1984, 256), (1472, 512), (4032, 192), (1, 24), (2, 46)])
def test_sizes_that_loaders_round_are_refused_with_sizes_that_work(rank, dim):
    config = our_config(attention=ATTENTION | {"query_rank": rank, "head_dim": dim})
    with pytest.raises(InputError, match=rf"query_rank {rank} with head_dim {dim}") as caught:
        to_step3(config)
    found = re.search(r"nearest that work are query_rank (\d+) or head_dim (\d+)$", str(caught.value))
    other_rank, other_dim = int(found[1]), int(found[2])
    for change in ({"query_rank": other_rank}, {"head_dim": other_dim}):
        sizes = ATTENTION | {"query_rank": rank, "head_dim": dim} | change
        fields = to_step3(our_config(attention=sizes))
        assert rows_as_loaded(fields["share_q_dim"], fields["head_dim"]) == list(
            range(fields["share_q_dim"] + 2 * fields["head_dim"])
        )
    # Nothing nearer works.
    step = max(power for power in (1, 2, 4, 8, 16, 32, 64) if rank % power == 0)
    nearer = [near for near in range(step, 2 * rank + 1, step) if abs(near - rank) < abs(other_rank - rank)]
    assert rank in nearer
    assert not any(rows_as_loaded(near, dim) == list(range(near + 2 * dim)) for near in nearer)


# ---- what cannot be exported -------------------------------------------------------------------------------------

MFA_KR = {"variant": "mfa_kr", "num_heads": 5, "head_dim": 16, "query_rank": 24, "query_norm": True}
NO_EXPORT = {
    "mfa_kr": ({"attention": MFA_KR}, "no place for MFA-KR's value made from the key"),
    "mha": ({"attention": {"variant": "mha", "num_heads": 4, "head_dim": 8}}, "states MFA alone, not mha"),
    "alibi": ({"attention": ATTENTION | {"position": "alibi"}}, "position is 'alibi'"),
    "no positions": ({"attention": ATTENTION | {"position": "none"}}, "position is 'none'"),
    "hybrid": (
        {"attention": [ATTENTION, ATTENTION, ATTENTION | {"num_heads": 4}]},
        "one attention for all layers",
        "layer 2",
        "'num_heads': 4",
    ),
    "no norm": ({"attention": ATTENTION | {"query_norm": False}}, "has query_norm=True", "train with True"),
    "partial RoPE": ({"attention": ATTENTION | {"rotary_dim": 8}}, "rotary_dim=16", "has rotary_dim=8"),
    "blocks": ({"attention": ATTENTION | {"rotary_blocks": 2}}, "rotary_blocks=1", "has rotary_blocks=2"),
    "scale": ({"attention": ATTENTION | {"softmax_scale": 0.5}}, "= 0.25", "softmax_scale is 0.5", "q_b_proj by 2 "),
    "latent scale": ({"attention": ATTENTION | {"latent_scaling": True}}, "q_a_norm", "1.1547"),
    "no shared expert": (
        {"mixture_of_experts": MIXTURE | {"shared_intermediate_size": 0}},
        "shared expert in every expert layer",
    ),
}


@pytest.mark.parametrize("case", NO_EXPORT)
def test_what_the_format_cannot_state_is_refused(case, tmp_path):
    changes, *parts = NO_EXPORT[case]
    saved(tmp_path / "ours", our_model(torch.float32, **changes))
    sentence = refusal(export_step3, tmp_path / "ours", tmp_path / "out", tmp_path=tmp_path)
    for part in parts:
        assert part in sentence


def test_a_scaled_rope_is_refused():
    config = our_config()
    config.rope_parameters = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    with pytest.raises(InputError, match="rope_type 'yarn'"):
        to_step3(config)


def test_spelled_out_defaults_are_exported(tmp_path):
    spelled = ATTENTION | {"softmax_scale": 0.25, "rotary_dim": 16, "rotary_blocks": 1, "position": "rope"}
    saved(tmp_path / "ours", our_model(torch.float32, attention=[spelled] * 3))
    export_step3(tmp_path / "ours", tmp_path / "step3")
    assert read_fields(tmp_path / "step3")["share_q_dim"] == 24


def test_a_folder_that_is_not_ours_is_not_exported(tmp_path):
    write_step3(tmp_path / "step3", step3_fields(), step3_tensors(step3_fields()))
    sentence = refusal(export_step3, tmp_path / "step3", tmp_path / "out", tmp_path=tmp_path)
    assert "holds a 'step3_text' model, not one of ours" in sentence
    saved(tmp_path / "ours", our_model(torch.float32))
    fields = read_fields(tmp_path / "ours")
    (tmp_path / "ours" / "config.json").write_text(json.dumps(fields | {"vocab_size": 62}))
    sentence = refusal(export_step3, tmp_path / "ours", tmp_path / "out", tmp_path=tmp_path)
    assert "model.embed_tokens.weight has shape (61, 32), but by config.json it is (62, 32)" in sentence
    (tmp_path / "ours" / "config.json").write_text(json.dumps(fields | {"vocab_size": "many"}))
    assert "config.json cannot be used" in refusal(export_step3, tmp_path / "ours", tmp_path / "out", tmp_path=tmp_path)


# ---- what cannot be imported -------------------------------------------------------------------------------------

GONE = object()
NO_IMPORT = {
    "another model": ({"model_type": "llama"}, "holds a 'llama' model, not step3_text or step3_vl"),
    "groups": ({"num_attention_groups": 8}, "num_attention_groups = 8, and only 1"),
    "bias": ({"attention_bias": True}, "attention_bias = True, and only False"),
    "window": ({"sliding_window": 512}, "sliding_window = 512"),
    "quantized": ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config", "fp8"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act = 'gelu', and only 'silu'"),
    "tied": ({"tie_word_embeddings": True}, "tie_word_embeddings = True, and only False"),
    "scaled RoPE": ({"rope_scaling": {"type": "yarn", "factor": 2}}, "rope_scaling", "'yarn'", "plain RoPE"),
    "nameless scaling": ({"rope_scaling": {"factor": 2}}, "plain RoPE"),
    "partial RoPE": ({"rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 0.5}}, "plain RoPE"),
    "two bases": ({"rope_parameters": {"rope_theta": 1e4}}, "one rope_theta", "[500000.0, 10000.0]"),
    "no base": ({"rope_theta": GONE}, "one rope_theta, but has none"),
    "unknown field": ({"attention_sinks": 4}, "the field attention_sinks"),
    "no rank": ({"share_q_dim": GONE}, "no share_q_dim, which must be a whole number of at least 1"),
    "no eps": ({"rms_norm_eps": GONE}, "no rms_norm_eps, which must be a positive number"),
    "a word": ({"num_attention_heads": "five"}, "num_attention_heads = 'five'"),
    "odd head": ({"head_dim": 15}, "even", "got 15"),
    "dtype": ({"torch_dtype": "float8_e4m3fn"}, "dtype = 'float8_e4m3fn'"),
    "eos": ({"eos_token_id": "end"}, "eos_token_id"),
    "no context": ({"max_seq_len": GONE, "max_position_embedding": None}, "none of max_seq_len"),
    "no list": ({"moe_layers_enum": GONE}, "no moe_layers_enum, which loaders read differently", 'string "1,2"'),
    "null list": ({"moe_layers_enum": None}, "moe_layers_enum = None", 'string "1,2"'),
    "empty list": ({"moe_layers_enum": ""}, "moe_layers_enum = ''", 'string "1,2"'),
    "a real list": ({"moe_layers_enum": [1, 2]}, "moe_layers_enum = [1, 2]", 'string "1,2"'),
    "words": ({"moe_layers_enum": "1,two"}, "moe_layers_enum = '1,two'", 'string "1,2"'),
    "layer too many": ({"moe_layers_enum": "1,2,3"}, "lists layer 3", "the 3 layers are 0 to 2"),
    "one too few": ({"moe_layers_enum": "1"}, "lacks model.layers.2.mlp.gate_proj.weight of shape (40, 32) and 2 more"),
    "no experts": ({"moe_num_experts": 0}, "moe_num_experts = 0"),
    "top-k": ({"moe_top_k": 7}, "7 of 6 experts"),
    "switch": ({"norm_expert_weight": "yes"}, "norm_expert_weight = 'yes', which must be true or false"),
    "router": ({"moe_router_activation": "sigmoid"}, "moe_router_activation = 'sigmoid', and only 'softmax'"),
    "other width": (
        {"share_expert_dim": 21},
        "model.layers.1.share_expert.gate_proj.weight has shape (20, 32), but by config.json it is (21, 32)",
    ),
}


@pytest.mark.parametrize("case", NO_IMPORT)
def test_configs_that_cannot_be_imported(case, tmp_path):
    changes, *parts = NO_IMPORT[case]
    fields = step3_fields(**KINDS["experts"])
    tensors = step3_tensors(fields)
    fields = {name: value for name, value in (fields | changes).items() if value is not GONE}
    write_step3(tmp_path / "step3", fields, tensors)
    sentence = refusal(import_step3, tmp_path / "step3", tmp_path / "out", tmp_path=tmp_path)
    for part in parts:
        assert part in sentence


def test_fields_that_change_nothing_are_accepted(tmp_path):
    fields = step3_fields(**KINDS["experts"])
    tensors = step3_tensors(fields)
    extra = {
        "auto_map": {"AutoConfig": "x.Y"}, "hidden_act": "silu", "rope_scaling": None, "sliding_window": None,
        "attention_bias": False, "quantization_config": None, "use_moe": True, "num_attention_groups": None,
        "rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 500000},
        "moe_layers_enum": " 2, 1", "max_position_embeddings": 256,
    }  # fmt: skip
    write_step3(tmp_path / "plain", fields, tensors)
    write_step3(tmp_path / "extra", fields | extra, tensors)
    for name in ("plain", "extra"):
        import_step3(tmp_path / name, tmp_path / f"ours-{name}")
    assert read_fields(tmp_path / "ours-plain") == read_fields(tmp_path / "ours-extra")


def drop(tensors, name):
    del tensors[name]


NO_TENSORS = {
    "missing": (
        lambda t: drop(t, "model.layers.1.self_attn.wq.weight"),
        "lacks model.layers.1.self_attn.wq.weight of shape (80, 24), which its config.json asks for",
    ),
    "no head": (lambda t: drop(t, "lm_head.weight"), "lacks lm_head.weight of shape (61, 32)"),
    "surplus": (
        lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(24)}),
        "holds model.layers.0.self_attn.q_proj.bias of shape (24,), which its config.json has no place for",
    ),
    "shape": (
        lambda t: t.update({"model.layers.0.self_attn.k_proj.weight": torch.ones(8, 32)}),
        "model.layers.0.self_attn.k_proj.weight has shape (8, 32), but by config.json it is (16, 32)",
    ),
    "transposed": (
        lambda t: t.update({"model.layers.1.moe.up_proj.weight": torch.ones(6, 32, 12)}),
        "model.layers.1.moe.up_proj.weight has shape (6, 32, 12), but by config.json it is (6, 12, 32)",
    ),
    "integers": (
        lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}),
        "model.norm.weight is stored as I8",
    ),
}


@pytest.mark.parametrize("case", NO_TENSORS)
def test_tensors_that_do_not_fit(case, tmp_path):
    change, part = NO_TENSORS[case]
    fields = step3_fields(**KINDS["experts"])
    tensors = step3_tensors(fields)
    change(tensors)
    write_step3(tmp_path / "step3", fields, tensors, shards=2)
    assert part in refusal(import_step3, tmp_path / "step3", tmp_path / "out", tmp_path=tmp_path)


def cut(path: Path, keep: float) -> None:
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])


SECOND = "model-00002-of-00003.safetensors"


def edit_index(folder: Path, change) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


DAMAGE = {
    "truncated": (lambda f: cut(f / SECOND, 0.9), SECOND, "damaged or was not copied whole"),
    "header cut": (lambda f: cut(f / SECOND, 0.01), SECOND, "damaged"),
    "empty": (lambda f: (f / SECOND).write_bytes(b""), SECOND, "damaged"),
    "garbage": (lambda f: (f / SECOND).write_bytes(b"\xff" * 4000), SECOND, "damaged"),
    "longer": (lambda f: (f / SECOND).write_bytes((f / SECOND).read_bytes() + b"x"), SECOND, "damaged"),
    "no shard": (lambda f: (f / SECOND).unlink(), SECOND, "is not there"),
    "shard of others": (
        lambda f: save_file({"x": torch.ones(1)}, f / SECOND),
        f"{SECOND} holds x, which model.safetensors.index.json does not place there",
    ),
    "not in its shard": (
        lambda f: edit_index(f, lambda i: i["weight_map"].update({"more": SECOND})),
        f"{SECOND} does not hold more",
    ),
    "no map": (lambda f: edit_index(f, lambda i: i.pop("weight_map")), "has no weight_map"),
    "outside": (lambda f: edit_index(f, lambda i: i["weight_map"].update({"x": "../x"})), "has no weight_map"),
    "no JSON": (lambda f: (f / "model.safetensors.index.json").write_text("{"), "index.json cannot be read"),
    "two kinds": (lambda f: (f / "model.safetensors").write_bytes(b""), "has both model.safetensors and"),
    "no weights": (lambda f: (f / "model.safetensors.index.json").unlink(), "has neither model.safetensors nor"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "config no JSON": (lambda f: (f / "config.json").write_text("model_type: x"), "config.json cannot be read"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "must hold a JSON object, not a list"),
    "config bytes": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "config.json cannot be read"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_checkpoints(case, tmp_path):
    damage, *parts = DAMAGE[case]
    write_step3(tmp_path / "step3", step3_fields(), step3_tensors(step3_fields()), shards=3)
    damage(tmp_path / "step3")
    sentence = refusal(import_step3, tmp_path / "step3", tmp_path / "out", tmp_path=tmp_path)
    for part in parts:
        assert part in sentence


# ---- whole or absent ---------------------------------------------------------------------------------------------


def test_what_is_there_is_not_overwritten(tmp_path):
    write_step3(tmp_path / "step3", step3_fields(), step3_tensors(step3_fields()))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        sentence = refusal(import_step3, tmp_path / "step3", tmp_path / name, tmp_path=tmp_path)
        assert "exists and is not an empty folder" in sentence
    assert "cannot write" in refusal(import_step3, tmp_path / "step3", tmp_path / "file" / "x", tmp_path=tmp_path)
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    import_step3(tmp_path / "step3", tmp_path / "empty")
    import_step3(tmp_path / "step3", tmp_path / "new" / "deep")
    assert same_bits(read_tensors(tmp_path / "empty"), read_tensors(tmp_path / "new" / "deep"))
    assert (tmp_path / "empty").stat().st_mode & 0o777 == 0o755


def test_a_failure_half_way_leaves_nothing(tmp_path, monkeypatch):
    write_step3(tmp_path / "step3", step3_fields(), step3_tensors(step3_fields()))
    copy = checkpoint._copy
    seen = []

    def full_disk(stored, target, progress):
        seen.append(stored)
        if len(seen) == 10:
            raise OSError(28, "No space left on device")
        copy(stored, target, progress)

    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(checkpoint, "_copy", full_disk)
    done = multimatrix("import", tmp_path / "step3", tmp_path / "ours", "--max-shard-size", "20KB")
    assert f"cannot write {tmp_path / 'ours'}: No space left on device" in done.sentence
    assert sorted(tmp_path.rglob("*")) == before


# ---- the command line --------------------------------------------------------------------------------------------


def test_commands(tmp_path):
    fields = step3_fields(**KINDS["experts"])
    tensors = step3_tensors(fields)
    write_step3(tmp_path / "step3", fields, tensors)
    done = multimatrix("import", tmp_path / "step3", tmp_path / "ours")
    assert done.status == 0
    size = sum(t.nbytes for t in tensors.values())
    assert done.out == f"{tmp_path / 'ours'}: {len(tensors)} tensors, {size:,} bytes in 1 file, and config.json\n"
    done = multimatrix(
        "export", tmp_path / "ours", tmp_path / "back", "--format", "step3", "--max-shard-size", "0.05MB"
    )
    assert done.status == 0
    files = sorted((tmp_path / "back").glob("model-*.safetensors"))
    assert len(files) > 1
    assert f"{size:,} bytes in {len(files)} files" in done.out
    assert all(path.stat().st_size < 60_000 for path in files)  # 50,000 and a header
    assert same_bits(read_tensors(tmp_path / "back"), tensors)
    again = multimatrix("import", tmp_path / "back", tmp_path / "again", "--format", "step3")
    assert again.status == 0
    assert same_bits(read_tensors(tmp_path / "again"), read_tensors(tmp_path / "ours"))


def test_commands_refuse_in_one_sentence(tmp_path):
    write_step3(tmp_path / "step3", step3_fields(**EXPERTS), step3_tensors(step3_fields()))
    write_step3(tmp_path / "llama", step3_fields(model_type="llama"), {"x": torch.ones(1)})
    folder, out = tmp_path / "step3", tmp_path / "out"
    cases = [
        (("import", tmp_path / "none", out), "has no config.json"),
        (("import", tmp_path / "llama", out), "holds a 'llama' model; those that can be imported are step3_text"),
        (("import", folder, out, "--format", "gguf"), "--format must be one of step3; got 'gguf'"),
        (
            ("import", folder, out, "--max-shard-size", "big"),
            "a size such as 5GB, 500MB or a number of bytes, got 'big'",
        ),
        (("import", folder, out, "--max-shard-size", "0"), "got '0'"),
        (("import", folder, folder), "exists and is not an empty folder"),
        (("export", folder, out, "--format", "step3"), "holds a 'step3_text' model, not one of ours"),
        (("export", folder, out, "--format", "gguf"), "got 'gguf'"),
    ]
    for words, part in cases:
        assert part in multimatrix(*words).sentence
    assert not out.exists()
    assert multimatrix("export", folder, out).status == 2  # typer's own message: --format is missing
