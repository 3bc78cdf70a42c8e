# Two commands: `make demo` and `make test`. Each makes the environment first and reuses it afterwards.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Idle OpenMP threads must sleep: beside another busy process, spinning ones slow training tenfold.
export OMP_WAIT_POLICY := passive

.PHONY: demo test test-slow test-gpu test-sanitizer lint clean
.DEFAULT_GOAL := test

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "multimatrix needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/multimatrix compare --preset demo

test: $(STAMP) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto tests/kernels

test-slow: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m slow

# On a machine with a CUDA device, with whatever torch is installed there.
test-gpu:
	PYTHONPATH=src $(PYTHON) -m pytest -m gpu

# Likewise, with compute-sanitizer: reads and writes outside of memory, and races in shared memory. Of a kernel whose warps
# differ, racecheck reports how the compiler hands them their arguments, at the line of `warp_specialize`.
test-sanitizer:
	PYTHONPATH=src compute-sanitizer --tool memcheck --error-exitcode 1 $(PYTHON) tests/sanitize_decode.py
	PYTHONPATH=src compute-sanitizer --tool racecheck --error-exitcode 1 --kernel-name-exclude kernel_substring=pipeline $(PYTHON) tests/sanitize_decode.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache
