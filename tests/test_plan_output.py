"""What the planner makes of devices: times, batches, parallelism, forms of attention, replacements, and the page."""

import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cases import CASES, DECODERS, small_config
from command import multimatrix
from multimatrix.attention import make_spec
from multimatrix.attention.module import Attention
from multimatrix.errors import InputError
from multimatrix.plan import tables
from multimatrix.plan.answer import Question, answer
from multimatrix.plan.forms import form_cost, pairs, prefill_flops, recompute_from
from multimatrix.plan.hardware import Hardware, find_hardware
from multimatrix.plan.model import DecoderSizes, decode_cost, stored_kv_bytes
from multimatrix.plan.parallel import Layout, attention_share, key_head_copies, key_head_share, weights_per_device
from multimatrix.plan.search import replaced, search
from multimatrix.plan.serving import LONGEST, Serving, least_layout, prompt_flops
from multimatrix.plan.sources import from_recipe
from multimatrix.recipes import recipe_names

ROOT = Path(__file__).parent.parent
CHIP = Hardware(
    name="own",
    title="own",
    memory_bytes=1e12,
    bytes_per_second=2e12,
    flops_per_second=3e14,
    dollars_per_hour=7.2,
)
RECIPES = recipe_names("models")


def sizes_of(spec, layers=3, **changes) -> DecoderSizes:
    return DecoderSizes(name="tiny", specs=(spec,) * layers, vocab_size=50, intermediate_size=40, **changes)


# ---- time ------------------------------------------------------------------------------------------------------------


def test_one_step_by_hand():
    sizes, batch, context = from_recipe("step3"), 5, 1000
    step = Serving(sizes, CHIP, Layout(), kv_bits=16, weight_bits=16).step(batch, context)
    layers, hidden, heads, width, rank = 61, 7168, 64, 256, 2048
    attention = layers * (hidden * rank + rank * heads * width + 2 * hidden * width + heads * width * hidden)
    assert step["core"].memory == pytest.approx(batch * context * layers * 2 * width * 2 / 2e12)
    assert step["core"].arithmetic == pytest.approx(batch * context * layers * 4 * heads * width / 3e14)
    assert step["linear"].memory == pytest.approx((attention + layers * 0) * 2 / 2e12, rel=1e-4)  # and its norms
    assert step["linear"].arithmetic == pytest.approx(batch * 2 * attention / 3e14)
    met = 48 * (1 - (1 - 3 / 48) ** batch)  # of 48 experts, by tokens that take 3 each
    expert = 3 * hidden * 5120
    weights = 5 * 3 * hidden * 18432 + 56 * (met * expert + expert + 48 * hidden) + 128815 * hidden
    assert step["rest"].memory == pytest.approx(weights * 2 / 2e12)
    active = 5 * 3 * hidden * 18432 + 56 * (4 * expert + 48 * hidden) + 128815 * hidden
    assert step["rest"].arithmetic == pytest.approx(batch * 2 * active / 3e14)


@pytest.mark.parametrize("name", RECIPES)
def test_a_large_batch_costs_what_the_reports_model_says(name):
    cost, batch = decode_cost(from_recipe(name), 8192, 16), 10**7
    step = Serving(from_recipe(name), CHIP, Layout()).step(batch, 8192)
    attention = (step["core"].seconds + step["linear"].seconds) / batch
    assert attention == pytest.approx(CHIP.attention_seconds(cost))
    assert step["rest"].seconds / batch == pytest.approx(CHIP.other_seconds(cost))
    assert step["core"].bound == CHIP.bound(cost)


def test_a_prediction_adds_up():
    serving = Serving(from_recipe("qwen3-32b"), CHIP, Layout(tensor=2, data=2), efficiency=0.5)
    made = serving.prediction(8, 4096)
    whole = sum(made[f"{part}_seconds"] for part in ("core", "linear", "rest"))
    assert made["seconds_per_token"] == pytest.approx(whole)
    assert made["tokens_per_second"] == pytest.approx(8 / whole)
    assert made["dollars_per_million_tokens"] == pytest.approx(whole * 4 / 8 * 1e6 * 7.2 / 3600)
    bound = dataclasses.replace(serving, efficiency=1.0).prediction(8, 4096)
    assert made["seconds_per_token"] == pytest.approx(2 * bound["seconds_per_token"])
    unpriced = dataclasses.replace(serving, chip=dataclasses.replace(CHIP, dollars_per_hour=None))
    assert unpriced.prediction(8, 4096)["dollars_per_million_tokens"] is None


