"""The decode kernel as an operator of torch: its schema, its shapes under tracing, and what it refuses."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from decode_cases import Case, make_call
from multimatrix.ops.decode import decode_attention
from multimatrix.ops.rotary import RopeParameters, SlotRotation

CASES = [
    Case(V=64, N=3),
    Case(source="key", N=3, mask="left", sinks=True, alibi=True),
    Case(source="slice", V=64, N=3, page=16),
    Case(source="unrotated", N=3, T=2, splits=2, window=9),
    Case(source="unrotated", N=3, one_length="int"),
    Case(N=3, fp8="token", dtype=torch.bfloat16),
]


class Recorder(TorchDispatchMode):
    """Our operators as they are called."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.namespace == "multimatrix":
            self.calls.append((function, arguments, options or {}))
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_operator(case):
    call = make_call(case)
    with Recorder() as recorder:
        decode_attention(*call.arguments, **call.options, num_splits=case.splits)
    assert len(recorder.calls) == 1
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    # That an operator changes none of its arguments is seen by comparing them, which torch cannot do in e4m3.
    checks += ["test_schema"] if not case.fp8 else []
    torch.library.opcheck(*recorder.calls[0], test_utils=checks)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_compiles_as_one_graph(case):
    call = make_call(case)

    def double(*arguments):
        o, lse = decode_attention(*arguments, **call.options, num_splits=case.splits)
        return o * 2, lse * 2

    compiled = torch.compile(double, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(*call.arguments), double(*call.arguments), strict=True):
        assert torch.equal(actual, expected)


def odd_rows(tensor):
    """The same numbers, two apart in memory."""
    return torch.stack((tensor, tensor), dim=-1)[..., 0]


def two_heads(tensor):
    return tensor.expand(-1, 2, -1, -1)


ROPE = RopeParameters()
REFUSALS = {
    "tokens": (Case(T=9), {}, {}, "it takes 1 to 8 new tokens, not 9"),
    "heads": (Case(N=5), {}, {1: two_heads, 2: two_heads}, "5 query heads cannot be shared by 2 key heads"),
    "key-dim": (Case(), {}, {1: lambda x: x[..., :64].contiguous()}, "queries have 96 elements and keys 64"),
    "mask-tokens": (
        Case(T=2),
        {"mask": torch.ones(2, 1, 1, 63, dtype=torch.bool)},
        {},
        "a mask has a row for each of the 2 new tokens, not 1",
    ),
    "dtype": (Case(dtype=torch.float64), {}, {}, "it does not compute in torch.float64"),
    "dim": (Case(D=40), {}, {}, "its head dims are multiples of 16 up to 576"),
    "wide": (Case(D=592), {}, {}, "its head dims are multiples of 16 up to 576"),
    "value-dim": (Case(V=40), {}, {}, "its head dims are multiples of 16 up to 576"),
    "slice-dim": (Case(source="slice", V=40), {}, {}, "its head dims are multiples of 16 up to 576"),
    "no-rotation": (
        Case(source="unrotated"),
        {"rotation": None},
        {},
        "it rotates one block of a multiple of 32",
    ),
    "blocks": (
        Case(source="unrotated"),
        {"rotation": SlotRotation(ROPE, 48, 2)},
        {},
        "it rotates one block of a multiple of 32",
    ),
    "rotary-dim": (
        Case(source="unrotated"),
        {"rotation": SlotRotation(ROPE, 48)},
        {},
        "it rotates one block of a multiple of 32",
    ),
    "rotated-and-wide": (
        Case(source="unrotated", D=576),
        {},
        {},
        "half of the rotated part, and the rest, are padded to powers of two, 576 columns at most in all",
    ),
    "slice-without-dim": (Case(source="slice", V=64), {"value_dim": None}, {}, "a slice needs value_dim"),
    "additive-mask": (
        Case(),
        {"mask": torch.zeros(2, 1, 1, 63)},
        {},
        "it takes boolean masks that all heads share",
    ),
    "head-mask": (
        Case(),
        {"mask": torch.ones(2, 5, 1, 63, dtype=torch.bool)},
        {},
        "it takes boolean masks that all heads share",
    ),
    "mask-rows": (
        Case(),
        {"mask": odd_rows(torch.ones(2, 1, 1, 63, dtype=torch.bool))},
        {},
        "it takes boolean masks that all heads share",
    ),
    "query-rows": (Case(), {}, {0: odd_rows}, "it reads rows that lie together"),
    "key-rows": (Case(), {}, {1: odd_rows}, "it reads rows that lie together"),
    "value-rows": (Case(), {}, {2: odd_rows}, "it reads rows that lie together"),
    "query-gradient": (Case(), {}, {0: lambda x: x.requires_grad_()}, "it has no gradient"),
    "key-gradient": (Case(), {}, {1: lambda x: x.requires_grad_()}, "it has no gradient"),
}


@pytest.mark.parametrize(("case", "options", "changes", "sentence"), REFUSALS.values(), ids=REFUSALS.keys())
def test_refusals(case, options, changes, sentence):
    call = make_call(case)
    arguments = [changes.get(i, lambda x: x)(tensor) for i, tensor in enumerate(call.arguments)]
    with pytest.raises(ValueError) as refusal:
        decode_attention(*arguments, **(call.options | options))
    assert str(refusal.value) == f"the decode kernel does not take this: {sentence}"


def test_no_splits_are_refused():
    call = make_call(Case())
    with pytest.raises(ValueError, match="num_splits must be at least 1, got 0"):
        decode_attention(*call.arguments, **call.options, num_splits=0)


def test_gradients_are_no_obstacle_where_none_is_taken():
    call = make_call(Case())
    expected, _ = decode_attention(*call.arguments, **call.options)
    call.arguments[0].requires_grad_()
    with torch.no_grad():
        assert torch.equal(decode_attention(*call.arguments, **call.options)[0], expected)
