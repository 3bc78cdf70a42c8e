"""Planning of published families: parameters and cache bytes against transformers' own models."""

import json
import re

import pytest
import torch
from transformers import DynamicCache

import step3 as step3_model
from cases import random_ids
from command import multimatrix
from multimatrix.evaluate.cache_bytes import stored_bytes
from multimatrix.model.modeling import CACHE
from multimatrix.plan.families import FAMILIES, WRAPPERS
from multimatrix.plan.model import decode_cost, stored_kv_bytes
from multimatrix.plan.sources import from_config, from_fields
from plan_cases import CONFIGS, LATENT, OTHERS, PEERS, PUBLISHED, peer, write_config

ATTENTION = re.compile(r"(self_attn|attention)\.")


def parts_of(model) -> dict[str, int]:
    """Parameters of a model of transformers by part, sorted by the names and shapes of its tensors."""
    parts = dict.fromkeys(("embeddings", "attention", "feed_forward", "router", "norms", "output_head", "other"), 0)
    for name, parameter in model.named_parameters():
        inside = name.partition("layers.")[2].partition(".")[2]
        if name.endswith(("bias", "sinks")) or re.search(r"\.[qk]_(layer)?norm|shared_expert_gate", name):
            part = "other"
        elif "embed_tokens" in name:
            part = "embeddings"
        elif "lm_head" in name:
            part = "output_head"
        elif ATTENTION.match(inside):
            part = "attention"
        elif "norm" in name:
            part = "norms"
        else:
            part = "router" if re.search(r"\.(router|gate)(\.weight)?$", name) else "feed_forward"
        parts[part] += parameter.numel()
    return parts


@pytest.mark.parametrize("name", PEERS)
def test_parameters_are_those_of_transformers(name, tmp_path):
    model = peer(name)
    model.config.save_pretrained(tmp_path)
    sizes = from_config(tmp_path)
    assert sizes.parts() == parts_of(model)
    assert sizes.parameters == model.num_parameters()
    assert sizes.warnings == []
    # What an author writes by hand has fewer fields.
    write_config(tmp_path, CONFIGS[name] | {"novel_gate": 1})
    assert from_config(tmp_path).parts() == sizes.parts()
    assert from_config(tmp_path).windows == sizes.windows
    assert from_config(tmp_path).unread_fields == ("novel_gate",)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_the_parameters_of_their_checkpoints(name):
    fields, parameters = PUBLISHED[name]
    assert from_fields(fields, name=name, source=name).parameters == parameters


def test_active_parameters_leave_out_the_experts_that_rest(tmp_path):
    model = peer("gpt_oss")
    experts = sum(tensor.numel() for name, tensor in model.named_parameters() if "experts" in name)
    sizes = from_config(write_config(tmp_path, CONFIGS["gpt_oss"]))
    assert sizes.parameters - sizes.active_parameters == experts // 2  # two of four


def test_step3s_formats_are_read(tmp_path):
    fields = OTHERS["step3"]
    tensors = step3_model.step3_tensors(fields)
    whole = sum(tensor.numel() for tensor in tensors.values())
    assert from_config(write_config(tmp_path, fields | {"novel_gate": 1})).unread_fields == ("novel_gate",)
    assert from_config(write_config(tmp_path, fields)).parameters == whole
    inner = {name: value for name, value in fields.items() if name != "model_type"}
    seeing = {"model_type": "step3_vl", "vision_config": {}, "text_config": inner}
    assert from_config(write_config(tmp_path, seeing)).parameters == whole


def test_kimi_is_deepseek(tmp_path):
    sizes = [from_config(write_config(tmp_path, LATENT | {"model_type": kind})) for kind in ("kimi_k2", "deepseek_v3")]
    assert sizes[0] == sizes[1]


def test_every_family_is_tested():
    tested = {kind for kind, _ in PEERS.values()} | {fields["model_type"] for fields in OTHERS.values()}
    assert tested == set(FAMILIES)
    assert set(WRAPPERS.values()) <= set(FAMILIES)


# ---- models that also see --------------------------------------------------------------------------------------------

SEEING = {
    "gemma3": ("gemma3", "gemma3"),
    "llama4": ("llama4", "llama4"),
    "mistral3": ("mistral3", "mistral"),
    "kimi_k25": ("kimi_k25", "deepseek"),
    "kimi_vl": ("kimi_vl", "deepseek"),
}


@pytest.mark.parametrize(("outer", "inner"), SEEING.values(), ids=SEEING)
@pytest.mark.parametrize("named", [False, True])
def test_the_language_model_of_one_that_sees(outer, inner, named, tmp_path):
    fields = CONFIGS[inner]
    text = fields if named else {name: value for name, value in fields.items() if name != "model_type"}
    alone = from_config(write_config(tmp_path, fields))
    sizes = from_config(write_config(tmp_path, {"model_type": outer, "text_config": text, "vision_config": {"a": 1}}))
    assert (sizes.specs, sizes.windows, sizes.parts()) == (alone.specs, alone.windows, alone.parts())
    assert ["image" in warning for warning in sizes.warnings] == [True]


def test_a_head_that_is_tied_outside(tmp_path):
    fields = {"model_type": "mistral3", "text_config": CONFIGS["mistral"]}
    untied, tied = (
        from_config(write_config(tmp_path, fields | {"tie_word_embeddings": flag})).parts()["output_head"]
        for flag in (False, True)
    )
    assert (untied, tied) == (61 * 32, 0)
    inner = CONFIGS["mistral"] | {"tie_word_embeddings": False}
    both = from_config(write_config(tmp_path, fields | {"text_config": inner, "tie_word_embeddings": True}))
    assert both.parts()["output_head"] == 61 * 32
    assert "tie_word_embeddings" in both.warnings[-1]


