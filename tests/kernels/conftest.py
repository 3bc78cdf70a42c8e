"""These tests run kernels through Triton's interpreter, which cannot share a process with the compiler.

A pytest run of their own, `TRITON_INTERPRET=1 python -m pytest tests/kernels`; `make test` makes it. Uninitialized
memory is poisoned with NaN as in all tests.
"""

import importlib.util
import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("tests/kernels is a run of its own: TRITON_INTERPRET=1 python -m pytest tests/kernels")


@pytest.fixture(autouse=True)
def corrected_interpreter(monkeypatch):
    from interpreter import corrected

    corrected(monkeypatch)


def pytest_collection_modifyitems(items):
    if importlib.util.find_spec("triton") is None:
        for item in items:
            item.add_marker(pytest.mark.skip(reason="triton is not installed"))


def pytest_configure(config):
    # log2(0) and 1 / 0 of what sees nothing are meant, and numpy says so every time.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.*")
