"""Predicted times of decoding beside those that results/ has measured."""

import dataclasses
import re
from pathlib import Path

import pytest

from multimatrix.attention import make_spec
from multimatrix.plan.hardware import Hardware, find_hardware
from multimatrix.plan.parallel import Layout
from multimatrix.plan.serving import Serving
from plan_devices import one_attention

ROOT = Path(__file__).parent.parent
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
    step = Serving(one_attention(spec, layers=1), chip, Layout(), kv_bits=bits).step(batch, 1024 * context)
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
