"""The decode kernel through Triton's interpreter against an oracle in float64, in every mode and at odd shapes."""

from dataclasses import replace

import pytest
import torch

from decode_cases import SOURCES, Case, assert_agrees, each, make_call, oracle
from multimatrix.ops.decode import decode_attention, plain_decode_attention
from multimatrix.ops.rotary import RopeParameters

# Relative differences of norms, two to three times what rounding costs.
TOLERANCES = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
YARN = RopeParameters(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)

HEADS = [
    Case(N=N, G=G, T=T, D=32, S=S)
    for N, G, T, S in [
        *[(N, 1, 1, 33) for N in (1, 3, 16, 17, 63, 64, 65, 127, 128)],
        *[(2, 2, 1, 33), (6, 2, 1, 33), (9, 3, 1, 33), (3, 3, 5, 33), (14, 2, 3, 33), (96, 3, 2, 33)],
        *[(3, 1, T, 33) for T in range(2, 9)],
        *[(13, 1, 8, 70), (63, 1, 3, 40)],
    ]
]
DIMS = [
    case
    for D in (16, 64, 80, 96, 128, 192, 256, 576)
    for case in (
        Case(D=D, S=49),
        Case(source="key", D=D, S=49),
        # What is rotated is padded to powers of two, and has to fit: 64 of 576.
        Case(source="unrotated", D=D, S=49, R=64 if D == 576 else D - D % 32) if D >= 32 else Case(D=D, V=48),
        Case(source="slice", D=D, V={16: 16, 64: 48, 80: 64, 192: 128, 576: 512}.get(D, D - 32), S=49),
    )
] + [Case(D=192, V=128), Case(D=96, V=576), Case(D=16, V=256), Case(source="key", D=240), Case(D=112, V=528)]
LENGTHS = [
    *each({"B": 6, "S": 130, "lengths": (0, 1, 17, 64, 65, 130)}),
    *each({"one_length": "int"}, {"one_length": "tensor"}, {"B": 1, "S": 40}),
    Case(lengths=(0, 0)),
    Case(lengths=(0, 0), splits=3),
    Case(one_length="int", S=1),
    Case(T=4, lengths=(2, 63)),
    Case(T=4, lengths=(2, 0), splits=2, source="unrotated"),
    Case(source="unrotated", S=3001, window=45, B=1, D=32, N=1),
    Case(source="unrotated", S=130, rope=YARN),
    Case(source="unrotated", S=130, R=64, rope=RopeParameters(rope_type="linear", factor=3.0)),
]
LAYOUTS = each({"layout": "static"}, {"layout": "swapped"}, {"layout": "swapped", "T": 3, "N": 6, "G": 2})
PAGED = [
    *each({"page": 16}, {"page": 64}, {"page": 256}),
    *each({"page": 64, "B": 6, "S": 130, "lengths": (0, 1, 17, 64, 65, 130)}),
    *each({"page": 16, "B": 5, "S": 70, "lengths": (15, 16, 17, 0, 70)}),
    *each({"page": 16, "layout": "swapped", "N": 6, "G": 2, "splits": 2}, {"page": 64, "T": 3, "splits": 5}),
    Case(page=256, S=513, lengths=(256, 513)),
    Case(page=48, S=100),  # no multiple of the tile, nor the other way about
]
SPLITS = each(
    *[{"splits": splits, "B": 4, "S": 200, "lengths": (0, 17, 129, 200)} for splits in (1, 2, 5)],
    {"splits": 20, "S": 70, "N": 3},  # more than there are tiles
    {"splits": 5, "T": 2, "N": 6, "G": 2, "S": 150},
)
FEATURES = [
    *each({"mask": "left"}, {"mask": "documents", "T": 3}, {"mask": "shared", "T": 2}),
    *each({"mask": "left", "splits": 2, "page": 16, "S": 150}),
    *each({"alibi": True}, {"alibi": True, "T": 3, "N": 6, "G": 2, "splits": 2}),
    *each({"window": 1}, {"window": 20, "S": 150}, {"window": 50, "S": 150, "T": 3, "splits": 2}, {"window": 500}),
    *each({"sinks": True}, {"sinks": True, "splits": 3, "N": 6, "G": 2, "T": 2, "lengths": (0, 63)}),
    Case(T=2, N=6, G=2, S=150, mask="documents", alibi=True, window=9, sinks=True, page=16, splits=3),
]
PRECISIONS = [
    *each({"dtype": torch.float16}, {"dtype": torch.float16, "splits": 2, "S": 150}),
    *each({"dtype": torch.bfloat16}, {"dtype": torch.bfloat16, "splits": 2, "S": 150}),
]
FP8 = each(
    *[{"dtype": torch.float16, "fp8": fp8} | more for fp8 in ("token", "tensor") for more in ({}, {"page": 16})],
    {"dtype": torch.bfloat16, "fp8": "token", "splits": 2, "S": 150, "T": 2, "N": 6, "G": 2, "sinks": True},
    {"dtype": torch.bfloat16, "fp8": "tensor", "splits": 2, "S": 150, "layout": "static"},
    {"dtype": torch.float32, "fp8": "token", "layout": "swapped", "N": 6, "G": 2},
)
ALL = [*SOURCES, *HEADS, *DIMS, *LENGTHS, *LAYOUTS, *PAGED, *SPLITS, *FEATURES, *PRECISIONS, *FP8]


