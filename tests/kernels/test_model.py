"""The model decodes through the kernel by itself, and says the same as without."""

import pytest
import torch
from transformers import CompileConfig, DynamicCache, StaticCache

from cases import logits_in_chunks, padded, random_ids, random_model
from multimatrix.attention import make_spec
from multimatrix.errors import InputError
from multimatrix.ops import decode

MFA = {"num_heads": 3, "head_dim": 32, "query_rank": 16}
SIZES = {
    "mha": {"variant": "mha", "num_heads": 4, "head_dim": 16},
    "gqa": {"variant": "gqa", "num_heads": 4, "num_kv_heads": 2, "head_dim": 16},
    "mqa": {"variant": "mqa", "num_heads": 4, "head_dim": 16},
    "mla": {"variant": "mla", "num_heads": 4, "head_dim": 16, "rope_head_dim": 16, "latent_dim": 48},
    "mfa": {"variant": "mfa", **MFA},
    "mfa-blocks": {"variant": "mfa", **MFA, "rotary_blocks": 2},
    "mfa-alibi": {"variant": "mfa", **MFA, "position": "alibi"},
    "mfa_kr": {"variant": "mfa_kr", **MFA},
    "mfa_kr-partial": {"variant": "mfa_kr", **MFA | {"head_dim": 48, "rotary_dim": 32}},
    "mfa_kr-none": {"variant": "mfa_kr", **MFA, "position": "none"},
    "mfa_kr-relative": {"variant": "mfa_kr", **MFA, "key_reuse": "relative"},
}
every_variant = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
NEAR = {"rtol": 2e-5, "atol": 2e-4}


def model_of(sizes, **changes):
    model = random_model([make_spec(32, sizes)] * 2, torch.float32, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    return model


@pytest.fixture
def launches(monkeypatch):
    """How many times the kernel ran, counted in a list."""
    launch, count = decode.launch, []

    def counted(*args, **kwargs):
        count.append(1)
        return launch(*args, **kwargs)

    monkeypatch.setattr(decode, "launch", counted)
    return count


@every_variant
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_cached_logits(sizes, kind, launches):
    model = model_of(sizes)
    ids, mask = padded([random_ids(11), random_ids(6)])
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    assert not launches
    cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=16)
    actual = logits_in_chunks(model, ids, [6, 1, 3, 1], cache, mask)
    assert len(launches) == 2 * (3 if kind == "dynamic" else 4)  # a padded static cache is longer than its prompt
    torch.testing.assert_close(actual[mask == 1], expected[mask == 1].detach(), **NEAR)


@every_variant
def test_a_packed_prompt(sizes, launches):
    model = model_of(sizes)
    documents = [random_ids(length) for length in (5, 2, 7)]
    row = torch.cat(documents)[None]
    positions = torch.cat([torch.arange(len(document)) for document in documents])[None]
    expected = torch.cat([model(document[None]).logits[0] for document in documents])
    cache, logits = DynamicCache(config=model.config), []
    with torch.no_grad():
        for step in (slice(0, 6), slice(6, 9), slice(9, 14)):
            logits.append(model(row[:, step], position_ids=positions[:, step], cache=cache).logits)
    assert launches
    torch.testing.assert_close(torch.cat(logits, dim=1)[0], expected.detach(), **NEAR)


@every_variant
@pytest.mark.parametrize("scaled", [False, True])
def test_compiled_decoding_is_one_graph_with_the_kernel_in_it(sizes, scaled):
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e3, "original_max_position_embeddings": 16}
    model = model_of(sizes, **({"rope_parameters": rope} if scaled else {}))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return graph.forward

    compile_config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    compile_config._compile_all_devices = True
    torch._dynamo.reset()
    ids = random_ids(2, 7)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, **options, use_cache=False)
    actual = model.generate(ids, **options, cache_implementation="static", compile_config=compile_config)
    assert torch.equal(actual, expected)
    assert len(graphs) == 1
    assert "decode_attention" in graphs[0]


def test_the_choice_of_implementation(launches):
    ids = random_ids(1, 6)
    for name, expected in (("multimatrix_sdpa", 0), ("eager", 0), ("multimatrix_triton", 4), ("sdpa", 4)):
        model = model_of(SIZES["mfa"])
        model.set_attn_implementation(name)
        launches.clear()
        logits_in_chunks(model, ids, [4, 1, 1], DynamicCache(config=model.config))
        assert len(launches) == expected
    narrow = random_model([make_spec(32, {"variant": "mha", "num_heads": 4, "head_dim": 8})], torch.float32)
    logits_in_chunks(narrow, ids, [4, 1, 1], DynamicCache(config=narrow.config))  # does without
    narrow.set_attn_implementation("multimatrix_triton")
    with pytest.raises(InputError, match="head dims are multiples of 16 up to 576; choose another"):
        logits_in_chunks(narrow, ids, [4, 1, 1], DynamicCache(config=narrow.config))


def test_training_through_a_cache_keeps_its_gradient(launches):
    model = model_of(SIZES["mfa"])
    cache = DynamicCache(config=model.config)
    model(random_ids(1, 4), cache=cache)
    model(random_ids(1, 1), cache=cache).logits.sum().backward()
    assert not launches
    assert all(parameter.grad is not None for parameter in model.parameters())
