"""A run that is killed ends as one that is not: the same rows, the same weights, bit for bit."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from command import multimatrix
from train_settings import SMALL, STEPS, rows, steps_kept, weights, write_text

HERE = Path(__file__).parent
KILLED = -9

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """A run that was never interrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert multimatrix("train", "--data", text, *SMALL, "--out", out).status == 0
    return out


def starts(text: Path, out: Path, how: list, *words: object) -> tuple[list[int], str]:
    """The exit status of every start, and all that they said."""
    command = list(map(str, ["train", "--data", text, *SMALL, *words, "--out", out]))
    paths = [str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, str(HERE / "train_starts.py"), json.dumps(command), json.dumps(how)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=True,
    )
    return [int(line) for line in done.stdout.split("\n") if line.lstrip("-").isdecimal()], done.stderr


def test_killed_at_every_kind_of_moment(text, whole, tmp_path):
    """A start goes on from the checkpoint before the one that killed the start before, so each is at a later step."""
    out = tmp_path / "out"
    moments = [
        ["row", 1],
        ["cut row", 3],
        ["before state", 4],
        ["before manifest", 4],
        ["before rename", 4],
        ["while deleting", 2],
        ["row", 7],
    ]
    statuses, said = starts(text, out, [*moments, None])
    assert statuses == [KILLED] * len(moments) + [0]
    # Where each start went on: the first kill was before any checkpoint.
    found = [line for line in said.splitlines() if line.startswith("continuing from")]
    assert [int(line.split()[-1]) for line in found] == [2, 2, 2, 2, 6, 6]
    assert "warning" not in said
    assert "Traceback" not in said
    assert rows(out) == rows(whole)
    assert weights(out) == weights(whole)
    assert steps_kept(out) == [STEPS - 2, STEPS]
    hidden = {path.name for path in out.rglob(".*")} - {".metadata"}
    assert not hidden


@pytest.mark.slow
def test_killed_at_random(text, tmp_path):
    """At least 20 kills; a run that ends is compared, and the next one begins."""
    wanted = int(os.environ.get("MULTIMATRIX_KILLS", "20"))
    shuffle = random.Random(os.environ.get("MULTIMATRIX_KILL_SEED", "0"))
    longer = ["--steps", 60]
    assert multimatrix("train", "--data", text, *SMALL, *longer, "--out", tmp_path / "whole").status == 0
    killed, runs = 0, 0
    while killed < wanted:
        out = tmp_path / f"killed{runs}"
        statuses, said = starts(text, out, [shuffle.uniform(0.2, 3.0) for _ in range(100)], *longer)
        assert statuses[-1] == 0, said
        assert set(statuses[:-1]) <= {KILLED}
        assert "Traceback" not in said
        assert rows(out) == rows(tmp_path / "whole")
        assert weights(out) == weights(tmp_path / "whole")
        killed, runs = killed + len(statuses) - 1, runs + 1
    print(f"{killed} random kills of {runs} runs")
