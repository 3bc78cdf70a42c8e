"""Every mode of the decode kernel once, at small shapes, for compute-sanitizer; `make test-sanitizer`.

    PYTHONPATH=src compute-sanitizer --tool memcheck python tests/sanitize_decode.py

With a second argument, `cuda serial`, the combining kernel starts when the first one has ended.

Results are compared with the plain twin, so that what is watched is what is tested.
"""

import sys
from dataclasses import replace

import torch

from decode_cases import assert_agrees, each, make_call
from multimatrix.ops import decode_launch
from multimatrix.ops.decode import decode_attention, plain_decode_attention

CASES = [
    *each({"dtype": torch.bfloat16, "S": 130, "B": 3, "lengths": (0, 17, 130), "splits": 1}),
    *each({"dtype": torch.bfloat16, "S": 130, "T": 3, "N": 10, "G": 2, "splits": 3, "page": 16}),
    *each({"dtype": torch.float16, "S": 130, "N": 70, "fp8": "token", "splits": 2, "layout": "static"}),
    *(replace(case, D=128, V=None) for case in each({"S": 130, "N": 70, "fp8": "token", "splits": 2}) if not case.V),
    # Of the kernel in Gluon.
    *(
        replace(case, D=128, V=None, R=None, S=S, N=70, dtype=torch.bfloat16, splits=2, page=page)
        for case in each({"fp8": "token"}, {"fp8": "tensor"}, {"fp8": None})
        for S, page in ((130, 0), (300, 16))
        if (case.source, case.V, case.R) in (("own", None, None), ("key", None, None), ("unrotated", None, None))
    ),
    *each({"dtype": torch.bfloat16, "S": 130, "fp8": "tensor", "page": 64, "window": 40, "sinks": True, "splits": 2}),
    *each({"dtype": torch.float32, "S": 70, "mask": "left", "alibi": True, "splits": 1, "layout": "swapped"}),
]


def main(device: str) -> None:
    for case in CASES:
        call = make_call(case, device)
        try:
            actual = decode_attention(*call.arguments, **call.options, num_splits=case.splits)
        except ValueError as refusal:
            print(f"{case.name}: {refusal}", flush=True)
            continue
        query, *cache = call.arguments
        expected = plain_decode_attention(query.double(), *cache, **call.options)
        assert_agrees(actual, expected, 1e-5 if case.dtype == torch.float32 and not case.fp8 else 1e-2)
        print(case.name, flush=True)


if __name__ == "__main__":
    if sys.argv[2:] == ["serial"]:
        decode_launch._can_launch_early = lambda device: False
    main(sys.argv[1] if len(sys.argv) > 1 else "cuda")
