"""What Step-3's format cannot state, what is damaged or does not fit: one sentence, and nothing written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from command import multimatrix
from damage import INDEX, change_index, cut
from multimatrix.convert import checkpoint
from multimatrix.convert.step3 import export_step3, import_step3
from multimatrix.convert.step3_config import to_step3
from multimatrix.errors import InputError
from step3 import EXPERTS, KINDS, read_fields, read_tensors, step3_fields, step3_tensors, write_step3
from step3_models import ATTENTION, MIXTURE, our_config, our_model, same_bits, saved


def refusal(function, *arguments, tmp_path: Path) -> str:
    """The sentence of the InputError; nothing may have been written."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError) as caught:
        function(*arguments)
    assert sorted(tmp_path.rglob("*")) == before
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


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
    config.rope_parameters = {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    }
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
    assert "no multimatrix model: it holds a 'step3_text' model" in sentence
    saved(tmp_path / "ours", our_model(torch.float32))
    fields = read_fields(tmp_path / "ours")
    (tmp_path / "ours" / "config.json").write_text(json.dumps(fields | {"vocab_size": 62}))
    sentence = refusal(export_step3, tmp_path / "ours", tmp_path / "out", tmp_path=tmp_path)
    assert "model.embed_tokens.weight is [61, 32] in model.safetensors and [62, 32] by config.json" in sentence
    (tmp_path / "ours" / "config.json").write_text(json.dumps(fields | {"vocab_size": "many"}))
    assert "config.json describes no model that works" in refusal(
        export_step3, tmp_path / "ours", tmp_path / "out", tmp_path=tmp_path
    )
    (tmp_path / "ours" / "config.json").write_text(json.dumps(fields | {"kv_lora_rank": 2}))
    sentence = refusal(export_step3, tmp_path / "ours", tmp_path / "out", tmp_path=tmp_path)
    assert "has a field 'kv_lora_rank' that no multimatrix model has" in sentence


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
    "huge eps": ({"rms_norm_eps": 10**400}, "rms_norm_eps = 1000"),
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
    "one too few": (
        {"moe_layers_enum": "1"},
        "model.layers.2.mlp.gate_proj.weight is in no file and [40, 32] by config.json (9 more",
    ),
    "no experts": ({"moe_num_experts": 0}, "moe_num_experts = 0"),
    "top-k": ({"moe_top_k": 7}, "7 of 6 experts"),
    "switch": ({"norm_expert_weight": "yes"}, "norm_expert_weight = 'yes', which must be true or false"),
    "router": ({"moe_router_activation": "sigmoid"}, "moe_router_activation = 'sigmoid', and only 'softmax'"),
    "other width": (
        {"share_expert_dim": 21},
        "model.layers.1.share_expert.gate_proj.weight is [20, 32] in model.safetensors and [21, 32] by config.json",
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


def test_vision_checkpoints_that_cannot_be_imported(tmp_path):
    text, outside = step3_fields(), {"model_type": "step3_vl"}
    write_step3(tmp_path / "none", outside, step3_tensors(text))
    write_step3(tmp_path / "fp8", outside | {"text_config": text, "quantization_config": 8}, step3_tensors(text))
    for name, part in (("none", "has no text_config"), ("fp8", "says quantization_config = 8, and only None")):
        assert part in refusal(import_step3, tmp_path / name, tmp_path / "out", tmp_path=tmp_path)


def drop(tensors, name):
    del tensors[name]


NO_TENSORS = {
    "missing": (
        lambda t: drop(t, "model.layers.1.self_attn.wq.weight"),
        "model.layers.1.self_attn.wq.weight is in no file and [80, 24] by config.json;",
    ),
    "no head": (lambda t: drop(t, "lm_head.weight"), "lm_head.weight is in no file and [61, 32] by config.json;"),
    "surplus": (
        lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(24)}),
        "model.layers.0.self_attn.q_proj.bias is [24] in model-00001-of-00002.safetensors and not in the model of",
    ),
    "shape": (
        lambda t: t.update({"model.layers.0.self_attn.k_proj.weight": torch.ones(8, 32)}),
        "model.layers.0.self_attn.k_proj.weight is [8, 32] in model-00001-of-00002.safetensors and [16, 32] by",
    ),
    "transposed": (
        lambda t: t.update({"model.layers.1.moe.up_proj.weight": torch.ones(6, 32, 12)}),
        "model.layers.1.moe.up_proj.weight is [6, 32, 12] in model-00001-of-00002.safetensors and [6, 12, 32] by",
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


SECOND = "model-00002-of-00003.safetensors"


DAMAGE = {
    "truncated": (lambda f: cut(f / SECOND, -100), SECOND, "is cut short or damaged"),
    "header cut": (lambda f: cut(f / SECOND, 100), SECOND, "damaged"),
    "empty": (lambda f: (f / SECOND).write_bytes(b""), SECOND, "damaged"),
    "garbage": (lambda f: (f / SECOND).write_bytes(b"\xff" * 4000), SECOND, "damaged"),
    "longer": (lambda f: (f / SECOND).write_bytes((f / SECOND).read_bytes() + b"x"), SECOND, "damaged"),
    "no shard": (lambda f: (f / SECOND).unlink(), f"lacks {SECOND}, a shard that"),
    "shard of others": (
        lambda f: save_file({"x": torch.ones(1)}, f / SECOND),
        f"{SECOND} holds x and model.safetensors.index.json does not list it",
    ),
    "not in its shard": (
        lambda f: change_index(f, lambda placed: placed.update({"more": SECOND})),
        f"{SECOND} has no more, which",
    ),
    "no map": (lambda f: (f / INDEX).write_text("{}"), "has no weight_map"),
    "outside": (lambda f: change_index(f, lambda placed: placed.update({"x": "../x"})), "has no weight_map"),
    "no JSON": (lambda f: (f / INDEX).write_text("{"), "index.json cannot be read"),
    "two kinds": (lambda f: (f / "model.safetensors").write_bytes(b""), "has both model.safetensors and"),
    "no weights": (lambda f: (f / INDEX).unlink(), "has neither model.safetensors nor"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "config no JSON": (lambda f: (f / "config.json").write_text("model_type: x"), "config.json cannot be read"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "holds a JSON list, not an object"),
    "config bytes": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "config.json cannot be read"),
}


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer.json"])
def test_damaged_companions(name, tmp_path):
    write_step3(tmp_path / "step3", step3_fields(), step3_tensors(step3_fields()))
    (tmp_path / "step3" / name).write_text("[1]")
    sentence = refusal(import_step3, tmp_path / "step3", tmp_path / "out", tmp_path=tmp_path)
    assert f"{name} holds a JSON list, not an object" in sentence


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
    for name, fragment in (("full", "is not empty"), ("file", "is a file"), ("file/x", "no folder can be made")):
        assert fragment in refusal(import_step3, tmp_path / "step3", tmp_path / name, tmp_path=tmp_path)
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
        (("import", tmp_path / "none", out), "there is no folder"),
        (("import", tmp_path / "llama", out), "holds a 'llama' model; those that can be imported are step3_text"),
        (("import", folder, out, "--format", "gguf"), "--format must be one of step3; got 'gguf'"),
        (
            ("import", folder, out, "--max-shard-size", "big"),
            "a size such as 5GB, 500MB or a number of bytes, got 'big'",
        ),
        (("import", folder, out, "--max-shard-size", "0"), "got '0'"),
        (("import", folder, folder), "is not empty; name a folder that is not there yet"),
        (("export", folder, out, "--format", "step3"), "no multimatrix model: it holds a 'step3_text' model"),
        (("export", folder, out, "--format", "gguf"), "got 'gguf'"),
    ]
    for words, part in cases:
        assert part in multimatrix(*words).sentence
    assert not out.exists()
    assert multimatrix("export", folder, out).status == 2  # typer's own message: --format is missing
