"""The planner: its parameters and bytes against models that are built, its recipes, and what the command prints."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from cases import ALL_DECODERS, CASES, MODELS, random_ids, random_model, small_config
from command import multimatrix
from multimatrix import MultimatrixConfig, MultimatrixForCausalLM
from multimatrix.attention import VARIANTS, make_spec
from multimatrix.errors import InputError
from multimatrix.evaluate.cache_bytes import stored_bytes
from multimatrix.ops import fp8
from multimatrix.plan.cache import KV_BITS, element_bytes, paged_tokens, scale_bytes
from multimatrix.plan.model import DecoderSizes, decode_cost, stored_kv_bytes
from multimatrix.plan.numbers import kv_bytes_per_token
from multimatrix.plan.sources import from_config, from_recipe
from multimatrix.recipes import recipe_names


@pytest.mark.parametrize("context", [1, 100, 8192])
def test_costs_follow_context_and_bits(context):
    for name in recipe_names("models"):
        at = {bits: decode_cost(from_recipe(name), context, bits) for bits in KV_BITS}
        one = decode_cost(from_recipe(name), 1, 16)
        assert at[16].kv_bytes == 2 * at[8].kv_bytes == 4 * at[4].kv_bytes == context * one.kv_bytes
        assert at[16].attention_core_flops == context * one.attention_core_flops
        assert at[16].flops - at[16].attention_core_flops == one.flops - one.attention_core_flops


def test_half_a_byte_is_rounded_up():
    mla = dataclasses.replace(CASES["mla"], latent_dim=5, rope_head_dim=2)
    assert [kv_bytes_per_token([mla], bits) for bits in KV_BITS] == [14, 7, 4]


# ---- parameters and bytes, against what is built ---------------------------------------------------------------------


def built_parts(model) -> dict[str, int]:
    """Parameters of a built model of ours by part, sorted by the names of its tensors."""
    parts = dict.fromkeys(("embeddings", "attention", "feed_forward", "router", "norms", "output_head", "other"), 0)
    for name, parameter in model.named_parameters():
        words = name.split(".")
        if "embed_tokens" in words:
            part = "embeddings"
        elif "lm_head" in words:
            part = "output_head"
        elif "self_attn" in words:
            part = "attention"
        elif "router" in words:
            part = "router"
        else:
            part = "feed_forward" if "mlp" in words else "norms"
        parts[part] += parameter.numel()
    return parts


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ALL_DECODERS | MODELS)
def test_predicted_parameters_are_the_models(name, tied, tmp_path):
    config = small_config((ALL_DECODERS | MODELS)[name], tie_word_embeddings=tied)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = MultimatrixForCausalLM(config)
    sizes = from_config(tmp_path)
    assert sizes.parts() == built_parts(model)
    assert sizes.parameters == model.num_parameters()
    assert sizes.unread_fields == ()
    assert from_config(tmp_path / "config.json").specs == tuple(config.layer_specs())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_predicted_bytes_are_those_of_the_cache(name, dtype, tmp_path):
    model = random_model(MODELS[name], dtype)
    model.config.save_pretrained(tmp_path)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(random_ids(1, 7), cache=cache)
    sizes = from_config(tmp_path)
    assert decode_cost(sizes, 7, 16).kv_bytes * dtype.itemsize == stored_bytes(cache) * 2
    assert stored_kv_bytes(sizes, 7, 16) == decode_cost(sizes, 7, 16).kv_bytes


def test_every_variant_is_compared():
    assert {spec.variant for specs in MODELS.values() for spec in specs} == set(VARIANTS)


@pytest.mark.parametrize("spec", CASES.values(), ids=CASES)
def test_eight_bits_with_scales_are_what_quantizing_stores(spec):
    sizes = DecoderSizes(name="one", specs=(spec,), vocab_size=9, intermediate_size=9)
    cost, stored = decode_cost(sizes, 5, 8), [0, 0]
    for heads, dim in spec.cache.vectors:
        for kind, tensor in enumerate(fp8.quantize(torch.randn(1, heads, 5, dim))):
            stored[kind] += tensor.nbytes
    assert [cost.kv_bytes, cost.kv_scale_bytes] == stored
    assert stored_kv_bytes(sizes, 5, 8) == sum(stored)


def test_four_bits_take_blocks_of_eighteen_bytes():
    """As llama.cpp's q4_0: 32 elements in 16 bytes, and a scale of two."""
    for head_dim, bytes_ in ((128, 4 * 18), (32, 18), (48, 24 + 2 * 2), (6, 3 + 2)):
        spec = make_spec(64, {"variant": "mqa", "num_heads": 4, "head_dim": head_dim})
        assert element_bytes(spec, 4) + scale_bytes(spec, 4) == 2 * bytes_  # key and value
    assert scale_bytes(spec, 16) == 0


