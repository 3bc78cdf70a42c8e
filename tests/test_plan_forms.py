"""Attention over latents, or over keys and values made from them: what each costs, and where they cross."""

import math

import pytest
import torch

from cases import CASES
from multimatrix.attention import make_spec
from multimatrix.attention.module import Attention
from multimatrix.plan.answer import Question, answer, forms_row
from multimatrix.plan.forms import form_cost, pairs, prefill_flops
from multimatrix.plan.hardware import find_hardware
from multimatrix.plan.sources import from_recipe
from plan_devices import CHIP, one_attention


@pytest.mark.parametrize("window", [None, 1, 3, 7, 20])
def test_pairs_are_those_that_are_seen(window):
    for context in (1, 5, 9):
        for queries in range(1, context + 1):
            seen = sum(min(place, window or place) for place in range(context - queries + 1, context + 1))
            assert pairs(queries, context, window) == seen


@pytest.mark.parametrize("name", CASES)
def test_forms_are_decoding_and_prefill(name):
    spec = CASES[name]
    for context in (1, 7, 100):
        assert form_cost(spec, "absorbed", 1, context).flops == spec.decode_flops(context)
        assert prefill_flops(spec, context) == context * spec.prefill_flops(context)
        assert form_cost(spec, "recomputed", context, context).flops == prefill_flops(spec, context)


@pytest.mark.parametrize("name", CASES)
def test_what_expanding_costs_is_what_it_does(name):
    spec = CASES[name]
    if not spec.has_expanded_form:
        assert (spec.expansion_products, spec.expanded_elements) == (0, spec.cache.elements)
        return
    layer, tokens = Attention(spec).float(), 5
    x = torch.randn(1, tokens, spec.hidden_size)

    def rope(t):
        return t

    _, latents = spec.project(layer, x, rope)
    products, shapes = count_products(lambda: shapes_of(spec.expand(layer, latents, rope)))
    assert products == tokens * spec.expansion_products
    assert shapes == tokens * spec.expanded_elements


def shapes_of(keys_and_values) -> int:
    return sum(tensor[0].numel() for tensor in keys_and_values)


def count_products(run):
    """Multiply-adds of the linear maps that `run` applies, and what it returns."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        made = run()
    return counter.get_total_flops() // 2, made


def recompute_from(spec, context):
    return forms_row(one_attention(spec), context, 16)["recompute_from_queries"]


@pytest.mark.parametrize(("name", "context"), [("deepseek-v3", 8192), ("kimi-k2", 500), ("deepseek-v3", 100)])
def test_recomputing_is_cheaper_from_where_it_says(name, context):
    spec = from_recipe(name).specs[0]

    def cheaper(queries):
        absorbed, recomputed = (form_cost(spec, form, queries, context).flops for form in ("absorbed", "recomputed"))
        return recomputed < absorbed

    first = next((queries for queries in range(1, context + 1) if cheaper(queries)), None)
    assert recompute_from(spec, context) == first


def test_mla_reuses_below_a_hundred_and_seventy_queries_and_mfa_kr_below_a_query_a_head():
    mla = from_recipe("deepseek-v3").specs[0]
    assert recompute_from(mla, 2**20) == math.ceil(512 * (128 + 128) / (2 * 512 + 64 - 128 - 64 - 128)) == 171
    mfa_kr = make_spec(7168, {"variant": "mfa_kr", "num_heads": 64, "head_dim": 256, "query_rank": 2048})
    assert recompute_from(mfa_kr, 6400) == 101
    assert recompute_from(from_recipe("step3").specs[0], 8192) is None


def test_forms_of_the_whole_model():
    forms = answer(from_recipe("deepseek-v3"), 8192, Question(chips=(CHIP,)))["forms"]
    assert forms["kept_kv_bytes_per_token"] == 61 * 128 * (192 + 128) * 2
    assert forms["by_queries"][0]["absorbed_flops"] == 61 * from_recipe("deepseek-v3").specs[0].decode_flops(8192)
    for one in forms["by_queries"]:
        recomputed = one["recomputed_flops"] < one["absorbed_flops"]
        assert recomputed == (one["queries"] >= forms["recompute_from_queries"])
    assert not answer(from_recipe("step3"), 8192, Question(chips=()))["forms"]["expands"]


def test_keeping_expanded_keys_is_faster_from_where_the_docs_say():
    row = answer(from_recipe("deepseek-v3"), 8192, Question(chips=tuple(find_hardware(["h800", "h20"])), kv_bits=8))
    assert [chip["forms"]["kept_faster_from"] for chip in row["hardware"]] == [75, 10]
    assert [chip["forms"]["recomputed_faster_from"] for chip in row["hardware"]] == [169, 169]
    mfa = answer(from_recipe("step3"), 8192, Question(chips=tuple(find_hardware(["h800"]))))
    assert mfa["hardware"][0]["forms"] == {"recomputed_faster_from": None, "kept_faster_from": None}
