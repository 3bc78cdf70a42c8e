"""The decode kernel on a GPU at real sizes, in the precisions it is for; `make test-gpu`."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from decode_cases import Case, assert_agrees, differences, make_call
from multimatrix.ops.decode import decode_attention, plain_decode_attention
from multimatrix.ops.fp8 import dequantize
from multimatrix.ops.rotary import RopeParameters, SlotRotation

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda"
LENGTHS = (0, 1, 17, 4096, 12_345, 32_768)
REAL = Case(B=6, S=32_768, lengths=LENGTHS, N=64, D=256, dtype=torch.bfloat16)
MLA = replace(REAL, source="slice", N=128, D=576, V=512)
SOURCES = [REAL, replace(REAL, source="key"), MLA, replace(REAL, source="unrotated")]
FP8 = replace(REAL, fp8="token")
TOLERANCES = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-5}


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Not the whole test: cuBLAS cannot run deterministically without a workspace setting. See `poisoned`."""
    torch.use_deterministic_algorithms(False)


@contextmanager
def poisoned():
    """Uninitialized memory is NaN within."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def kernel(call, **options):
    with poisoned():
        return decode_attention(*call.arguments, **(call.options | options))


def exact(call):
    """The plain twin in float64."""
    query, *cache = call.arguments
    return plain_decode_attention(query.double(), *cache, **call.options)


def rough(call):
    """o as torch computes it in the precision of the query: scores and weights rounded, the softmax in float32."""
    query, *cache = call.arguments
    options, dtype = call.options, query.dtype
    inside = torch.arange(cache[0].shape[2], device=query.device) < options["lengths"][:, None]  # [B, S]
    for i, tensor in enumerate(cache):
        plain = dequantize(tensor, options["scales"][i], dtype) if "scales" in options else tensor
        cache[i] = plain.masked_fill(~inside[:, None, :, None], 0.0)
    keys, values = cache[0], cache[-1]
    if options["source"] == "slice":
        values = keys[..., : options["value_dim"]]
    elif options["source"] == "unrotated":
        keys = options["rotation"].at(keys.shape[2], torch.float64, query.device)(keys.double()).to(dtype)
    scores = (query.squeeze(2) @ keys.squeeze(1).transpose(-1, -2)).float() * options["scale"]  # [B, N, S]
    scores = scores.masked_fill(~inside[:, None], -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0.0).to(dtype)
    return (weights @ values.squeeze(1)).unsqueeze(2)


AT_REAL_SIZES = [
    *[replace(case, D=D) for case in SOURCES if case is not MLA for D in (64, 128, 192, 256, 512)],
    *[replace(case, D=D, N=N) for case in SOURCES if case is not MLA for D in (128, 256) for N in (16, 128)],
    *[MLA, replace(MLA, N=16)],
    *[replace(case, dtype=torch.float16) for case in SOURCES],
    *[replace(case, fp8="token") for case in SOURCES],
    *[replace(case, fp8="token", D=D) for case in SOURCES[:2] for D in (128, 512)],
    *[replace(case, fp8="tensor") for case in SOURCES],
    replace(SOURCES[-1], R=64),
    replace(SOURCES[-1], R=64, fp8="token"),
]


@pytest.mark.parametrize("case", AT_REAL_SIZES, ids=lambda case: case.name)
def test_error_is_at_most_twice_that_of_torch(case):
    call = make_call(case, DEVICE)
    o, lse = kernel(call)
    exact_o, exact_lse = exact(call)
    assert torch.equal(lse.isneginf(), exact_lse.isneginf())
    assert not o[exact_lse.isneginf()].any()
    error, allowed = differences(o, exact_o), differences(rough(call), exact_o)
    assert o.isfinite().all()
    assert error["relative"] <= 2 * allowed["relative"], (error, allowed)
    assert error["absolute"] <= 2 * allowed["absolute"], (error, allowed)
    assert error["cosine"] <= 4 * allowed["cosine"], (error, allowed)
    alive = exact_lse.isfinite()
    assert (lse - exact_lse)[alive].abs().max() <= 1e-2


ASKED = [
    *[replace(case, page=64, S=8192, lengths=(0, 1, 64, 65, 5000, 8192)) for case in SOURCES],
    replace(REAL, page=16, S=4096, lengths=(0, 1, 16, 17, 2500, 4096)),
    replace(REAL, page=256, S=4096, lengths=(0, 1, 256, 257, 2500, 4096)),
    *[replace(case, page=64, S=4096, B=2, lengths=(700, 4096), fp8="token") for case in SOURCES],
    *[replace(case, T=8, G=2, S=4096, B=2, lengths=(5, 4096), layout="swapped") for case in SOURCES],
    replace(REAL, T=3, S=4096, B=2, lengths=(77, 4096), mask="documents", layout="static"),
    replace(REAL, N=5, D=96, S=4096, B=2, lengths=(77, 4096), alibi=True, window=1000, sinks=True),
    replace(SOURCES[-1], T=2, S=4096, B=2, lengths=(77, 4096), mask="left", alibi=True, sinks=True, page=16),
    replace(REAL, dtype=torch.float32, S=4096, B=2, lengths=(77, 4096), D=128),
    replace(SOURCES[-1], dtype=torch.float32, S=4096, B=2, lengths=(77, 4096), D=128, N=16),
]


# Queries in bfloat16 are split in two for an e4m3 cache, others are not; chunks of keys and values have other widths.
ODD = [
    replace(case, N=N, S=2048, B=3, lengths=(1, 700, 2048), D=D, V=V, fp8="token", dtype=dtype)
    for case, V in ((REAL, None), (REAL, 32), (SOURCES[1], None))
    for N, D, dtype in (
        *[(70, D, torch.bfloat16) for D in (16, 48, 80, 96, 112, 160, 240, 320, 448, 576)],
        *[(5, D, torch.float16) for D in (32, 96, 128)],
    )
]
# Small and odd numbers of rows, several tokens and key heads, in the kernel of its own that Hopper has.
PIPELINED = [
    replace(case, **change)
    for case in (
        replace(SOURCES[-1], D=128),
        replace(REAL, D=64, V=256, fp8="token"),
        replace(REAL, D=128, fp8="tensor"),
    )
    for change in (
        {"B": 4, "S": 130, "lengths": (0, 1, 17, 130), "N": 70},
        {"B": 2, "S": 3000, "lengths": (64, 3000), "N": 6, "T": 3, "G": 2, "layout": "static"},
        {"B": 2, "S": 600, "lengths": (33, 600), "N": 128, "page": 16},
        {"B": 2, "S": 600, "lengths": (65, 600), "N": 128, "page": 256, "layout": "swapped"},
        {"B": 1, "S": 40, "lengths": (40,), "N": 1},
        {"B": 2, "S": 700, "one_length": "tensor", "lengths": None, "N": 16},
    )
]


@pytest.mark.parametrize("case", [*ASKED, *ODD, *PIPELINED], ids=lambda case: case.name)
def test_agrees_with_the_twin(case):
    call = make_call(case, DEVICE)
    assert_agrees(kernel(call), exact(call), TOLERANCES[case.dtype])


def fewer_tokens(cases, B=3, S=8192):
    return [replace(case, B=B, S=S, lengths=(1, 5000, S)) for case in cases]


@pytest.mark.parametrize("case", fewer_tokens([*SOURCES, FP8]), ids=lambda case: case.name)
def test_two_hundred_repetitions_are_bit_identical(case):
    call = make_call(case, DEVICE)
    first = kernel(call)
    differ = torch.zeros((), dtype=torch.bool, device=DEVICE)
    for _ in range(200):
        for actual, expected in zip(kernel(call), first, strict=True):
            differ |= (actual != expected).any()
    assert not differ


@pytest.mark.parametrize("case", fewer_tokens([*SOURCES, FP8]), ids=lambda case: case.name)
def test_a_fixed_number_of_splits_does_not_depend_on_the_batch(case):
    call = make_call(case, DEVICE)
    o, lse = kernel(call, num_splits=7)
    for b in range(case.B):
        row = [tensor[b : b + 1] for tensor in call.arguments]
        options = call.options | {"lengths": call.options["lengths"][b : b + 1], "num_splits": 7}
        if case.fp8:
            options["scales"] = tuple(scale[b : b + 1] for scale in options["scales"])
        alone, lse_alone = decode_attention(*row, **options)
        assert torch.equal(alone[0], o[b])
        assert torch.equal(lse_alone[0], lse[b])


@pytest.mark.parametrize("page", [0, 64])
@pytest.mark.parametrize("case", fewer_tokens([*SOURCES, FP8]), ids=lambda case: case.name)
def test_a_captured_call_is_replayed_with_lengths_that_grow(case, page):
    case = replace(case, page=page)
    call = make_call(replace(case, lengths=(0, 1, 2)), DEVICE)
    decode_attention(*call.arguments, **call.options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, lse = decode_attention(*call.arguments, **call.options)
    for lengths in ((0, 1, 2), (1, 64, 65), (4000, 4097, 8192)):
        fresh = make_call(replace(case, lengths=lengths), DEVICE)
        changed = [*call.arguments, *call.options.get("scales", ())]
        for tensor, new in zip(changed, [*fresh.arguments, *fresh.options.get("scales", ())], strict=True):
            tensor.copy_(new)
        for name in ("lengths", "block_table"):
            if name in call.options:
                call.options[name].copy_(fresh.options[name])
        graph.replay()
        expected_o, expected_lse = kernel(fresh)
        assert torch.equal(o, expected_o)
        assert torch.equal(lse, expected_lse)
        assert_agrees((o, lse), exact(fresh), TOLERANCES[case.dtype])


@pytest.mark.parametrize("one_length", [None, "int", "tensor"])
@pytest.mark.parametrize("case", fewer_tokens([*SOURCES, FP8]), ids=lambda case: case.name)
def test_nothing_waits_for_the_device(case, one_length):
    case = replace(case, one_length=one_length, lengths=None)
    call = make_call(replace(case, mask="left", sinks=True), DEVICE)
    decode_attention(*call.arguments, **call.options)  # the first call compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        decode_attention(*call.arguments, **call.options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("case", fewer_tokens([REAL, SOURCES[-1]]), ids=lambda case: case.name)
def test_compiles_as_one_graph(case):
    call = make_call(case, DEVICE)

    def double(*arguments):
        o, lse = decode_attention(*arguments, **call.options)
        return o * 2, lse * 2

    for actual, expected in zip(
        torch.compile(double, fullgraph=True)(*call.arguments), double(*call.arguments), strict=True
    ):
        assert torch.equal(actual, expected)


# More than 2^31 elements, 4.4 GB.
HUGE = 2_200_000_000


def test_many_pages():
    """Pages at both ends of a pool of more than 2^31 elements."""
    page, dim, slots = 64, 256, 640
    pool = torch.full((HUGE // (page * dim), 1, page, dim), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    small = make_call(Case(source="key", B=2, S=slots, N=64, D=dim, page=page, dtype=torch.bfloat16), DEVICE)
    query, pages = small.arguments
    count = pages.shape[0]
    pool[: count // 2] = pages[: count // 2]
    pool[-(count - count // 2) :] = pages[count // 2 :]
    table = small.options["block_table"]
    moved = torch.where((table >= count // 2) & (table < count), table + pool.shape[0] - count, table)
    o, lse = decode_attention(query, pool, **(small.options | {"block_table": moved}))
    assert_agrees((o, lse), exact(small), TOLERANCES[torch.bfloat16])
    rotation = SlotRotation(RopeParameters(), dim)
    small.options |= {"source": "unrotated", "rotation": rotation}
    o, lse = decode_attention(query, pool, **(small.options | {"block_table": moved}))
    assert_agrees((o, lse), exact(small), TOLERANCES[torch.bfloat16])


def test_many_sequences():
    """The first and the last of a batch whose cache has more than 2^31 elements."""
    dim, slots, read = 256, 131_072, 1000
    batch = HUGE // (slots * dim) + 1
    cache = torch.full((batch, 1, slots, dim), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    small = make_call(Case(B=2, S=read, N=64, D=dim, lengths=(read, read), dtype=torch.bfloat16), DEVICE)
    query, key, _ = small.arguments
    cache[[0, -1], :, :read] = key
    wide = torch.zeros(batch, 64, 1, dim, dtype=torch.bfloat16, device=DEVICE)
    wide[[0, -1]] = query
    lengths = torch.zeros(batch, dtype=torch.int32, device=DEVICE)
    lengths[[0, -1]] = read
    o, lse = decode_attention(wide, cache, scale=small.options["scale"], source="key", lengths=lengths)
    small.arguments, small.options["source"] = (query, key), "key"
    assert_agrees((o[[0, -1]], lse[[0, -1]]), exact(small), TOLERANCES[torch.bfloat16])
    assert not o[1:-1].any()


def test_many_tokens():
    """The last tokens of one sequence whose cache has more than 2^31 elements."""
    dim, read = 256, 1000
    slots = HUGE // dim
    cache = torch.full((1, 1, slots, dim), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    small = make_call(Case(source="key", B=1, S=read, N=64, D=dim, dtype=torch.bfloat16), DEVICE)
    query, key = small.arguments
    cache[:, :, -read:] = key
    cache[:, :, -read - 64 : -read] = 0.0  # the first tile may begin before the window
    options = small.options | {"lengths": slots, "window": read}
    assert_agrees(decode_attention(query, cache, **options), exact(small), TOLERANCES[torch.bfloat16])
