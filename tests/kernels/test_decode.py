"""The decode kernel through Triton's interpreter against an oracle in float64, in every mode and at odd shapes."""

import pytest
import torch

from decode_cases import Case, assert_agrees, make_call, oracle
from multimatrix.ops.decode import decode_attention

TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3}

SOURCES = [
    Case(),
    Case(V=64),
    Case(D=64, V=96),
    Case(source="key"),
    Case(source="slice", V=64),
    Case(source="unrotated"),
    Case(source="unrotated", R=32),
]


@pytest.mark.parametrize("case", SOURCES, ids=lambda case: case.name)
def test_sources(case):
    call = make_call(case)
    actual = decode_attention(*call.arguments, **call.options, num_splits=case.splits)
    assert_agrees(actual, oracle(*call.arguments, **call.options), TOLERANCES[case.dtype], case)
