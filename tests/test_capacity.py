"""What specs state, against the paper, the GMHA oracle and the modules that were built."""

import json
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from cases import CASES, DEFAULTS, random_attention, weights_of
from multimatrix.attention import VARIANTS, make_spec
from multimatrix.attention.gmha import head_matrices, output_matrices
from multimatrix.attention.module import Attention
from multimatrix.ops.reference import bilinear_attention
from multimatrix.plan.capacity import capacity_rows, load_recipe
from multimatrix.recipes import recipe_names

TIGHT = {"rtol": 1e-10, "atol": 1e-10}
H, T = 12, 6
every_case = pytest.mark.parametrize("spec", CASES.values(), ids=CASES.keys())


@every_case
def test_stated_parameters_are_built(spec):
    assert sum(p.numel() for p in Attention(spec).parameters()) == spec.parameters


@every_case
def test_stated_cache_is_stored(spec):
    cache = DynamicCache()
    random_attention(spec)(torch.randn(2, 5, spec.hidden_size, dtype=torch.float64), cache=cache)
    layer = cache.layers[0]
    stored = layer.keys.untyped_storage().nbytes() + layer.values.untyped_storage().nbytes()
    assert stored == 2 * 5 * spec.cache.elements * 8
    assert (layer.values.numel() == 0) == (spec.cache.value is None)


@every_case
def test_stated_decode_flops_are_counted(spec):
    module, cache, context = random_attention(spec), DynamicCache(), 11
    x = torch.randn(1, context, spec.hidden_size, dtype=torch.float64)
    module(x[:, :-1], cache=cache)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(x[:, -1:], cache=cache, backend="eager")
    assert counter.get_total_flops() == spec.decode_flops(context)


