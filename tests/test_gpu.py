"""The same agreement on a CUDA device, in every precision; `make test-gpu`."""

import copy

import pytest
import torch
from transformers import DynamicCache

from cases import (
    CASES,
    DECODERS,
    DEFAULTS,
    MODELS,
    logits_in_chunks,
    padded,
    random_attention,
    random_ids,
    random_model,
    weights_of,
)
from multimatrix.attention import make_spec
from multimatrix.cli import main
from multimatrix.evaluate import agreement
from multimatrix.generate.decoder import Decoder
from multimatrix.model.experts import make_experts
from multimatrix.model.mixture import MixtureOfExperts, route
from multimatrix.ops import grouped
from multimatrix.ops.reference import reference_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

EXPERTS = {"num_experts": 8, "experts_per_token": 2, "intermediate_size": 32, "shared_intermediate_size": 48}


@pytest.fixture(autouse=True)
def poisoned_memory():
    """cuBLAS cannot run deterministically without a workspace setting, so memory is not poisoned here."""
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spec", DEFAULTS.values(), ids=DEFAULTS.keys())
def test_agreement(spec, dtype):
    checks = agreement.check_model(agreement.random_model(spec, dtype, "cuda"))
    assert all(check.passed for check in checks), [check for check in checks if not check.passed]


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("spec", CASES.values(), ids=CASES.keys())
def test_forward_and_every_gradient(spec, backend):
    module = random_attention(spec).cuda()
    x = torch.randn(2, 7, spec.hidden_size, dtype=torch.float64, device="cuda", requires_grad=True)
    weights = {name: weight.cpu() for name, weight in weights_of(module).items()}
    expected = torch.stack([reference_attention(spec, weights, sequence) for sequence in x.cpu()])
    actual = module(x, backend=backend).cpu()
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    inputs = [x, *module.parameters()]
    gradients = [torch.autograd.grad(y.square().sum(), inputs, retain_graph=True) for y in (actual, expected)]
    for actual_gradient, expected_gradient in zip(*gradients, strict=True):
        torch.testing.assert_close(actual_gradient, expected_gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_experts(dtype):
    """The grouped product serves bfloat16 without waiting for the device, the loop serves the others."""
    module = MixtureOfExperts(make_experts(EXPERTS), 64).to("cuda", dtype)
    x = torch.randn(2, 33, 64, dtype=dtype, device="cuda")
    assert grouped.grouped_mm_serves(x, module.experts.up_proj) == (dtype == torch.bfloat16)
    if dtype == torch.bfloat16:
        module(x)[0].square().mean().backward()  # the first calls set libraries up
        torch.cuda.set_sync_debug_mode("error")
    try:
        y, router_logits = module(x)
        y.square().mean().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    exact = copy.deepcopy(module).double()
    expected, exact_logits = exact(x.double())
    same = (route(router_logits, module.spec)[1] == route(exact_logits, exact.spec)[1]).all(1).view(2, 33)
    assert same.float().mean() > 0.8  # in bfloat16 a near tie may fall the other way
    error = (y - expected)[same].norm() / expected[same].norm()
    assert error < {torch.bfloat16: 3e-2, torch.float32: 1e-5}.get(dtype, 1e-10)
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


def test_compare(tmp_path, monkeypatch, capsys):
    text = "\n".join('{"text": "' + f"story {i} of the fox and the hen " * 40 + '"}' for i in range(100))
    (tmp_path / "text.jsonl").write_text(text)
    monkeypatch.chdir(tmp_path)
    sizes = ["--hidden-size", "64", "--layers", "2", "--head-dim", "16", "--context", "64", "--steps", "10"]
    arguments = ["compare", "--data", "text.jsonl", "--seeds", "0,1", "--evaluations", "2", "--batch-size", "8", *sizes]
    monkeypatch.setattr("sys.argv", ["multimatrix", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code in (0, None)
    assert (tmp_path / "runs/compare/report.html").is_file()
    assert "bfloat16 on cuda" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "offloaded"},
        {"cache_implementation": "offloaded_static", "disable_compile": True},
        {"cache_implementation": "static", "disable_compile": True},
    ],
    ids=["offloaded", "offloaded-static", "static"],
)
@pytest.mark.parametrize("specs", MODELS.values(), ids=MODELS.keys())
def test_generate_with_every_cache(specs, options):
    model = random_model(specs).cuda()
    ids, mask = (tensor.cuda() for tensor in padded([random_ids(7), random_ids(3)]))
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    expected = model.generate(ids, **settings, use_cache=False)
    assert torch.equal(model.generate(ids, **settings, **options), expected)