AS_PUBLISHED = {
    "GLM-4.5-Air": (
        {
            **{"architectures": ["Glm4MoeForCausalLM"], "attention_bias": True, "attention_dropout": 0.0},
            **{"eos_token_id": [151329, 151336], "first_k_dense_replace": 1, "head_dim": 128, "hidden_act": "silu"},
            **{"hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 10944, "model_type": "glm4_moe"},
            **{"max_position_embeddings": 131072, "moe_intermediate_size": 1408, "n_group": 1, "vocab_size": 151552},
            **{"n_routed_experts": 128, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 96},
            **{"num_experts_per_tok": 8, "num_hidden_layers": 46, "num_key_value_heads": 8, "pad_token_id": 151329},
            **{"num_nextn_predict_layers": 1, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-05, "topk_group": 1},
            **{"rope_scaling": None, "rope_theta": 1000000, "routed_scaling_factor": 1.0, "torch_dtype": "bfloat16"},
            **{"tie_word_embeddings": False, "transformers_version": "4.54.1", "use_cache": True, "use_qk_norm": False},
        },
        106e9,
        0,
    ),
    "Llama-4-Maverick": (
        {
            **{"model_type": "llama4", "boi_token_index": 200080, "vision_config": {"hidden_size": 1408}},
            "text_config": {
                **{"_attn_implementation_autoset": True, "attention_bias": False, "attention_chunk_size": 8192},
                **{"attention_dropout": 0.0, "bos_token_id": 200000, "for_llm_compressor": False, "head_dim": 128},
                **{"hidden_act": "silu", "hidden_size": 5120, "interleave_moe_layer_step": 2, "rope_scaling": None},
                **{"intermediate_size": 8192, "intermediate_size_mlp": 16384, "max_position_embeddings": 1048576},
                **{"model_type": "llama4_text", "no_rope_layers": [], "num_attention_heads": 40},
                **{"num_experts_per_tok": 1, "num_hidden_layers": 48, "num_key_value_heads": 8},
                **{"num_local_experts": 128, "output_router_logits": False, "pad_token_id": 200018},
                **{"rms_norm_eps": 1e-05, "rope_theta": 500000.0, "router_aux_loss_coef": 0.001},
                **{"router_jitter_noise": 0.0, "torch_dtype": "bfloat16", "use_qk_norm": False, "vocab_size": 202048},
            },
        },
        400e9,
        1,
    ),
}


@pytest.mark.parametrize(("fields", "stated", "warnings"), AS_PUBLISHED.values(), ids=AS_PUBLISHED)
def test_a_config_as_it_is_published(fields, stated, warnings):
    """Whole files, with all that changes nothing; stated: by the authors, rounded."""
    sizes = from_fields(fields, name="published", source="published")
    assert sizes.parameters == pytest.approx(stated, rel=0.01)
    assert len(sizes.warnings) == warnings


def test_gemma3_as_it_is_published(tmp_path):
    """Its text_config leaves out what its class has by default."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
    sizes = from_config(write_config(tmp_path, {"model_type": "gemma3", "text_config": text}))
    assert round(sizes.parameters / 1e9, 2) == 3.88
    assert sizes.windows.count(None) == 5
    cost = decode_cost(sizes, 131_072, 16)
    assert cost.kv_bytes == 2 * 2 * 4 * 256 * (5 * 131_072 + 29 * 1024)


# ---- the cache -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_cache_bytes_are_those_of_transformers(name, dtype, tmp_path):
    """Past the windows, as each token is decoded; DeepSeek's classes cache the latents."""
    model = peer(name, "cpu", dtype=dtype, attn_implementation="eager").eval()
    sizes = from_config(write_config(tmp_path, CONFIGS[name]))
    cache = DynamicCache(config=model.config)
    assert sizes.windows or not any(layer.is_sliding for layer in cache.layers)
    for seen, token in enumerate(random_ids(1, 11).split(1, dim=1), start=1):
        with torch.no_grad():
            model(token, **{CACHE: cache})
        stated = decode_cost(sizes, seen, 16).kv_bytes
        assert stored_bytes(cache) * 2 == stated * dtype.itemsize
        assert stored_kv_bytes(sizes, seen, 16) == stated


def test_windows_end_what_a_token_costs(tmp_path):
    sizes = from_config(write_config(tmp_path, CONFIGS["gemma3"]))
    layer = sizes.specs[0]
    assert sizes.windows == (4, 4, 4, 4, 4, None, 4)
    for context in (1, 4, 5, 100):
        cost, seen = decode_cost(sizes, context, 16), 6 * min(context, 4) + context
        assert cost.kv_bytes == seen * layer.cache.elements * 2
        assert cost.attention_core_flops == layer.decode_core_flops(1) * seen
        assert cost.linear_flops == 7 * 2 * layer.linear_products


def test_warnings_go_to_stderr(tmp_path):
    write_config(tmp_path, {"model_type": "gemma3", "novel": 1, "text_config": CONFIGS["gemma3"] | {"novel_gate": 1}})
    done = multimatrix("plan", tmp_path, "--json")
    assert json.loads(done.out)["unread_fields"] == ["novel_gate"]
    first, second = done.err.splitlines()
    assert first.startswith("warning: ")
    assert "images" in first
    assert "novel_gate" in second
