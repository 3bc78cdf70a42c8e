"""What importing costs and registers, each seen in a fresh interpreter."""

import subprocess
import sys

import pytest

ORDERS = {
    "ours-first": "import multimatrix; from transformers import AutoConfig, AutoModelForCausalLM",
    "theirs-first": "from transformers import AutoConfig, AutoModelForCausalLM; import multimatrix",
    "before-trainer": "import multimatrix; from transformers import Trainer, pipeline, AutoConfig",
    "model-first": "from multimatrix import MultimatrixForCausalLM; from transformers import AutoConfig",
}


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS.keys())
def test_auto_classes_know_us(order: str) -> None:
    code = f"""
{order}
config = AutoConfig.for_model("multimatrix", vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    attention={{"variant": "mfa_kr", "num_heads": 2, "head_dim": 4, "query_rank": 4}})
from transformers import AutoModelForCausalLM
print(type(AutoModelForCausalLM.from_config(config)).__name__)
"""
    assert run(code) == "MultimatrixForCausalLM"


def test_specs_import_no_torch() -> None:
    modules = "multimatrix.plan.numbers, multimatrix.plan.sources, multimatrix.plan.hardware, multimatrix.cli"
    assert run(f"import sys, {modules}; print('torch' in sys.modules)") == "False"


def test_public_names() -> None:
    import multimatrix

    for name in multimatrix.__all__:
        assert getattr(multimatrix, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = multimatrix.no_such_name
