"""The same agreement on a CUDA device, in every precision; `make test-gpu`."""

import pytest
import torch

from cases import CASES, DEFAULTS, random_attention, weights_of
from multimatrix.cli import main
from multimatrix.evaluate import agreement
from multimatrix.ops.reference import reference_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """cuBLAS cannot run deterministically without a workspace setting, so memory is not poisoned here."""
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spec", DEFAULTS.values(), ids=DEFAULTS.keys())
def test_agreement(spec, dtype):
    checks = agreement.check_model(agreement.random_model(spec, dtype, "cuda"))
    assert all(check.passed for check in checks), [check for check in checks if not check.passed]


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("spec", CASES.values(), ids=CASES.keys())
def test_forward_and_every_gradient(spec, backend):
    module = random_attention(spec).cuda()
    x = torch.randn(2, 7, spec.hidden_size, dtype=torch.float64, device="cuda", requires_grad=True)
    weights = {name: weight.cpu() for name, weight in weights_of(module).items()}
    expected = torch.stack([reference_attention(spec, weights, sequence) for sequence in x.cpu()])
    actual = module(x, backend=backend).cpu()
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    inputs = [x, *module.parameters()]
    gradients = [torch.autograd.grad(y.square().sum(), inputs, retain_graph=True) for y in (actual, expected)]
    for actual_gradient, expected_gradient in zip(*gradients, strict=True):
        torch.testing.assert_close(actual_gradient, expected_gradient, rtol=1e-9, atol=1e-9)


def test_compare(tmp_path, monkeypatch, capsys):
    text = "\n".join('{"text": "' + f"story {i} of the fox and the hen " * 40 + '"}' for i in range(100))
    (tmp_path / "text.jsonl").write_text(text)
    monkeypatch.chdir(tmp_path)
    sizes = ["--hidden-size", "64", "--layers", "2", "--head-dim", "16", "--context", "64", "--steps", "10"]
    arguments = ["compare", "--data", "text.jsonl", "--seeds", "0,1", "--evaluations", "2", "--batch-size", "8", *sizes]
    monkeypatch.setattr("sys.argv", ["multimatrix", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code in (0, None)
    assert (tmp_path / "runs/compare/report.html").is_file()
    assert "bfloat16 on cuda" in capsys.readouterr().out