@every_case
def test_stated_training_flops_are_counted(spec):
    module, context = random_attention(spec), 11
    x = torch.randn(1, context, spec.hidden_size, dtype=torch.float64, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        module(x, backend="eager").sum().backward()
    # The eager products cover the masked half too, which the spec does not count.
    masked = 3 * spec.num_heads * sum(spec.head_dims) * (context - 1)
    assert counter.get_total_flops() == (spec.training_flops(context) + masked) * context


def test_mha_gqa_mqa_are_special_cases_of_gmha():
    for sizes in ({"variant": "mha"}, {"variant": "gqa", "num_kv_heads": 2}, {"variant": "mqa"}):
        spec = make_spec(H, {"num_heads": 4, "head_dim": 3, "position": "none", **sizes})
        module = random_attention(spec)
        w = weights_of(module)
        groups = spec.num_kv_heads
        q, k, v = (head_matrices(w[f"{name}_proj"], 4 if name == "q" else groups) for name in "qkv")
        shared = [c // (4 // groups) for c in range(4)]
        circuits_w = q @ k[shared].transpose(1, 2)  # Q_c K_g(c)^T, [N, H, H]
        circuits_u = v[shared] @ output_matrices(w["o_proj"], 4)  # V_g(c) O_c^T
        x = torch.randn(T, H, dtype=torch.float64)
        expected = bilinear_attention(x, circuits_w, circuits_u, scale=spec.scale)
        torch.testing.assert_close(module(x[None])[0], expected, **TIGHT)


def test_fpba_is_gmha_and_mfa_reaches_it():
    fpba = random_attention(make_spec(H, {"variant": "fpba", "position": "none"}))
    w = weights_of(fpba)
    circuits_w = head_matrices(w["k_proj"], H).transpose(1, 2)
    circuits_u = head_matrices(w["v_proj"], H)
    x = torch.randn(T, H, dtype=torch.float64)
    expected = bilinear_attention(x, circuits_w, circuits_u, scale=H**-0.5)
    torch.testing.assert_close(fpba(x[None])[0], expected, **TIGHT)

    # S_q, S_k, S_v of full rank R = C = H: Q_c = S_q^-1 W_c S_k^-T and O_c^T = S_v^-1 U_c give every circuit.
    mfa = random_attention(
        make_spec(H, {"variant": "mfa", "num_heads": H, "head_dim": H, "query_rank": H, "position": "none"})
    )
    s_q, s_k, s_v = (weights_of(mfa)[name].T for name in ("q_a_proj", "k_proj", "v_proj"))
    with torch.no_grad():
        q_c = torch.linalg.solve(s_q, circuits_w) @ torch.linalg.inv(s_k).T
        o_c = torch.linalg.solve(s_v, circuits_u)
        mfa.q_b_proj.weight.copy_(q_c.transpose(1, 2).flatten(0, 1))
        mfa.o_proj.weight.copy_(o_c.permute(2, 0, 1).flatten(1))
    torch.testing.assert_close(mfa(x[None])[0], expected, rtol=1e-7, atol=1e-7)
    assert mfa.spec.capacity == fpba.spec.capacity


def test_gqa_is_exactly_an_mfa():
    heads, groups, dim, hidden = 4, 2, 8, 32
    gqa = random_attention(
        make_spec(hidden, {"variant": "gqa", "num_heads": heads, "head_dim": dim, "num_kv_heads": groups})
    )
    spec = make_spec(
        hidden,
        {
            "variant": "mfa",
            "num_heads": heads,
            "head_dim": groups * dim,
            "query_rank": hidden,
            "rotary_blocks": groups,
            "softmax_scale": dim**-0.5,
        },
    )
    mfa = Attention(spec).double()
    with torch.no_grad():
        for name in ("k_proj", "v_proj"):
            getattr(mfa, name).weight.copy_(getattr(gqa, name).weight)
        mfa.q_a_proj.weight.copy_(torch.eye(hidden))
        q_b = torch.zeros(heads, groups, dim, hidden, dtype=torch.float64)
        o = torch.zeros(hidden, heads, groups, dim, dtype=torch.float64)
        for c in range(heads):
            q_b[c, c // (heads // groups)] = gqa.q_proj.weight.unflatten(0, (heads, dim))[c]
            o[:, c, c // (heads // groups)] = gqa.o_proj.weight.unflatten(1, (heads, dim))[:, c]
        mfa.q_b_proj.weight.copy_(q_b.flatten(0, 2))
        mfa.o_proj.weight.copy_(o.flatten(1))
    x = torch.randn(2, 9, hidden, dtype=torch.float64)
    torch.testing.assert_close(mfa(x), gqa(x), **TIGHT)
    assert mfa.spec.cache.elements == gqa.spec.cache.elements


def test_published_numbers():
    bytes_per_token = {row["variant"]: row["kv_bytes_per_token"] for row in rows("paper-7b")}
    assert (bytes_per_token["mha"], bytes_per_token["mfa"], bytes_per_token["mfa_kr"]) == (
        196_608,
        24_576,
        12_288,
    )
    per_layer = {row["variant"]: row["kv_bytes_per_token_per_layer"] for row in rows("paper-7b")}
    assert per_layer["mla"] == 1_152
    one_b = {row["variant"]: row["kv_bytes_per_token"] for row in rows("paper-1b")}
    assert (one_b["mha"], one_b["mfa"], one_b["mfa_kr"]) == (163_840, 20_480, 10_240)
    step3 = {row["variant"]: row for row in rows("step3")}["mfa"]
    assert round(step3["parameters"] / 1e6, 2) == 169.35
    assert step3["total_effective_rank"] == 16_384
    # The report's core FLOPs of the whole model at 8,192 tokens: 3.27e10; linear 2.07e10.
    spec = load_recipe("step3").specs["mfa"]
    core = spec.decode_flops(8192) - spec.decode_flops(0)
    assert f"{61 * core:.2e}" == "3.27e+10"
    assert f"{61 * spec.decode_flops(0):.2e}" == "2.07e+10"


def test_the_papers_table():
    """Parameters and cached elements of the paper's table 1, as formulas of its own letters."""
    h, n, d, g, m, c, r, e = 64, 8, 8, 2, 9, 16, 12, 4
    sizes = {
        "fpba": ({}, 2 * h**3, 2 * h * h, (h, h, h)),
        "mha": ({"num_heads": n, "head_dim": d}, 4 * h * n * d, 2 * n * d, (n, d, h)),
        "gqa": (
            {"num_heads": n, "head_dim": d, "num_kv_heads": g},
            2 * h * n * d + 2 * h * g * d,
            2 * g * d,
            (n, d, g * d),
        ),
        "mqa": ({"num_heads": n, "head_dim": d}, 2 * h * n * d + 2 * h * d, 2 * d, (n, d, d)),
        "mla": (
            {"num_heads": m, "head_dim": d, "rope_head_dim": e, "latent_dim": c, "query_rank": r},
            r * (h + m * (d + e)) + h * (c + e) + m * c * 2 * d + m * d * h + r + c,
            c + e,
            (m, d, c),
        ),
        "mfa": (
            {"num_heads": m, "head_dim": c, "query_rank": r},
            h * r + r * m * c + 2 * h * c + m * c * h,
            2 * c,
            (m, c, c),
        ),
        "mfa_kr": (
            {"num_heads": m, "head_dim": c, "query_rank": r},
            h * r + r * m * c + h * c + c * c + c + m * c * h,
            c,
            (m, c, c),
        ),
    }
    assert set(sizes) <= set(VARIANTS)
    for variant, (fields, parameters, cached, (heads, rank, shared)) in sizes.items():
        spec = make_spec(h, {"variant": variant, **fields})
        assert spec.parameters == parameters, variant
        assert spec.cache.elements == cached, variant
        assert (spec.capacity.heads, spec.capacity.rank_per_head, spec.capacity.shared_latent_dim) == (
            heads,
            rank,
            shared,
        ), variant
        assert spec.capacity.total_effective_rank == heads * rank


def test_specs_survive_their_dict():
    for spec in CASES.values():
        assert make_spec(spec.hidden_size, json.loads(json.dumps(spec.to_dict()))) == spec


def test_every_recipe_loads():
    assert recipe_names("sizes") == ["paper-1b", "paper-7b", "step3"]
    for name in recipe_names("sizes"):
        assert load_recipe(name).source


def test_default_cases_are_small():
    assert all(spec.parameters < 20_000 for spec in DEFAULTS.values())


def rows(recipe: str) -> list[dict]:
    known = load_recipe(recipe)
    return capacity_rows(known.specs, known.num_hidden_layers, 8192)


def test_capacity_command_prints_json():
    done = subprocess.run(
        [sys.executable, "-m", "multimatrix", "capacity", "--recipe", "step3", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert [row["variant"] for row in json.loads(done.stdout)] == ["mha", "mla", "mfa", "mfa_kr"]