@pytest.mark.parametrize("name", ["mla", "mfa", "mfa_kr"])
def test_generate_compiles_one_decode_step(name):
    """transformers compiles decoding on a static cache by itself, with CUDA graphs."""
    model = random_model(DECODERS[name], torch.float32).cuda()
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    torch._dynamo.reset()
    for prompt in (random_ids(2, 7), random_ids(2, 5)):
        ids = prompt.cuda()
        mask = torch.ones_like(ids)
        expected = model.generate(ids, attention_mask=mask, **settings)
        with torch._dynamo.config.patch(error_on_recompile=True):
            actual = model.generate(ids, attention_mask=mask, cache_implementation="static", **settings)
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("specs", MODELS.values(), ids=MODELS.keys())
def test_packed_documents_are_separate_rows(specs, dtype):
    model = random_model(specs, dtype).cuda()
    documents = [random_ids(length).cuda() for length in (5, 2, 7)]
    row = torch.cat(documents)[None]
    positions = torch.cat([torch.arange(len(document)) for document in documents])[None].cuda()
    expected = torch.cat([model(document[None]).logits[0] for document in documents])
    error = (model(row, position_ids=positions).logits[0] - expected).norm() / expected.norm()
    assert error < (1e-12 if dtype == torch.float64 else 2e-2)


KERNEL_SPECS = {
    "gqa": {"variant": "gqa", "num_heads": 8, "head_dim": 32, "num_kv_heads": 2},
    "mla": {"variant": "mla", "num_heads": 8, "head_dim": 32, "rope_head_dim": 16, "latent_dim": 128},
    "mfa": {"variant": "mfa", "num_heads": 9, "head_dim": 64, "query_rank": 64},
    "mfa-alibi": {"variant": "mfa", "num_heads": 9, "head_dim": 64, "query_rank": 64, "position": "alibi"},
    "mfa_kr": {"variant": "mfa_kr", "num_heads": 9, "head_dim": 64, "query_rank": 64},
    "mfa_kr-partial": {"variant": "mfa_kr", "num_heads": 9, "head_dim": 64, "query_rank": 64, "rotary_dim": 32},
    "mfa_kr-relative": {
        "variant": "mfa_kr",
        "num_heads": 9,
        "head_dim": 64,
        "query_rank": 64,
        "key_reuse": "relative",
    },
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", KERNEL_SPECS.values(), ids=KERNEL_SPECS.keys())
def test_decoding_with_the_kernel_is_decoding_without(sizes, dtype):
    model = random_model([make_spec(128, sizes)] * 2, dtype).cuda()
    ids, mask = (tensor.cuda() for tensor in padded([random_ids(40), random_ids(23)]))
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, use_cache=False).logits[mask == 1].float()
        errors = {}
        for name in ("multimatrix_triton", "multimatrix_sdpa"):
            model.set_attn_implementation(name)
            for cache in (DynamicCache(config=model.config), model.static_cache(2, 50)):
                logits = logits_in_chunks(model, ids, [30, 1, 4, 1, 1, 3], cache, mask)[mask == 1].float()
                error = ((logits - expected).norm() / expected.norm()).item()
                errors[name] = max(error, errors.get(name, 0.0))
    # Against whole sequences by SDPA, which decoding by SDPA may equal to the bit.
    tolerance = 2e-5 if dtype == torch.float32 else 1e-2
    assert errors["multimatrix_triton"] < max(tolerance, 2 * errors["multimatrix_sdpa"])


@pytest.mark.parametrize("sizes", KERNEL_SPECS.values(), ids=KERNEL_SPECS.keys())
def test_a_graph_of_the_decode_step_gives_the_same_tokens(sizes):
    model = random_model([make_spec(128, sizes)] * 2, torch.float32).cuda()
    ids = random_ids(1, 20).cuda()
    decoders = [Decoder(model, graph=graph) for graph in (True, False)]
    with_graph, without = (list(decoder.stream(ids, 30)) for decoder in decoders)
    assert [decoder.speed.graph for decoder in decoders] == [True, False]
    assert with_graph == without
    sampled = []
    for _ in range(2):
        torch.manual_seed(3)
        sampled.append(list(Decoder(model, temperature=5.0, top_p=0.9).stream(ids, 30)))
    assert sampled[0] == sampled[1]
    assert len(set(sampled[0])) > 3