def test_arithmetic_runs_at_the_peak_of_what_is_stored():
    h100, h800 = find_hardware(["h100", "h800"])
    sizes = from_recipe("qwen3-32b")
    wide, narrow = (Serving(sizes, h100, Layout(), kv_bits=bits, weight_bits=bits) for bits in (16, 8))
    ratio = h100.peak(8) / h100.peak(16)
    assert ratio == pytest.approx(2, abs=0.01)
    for part in ("core", "linear", "rest"):
        assert wide.step(4, 100)[part].arithmetic == pytest.approx(ratio * narrow.step(4, 100)[part].arithmetic)
    assert h800.peak(4) == h800.peak(8)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("batch", [None, 400])
def test_the_bound_changes_where_it_says(name, batch):
    serving = least_layout(from_recipe(name), find_hardware(["h20"])[0], 1, 8192, roomy=True, weight_bits=8, kv_bits=8)
    crossing = serving.bound_changes(batch, 1, 2**20)

    def bound(context):
        return serving.prediction(batch or max(1, serving.largest_batch(context)), context)["bound"]

    if crossing is None:
        assert bound(1) == bound(2**20)
    else:
        assert bound(1) == bound(crossing - 1) != bound(crossing) == bound(2**20)


def test_prefill_is_every_layer_for_every_token():
    sizes, context = from_recipe("qwen3-32b"), 300
    per_token = sum(spec.prefill_flops(context) for spec in sizes.specs) + 2 * sizes.parts()["feed_forward"]
    assert prompt_flops(sizes, context) == context * per_token + 2 * 151936 * 5120
    work = Serving(sizes, CHIP, Layout(tensor=4)).prefill(context)
    assert work.arithmetic == pytest.approx(prompt_flops(sizes, context) / 4 / 3e14)


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [Layout(), Layout(tensor=4), Layout(2, 4), Layout(1, 2, 3)], ids=str)
@pytest.mark.parametrize("name", ["step3", "qwen3-32b"])
def test_largest_batch_and_longest_context_are_the_last_that_fit(name, layout):
    chip = dataclasses.replace(CHIP, memory_bytes=8e11)
    serving = Serving(from_recipe(name), chip, layout, page_size=64)
    batch = serving.largest_batch(8192)
    assert batch > 0
    assert serving.fits(batch, 8192)
    assert not serving.fits(batch + 1, 8192)
    longest = serving.longest_context(batch)
    assert serving.fits(batch, longest)
    assert not serving.fits(batch, longest + 1)
    used = serving.weight_bytes + layout.sequences(batch) * serving.kv_bytes_per_sequence(longest)
    assert used <= 0.9 * 8e11 < used + layout.sequences(batch) * serving.kv_bytes_per_sequence(64)


def test_a_window_bounds_no_context():
    sizes = dataclasses.replace(from_recipe("qwen3-32b"), windows=(1024,) * 64)
    assert Serving(sizes, CHIP, Layout()).longest_context(1) == LONGEST
    row = answer(sizes, 8192, Question(chips=(CHIP,)))
    assert row["hardware"][0]["predictions"][0]["longest_context"] is None
    assert row["hardware"][0]["predictions"][0]["core_seconds"] == pytest.approx(1024 * 262144 / 2e12)


def test_where_weights_do_not_fit():
    h800 = find_hardware(["h800"])[0]
    serving = Serving(from_recipe("step3"), h800, Layout(tensor=4))
    assert serving.cache_memory < 0
    assert serving.largest_batch(8192) == 0
    assert serving.longest_context(1) == 0
    least = least_layout(from_recipe("step3"), h800, 1, 8192)
    assert least.layout.devices == 16
    assert 2 * from_recipe("step3").parameters > 8 * 0.9 * 80e9  # half as many cannot hold the weights
    assert least_layout(from_recipe("step3"), dataclasses.replace(h800, memory_bytes=1e9), 1, 8192) is None


# ---- parallelism -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ways", [1, 2, 4])
@pytest.mark.parametrize("name", CASES)
def test_tensor_parallelism_cuts_as_the_models_plan_does(name, ways):
    spec = CASES[name]
    layout = Layout(tensor=ways)
    if spec.num_heads % ways:
        with pytest.raises(InputError, match="heads"):
            Serving(sizes_of(spec), CHIP, layout)
        return
    if spec.cache.key[0] % ways and spec.cache.key[0] > 1:
        return  # key heads are copied, which the model's plan does not do
    module = Attention(spec)
    held = 0
    for weight, parameter in module.named_parameters():
        cut = weight.split(".")[0] in spec.tensor_parallel_plan
        held += parameter.numel() // ways if cut else parameter.numel()
    assert attention_share(spec, layout) == held


