"""Uninitialized memory is poisoned with NaN in every test, so that nothing can depend on it by luck."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def token_cache(tmp_path_factory):
    """Nothing is left in the cache of whoever runs the tests."""
    os.environ["MULTIMATRIX_CACHE"] = str(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(autouse=True)
def poisoned_memory():
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
