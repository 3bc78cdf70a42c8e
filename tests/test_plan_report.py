"""The planner against the tables that the Step-3 report prints, digit by digit."""

import dataclasses

import pytest

from multimatrix.plan.hardware import find_hardware
from multimatrix.plan.model import decode_cost
from multimatrix.plan.sources import from_recipe
from multimatrix.recipes import recipe_names

# The Step-3 report (arXiv 2507.19427) for one token decoded at 8192, 8 bit cache: KV bytes, core, linear, feed-forward.
REPORT = {
    "step3": ("2.56e8", "3.27e10", "2.07e10", "5.33e10"),
    "deepseek-v3": ("2.88e8", "1.47e11", "2.28e10", "4.84e10"),
    "kimi-k2": ("2.88e8", "7.37e10", "1.23e10", "4.84e10"),
    "qwen3-235b-a22b": ("7.89e8", "2.52e10", "1.34e10", "2.84e10"),
    "qwen3-32b": ("1.07e9", "1.72e10", "1.21e10", "5.03e10"),
}
# Its dollars of attention for a million tokens on H800, H20, A800, 910B, by context.
DOLLARS = {
    8192: {
        "step3": (".048", ".040", ".040", ".043"),
        "deepseek-v3": (".054", ".128", ".114", ".113"),
        "kimi-k2": (".051", ".065", ".057", ".057"),
        "qwen3-235b-a22b": (".135", ".054", ".091", ".101"),
        "qwen3-32b": (".181", ".069", ".120", ".133"),
    },
    32768: {
        "step3": (".176", ".114", ".120", ".133"),
        "deepseek-v3": (".197", ".460", ".409", ".407"),
        "qwen3-235b-a22b": (".527", ".185", ".338", ".376"),
    },
}
CHIPS = ["h800", "h20", "a800", "910b"]
MLA = ("deepseek-v3", "kimi-k2")
PRICED = [(context, name) for context, row in DOLLARS.items() for name in row]


def printed(number: float) -> str:
    """As the report prints it: three digits."""
    return f"{number:.2e}".replace("e+", "e").replace("e0", "e")


def report_cost(name: str, context: int):
    """Our cost with the report's core: it multiplies MLA's values at the 576 elements that are cached.

    docs/planning.md has the derivation; every other number is ours.
    """
    cost = decode_cost(from_recipe(name), context, 8)
    if name not in MLA:
        return cost
    heads, layers, latent, rotary = {"deepseek-v3": 128, "kimi-k2": 64}[name], 61, 512, 64
    wide = 4 * heads * (latent + rotary) * context * layers
    narrow = 2 * heads * (2 * latent + rotary) * context * layers
    assert cost.attention_core_flops == narrow
    return dataclasses.replace(cost, attention_core_flops=wide)


def test_every_model_of_the_report_is_a_recipe():
    assert recipe_names("models") == sorted(REPORT)


@pytest.mark.parametrize("name", REPORT)
def test_the_digits_of_the_step3_report(name):
    cost = report_cost(name, 8192)
    numbers = (cost.kv_bytes, cost.attention_core_flops, cost.linear_flops, cost.feed_forward_flops)
    assert tuple(map(printed, numbers)) == REPORT[name]


@pytest.mark.parametrize(("context", "name"), PRICED)
def test_the_dollars_of_the_step3_report(context, name):
    cost = report_cost(name, context)
    dollars = [chip.dollars(chip.attention_seconds(cost)) for chip in find_hardware(CHIPS)]
    assert tuple(f"{value:.3f}".lstrip("0") for value in dollars) == DOLLARS[context][name]


def test_step3_by_the_formulas_of_its_report():
    cost = decode_cost(from_recipe("step3"), 8192, 8)
    heads, width, rank, hidden, layers = 64, 256, 2048, 7168, 61
    assert cost.kv_bytes == 2 * width * layers * 8192
    assert cost.attention_core_flops == 4 * heads * width * 8192 * layers
    weights = hidden * rank + rank * heads * width + 2 * hidden * width + heads * width * hidden
    assert cost.linear_flops == 2 * weights * layers
    assert cost.feed_forward_flops == 2 * 3 * hidden * (5 * 18432 + 56 * (3 + 1) * 5120)
    assert cost.router_flops == 2 * 56 * 48 * hidden
    assert cost.output_head_flops == 2 * 128815 * hidden


def test_hardware_bounds_and_rooflines():
    assert [round(chip.roofline) for chip in find_hardware(CHIPS)] == [591, 74, 156, 175]
    intensity = {name: decode_cost(from_recipe(name), 8192, 8).arithmetic_intensity for name in REPORT}
    assert intensity["step3"] == 128
    assert intensity["qwen3-235b-a22b"] == 32
    assert intensity["deepseek-v3"] == pytest.approx(512 * 1088 / 1152)
    step3 = decode_cost(from_recipe("step3"), 8192, 8)
    assert [chip.bound(step3) for chip in find_hardware(CHIPS)] == ["memory", "arithmetic", "memory", "memory"]
