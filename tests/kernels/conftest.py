"""These tests run kernels through Triton's interpreter, which cannot share a process with the compiler.

A pytest run of their own, `TRITON_INTERPRET=1 python -m pytest tests/kernels`; `make test` makes it. Uninitialized
memory is poisoned with NaN as in all tests.
"""

import os

assert os.environ.get("TRITON_INTERPRET") == "1", "run these tests on their own, with TRITON_INTERPRET=1"
