"""What cannot be planned is refused in a sentence: contradictions, bad values, files that are none."""

import json
import math

import pytest

import step3 as step3_model
from command import multimatrix
from multimatrix.errors import InputError
from multimatrix.fields import LARGEST, nearest_divisor
from multimatrix.plan.families import FAMILIES, WRAPPERS
from multimatrix.plan.model import plan_row
from multimatrix.plan.sources import from_fields
from plan_cases import (
    CONFIGS,
    GROUPED,
    LATENT,
    LLAMA4,
    QWEN3_MOE,
    ROUTED,
    SMALL,
    write_config,
)

LLAMA = GROUPED | {"model_type": "llama"}
GEMMA3, GPT_OSS, LLAMA4_TEXT = CONFIGS["gemma3"], CONFIGS["gpt_oss"], LLAMA4 | {"model_type": "llama4_text"}
DEEPSEEK = LATENT | {"model_type": "deepseek_v3"}
QWEN2 = GROUPED | {"model_type": "qwen2"}
QWEN3_MOE = QWEN3_MOE | {"model_type": "qwen3_moe"}
BAD_CONFIGS = {
    "unknown": ({"model_type": "mamba"}, "mamba"),
    "unknown-list": ({"model_type": ["llama"]}, "model_type"),
    "no-type": ({"hidden_size": 8}, "model_type"),
    "hybrid": (GROUPED | {"model_type": "qwen3_next"}, "qwen3_next"),
    "heads": (LLAMA | {"num_attention_heads": 5, "num_key_value_heads": 5}, "head_dim"),
    "groups": (LLAMA | {"num_key_value_heads": 3}, "groups"),
    "negative": (LLAMA | {"hidden_size": -32}, "-32"),
    "zero": (LLAMA | {"vocab_size": 0}, "vocab_size = 0"),
    "absurd": (LLAMA | {"num_hidden_layers": 10**9}, "10,000"),
    "huge": (LLAMA | {"hidden_size": LARGEST + 1}, f"{LARGEST:,}"),
    "huger": (LLAMA | {"hidden_size": 10**3000}, "hidden_size = 1000"),
    "infinite": (LLAMA | {"hidden_size": math.inf}, "inf"),
    "not-a-number": (LLAMA | {"hidden_size": math.nan}, "nan"),
    "half": (LLAMA | {"hidden_size": 32.0}, "32.0"),
    "true": (LLAMA | {"hidden_size": True}, "True"),
    "missing": ({name: value for name, value in LLAMA.items() if name != "vocab_size"}, "no vocab_size"),
    "text": (LLAMA | {"intermediate_size": "40"}, "'40'"),
    "tied": (LLAMA | {"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    "flag": (LLAMA | {"attention_bias": 1}, "attention_bias"),
    "odd-head": (LLAMA | {"head_dim": 7}, "RoPE"),
    "rotary": (LLAMA | {"partial_rotary_factor": 2}, "partial_rotary_factor"),
    "rotary-inside": (LLAMA | {"rope_parameters": {"partial_rotary_factor": "half"}}, "partial_rotary_factor"),
    "layers": (LLAMA | {"layer_types": ["sliding_attention"] * 3}, "sliding_attention"),
    "linear-layers": (QWEN2 | {"layer_types": ["linear_attention"] * 3}, "linear_attention"),
    "few-layers": (GEMMA3 | {"layer_types": ["full_attention"]}, "7 layers"),
    "layers-text": (GEMMA3 | {"layer_types": "full_attention"}, "layer_types"),
    "layers-list": (GEMMA3 | {"layer_types": [["full_attention"]] * 7}, "full_attention"),
    "mistral-silent": (GROUPED | {"model_type": "mistral"}, "4096"),
    "mistral-window": (GROUPED | {"model_type": "mistral", "sliding_window": -1}, "sliding_window"),
    "mixtral-window": (ROUTED | {"model_type": "mixtral", "num_local_experts": 4, "sliding_window": "8"}, "'8'"),
    "qwen2-window": (QWEN2 | {"use_sliding_window": "on"}, "use_sliding_window"),
    "qwen2-off": (QWEN2 | {"layer_types": ["sliding_attention"] * 3}, "sliding_attention"),
    "qwen2-from": (QWEN2 | {"use_sliding_window": True, "max_window_layers": -1}, "max_window_layers"),
    "qwen3-head": (GROUPED | {"model_type": "qwen3"}, "no head_dim"),
    "qwen3_moe-list": (QWEN3_MOE | {"mlp_only_layers": 1}, "mlp_only_layers"),
    "qwen3_moe-flags": (QWEN3_MOE | {"mlp_only_layers": [True]}, "mlp_only_layers"),
    "qwen3_moe-experts": (QWEN3_MOE | {"num_experts": 0}, "num_experts = 0"),
    "qwen3_moe-step": (QWEN3_MOE | {"decoder_sparse_step": 0}, "decoder_sparse_step"),
    "gemma3-window": (GEMMA3 | {"sliding_window": None}, "sliding_window"),
    "gemma3-pattern": (GEMMA3 | {"sliding_window_pattern": 0}, "sliding_window_pattern"),
    "gemma3-both-ways": (GEMMA3 | {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    "gpt_oss-window": ({**GPT_OSS, "sliding_window": None}, "sliding_window"),
    "llama4-rope": (LLAMA4_TEXT | {"no_rope_layers": [1, 2, 1]}, "no_rope_layers"),
    "llama4-experts": (LLAMA4_TEXT | {"moe_layers": [6]}, "layer 6"),
    "llama4-twice": (LLAMA4_TEXT | {"moe_layers": [1, 1]}, "twice"),
    "deepseek-rank": (DEEPSEEK | {"kv_lora_rank": 0}, "kv_lora_rank"),
    "deepseek-query": ({name: value for name, value in DEEPSEEK.items() if name != "q_lora_rank"}, "q_lora_rank"),
    "deepseek-mlp": (DEEPSEEK | {"mlp_bias": True}, "mlp_bias"),
    "deepseek-every": (DEEPSEEK | {"moe_layer_freq": 2}, "moe_layer_freq"),
    "deepseek-experts": (DEEPSEEK | {"num_experts_per_tok": 9}, "9 of 8"),
    "ours": (SMALL | {"model_type": "multimatrix", "attention": None}, "attention"),
    "ours-layers": (SMALL | {"model_type": "multimatrix", "attention": [{"variant": "mha"}]}, "num_hidden_layers is 3"),
    "ours-variant": (SMALL | {"model_type": "multimatrix", "attention": {"variant": {}}}, "variant"),
    "step3": (step3_model.step3_fields(sliding_window=4), "sliding_window"),
    "step3-layers": (step3_model.step3_fields(moe_layers_enum="4"), "moe_layers_enum"),
    "nothing-inside": ({"model_type": "gemma3"}, "no text_config"),
    "list-inside": ({"model_type": "gemma3", "text_config": [1]}, "text_config = [1]"),
    "other-inside": ({"model_type": "mistral3", "text_config": {"model_type": "mamba"}}, "mamba"),
    "wrapper-inside": ({"model_type": "gemma3", "text_config": {"model_type": "gemma3"}}, "gemma3"),
    "list": ([1], "list"),
    "number": (3, "int"),
    "null": (None, "NoneType"),
}


@pytest.mark.parametrize(("fields", "word"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
@pytest.mark.parametrize("as_file", [False, True])
def test_a_config_that_cannot_be_planned_is_refused(fields, word, as_file, tmp_path):
    file = write_config(tmp_path, fields)
    done = multimatrix("plan", file if as_file else tmp_path)
    assert word in done.sentence
    assert str(tmp_path) in done.sentence
    assert done.out == ""
    assert len(done.sentence) < 700


BAD_FILES = {
    "cut": b'{"model_type": "lla',
    "empty": b"",
    "utf-16": '{"model_type": "llama"}'.encode("utf-16"),
    "latin-1": '{"model_type": "llämä"}'.encode("latin-1"),
    "binary": bytes(range(256)),
    "deep": b"[" * 100_000,
    "digits": b'{"hidden_size": ' + b"9" * 5000 + b"}",
    "two": b"{} {}",
}


@pytest.mark.parametrize("content", BAD_FILES.values(), ids=BAD_FILES)
def test_a_file_that_is_no_json_is_refused(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    assert "cannot be read as JSON" in multimatrix("plan", tmp_path).sentence


def test_a_folder_without_config(tmp_path):
    assert "no config.json" in multimatrix("plan", tmp_path).sentence
    assert "nowhere" in multimatrix("plan", tmp_path / "nowhere").sentence
    assert "cannot be read" in multimatrix("plan", "x" * 5000).sentence
    (tmp_path / "config.json").mkdir()
    assert "no config.json" in multimatrix("plan", tmp_path).sentence
    write_config(tmp_path / "config.json", LLAMA)
    assert multimatrix("plan", tmp_path / "config.json").status == 0


BAD_OPTIONS = {
    "hidden": (("--hidden-size", 10**30 + 1), "hidden_size"),
    "heads": (("--hidden-size", 999_999_937, "--head-dim", 128), "the nearest that does: 1"),
    "shared": (("--variants", "gqa", "--set", "gqa.num_heads=999999937", "--set", "gqa.num_kv_heads=7"), "groups"),
    "heads-many": (("--set", "mfa.num_heads=100000000000000000"), "num_heads must be at most"),
    "weights-many": (("--hidden-size", 10**9, "--head-dim", 1000), "parameters a layer"),
    "batch": (("--batch", 10**23), "at most 1,000,000,000,000,000, got 100,000,000,000,000,000,000,000"),
    "ways": (("--data-parallel", 10**6), "at most 100,000, got 1,000,000"),
    "devices": (("--data-parallel", 1000, "--attention-data-parallel", 1000), "1,000,000 devices"),
    "own": (("--memory", "80GB", "--bandwidth", "1e-300", "--flops", "989T"), "bytes_per_second of own"),
    "efficiency": (("--efficiency", "0.0000001%"), "0.1 %"),
    "layers": (("--layers", 10_001), "10,000"),
    "vocabulary": (("--vocab-size", LARGEST + 1), "vocab_size"),
    "width": (("--intermediate-size", 10**12), "intermediate_size"),
    "context": (("--context", 10**16), "context"),
    "page": (("--page-size", 10**10), "page size"),
}


@pytest.mark.parametrize(("words", "word"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_absurd_options_are_refused_at_once(words, word):
    assert word in multimatrix("plan", *words).sentence


def test_the_nearest_divisor():
    for number in range(1, 60):
        divisors = [divisor for divisor in range(1, number + 1) if number % divisor == 0]
        for near in range(1, 70):
            assert nearest_divisor(number, near) == min(divisors, key=lambda divisor: abs(divisor - near))


# ---- every field of every family, spoiled ----------------------------------------------------------------------------

SPOILED = [
    *(None, True, False, -1, 0, 1, 7, 10**8, 10**12, 10**400, 0.5, -math.inf, math.nan, "", "8", "\ud800"),
    *([], [0], [-1], [None], [10**30], [True] * 3, ["full_attention"] * 3, ["sliding_attention"] * 3, [{}], {}),
    *({"variant": "mha"}, {"partial_rotary_factor": math.nan}, {"num_experts": 2}, [[]] * 3, "0,1", ",", "1e9"),
]
FIRST = {fields["model_type"]: fields for fields in reversed(CONFIGS.values())}  # one of each family
ALSO = ("partial_rotary_factor", "layer_types", "sliding_window", "rope_parameters", "moe_layer_freq", "novel_gate")


def plans(fields) -> bool:
    """Whether the fields can be planned; anything but an answer and a sentence comes through."""
    try:
        row = plan_row(from_fields(fields, name="spoiled", source="config.json"), 100, 8, page_size=16)
    except InputError as error:
        sentence = str(error)
        assert "config.json" in sentence
        assert "\n" not in sentence
        assert len(sentence) < 700
        return False
    assert json.dumps(row)
    assert min(row["parameters"], row["kv_bytes"], row["flops"]) > 0
    return True


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_spoiled_field_is_answered_or_refused(kind):
    fields = FIRST[kind]
    assert plans(fields)
    names = {name for other in CONFIGS.values() if other["model_type"] == kind for name in other}
    for name in sorted(names.union(ALSO)):
        for value in SPOILED:
            plans(fields | {name: value})
        plans({key: value for key, value in fields.items() if key != name})
    for name in ("hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads"):
        if name in fields:
            wrong = [value for value in SPOILED if type(value) is not int and value is not None]
            assert not any(plans(fields | {name: value}) for value in wrong)


@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_spoiled_wrapper_is_answered_or_refused(kind):
    fields = {"model_type": kind, "text_config": FIRST[WRAPPERS[kind]]}
    assert plans(fields)
    for value in SPOILED:
        assert not plans(fields | {"text_config": value})
        plans(fields | {"tie_word_embeddings": value, "vision_config": value})
