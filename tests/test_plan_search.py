"""MFA in the place of a model's attention: what is kept, and what a search finds."""

import dataclasses
import json

import pytest

from command import multimatrix
from multimatrix.attention import make_spec
from multimatrix.errors import InputError
from multimatrix.plan.answer import Question
from multimatrix.plan.hardware import find_hardware
from multimatrix.plan.model import stored_kv_bytes
from multimatrix.plan.search import replaced, search
from multimatrix.plan.sources import from_recipe
from plan_devices import RECIPES


@pytest.mark.parametrize("variant", ["mfa", "mfa_kr"])
@pytest.mark.parametrize("name", RECIPES)
def test_replacements_keep_what_they_say(name, variant):
    sizes = from_recipe(name)
    same = replaced(sizes, variant, "parameters")
    assert same.parts()["attention"] == pytest.approx(sizes.parts()["attention"], rel=0.01)
    assert same.specs[0].variant == variant
    bytes_ = stored_kv_bytes(sizes, 1000, 16)
    cached = replaced(sizes, variant, "cache")
    assert stored_kv_bytes(cached, 1000, 16) == bytes_
    assert cached.parts()["attention"] == pytest.approx(sizes.parts()["attention"], rel=0.01)


def test_a_replacement_has_no_fewer_devices_than_its_model():
    question = Question(chips=tuple(find_hardware(["h20"])))
    sizes = from_recipe("deepseek-v3")
    other = replaced(sizes, "mfa_kr", "parameters")
    devices = [question.served(one, question.chips[0], 8192).layout.devices for one in (sizes, other)]
    assert devices[0] == devices[1]
    alone = dataclasses.replace(other, instead_of=None)
    assert question.served(alone, question.chips[0], 8192).layout.devices < devices[0]


def test_given_sizes_of_a_replacement_are_kept():
    sizes = from_recipe("qwen3-32b")
    spec = replaced(sizes, "mfa", "parameters", fixed={"head_dim": 192, "query_rank": 1024}, multiple=8).specs[0]
    assert (spec.head_dim, spec.query_rank) == (192, 1024)
    assert spec.num_heads % 8 == 0
    more = dataclasses.replace(spec, num_heads=spec.num_heads + 8)
    assert spec.parameters <= sizes.specs[0].parameters < more.parameters
    spec = replaced(sizes, "mfa_kr", "cache", fixed={"num_heads": 3}).specs[0]
    assert (spec.num_heads, spec.head_dim) == (3, 2048)
    with pytest.raises(InputError, match="head_dim=5000"):
        replaced(sizes, "mfa", "parameters", fixed={"head_dim": 10000})
    with pytest.raises(InputError, match="mfa or mfa_kr"):
        replaced(sizes, "mla", "parameters")


def test_a_search_finds_what_fits_best_rank_first():
    sizes = from_recipe("qwen3-32b")
    own = sizes.specs[0]
    found = search(sizes, lambda one: one.specs[0].cache.elements <= 0.2 * own.cache.elements)
    specs = [one.specs[0] for one in found]
    ranks = [spec.capacity.total_effective_rank for spec in specs]
    assert ranks == sorted(ranks, reverse=True)
    assert {spec.variant for spec in specs} == {"mfa", "mfa_kr"}
    for spec in specs:
        assert spec.cache.elements <= 0.2 * own.cache.elements
        assert spec.parameters <= own.parameters
        assert dataclasses.replace(spec, num_heads=spec.num_heads + 1).parameters > own.parameters
        assert spec.head_dim >= 128
    narrow = search(sizes, lambda one: one.specs[0].cache.elements <= 128)
    assert {(one.specs[0].variant, one.specs[0].head_dim) for one in narrow} == {("mfa", 64), ("mfa_kr", 128)}
    assert search(sizes, lambda one: False) == []


def test_the_search_of_the_issue():
    words = ("--recipe", "qwen3-32b", "--context", "1M", "--gpu", "h200", "--batch", 8, "--kv-bits", 8)
    row = json.loads(multimatrix("plan", *words, "--json").out)
    assert row["context"] == 2**20
    found = row["search"]
    assert found["found"]
    for one in found["found"]:
        spec = make_spec(5120, {name: one[name] for name in ("variant", "num_heads", "head_dim", "query_rank")})
        assert spec.parameters * 64 == one["attention_parameters"]
        sizes = dataclasses.replace(from_recipe("qwen3-32b"), specs=(spec,) * 64)
        chip = find_hardware(["h200"])[0]
        assert found["devices"] * 0.9 * chip.memory_bytes > 2 * sizes.parameters
        assert one["largest_batch"] >= 8
        assert one["total_effective_rank"] == spec.capacity.total_effective_rank
    target = json.loads(multimatrix("plan", "--recipe", "qwen3-32b", "--target-kv", "10%", "--gpu", "", "--json").out)
    assert all(one["of_own_kv"] <= 0.1 for one in target["search"]["found"])
    assert target["hardware"] == []
