"""Two processes train as one: the same losses, and checkpoints that the other number reads."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from command import multimatrix
from multimatrix.train.metrics import MetricsFile
from train_settings import SMALL, losses, rows, steps_kept, write_text

HERE = Path(__file__).parent
# What is trained by two processes from the beginning, and beside it by one: with 5 blocks to validate on, which two
# cannot share out; with all that shards can be combined with; with an optimizer that looks at whole matrices.
WORDS = {
    "ddp": ["--validation-tokens", 80],
    "fsdp": ["--fsdp", "--activation-checkpointing", "--micro-batch-size", 1, "--no-tie-embeddings"],
    "muon": ["--fsdp", "--optimizer", "muon"],
}
SHARED_OUT = ("--fsdp", "--activation-checkpointing", "--micro-batch-size", 1)
# Muon orthogonalizes in bfloat16, where the order of sums shows.
TOLERANCE = {"ddp": 1e-5, "fsdp": 1e-5, "muon": 2e-3}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The folders of all runs, and what the processes said: name -> [of the first, of the second]."""
    root = tmp_path_factory.mktemp("processes")
    text = write_text(root / "text.jsonl")

    def command(name: str, words: list) -> list[str]:
        return list(map(str, ["train", "--data", text, *SMALL, *words, "--out", root / name]))

    for name, words in WORDS.items():
        assert multimatrix(*command(f"{name}-alone", [word for word in words if word not in SHARED_OUT])).status == 0
    interrupt(command("one-to-ddp", WORDS["ddp"]), step=5)
    (root / "one-to-ddp" / "checkpoints" / "step-4" / "scheduler.pt").unlink()
    interrupt(command("one-to-muon", WORDS["muon"]), step=5)
    commands = {name: command(name, words) for name, words in WORDS.items()}
    commands |= {
        name: command(name, WORDS[name.split("-")[-1]]) for name in ("one-to-ddp", "one-to-muon", "sigterm-fsdp")
    }
    commands["odd"] = command("odd", ["--batch-size", 5])
    paths = [str(HERE), str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, str(HERE / "train_worker.py"), str(root), json.dumps(commands)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = {name: [json.loads((root / f"{name}-{rank}.json").read_text()) for rank in (0, 1)] for name in commands}
    assert [each["status"] for each in said["sigterm-fsdp"]] == [75, 75], said["sigterm-fsdp"]
    assert multimatrix(*commands["sigterm-fsdp"]).status == 0
    return root, said


def interrupt(command: list[str], step: int) -> None:
    """Begin a run in this process and break it off after a step."""
    write = MetricsFile.write

    def failing(self, row):
        write(self, row)
        if row["step"] == step:
            raise KeyboardInterrupt

    MetricsFile.write = failing
    try:
        assert multimatrix(*command).status == 130
    finally:
        MetricsFile.write = write


@pytest.mark.parametrize("name", WORDS)
def test_two_processes_have_the_losses_of_one(found, name):
    root, said = found
    for process in said[name]:
        assert process["status"] == 0, process["said"]
    assert [row["step"] for row in rows(root / name)] == [row["step"] for row in rows(root / f"{name}-alone")]
    assert losses(root / name) == pytest.approx(losses(root / f"{name}-alone"), abs=TOLERANCE[name])


@pytest.mark.parametrize("name", WORDS)
def test_the_model_is_whole(found, name):
    root, _ = found
    model, alone = (AutoModelForCausalLM.from_pretrained(root / each / "model") for each in (name, f"{name}-alone"))
    for (key, mine), theirs in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=100 * TOLERANCE[name]), key


def test_fsdp_shards_and_ddp_does_not(found):
    _, said = found
    assert [process["share"] for process in said["ddp"]] == [1, 1]
    for name in ("fsdp", "muon"):
        first, second = (process["share"] for process in said[name])
        assert first + second == pytest.approx(1)
        assert 0.4 < first < 0.6


@pytest.mark.parametrize(("kind", "went_on"), [("ddp", 2), ("muon", 4)])
def test_two_processes_go_on_where_one_was(found, kind, went_on):
    """The second one's newest checkpoint is damaged."""
    root, said = found
    first, second = said[f"one-to-{kind}"]
    assert first["status"] == second["status"] == 0, first["said"]
    assert f"continuing from the checkpoint of step {went_on}" in first["said"]
    assert losses(root / f"one-to-{kind}") == pytest.approx(losses(root / f"{kind}-alone"), abs=TOLERANCE[kind])
    assert ("step-4 is damaged and is skipped" in first["said"]) == (kind == "ddp")
    assert second["said"] == ""


def test_one_process_goes_on_where_two_were_stopped(found):
    """The signal came to one of the two; both stopped after the same step, with a checkpoint."""
    root, said = found
    assert "stopped after step 4 of 8, with a checkpoint" in said["sigterm-fsdp"][0]["said"]
    assert losses(root / "sigterm-fsdp") == pytest.approx(losses(root / "fsdp-alone"), abs=TOLERANCE["fsdp"])
    assert steps_kept(root / "sigterm-fsdp") == [6, 8]


def test_a_batch_that_cannot_be_shared_out_is_refused_once(found):
    _, said = found
    first, second = said["odd"]
    assert first["status"] == second["status"] == 2
    assert "5 sequences cannot be shared out evenly to 2 processes; set the batch size to a multiple" in first["said"]
    assert second["said"] == ""


def torchrun(*words: object) -> subprocess.Popen:
    paths = [str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *("-m", "multimatrix", *map(str, words)),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_rows(process: subprocess.Popen, out: Path, count: int) -> None:
    path = out / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (path.is_file() and path.read_text().count("\n") >= count):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_torchrun_terminated_and_killed(tmp_path):
    """SIGTERM to torchrun, then SIGKILL to one of its processes, then to the end: as one process that is left alone."""
    text = write_text(tmp_path / "text.jsonl")
    words = ["train", "--data", text, *SMALL, "--steps", 300, "--checkpoint-interval", 20]
    assert multimatrix(*words, "--out", tmp_path / "alone").status == 0
    out = tmp_path / "out"

    process = torchrun(*words, "--fsdp", "--out", out)
    wait_for_rows(process, out, 10)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "with a checkpoint; the same command goes on from there" in said
    (first,) = steps_kept(out)
    assert first == rows(out)[-1]["step"] >= 9

    process = torchrun(*words, "--fsdp", "--out", out)
    wait_for_rows(process, out, first + 40)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert steps_kept(out)[-1] > first

    process = torchrun(*words, "--fsdp", "--out", out)
    _, said = process.communicate(timeout=200)
    assert process.returncode == 0, said
    assert [row["step"] for row in rows(out)] == [row["step"] for row in rows(tmp_path / "alone")]
    assert losses(out) == pytest.approx(losses(tmp_path / "alone"), abs=1e-3)


@pytest.mark.slow
def test_a_compiled_run_goes_on(tmp_path):
    """With shards and with activations computed again, as large models are trained."""
    text = write_text(tmp_path / "text.jsonl")
    words = ["train", "--data", text, *SMALL, "--compile"]
    assert multimatrix(*words, "--out", tmp_path / "alone").status == 0
    command = list(map(str, [*words, "--out", tmp_path / "out"]))
    interrupt(command, step=5)
    process = torchrun(*command, "--fsdp", "--activation-checkpointing")
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert "continuing from the checkpoint of step 4" in said
    assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "alone"), abs=1e-4)