def test_a_single_key_head_lies_on_every_device():
    step3, qwen = (from_recipe(name).specs[0] for name in ("step3", "qwen3-32b"))
    for ways in (2, 8, 16):
        assert key_head_share(step3, Layout(tensor=ways)) == 1
        assert key_head_copies(step3, Layout(tensor=ways)) == ways
        assert key_head_share(qwen, Layout(tensor=ways)) == max(1, 8 // ways) / 8
        assert key_head_copies(qwen, Layout(tensor=ways)) == max(1, ways // 8)
        assert key_head_copies(step3, Layout(attention_data=ways, data=2)) == 1


def test_what_a_device_holds():
    sizes = from_recipe("step3")
    whole = weights_per_device(sizes, Layout())
    assert whole == sizes.parts()
    assert weights_per_device(sizes, Layout(data=8)) == whole
    spread = weights_per_device(sizes, Layout(attention_data=8))
    assert spread["attention"] == whole["attention"]
    assert spread["feed_forward"] == whole["feed_forward"] // 8
    cut = weights_per_device(sizes, Layout(tensor=8))
    replicated = 61 * (7168 * 2048 + 2048 + 2 * 256 * 7168)
    assert cut["attention"] == replicated + (whole["attention"] - replicated) // 8
    question = Question(chips=(CHIP,))
    row = answer(sizes, 8192, question)
    held = {kind["parallelism"]: kind for kind in row["per_device"]}
    assert held["tensor"]["kv_bytes_per_token"] == held["data"]["kv_bytes_per_token"] == 62464
    assert [kind["copies"] for kind in row["per_device"]] == [8, 1, 1]
    qwen = answer(from_recipe("qwen3-32b"), 8192, question)["per_device"]
    assert [kind["kv_bytes_per_token"] for kind in qwen] == [262144 // 8, 262144, 262144]


def test_devices_share_the_work():
    sizes = from_recipe("qwen3-32b")
    one, eight = (Serving(sizes, CHIP, Layout(tensor=ways)).step(16, 8192) for ways in (1, 8))
    for part in ("core", "linear", "rest"):
        assert eight[part].arithmetic == pytest.approx(one[part].arithmetic / 8)
        assert eight[part].memory == pytest.approx(one[part].memory / 8, rel=1e-4)
    mfa = from_recipe("step3")
    one, eight = (Serving(mfa, CHIP, Layout(tensor=ways)).step(16, 8192) for ways in (1, 8))
    assert eight["core"].arithmetic == pytest.approx(one["core"].arithmetic / 8)
    assert eight["core"].memory == one["core"].memory  # its one key head is read by every device
    spread = Serving(mfa, CHIP, Layout(attention_data=8)).step(16, 8192)
    assert spread["core"].memory == pytest.approx(one["core"].memory / 8)


# ---- reuse or recompute ----------------------------------------------------------------------------------------------


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


# ---- replacements ----------------------------------------------------------------------------------------------------


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


# ---- the command -----------------------------------------------------------------------------------------------------


def test_replacements_are_columns_beside_the_model(monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    words = ("--recipe", "step3", "--replace", "mfa_kr", "--equal", "parameters,cache", "--gpu", "h800")
    rows = json.loads(multimatrix("plan", *words, "--json").out)
    assert [row["model"] for row in rows] == ["step3", "step3 with mfa_kr", "step3 with mfa_kr, equal cache"]
    assert rows[1]["kv_bytes_per_token"] * 2 == rows[0]["kv_bytes_per_token"] == rows[2]["kv_bytes_per_token"]
    wide = json.loads(multimatrix("plan", *words, "--set", "mfa_kr.head_dim=512", "--json").out)
    assert wide[1]["kv_bytes_per_token"] == rows[0]["kv_bytes_per_token"]
    assert "step3 with mfa_kr" in multimatrix("plan", *words).out


def test_own_numbers_and_layouts(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    words = ("--variants", "mfa", "--memory", "80GB", "--bandwidth", "3.2TB", "--flops", "989T", "--batch", "1,4")
    row = json.loads(multimatrix("plan", *words, "--tensor-parallel", 2, "--page-size", 64, "--json").out)
    (chip,) = row["hardware"]
    assert (chip["hardware"], chip["devices"], chip["dollars_per_hour"]) == ("own", 2, None)
    assert [made["batch"] for made in chip["predictions"]] == [1, 4, chip["largest_batch"]]
    assert chip["predictions"][0]["core_seconds"] == pytest.approx(8192 * 24 * 2 * 256 * 2 / 3.2e12)
    out = " ".join(multimatrix("plan", *words, "--tensor-parallel", 2).out.split())
    for text in (
        "on 2 devices",
        "One of 2 devices holds",
        "a single one to every device",
        "2 (T2)",
        "10 % of the memory",
    ):
        assert text in out
    both = json.loads(multimatrix("plan", *words, "--gpu", "h20", "--price", "3", "--json").out)
    assert [chip["hardware"] for chip in both["hardware"]] == ["h20", "own"]


def test_what_the_docs_show_of_parallelism_is_what_the_command_prints(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    words = (
        "--recipe qwen3-32b --replace mfa --replace mfa_kr --gpu h200 --context 128k --kv-bits 8 --tensor-parallel 8"
    )
    out = "\n".join(line.rstrip() for line in multimatrix("plan", *words.split()).out.splitlines())
    shown = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8").split("```text\n")[1].split("```")[0]
    assert out.endswith(shown.rstrip())
    assert "on 8 devices" in shown


def test_what_does_not_fit_says_what_would():
    words = ("--recipe", "step3", "--gpu", "h800", "--tensor-parallel", 4)
    (made,) = json.loads(multimatrix("plan", *words, "--json").out)["hardware"][0]["predictions"]
    assert not made["fits"]
    assert (made["devices_needed"], made["seconds_per_token"], made["longest_context"]) == (16, None, 0)
    assert "needs 16" in multimatrix("plan", *words).out
    assert "MFA-KR fits; take more" in " ".join(multimatrix("plan", *words, "--batch", 1).out.split())
    small = ("--recipe", "step3", "--memory", "1GB", "--bandwidth", "1TB", "--flops", "1T")
    assert "fits nowhere" in multimatrix("plan", *small).out


BAD_WORDS = {
    "batch": (("--batch", 0), "--batch must be at least 1, got 0"),
    "batches": (("--batch", "many"), "many"),
    "negative": (("--context", "-8k"), "-8k"),
    "fraction": (("--context", "1.0001k"), "1.0001k"),
    "workspace": (("--workspace", "100%"), "100 %"),
    "workspace-text": (("--workspace", "some"), "some"),
    "efficiency": (("--efficiency", "0%"), "0 %"),
    "efficiency-much": (("--efficiency", "120%"), "120%"),
    "weight-bits": (("--weight-bits", 2), "16, 8 or 4"),
    "page": (("--page-size", 0), "page"),
    "tensor": (("--tensor-parallel", 0), "tensor"),
    "heads": (("--recipe", "step3", "--tensor-parallel", 7), "64 heads"),
    "key-heads": (("--variants", "gqa", "--hidden-size", 1536, "--tensor-parallel", 2), "3 key heads"),
    "gpu": (("--gpu", "h9000"), "h800"),
    "own": (("--flops", "1T"), "--memory, --bandwidth beside --flops"),
    "own-number": (("--flops", "fast", "--memory", "1GB", "--bandwidth", "1TB"), "fast"),
    "replace": (("--recipe", "step3", "--replace", "mla"), "mfa or mfa_kr"),
    "equal": (("--recipe", "step3", "--replace", "mfa", "--equal", "speed"), "speed"),
    "equal-alone": (("--recipe", "step3", "--equal", "cache"), "--replace"),
    "set-alone": (("--recipe", "step3", "--set", "mfa.head_dim=64"), "--replace"),
    "set-other": (("--recipe", "step3", "--replace", "mfa", "--set", "mla.latent_dim=64"), "mla"),
    "set-field": (("--recipe", "step3", "--replace", "mfa", "--set", "mfa.width=64"), "width"),
    "no-head": (("--recipe", "qwen3-32b", "--replace", "mfa", "--set", "mfa.head_dim=9000"), "head_dim"),
    "target": (("--recipe", "step3", "--target-kv", "most"), "most"),
    "html": (("--html", "."), "folder"),
}


@pytest.mark.parametrize(("words", "word"), BAD_WORDS.values(), ids=BAD_WORDS)
def test_bad_options_are_refused(words, word):
    assert word in multimatrix("plan", *words).sentence


def test_plans_without_a_page_load_no_matplotlib():
    code = (
        "import sys; sys.argv = 'multimatrix plan --recipe qwen3-32b --target-kv 10% --batch 8 --gpu h200'.split()\n"
        "from multimatrix.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print([m for m in ('matplotlib', 'numpy', 'torch', 'jinja2') if m in sys.modules], file=sys.stderr)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr == "[]\n"


# ---- the page --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("page")
    small_config(DECODERS["mla"]).save_pretrained(folder / "model <b>")
    words = (folder / "model <b>", "--recipe", "step3,deepseek-v3", "--gpu", "h800", "--target-kv", "50%")
    file = folder / "new" / "plan.html"
    done = multimatrix("plan", *words, "--context", "8k,64k", "--html", file)
    assert done.status == 0
    assert f"wrote {file}" in done.out
    assert list(file.parent.iterdir()) == [file]
    return file.read_text(encoding="utf-8")


def test_the_page_is_self_contained(page):
    assert page.count("<svg") == 4
    assert "<script" not in page
    assert not re.search(r"""(src|href)\s*=\s*["']?(?!#)""", re.sub(r'xlink:href="#', "", page))
    assert not re.search(r"url\((?!#)", page)
    assert "@import" not in page
    assert "model &lt;b&gt;" in page
    assert "model <b>" not in page


def test_the_page_has_the_tables_of_the_terminal(page):
    text = re.sub(r"<[^>]+>", " ", page)
    row = answer(from_recipe("deepseek-v3"), 8192, Question(chips=tuple(find_hardware(["h800"]))))
    made = [cell.text for line in tables.serving_table([row], 0).lines for cell in line.cells[1:]]
    made += [cell.text for line in tables.form_table([row]).lines for cell in line.cells[1:]]
    assert len(made) > 30
    for cell in made:
        assert f" {cell} " in text
    assert "on 32 devices" in text
    assert "10 % of every device" in text


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    file = tmp_path / "plan.html"
    file.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device", str(file))

    monkeypatch.setattr("os.replace", full)
    assert "No space" in multimatrix("plan", "--recipe", "step3", "--gpu", "h800", "--html", file).sentence
    assert [path.name for path in tmp_path.iterdir()] == ["plan.html"]
    assert file.read_text() == "old"


# ---- measured --------------------------------------------------------------------------------------------------------

MODES = {  # kind of cache in results/decode-*.md: variant, bits
    "own value, bf16": ("mfa", 16),
    "value is the key": ("mfa_kr", 16),
    "value is the un-rotated key": ("mfa_kr", 16),
    "own value, FP8": ("mfa", 8),
}
RESULTS = sorted((ROOT / "results").glob("decode-*.md"))


def measured(text: str) -> dict[str, dict[str, float]]:
    """Microseconds of our kernel by kind of cache and shape, at m = 64 and C = 256."""
    found = {}
    for mode in MODES:
        section = next(part for part in text.split("\n## ") if part.startswith(mode) and "m = 64, C = 256" in part)
        lines = section.splitlines()
        shapes = next(line for line in lines if line.startswith("| batch x context")).split("|")[2:-1]
        times = next(line for line in lines if line.startswith("| **multimatrix**, us")).split("|")[2:-1]
        found[mode] = {shape.strip(): float(time.replace(",", "")) for shape, time in zip(shapes, times, strict=True)}
    return found


def predicted(chip: Hardware, mode: str, shape: str) -> float:
    """Microseconds of one layer's core by the planner."""
    variant, bits = MODES[mode]
    spec = make_spec(7168, {"variant": variant, "num_heads": 64, "head_dim": 256, "query_rank": 2048})
    batch, context = (int(number) for number in shape.replace("k", "").split("x"))
    step = Serving(sizes_of(spec, layers=1), chip, Layout(), kv_bits=bits).step(batch, 1024 * context)
    return step["core"].seconds * 1e6


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)
def test_the_docs_compare_predicted_with_measured_times(file):
    text, docs = file.read_text(encoding="utf-8"), (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
    (chip,) = find_hardware([file.stem.removeprefix("decode-")])
    read = float(re.search(r"measured read bandwidth ([\d,]+) GB/s", text)[1].replace(",", "")) * 1e9
    chip = dataclasses.replace(chip, bytes_per_second=read)
    assert f"`results/{file.name}`" in docs
    for mode, times in measured(text).items():
        cells = []
        for shape, time in times.items():
            bound = predicted(chip, mode, shape)
            assert bound < time  # a bound that a kernel beats is none
            cells.append(f"{bound:.0f} / {time:.0f}, {100 * bound / time:.0f} %")
        assert f"| {mode} | {' | '.join(cells)} |" in docs


def test_decoding_was_measured():
    assert "decode-h100" in [file.stem for file in RESULTS]