@pytest.mark.parametrize("window", [None, 1, 4, 5, 16])
@pytest.mark.parametrize("page_size", [1, 3, 4, 16])
def test_pages_are_kept_whole_where_a_window_touches_them(window, page_size):
    most = 0
    for context in range(1, 60):
        seen = range(max(0, context - window) if window else 0, context)
        most = max(most, len({token // page_size for token in seen}))
        assert paged_tokens(context, window, page_size) == most * page_size


def test_a_cache_in_pages():
    step3 = from_recipe("step3")
    token = 61 * 2 * (256 + 4)
    assert stored_kv_bytes(step3, 8192, 8) == 8192 * token
    assert stored_kv_bytes(step3, 8193, 8, page_size=64) == (8192 + 64) * token
    row = json.loads(multimatrix("plan", "--recipe", "step3", "--context", 8193, "--page-size", 64, "--json").out)
    assert row["kv_stored_bytes"] == (8192 + 64) * 61 * 1024


def test_active_parameters_leave_out_what_a_token_does_not_take():
    sizes = from_recipe("step3")
    skipped = 56 * (48 - 3) * 3 * 7168 * 5120
    assert sizes.parameters - sizes.active_parameters == skipped
    assert from_recipe("qwen3-32b").parameters == from_recipe("qwen3-32b").active_parameters


PUBLISHED = {
    "deepseek-v3": ("deepseek_v3", {}),  # the defaults of its class
    "qwen3-32b": (
        "qwen3",
        {
            **{"vocab_size": 151936, "hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64},
            **{"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128},
        },
    ),
    "qwen3-235b-a22b": (
        "qwen3_moe",
        {
            **{"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 94},
            **{"num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128},
            **{"num_experts_per_tok": 8, "moe_intermediate_size": 1536},
        },
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_are_the_published_models(name):
    kind, fields = PUBLISHED[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields))
    assert from_recipe(name).parameters == model.num_parameters()


def test_recipes_have_the_sizes_their_authors_state():
    sizes = {name: from_recipe(name) for name in recipe_names("models")}
    billions = {name: (size.parameters / 1e9, size.active_parameters / 1e9) for name, size in sizes.items()}
    assert round(billions["step3"][0]) == 316
    assert int(billions["step3"][1]) == 38
    assert round(billions["deepseek-v3"][0]) == 671
    assert round(billions["kimi-k2"][0], -1) == 1030
    assert round(billions["kimi-k2"][1]) == 33
    assert round(billions["qwen3-235b-a22b"][0]) == 235
    assert round(billions["qwen3-235b-a22b"][1]) == 22
    assert round(billions["qwen3-32b"][0], 1) == 32.8


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_prints_one_object_without_torch_at_once():
    code = (
        "import sys, time; sys.argv = 'multimatrix plan --recipe step3 --context 8192 --kv-bits 8 --json'.split()\n"
        "from multimatrix.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'huggingface_hub', 'matplotlib'} & set(sys.modules)\n"
        "print(bool(heavy), time.process_time(), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy, seconds = done.stderr.split()
    assert heavy == "False"
    assert float(seconds) < 0.5
    printed_row = json.loads(done.stdout)
    cost = decode_cost(from_recipe("step3"), 8192, 8)
    for name in ("kv_bytes", "attention_core_flops", "linear_flops", "feed_forward_flops"):
        assert printed_row[name] == getattr(cost, name)
    assert printed_row["kv_bytes_per_token"] == 2 * 256 * 61
    assert [row["hardware"] for row in printed_row["hardware"]] == ["h800", "h20", "a800", "910b"]
    assert printed_row["hardware"][0]["attention_dollars"] == pytest.approx(0.048, abs=5e-4)


def test_several_models_and_contexts_make_a_list(tmp_path):
    small_config(MODELS["mfa-experts"]).save_pretrained(tmp_path)
    done = multimatrix("plan", tmp_path, "--recipe", "step3,qwen3-32b", "--context", "1024,4096", "--json")
    rows = json.loads(done.out)
    named = [(row["model"], row["context"]) for row in rows]
    assert named == [(name, at) for name in ("step3", "qwen3-32b", tmp_path.name) for at in (1024, 4096)]
    assert rows[-1]["kv_bytes_per_token_by_bits"]["16"] == rows[-1]["kv_bytes_per_token"]


def test_sizes_given_by_options(monkeypatch):
    words = ("plan", "--variants", "mha,mfa", "--hidden-size", 512, "--head-dim", 64, "--layers", 3, "--vocab-size", 99)
    words += ("--intermediate-size", 700, "--tie-word-embeddings", "--set", "mfa.num_heads=7")
    mha, mfa = json.loads(multimatrix(*words, "--json").out)
    attention = {"variant": "mfa", "num_heads": 7, "head_dim": 128, "query_rank": 128}
    with torch.device("meta"):
        model = MultimatrixForCausalLM(
            MultimatrixConfig(
                vocab_size=99, hidden_size=512, intermediate_size=700, num_hidden_layers=3, attention=attention,
                tie_word_embeddings=True,
            )
        )  # fmt: skip
    assert mfa["parameters"] == model.num_parameters()
    assert mha["kv_bytes_per_token"] == 3 * 2 * 512 * 2
    monkeypatch.setenv("COLUMNS", "120")
    table = multimatrix(*words).out
    for text in ("mfa", "KV bytes/token, 16 bit", f"{mha['kv_bytes_per_token']:,}", "h20: $ of attention"):
        assert text in table


def test_experts_beyond_the_layers_are_refused():
    sizes = from_recipe("step3")
    with pytest.raises(InputError, match="layer"):
        dataclasses.replace(sizes, specs=sizes.specs[:10])
