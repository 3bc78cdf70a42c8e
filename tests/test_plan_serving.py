"""What a plan says of devices: time, what bounds it, what fits, and what each device holds."""

import dataclasses

import pytest

from cases import CASES
from multimatrix.attention import make_spec
from multimatrix.attention.module import Attention
from multimatrix.errors import InputError
from multimatrix.plan.answer import Question, answer
from multimatrix.plan.hardware import find_hardware
from multimatrix.plan.model import decode_cost
from multimatrix.plan.parallel import Layout, attention_share, key_head_copies, key_head_share, weights_per_device
from multimatrix.plan.serving import LONGEST, Serving, least_layout, prompt_flops
from multimatrix.plan.sources import from_recipe
from plan_devices import CHIP, RECIPES, one_attention

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
            Serving(one_attention(spec), CHIP, layout)
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


def test_copies_of_the_model_share_the_batch():
    sizes = from_recipe("qwen3-235b-a22b")
    two, half = Serving(sizes, CHIP, Layout(data=2)).step(15, 8192), Serving(sizes, CHIP, Layout()).step(8, 8192)
    assert two == half


def test_copied_key_heads_bring_their_weights():
    spec = from_recipe("qwen3-235b-a22b").specs[0]  # 64 heads of 128 over 4 key heads
    queries, keys = 4096 * 64 * 128, 4096 * 4 * 128
    assert attention_share(spec, Layout(tensor=2)) == queries + keys
    assert attention_share(spec, Layout(tensor=8)) == queries // 4 + keys // 2  # a quarter of keys and of values


def test_the_value_map_of_mfa_kr_is_cut_by_heads():
    spec = make_spec(512, {"variant": "mfa_kr", "num_heads": 8, "head_dim": 64, "query_rank": 64})
    one, four = (Serving(one_attention(spec), CHIP, Layout(tensor=ways)) for ways in (1, 4))
    replicated = 64 * 512 + 64 * 512 + 64 * 64  # down to the query latent, the key, and one use of the map
    cut = 8 * 64 * 64 + 8 * 64 * 512 + 7 * 64 * 64  # up to the heads, the output, and the map of the other heads
    for serving, ways in ((one, 1), (four, 4)):
        flops = serving.step(1, 100)["linear"].arithmetic * 3e14
        assert flops == pytest.approx(2 * 3 * (replicated + cut / ways))