def run(case):
    call = make_call(case)
    return call, decode_attention(*call.arguments, **call.options, num_splits=case.splits)


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_agrees_with_the_oracle(case):
    call, actual = run(case)
    # The products of an FP8 cache are in float16.
    tolerance = max(TOLERANCES[case.dtype], 1e-3 if case.fp8 else 0)
    assert actual[0].dtype == case.dtype
    assert actual[1].dtype == torch.float32
    assert_agrees(actual, oracle(*call.arguments, **call.options), tolerance)


def test_every_case_has_a_name_of_its_own():
    names = [case.name for case in ALL]
    assert len(set(names)) == len(names), sorted(name for name in set(names) if names.count(name) > 1)


@pytest.mark.parametrize("case", each({"B": 3, "S": 150}), ids=lambda case: case.name)
def test_a_fixed_number_of_splits_does_not_depend_on_the_batch(case):
    call = make_call(case)
    lengths = call.options.pop("lengths")
    o, lse = decode_attention(*call.arguments, **call.options, lengths=lengths, num_splits=2)
    for b in range(case.B):
        row = [tensor[b : b + 1] for tensor in call.arguments]
        alone, lse_alone = decode_attention(*row, **call.options, lengths=lengths[b : b + 1], num_splits=2)
        assert torch.equal(alone[0], o[b])
        assert torch.equal(lse_alone[0], lse[b])


@pytest.mark.parametrize("source", ["own", "key"])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_precision_of_an_fp8_cache_does_not_depend_on_its_size(source, size):
    """Small values have small scales; multiplied into the weights, they must not fall out of float16's range."""
    case = Case(source=source, S=150, N=3, dtype=torch.float16, fp8="token")
    query, *cache = make_call(case).arguments
    query, options = query.float(), make_call(case).options
    options["scales"] = tuple(scale * size for scale in options["scales"])
    options["scale"] /= size if source == "key" else 1.0
    if source == "own":
        options["scales"] = (options["scales"][0] / size, options["scales"][1])
    o, lse = decode_attention(query, *cache, **options)
    exact_o, exact_lse = oracle(query, *cache, **options)
    assert_agrees((o / size, lse), (exact_o / size, exact_lse), 1e-3)


@pytest.mark.parametrize("splits", [1, 3])
def test_a_sink_of_minus_infinity_is_no_sink(splits):
    call = make_call(Case(sinks=True, lengths=(0, 63)))
    none = call.options | {"sinks": None}
    call.options["sinks"].fill_(float("-inf"))
    actual = decode_attention(*call.arguments, **call.options, num_splits=splits)
    expected = decode_attention(*call.arguments, **none, num_splits=splits)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_lengths_may_change_between_calls():
    """The same tensors with other numbers in them: what a CUDA graph replays."""
    case = Case(source="unrotated", S=150, page=16, splits=3, N=3)
    call = make_call(case)
    for lengths in ((1, 75), (64, 150), (0, 33)):
        fresh = make_call(replace(case, lengths=lengths))
        for tensor, new in zip(call.arguments, fresh.arguments, strict=True):
            tensor.copy_(new)
        for name in ("lengths", "block_table"):
            call.options[name].copy_(fresh.options[name])
        actual = decode_attention(*call.arguments, **call.options, num_splits=3)
        assert_agrees(actual, oracle(*call.arguments, **call.options), TOLERANCES[torch.float32])


@pytest.mark.parametrize("page", [0, 16, 64])
@pytest.mark.parametrize("source", ["own", "key", "unrotated"])
def test_slots_before_the_window_may_hold_anything(source, page):
    """A cache may drop what its window has passed."""
    case = Case(source=source, B=1, S=150, T=2, N=3, window=40, page=page, splits=2)
    call = make_call(case)
    oldest = case.S - case.T - case.window + 1
    for cache in call.arguments[1:]:
        if page:
            table = call.options["block_table"][0]
            cache[table[: oldest // page].long()] = float("nan")
            cache[table[oldest // page], :, : oldest % page] = float("nan")
        else:
            cache[:, :, :oldest] = float("nan")
    actual = decode_attention(*call.arguments, **call.options, num_splits=case.splits)
    expected = oracle(*call.arguments, **call.options)
    assert_agrees(actual, expected, TOLERANCES[case.dtype])
    assert_agrees(plain_decode_attention(*call.arguments, **call.options), expected, TOLERANCES[case.dtype])
