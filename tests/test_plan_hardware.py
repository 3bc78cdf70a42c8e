"""The table of accelerators: complete, in the units it states, dense rates, and a source beside every number."""

import dataclasses
import itertools
import math
import tomllib
from pathlib import Path

import pytest

from multimatrix.errors import InputError
from multimatrix.plan.hardware import Hardware, find_hardware, hardware_table
from multimatrix.plan.model import decode_cost
from multimatrix.plan.sources import from_recipe

FILE = Path(__file__).parent.parent / "src" / "multimatrix" / "recipes" / "hardware.toml"
TABLE = tomllib.loads(FILE.read_text(encoding="utf-8"))
ROWS = TABLE["hardware"]
NAMES = ["h100", "h200", "h800", "h20", "a100", "a800", "l40s", "b200", "gb200", "mi300x", "910b", "rtx4090"]
RATES = ("bf16_flops_per_second", "fp8_flops_per_second", "fp4_flops_per_second")
REQUIRED = {"memory_bytes", "bytes_per_second", "bf16_flops_per_second"}
NO_FP8 = {"a100", "a800", "910b"}
FP4 = {"b200", "gb200"}
UNPRICED = {"gb200", "mi300x"}


def test_the_table_has_every_accelerator():
    assert list(ROWS) == NAMES == list(hardware_table())
    assert set(TABLE) == {"sources", "hardware"}


@pytest.mark.parametrize("name", NAMES)
def test_a_row_is_complete(name):
    row = dict(ROWS[name])
    assert isinstance(row.pop("title"), str)
    assert all(name.startswith("NVIDIA ") for name in row.pop("device_names", ()))
    expected = set(REQUIRED)
    expected |= set() if name in NO_FP8 else {"fp8_flops_per_second"}
    expected |= {"fp4_flops_per_second"} if name in FP4 else set()
    expected |= set() if name in UNPRICED else {"dollars_per_hour"}
    assert set(row) == expected
    for entry in row.values():
        assert set(entry) <= {"value", "source", "with_sparsity", "note"}
        assert entry["source"] in TABLE["sources"]
    chip = hardware_table()[name]
    assert chip.flops_per_second == (chip.fp8_flops_per_second or chip.bf16_flops_per_second)
    for field in dataclasses.fields(Hardware):
        if field.name in row:
            assert getattr(chip, field.name) == row[field.name]["value"]


def test_every_source_is_used_and_can_be_found():
    used = {entry["source"] for row in ROWS.values() for entry in row.values() if isinstance(entry, dict)}
    assert used == set(TABLE["sources"])
    assert all("https://" in text for text in TABLE["sources"].values())


@pytest.mark.parametrize("name", NAMES)
def test_units_and_orders_of_magnitude(name):
    """Bytes, not gigabytes; per second, not per clock; what no chip of these years reaches is a slip."""
    chip = hardware_table()[name]
    assert 20e9 < chip.memory_bytes < 300e9
    assert 0.5e12 < chip.bytes_per_second < 10e12
    assert 100e12 < chip.bf16_flops_per_second < 3e15
    assert chip.dollars_per_hour is None or 0.3 < chip.dollars_per_hour < 20
    assert 40 < chip.bf16_flops_per_second / chip.bytes_per_second < 500 or name == "h20"
    assert 0.002 < chip.memory_bytes / chip.bytes_per_second < 0.06  # seconds for all of its memory


@pytest.mark.parametrize("name", NAMES)
def test_rates_are_dense_and_double_as_operands_halve(name):
    row = ROWS[name]
    rates = [row[key] for key in RATES if key in row]
    for entry in rates:
        if "with_sparsity" in entry:
            assert entry["with_sparsity"] / entry["value"] == pytest.approx(2, rel=0.015)
    for wide, narrow in itertools.pairwise(rates):
        assert narrow["value"] / wide["value"] == pytest.approx(2, rel=0.015)


def test_chips_that_share_a_die_agree():
    chips = hardware_table()
    for one, other in (("h100", "h200"), ("h100", "h800"), ("a100", "a800")):
        for rate in RATES:
            values = [getattr(chips[name], rate) for name in (one, other)]
            assert values[0] == values[1] or values[0] == pytest.approx(values[1], rel=0.002)
    assert chips["h800"].bytes_per_second == chips["h100"].bytes_per_second


def test_the_numbers_of_the_step3_report_are_kept():
    """Price, peak and bandwidth from its table, whatever a data sheet rounds."""
    report = {
        "h800": (2.0, 1.98e15, 3.35e12),
        "h20": (0.8, 2.96e14, 4.00e12),
        "a800": (0.75, 3.12e14, 2.00e12),
        "910b": (0.67, 2.80e14, 1.60e12),
    }
    for name, numbers in report.items():
        chip = hardware_table()[name]
        assert (chip.dollars_per_hour, chip.flops_per_second, chip.bytes_per_second) == numbers


def test_the_peak_of_a_width():
    b200, h100, a100 = find_hardware(["b200", "h100", "a100"])
    assert [b200.computing(bits).flops_per_second for bits in (4, 8, 16)] == [9e15, 4.5e15, 2.25e15]
    assert [h100.computing(bits).flops_per_second for bits in (4, 8, 16)] == [1979e12, 1979e12, 989e12]
    assert [a100.computing(bits).flops_per_second for bits in (4, 8, 16)] == [312e12] * 3
    own = Hardware(name="own", title="", flops_per_second=1e12, bytes_per_second=1e11, memory_bytes=1e9)
    assert own.computing(4) == own
    assert [b200.peak(bits) for bits in (4, 8, 16)] == [4.5e15, 4.5e15, 2.25e15]
    assert own.peak(16) == own.flops_per_second
    assert b200.storing(4) == b200.computing(8)


def test_no_price_no_dollars():
    row = find_hardware(["mi300x"])[0].row(decode_cost(from_recipe("step3"), 8192, 8))
    assert row["attention_dollars"] is None
    assert row["other_dollars"] is None
    assert row["bound"] == "memory"


@pytest.mark.parametrize("value", [0, -1.0, 1e25, math.inf, math.nan])
@pytest.mark.parametrize("field", ["flops_per_second", "bytes_per_second", "memory_bytes", "dollars_per_hour"])
def test_numbers_that_no_accelerator_has(field, value):
    numbers = {"flops_per_second": 1e12, "bytes_per_second": 1e11, "memory_bytes": 1e9}
    with pytest.raises(InputError, match=field):
        Hardware(name="own", title="", **numbers | {field: value})
