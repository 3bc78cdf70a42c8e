"""benchmarks/decode.py on tiny shapes: arguments, tables, JSON, and that a wrong result has no time."""

import json
import math
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def decode(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import decode

    return decode


def run(decode, capsys, *arguments):
    """Exit status, the tables, the JSON of the last line, and what went to stderr."""
    status = decode.main(["--smoke", *arguments])
    printed = capsys.readouterr()
    *tables, last = printed.out.splitlines()
    return status, "\n".join(tables), json.loads(last), printed.err


BYTES = {  # of a cached token, C = 32
    "own": 2 * 32 * 2,
    "key": 32 * 2,
    "unrotated": 32 * 2,
    "fp8": 2 * (32 + 4),
    "mla": 48 * 2,
}


def test_tables_and_json(decode, capsys, tmp_path):
    path = tmp_path / "decode.md"
    arguments = ["--modes", ",".join(BYTES), "--m", "2,4", "--dim", "32", "--shapes", "2x48,1x1k", "--seed", "0"]
    status, tables, report, _ = run(decode, capsys, *arguments, "--markdown", str(path), "--commit", "abc")
    assert status == 0
    assert report["commit"] == "abc"
    assert report["command"].startswith("python benchmarks/decode.py --smoke --modes own,key")
    assert report["versions"]["torch"] == torch.__version__
    assert not report["stopped_by_budget"]
    assert report["not_measured"] == []
    sizes = [(mode, m) for mode in BYTES for m in ((4,) if mode == "mla" else (2, 4))]
    expected = [(mode, m, *shape) for mode, m in sizes for shape in ((2, 48), (1, 1024))]
    assert [(row["mode"], row["m"], row["batch"], row["context"]) for row in report["rows"]] == expected
    for row in report["rows"]:
        tokens = row["batch"] * row["context"]
        dims = 48 + 32 if row["mode"] == "mla" else 64
        assert row["bytes"] == tokens * BYTES[row["mode"]]
        assert 0 < row["us_min"] <= row["us"] <= row["us_max"]
        assert row["error"] < 1e-2
        share = row["bytes"] / row["us"] * 1e-3 / report["read_bandwidth_gb_per_s"]
        assert row["share"] == pytest.approx(share, rel=1e-3)
        assert row["TFLOP/s"] == pytest.approx(2 * row["m"] * dims * tokens / row["us"] * 1e-6, rel=1e-3)
        assert row["peers"]["attend, eager"]["reason"] is None
        assert row["peers"]["attend, eager"]["us"] > 0
        assert row["peers"]["attend, eager"]["error"] < 2e-2
        assert row["peers"]["SDPA cuDNN, folded"]["us"] is None
        assert "backend" in row["peers"]["SDPA cuDNN, folded"]["reason"]
    assert "same last dimension" in report["rows"][-1]["peers"]["SDPA flash, grouped"]["reason"]
    text = path.read_text()
    for written in (tables, text):
        assert "value is a slice of the key, bf16 (MLA, absorbed): m = 4, C = 48, value 32; 96 bytes" in written
        assert f"{report['rows'][0]['us']:,.1f}" in written
        assert "Commit abc" in written
    assert report["command"] in text
    assert "| SDPA cuDNN, folded: us, share | - | - |" in text


def test_same_numbers_for_the_same_seed(decode, capsys):
    arguments = ["--modes", "fp8", "--shapes", "2x48", "--no-peers", "--seed"]
    errors = [run(decode, capsys, *arguments, seed)[2]["rows"][0]["error"] for seed in ("3", "3", "4")]
    assert errors[0] == errors[1] != errors[2]


def scaled(o):
    return o * 1.02


def nan_at_one_place(o):
    o[0, 0, 0, 0] = math.nan
    return o


def last_sequence_of_the_first(o):
    o[-1] = o[0]
    return o


def one_head(o):
    o[:, 1] *= 1.5
    return o


@pytest.mark.parametrize("spoil", [scaled, nan_at_one_place, last_sequence_of_the_first, one_head])
def test_a_wrong_kernel_has_no_time(decode, capsys, monkeypatch, spoil):
    right = decode.plain_decode_attention

    def wrong(q, *rest, **arguments):
        o, lse = right(q, *rest, **arguments)
        return spoil(o), lse

    monkeypatch.setattr(decode, "plain_decode_attention", wrong)
    status, tables, report, stderr = run(decode, capsys, "--modes", "own", "--shapes", "3x64")
    assert status == 1
    (row,) = report["rows"]
    assert row["us"] is row["us_min"] is row["share"] is row["TFLOP/s"] is None
    assert row["reason"].startswith("wrong: relative error")
    assert "kernel has no time at own m=4 C=32 3x64: wrong" in stderr
    lines = {line.split("  ")[0]: line.split()[-1] for line in tables.splitlines() if line.strip()}
    assert lines["multimatrix, us"] == lines["share of read bandwidth"] == "wrong"
    assert row["peers"]["attend, sdpa"]["us"] > 0  # the peers are right all the same


def test_a_wrong_last_buffer_set_has_no_time(decode, capsys, monkeypatch):
    right, seen = decode.plain_decode_attention, []

    def wrong(q, *rest, **arguments):
        if all(q is not other for other in seen):
            seen.append(q)
        o, lse = right(q, *rest, **arguments)
        return (o if q is seen[0] else -o), lse

    monkeypatch.setattr(decode, "plain_decode_attention", wrong)
    status, _, report, _ = run(decode, capsys, "--modes", "key", "--shapes", "1x64", "--no-peers")
    assert status == 1
    assert len(seen) == 2
    assert report["rows"][0]["us"] is None


def test_a_kernel_that_fails(decode, capsys, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("out of shared memory")

    monkeypatch.setattr(decode, "plain_decode_attention", fail)
    status, _, report, stderr = run(decode, capsys, "--modes", "own", "--no-peers")
    assert status == 1
    assert [row["reason"] for row in report["rows"]] == ["out of shared memory"] * 2
    assert "out of shared memory" in stderr


def test_a_wrong_peer_has_no_time(decode, capsys, monkeypatch):
    import decode_peers

    monkeypatch.setattr(decode_peers, "eager", lambda q, key, value, *rest: torch.zeros_like(q))
    status, tables, report, _ = run(decode, capsys, "--modes", "own", "--shapes", "2x48")
    assert status == 0
    peer = report["rows"][0]["peers"]["attend, eager"]
    assert peer["us"] is None
    assert peer["share"] is None
    assert peer["reason"].startswith("wrong")
    assert next(line for line in tables.splitlines() if line.startswith("attend, eager")).endswith("wrong")


def test_a_budget_that_is_spent(decode, capsys):
    status, tables, report, _ = run(decode, capsys, "--modes", "own,key", "--shapes", "2x48", "--budget", "0")
    assert status == 0
    assert report["rows"] == []
    assert report["stopped_by_budget"]
    assert report["not_measured"] == ["own m=4 C=32 2x48", "key m=4 C=32 2x48"]
    assert "Stopped by --budget" in tables


def test_a_budget_keeps_time_for_the_longest_step(decode, monkeypatch):
    import decode_measure

    now = [100.0]
    monkeypatch.setattr(decode_measure.time, "monotonic", lambda: now[0])
    budget = decode.Budget(10)
    for seconds in (4.0, 1.0):
        assert budget.allows("case")
        with budget.step("case"):
            now[0] += seconds
    assert budget.allows("case")  # 5 s are left, one took 4
    now[0] += 1.5
    assert not budget.is_spent
    assert budget.allows("another")
    assert not budget.allows("case")
    assert budget.is_spent


def test_default_is_the_table_and_full_is_everything(decode, monkeypatch):
    monkeypatch.setattr(decode.torch.cuda, "is_available", lambda: True)
    counts = {}
    for words in ((), ("--full",), ("--quick",)):
        options = decode.parse(list(words))
        counts[words] = len(decode.make_cases(options.modes, options.m, options.dim, options.shapes, smoke=False))
    assert counts == {(): 4 * 6, ("--full",): (4 * 9 + 1) * 6, ("--quick",): 4 * 3}
    assert decode.parse(["--quick"]).no_peers
    assert not decode.parse([]).no_peers


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--shapes", "16"], "a shape is BATCHxCONTEXT such as 16x8k, got '16'"),
        (["--shapes", "0x8k"], "got '0x8k'"),
        (["--modes", "mfa"], "there is no mode 'mfa'; the modes are own, key, unrotated, fp8, mla"),
        (["--m", "64,0"], "a positive number is needed, got '0'"),
    ],
)
def test_refused_arguments(decode, capsys, words, said):
    with pytest.raises(SystemExit) as exit_:
        decode.main(["--smoke", *words])
    assert exit_.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_device(decode, capsys):
    with pytest.raises(SystemExit) as exit_:
        decode.main([])
    assert exit_.value.code == 2
    assert "no CUDA device; --smoke runs on a CPU" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(decode, capsys):
    status = decode.main(["--full", "--quick", "--m", "16", "--dim", "64", "--shapes", "2x1k"])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert status == 0, report
    assert len(report["rows"]) == 5
    assert 0.3e3 < report["read_bandwidth_gb_per_s"] < 20e3
