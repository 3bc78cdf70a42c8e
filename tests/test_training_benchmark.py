"""benchmarks/training.py at its tiny size: arguments, tables, JSON, and that a wrong model has no time."""

import json
import sys
from pathlib import Path

import pytest
import torch

from multimatrix.attention import VARIANTS
from multimatrix.model import modeling

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def training(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import training

    torch._dynamo.reset()
    return training


@pytest.fixture(autouse=True)
def plain_memory():
    torch.use_deterministic_algorithms(False)


def run(training, capsys, *arguments):
    """Exit status, the tables, the JSON of the last line, and what went to stderr."""
    status = training.main(["--smoke", "--steps", "2", *arguments])
    printed = capsys.readouterr()
    *tables, last = printed.out.splitlines()
    return status, "\n".join(tables), json.loads(last), printed.err


def test_tables_and_json(training, capsys, tmp_path):
    path = tmp_path / "training.md"
    arguments = ["--variants", "mha,llama,mfa", "--commit", "abc", "--markdown", str(path)]
    status, tables, report, _ = run(training, capsys, *arguments)
    assert status == 0
    assert [row["model"] for row in report["rows"]] == ["mha", "llama", "mfa"]
    assert report["command"].startswith("python benchmarks/training.py --smoke --steps 2")
    mha, llama, mfa = report["rows"]
    for row in report["rows"]:
        assert row["reason"] is None
        assert row["mfu"] is None  # a CPU has no peak in the table
        assert row["flops_per_token"] == sum(row["flops_by_part"].values())
        assert row["tokens_per_second"] == pytest.approx(128 / row["seconds_per_step"], rel=1e-3)
        assert row["batch"] * row["passes"] * row["context"] == 128
        assert row["last_loss"] < row["first_loss"]
        assert 0 < row["gradient_error"] < 0.05
    assert mha["flops_by_part"] == llama["flops_by_part"]
    assert mha["parameters"] == llama["parameters"]
    assert mfa["parameters"] == pytest.approx(mha["parameters"], rel=0.01)
    text = path.read_text()
    for written in (tables, text):
        assert "Commit abc" in written
        assert "MHA at tiny, context 32: " in written
        assert f"{mfa['tokens_per_second']:,.0f}" in written
    assert "| transformers llama | 4 x 16 |" in text


@pytest.mark.parametrize("compile_", ["model", "none"])
def test_other_ways_to_compile(training, capsys, compile_):
    status, _, report, _ = run(training, capsys, "--variants", "mfa_kr", "--compile", compile_)
    assert status == 0
    assert report["compile"] == compile_


def test_a_wrong_loss_or_gradient_has_no_time(training, capsys, monkeypatch):
    right = modeling.next_token_loss

    def another_loss(*arguments, **options):
        return right(*arguments, **options) * 1.1

    def another_gradient(hidden, *arguments, **options):
        return right(1.3 * hidden - 0.3 * hidden.detach(), *arguments, **options)

    for wrong, said in ((another_loss, "the compiled loss is"), (another_gradient, "the compiled gradient is off by")):
        monkeypatch.setattr(modeling, "next_token_loss", wrong)
        status, tables, report, stderr = run(training, capsys, "--variants", "mfa")
        assert status == 1
        assert report["rows"][0]["reason"].startswith(f"wrong: {said}")
        assert "no time for tiny mfa 32: wrong" in stderr
        assert "wrong" in next(line for line in tables.splitlines() if line.startswith("mfa"))


def test_a_loss_that_does_not_fall_has_no_time(training, capsys, monkeypatch):
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    status, _, report, _ = run(training, capsys, "--variants", "mha")
    assert status == 1
    assert "does not fall" in report["rows"][0]["reason"]


def test_fewer_sequences_where_memory_ends(training, capsys, monkeypatch):
    import training_measure

    seen, right = [], training_measure._measure

    def small(case, settings, batch):
        seen.append(batch)
        if batch > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return right(case, settings, batch)

    monkeypatch.setattr(training_measure, "_measure", small)
    status, _, report, stderr = run(training, capsys, "--variants", "mha")
    assert status == 0
    assert seen == [2, 1]
    assert (report["rows"][0]["batch"], report["rows"][0]["passes"]) == (1, 4)
    assert "out of memory, 1 sequences" in stderr


def test_a_budget_that_is_spent(training, capsys):
    status, tables, report, _ = run(training, capsys, "--budget", "0", "--variants", "mha,mfa")
    assert status == 0
    assert report["rows"] == []
    assert report["not_measured"] == ["tiny mha 32", "tiny mfa 32"]
    assert "Stopped by --budget" in tables


def test_every_variant_has_a_row_at_every_size(training):
    import training_models

    assert set(training_models.MODELS) == (VARIANTS.keys() - {"fpba"}) | training_models.LLAMAS.keys()
    cases = training_models.make_cases(["350m", "1b", "124m"], training_models.MODELS, [2048])
    assert [(case.size_name, case.model) for case in cases[:4]] == [
        ("350m", "mfa"),
        ("350m", "mha"),
        ("350m", "llama"),
        ("1b", "mfa"),
    ]
    millions = {"124m": 124, "350m": 360, "1b": 1115}
    for case in cases:
        assert case.sizes.parameters / 1e6 == pytest.approx(millions[case.size_name], rel=0.01)
        assert case.sizes.intermediate_size % 64 == 0 or case.size_name == "124m"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--variants", "fpba"], "there is no 'fpba'; there are mfa, mha, llama"),
        (["--size", "7b"], "there is no '7b'; there are 124m, 350m, 1b"),
        (["--steps", "0"], "a positive number is needed, got '0'"),
    ],
)
def test_refused_arguments(training, capsys, words, said):
    with pytest.raises(SystemExit) as exit_:
        training.main(["--smoke", *words])
    assert exit_.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_device(training, capsys):
    with pytest.raises(SystemExit) as exit_:
        training.main([])
    assert exit_.value.code == 2
    assert "no CUDA device; --smoke runs on a CPU" in capsys.readouterr().err


def test_bars(training):
    import training_report

    def row(size, model, speed, mfu):
        return {
            "size": size, "model": model, "context": 2048, "reason": None, "tokens_per_second": speed, "mfu": mfu,
        }  # fmt: skip

    rows = [row("350m", "mfa", 100, 0.46), row("1b", "mfa", 50, 0.44), row("1b", "mha", 90, 0.5)]
    rows += [row("1b", "llama", 60, 0.4), row("1b", "gqa", 10, 0.1)]
    assert training_report.bars({"rows": rows}) == [
        "MFA at 350m: MFU 46.0 %, the bar is 45 %: met.",
        "MFA at 1b: MFU 44.0 %, the bar is 50 %: missed.",
        "MHA at 1b, context 2,048: 1.50 times the tokens/s of transformers' llama.",
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(training, capsys):
    status = training.main(["--size", "tiny", "--variants", "mfa,llama", "--context", "64", "--tokens-per-step", "256"])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert status == 0, report
    assert sys.modules["training_measure"].BACKENDS.keys() == report["rows"][0]["attention"]["ms"].keys()
