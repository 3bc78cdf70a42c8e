"""The plain twin of the decode kernel against an oracle in float64, and who is told that there is no kernel."""

import os
import subprocess
import sys

import pytest
import torch

from decode_cases import SOURCES, Case, assert_agrees, each, make_call, oracle
from multimatrix.ops.decode import decode_attention, plain_decode_attention
from multimatrix.ops.rotary import RopeParameters

TOLERANCES = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
LAYOUTS = [
    {"S": 33},
    {"S": 40, "layout": "static", "T": 3, "N": 6, "G": 2},
    {"S": 40, "layout": "swapped", "T": 8, "N": 3, "G": 3},
    {"S": 40, "page": 16, "B": 4, "lengths": (0, 1, 16, 33), "N": 4, "G": 2},
    {"S": 70, "page": 64, "layout": "swapped", "T": 2, "lengths": (1, 70)},
]
FEATURES = [
    *[{}, {"mask": "left"}, {"mask": "documents"}, {"mask": "shared"}, {"alibi": True}, {"window": 9}, {"sinks": True}],
    *[{"fp8": "token"}, {"fp8": "tensor"}],
    {"mask": "documents", "alibi": True, "window": 9, "sinks": True, "fp8": "token"},
]
CASES = [
    *each(*[{"dtype": torch.float64} | layout | feature for layout in LAYOUTS for feature in FEATURES]),
    *each(*[{"dtype": dtype} | layout for dtype in list(TOLERANCES)[1:] for layout in LAYOUTS]),
    *each({"dtype": torch.float64, "one_length": "int"}, {"dtype": torch.float64, "one_length": "tensor"}),
    *[
        Case(source="unrotated", dtype=torch.float64, S=70, rope=rope, R=R, blocks=blocks)
        for rope in (
            RopeParameters(rope_type="yarn", factor=4.0, original_max_position_embeddings=32),
            RopeParameters(rope_type="linear", factor=3.0),
        )
        for R, blocks in ((None, 1), (32, 1), (None, 2), (16, 3))
    ],
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_twin_agrees_with_the_oracle(case):
    call = make_call(case)
    actual = plain_decode_attention(*call.arguments, **call.options)
    assert actual[0].dtype == case.dtype
    assert actual[1].dtype == (torch.float64 if case.dtype == torch.float64 else torch.float32)
    assert_agrees(actual, oracle(*call.arguments, **call.options), TOLERANCES[case.dtype])


@pytest.mark.parametrize("case", SOURCES, ids=lambda case: case.name)
def test_the_oracle_notices(case):
    """One number changed in one cached token that is seen changes the result; one that is not seen does not."""
    call = make_call(case)
    expected, _ = oracle(*call.arguments, **call.options)
    length = int(call.options["lengths"][0])
    for slot, is_seen in ((0, True), (length - 1, True), (length, False)):
        key = call.arguments[1].clone()
        key[0, 0, slot, 3] += 1.0
        o, _ = oracle(call.arguments[0], key, *call.arguments[2:], **call.options)
        assert (o[0] != expected[0]).any() == is_seen
        assert torch.equal(o[1], expected[1])


def test_the_kernel_refuses_a_cpu():
    call = make_call(Case())
    with pytest.raises(ValueError, match="the decode kernel does not take this: it runs on a GPU"):
        decode_attention(*call.arguments, **call.options)


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
from decode_cases import Case, make_call
from multimatrix.ops.decode import decode_attention
call = make_call(Case())
try:
    decode_attention(*call.arguments, **call.options)
except ValueError as error:
    print(error)
"""


def test_the_kernel_needs_triton():
    paths = [path for path in sys.path if path]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", WITHOUT_TRITON]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert process.stdout.startswith("the decode kernel does not take this: triton ")
    assert "not installed" in process.stdout
