"""Runs of a comparison in processes of their own: the same numbers, and nothing that befalls one harms the others."""

from __future__ import annotations

import contextlib
import html
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from command import Done, multimatrix
from multimatrix.compare import execute, figures, launch, local, prepare
from multimatrix.compare.configuration import make_comparison
from multimatrix.compare.folder import LOCK, RUN_LOCK, state_of
from multimatrix.compare.on_ray import OnRay
from multimatrix.locks import is_locked, locked
from multimatrix.train.protocol import STOPPED

SMALL = ["--hidden-size", 32, "--head-dim", 8, "--layers", 2, "--context", 32, "--batch-size", 4]
SMALL += ["--evaluations", 2, "--validation-tokens", 256, "--learning-rate", 3e-3]
TWO_RUNS = ["--steps", 6, "--variants", "mha,mfa_kr", "--seeds", 0]
ENDLESS = ["--steps", 1_000_000, "--variants", "mha,mfa_kr", "--seeds", 0]
LOCAL = ["--launcher", "local", "--workers", 2]
# What depends on the machine, the time and the command.
MEASURED = ("train_tokens_per_second", "decode_tokens_per_second", "peak_memory_bytes", "wall_seconds")
SPEEDS = ("tokens_per_second", "seconds_left", "memory_bytes")

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and locks of POSIX")


@pytest.fixture(scope="module", autouse=True)
def one_thread_and_quick_figures():
    """As many threads here as in a worker, so that sums are taken in the same order; and no time for drawing."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(figures, "loss_against_tokens", lambda results, directory: Figure())
        patch.setattr(figures, "loss_against_kv_bytes", lambda results: Figure())
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    shuffle = random.Random(0)
    rows = [{"text": " ".join(shuffle.choice(["fox", "hen", "rain"]) for _ in range(60))} for _ in range(60)]
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def compare(text):
    def run(out: Path, *words: object) -> Done:
        return multimatrix("compare", "--data", text, *SMALL, "--out", out, *words)

    return run


@pytest.fixture(scope="module")
def alone(compare, tmp_path_factory):
    """Two runs in one process, one after the other."""
    out = tmp_path_factory.mktemp("alone") / "out"
    done = compare(out, *TWO_RUNS)
    assert done.status == 0, done.err
    return out


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def statuses(out: Path) -> dict[str, str]:
    return {run["directory"].removeprefix("runs/"): run["status"] for run in results(out)["runs"]}


def reasons(out: Path) -> dict[str, str]:
    return {run["directory"].removeprefix("runs/"): run["reason"] for run in results(out)["runs"] if run["reason"]}


def comparable(out: Path) -> dict:
    """results.json without what was measured with a clock, and without the command."""
    found = results(out)
    for name in ("created", "command", "sharing", "environment"):
        del found[name]
    found["cannot_show"] = [line for line in found["cannot_show"] if not line.startswith("the speed of a run")]
    for row in found["rows"]:
        for name in MEASURED:
            assert row.pop(name) is not None
    return found


def metrics(out: Path, name: str) -> list[dict]:
    rows = [json.loads(line) for line in (out / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in SPEEDS} for row in rows]


def assert_nothing_is_left(out: Path) -> None:
    """No lock, no shared text, no half-written file."""
    names = {path.name for path in out.rglob("*")}
    assert not names & {LOCK, RUN_LOCK, local.SHARED}
    assert not [name for name in names if name.startswith(".") and name != ".metadata"]


def until(true, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it has not come to pass"
        time.sleep(0.02)


def worker_of(run: Path) -> int | None:
    """The process that trains in the folder, as its lock names it."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int((run / RUN_LOCK).read_text().split()[0])
    return None


def is_alive(process: int) -> bool:
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@contextlib.contextmanager
def killing_the_worker_of(run: Path):
    """SIGKILL for whoever trains in the folder, as soon as somebody does."""

    def wait_and_kill() -> None:
        until(lambda: worker_of(run) is not None)
        os.kill(worker_of(run), signal.SIGKILL)

    thread = threading.Thread(target=wait_and_kill)
    thread.start()
    yield
    thread.join()


def endless(text: Path, out: Path) -> tuple[prepare.Prepared, list[prepare.Run]]:
    """A comparison of one run that does not end by itself."""
    settings = {"data": [str(text)], "hidden_size": 32, "head_dim": 8, "num_hidden_layers": 2, "context": 32}
    settings |= {"variants": ["mha"], "seeds": [0], "steps": 1_000_000, "batch_size": 4}
    prepared = prepare.prepare(make_comparison(None, settings), device_type="cpu", say=lambda line: None)
    return prepared, prepare.make_runs(prepared, out)


# ---- one process per run -----------------------------------------------------------------------------------------


def test_workers_give_the_numbers_of_one_process(compare, alone, tmp_path):
    out = tmp_path / "out"
    done = compare(out, *TWO_RUNS, *LOCAL)
    assert done.status == 0, done.err
    assert "2 runs at once" in done.out
    assert comparable(out) == comparable(alone)
    for name in statuses(alone):
        assert metrics(out, name) == metrics(alone, name)
        first, second = (folder / "runs" / name / "model" / "model.safetensors" for folder in (alone, out))
        assert first.read_bytes() == second.read_bytes()
        for step in range(1, 7):
            assert f"{name} step {step}/6: loss " in done.err
    assert "2 ran at once on one processor" in results(out)["cannot_show"][-1]
    assert not any("at once" in limit for limit in results(alone)["cannot_show"])
    assert_nothing_is_left(out)
    again = compare(out, *TWO_RUNS, *LOCAL)
    assert (again.status, "2 of 2 runs are done already" in again.err) == (0, True)


def test_what_befalls_one_run_leaves_the_others_alone(compare, alone, tmp_path, monkeypatch):
    """A worker is killed, another meets an error that nobody foresaw: the rest goes on, and those two are retried."""
    out, words = tmp_path / "out", ["--steps", 6, "--variants", "mha,mfa_kr,mqa", "--seeds", 0]
    killed, spoilt = out / "runs" / "mha-seed0", out / "runs" / "mfa_kr-seed0"
    share = local.share

    def share_and_spoil(*args: object) -> None:
        share(*args)
        (spoilt / "metrics.jsonl").mkdir(parents=True)

    monkeypatch.setattr(local, "share", share_and_spoil)
    with killing_the_worker_of(killed):
        done = compare(out, *words, *LOCAL)
    assert done.status == 1
    assert "Traceback" not in done.out + done.err
    assert statuses(out) == {"mha-seed0": "failed", "mfa_kr-seed0": "failed", "mqa-seed0": "done"}
    by_signal = "its process was ended by SIGKILL, as the system does when memory runs out"
    assert reasons(out)["mha-seed0"].startswith(by_signal)
    assert reasons(out)["mfa_kr-seed0"].startswith("IsADirectoryError: ")
    page = (out / "report.html").read_text()
    for name, reason in reasons(out).items():
        assert f"{name} failed: {reason}" in done.err
        assert html.escape(reason, quote=True).replace("&#x27;", "&#39;") in page
    assert "MHA with seed 0 failed: its process was ended by SIGKILL" in " ".join(done.out.split())
    assert "_execute" in json.loads((spoilt / "failed.json").read_text())["traceback"]
    assert results(out)["complete"] is False
    assert_nothing_is_left(out)

    (spoilt / "metrics.jsonl").rmdir()
    trained, train = [], execute.train

    def spy(*args, directory, **others):
        trained.append(directory.name)
        return train(*args, directory=directory, **others)

    monkeypatch.setattr(execute, "train", spy)
    again = compare(out, *words)
    assert (again.status, trained) == (0, ["mha-seed0", "mfa_kr-seed0"])
    assert set(statuses(out).values()) == {"done"}
    assert not list(out.rglob("failed.json"))
    for name in statuses(alone):
        assert metrics(out, name) == metrics(alone, name)


@pytest.mark.parametrize("launcher", ["local", "ray"])
def test_an_interrupted_run_goes_on_from_its_checkpoint(compare, alone, tmp_path, monkeypatch, request, launcher):
    """It was trained in this process; whoever goes on, it ends as if nothing had been."""
    if launcher == "ray":
        request.getfixturevalue("cluster")
    out, name, train = tmp_path / "out", "mfa_kr-seed0", execute.train

    def interrupted(*args, directory, on_step, **others):
        def show(row):
            on_step(row)
            if directory.name == name and row["step"] == 4:
                raise KeyboardInterrupt

        return train(*args, directory=directory, on_step=show, **others)

    with monkeypatch.context() as patch:
        patch.setattr(execute, "train", interrupted)
        assert compare(out, *TWO_RUNS).status == 130
    assert statuses(out) == {"mha-seed0": "done", name: "stopped"}
    done = compare(out, *TWO_RUNS, "--launcher", launcher)
    assert done.status == 0, done.err
    assert [step for step in range(1, 7) if f"{name} step {step}/6: loss " in done.err] == [4, 5, 6]
    if launcher == "local":
        said = (out / "runs" / name / "log.txt").read_text()
        assert f"{name}: continuing from the checkpoint of step 3" in said
    assert metrics(out, name) == metrics(alone, name)
    first, second = (folder / "runs" / name / "model" / "model.safetensors" for folder in (alone, out))
    assert first.read_bytes() == second.read_bytes()
    assert not list(out.rglob("checkpoints"))


def test_sigterm_stops_the_workers_and_gathers(text, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "multimatrix", "compare", "--data", text, *SMALL, *ENDLESS, "--out", out, *LOCAL]
    runs = [out / "runs" / f"{variant}-seed0" for variant in ("mha", "mfa_kr")]
    with (tmp_path / "err").open("w+") as err:
        process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=err)
        try:
            until(lambda: process.poll() is not None or all(worker_of(run) is not None for run in runs))
            workers = [worker_of(run) for run in runs]
            assert process.poll() is None
            assert [state_of(run).status for run in runs] == ["running", "running"]
            assert "another process" in multimatrix("compare", *command[4:]).sentence
            process.terminate()
            status = process.wait(timeout=60)
        finally:
            process.kill()
        err.seek(0)
        said = err.read()
    assert status == 75, said
    assert "stopped by SIGTERM; what was finished is in" in said
    assert "Traceback" not in said
    assert not any(map(is_alive, workers))
    assert set(statuses(out).values()) <= {"stopped", "missing"}
    assert results(out)["running"] is False
    assert all(list((run / "checkpoints").glob("step-*")) for run in runs)
    assert_nothing_is_left(out)


def test_a_worker_ends_when_who_started_it_is_killed(text, tmp_path):
    """The system closes the pipe to the worker's standard input then, as is done here."""
    prepared, (run,) = endless(text, tmp_path)
    local.share(prepared, [run], "a command", tmp_path / "shared")
    worker = subprocess.Popen(
        [sys.executable, "-m", "multimatrix.compare.worker", tmp_path / "shared", run.name], stdin=subprocess.PIPE
    )
    try:
        until(lambda: worker.poll() is not None or state_of(run.directory).status == "running")
        assert worker.poll() is None
        worker.stdin.close()
        assert worker.wait(timeout=60) == STOPPED
    finally:
        worker.kill()
    assert state_of(run.directory).status in ("stopped", "missing")


def test_the_lock_keeps_a_second_comparison_out(compare, tmp_path):
    out = tmp_path / "out"
    with locked(out / LOCK, ""):
        sentence = compare(out, *TWO_RUNS).sentence
    assert f"another process ({os.getpid()} on " in sentence
    assert f"is at work in {out}; wait for it, or choose another --out" in sentence
    assert list(out.iterdir()) == []


def test_a_lock_ends_with_its_process(tmp_path):
    code = f"""
import os, pathlib
from multimatrix.compare.on_ray import OnRay
from multimatrix.locks import locked
with locked(pathlib.Path({str(tmp_path / LOCK)!r}), ""):
    os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    assert (tmp_path / LOCK).exists()
    assert not is_locked(tmp_path / LOCK)
    with locked(tmp_path / LOCK, ""):
        assert is_locked(tmp_path / LOCK)
    assert not (tmp_path / LOCK).exists()


@pytest.mark.slow
def test_random_kills_change_no_number(compare, text, tmp_path):
    """SIGKILL for the comparison or one of its workers at random moments until all is done: as if nothing had been."""
    settings = ["--steps", 2000, "--checkpoint-interval", 50, "--variants", "mha,mfa_kr", "--seeds", "0,1"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert compare(whole, *settings).status == 0
    words = ["compare", "--data", text, *SMALL, *settings, "--out", out, *LOCAL]
    chance, kills = random.Random(0), []
    for _ in range(60):
        process = subprocess.Popen([sys.executable, "-m", "multimatrix", *map(str, words)], stderr=subprocess.PIPE)
        moment = time.monotonic() + chance.uniform(8, 20)
        while process.poll() is None and time.monotonic() < moment:
            time.sleep(0.05)
        if process.poll() == 0:
            break
        workers = [found for run in (out / "runs").glob("*") if (found := worker_of(run)) and is_alive(found)]
        victim = chance.choice([process.pid, *workers])
        if process.poll() is None and is_alive(victim):
            os.kill(victim, signal.SIGKILL)
            kills.append("comparison" if victim == process.pid else "worker")
        if victim != process.pid:
            assert process.wait(timeout=300) == 1
    print(f"{len(kills)} kills survived: {kills}")
    assert process.returncode == 0
    assert len(kills) > 2
    assert comparable(out) == comparable(whole)
    for name in statuses(whole):
        assert metrics(out, name) == metrics(whole, name)


# ---- which launcher, which device --------------------------------------------------------------------------------


def test_the_launcher_follows_the_devices(monkeypatch):
    def chosen(gpus: list[str], *words) -> tuple:
        for module in (launch, local):
            monkeypatch.setattr(module, "visible_gpus", lambda: gpus)
        found = launch.make_launcher(*words)
        return type(found).__name__, found.workers, found.device_type

    assert chosen([], None, None) == ("InProcess", 1, "cpu")
    assert chosen(["3"], None, None) == ("InProcess", 1, "cuda")
    assert chosen(["3", "5"], None, None) == ("Local", 2, "cuda")
    assert chosen([], None, 3) == ("Local", 3, "cpu")
    assert chosen([], "local", None) == ("Local", 1, "cpu")
    assert chosen(["3", "5"], "local", 4) == ("Local", 4, "cuda")
    assert chosen(["3", "5"], "in-process", None) == ("InProcess", 1, "cuda")


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        (["--launcher", "slurm"], "launcher must be one of in-process, local, ray, got 'slurm'"),
        (["--workers", 0], "workers must be at least 1, got 0"),
        (["--launcher", "in-process", "--workers", 2], "one process trains one run at a time, not 2"),
        (["--launcher", "local", "--micro-batch-size", 3], "which micro_batch_size 3 does not divide"),
    ],
)
def test_launchers_that_cannot_be(compare, tmp_path, words, fragment):
    assert fragment in compare(tmp_path / "out", *TWO_RUNS, *words).sentence
    assert not (tmp_path / "out").exists()


def test_ray_is_asked_for_where_it_is_missing(compare, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "pip install 'multimatrix[ray]'" in compare(tmp_path / "out", *TWO_RUNS, "--launcher", "ray").sentence


def test_every_worker_has_a_gpu_of_those_that_are_visible(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6, GPU-1f")
    assert launch.visible_gpus() == ["6", "GPU-1f"]
    launcher = local.Local(3)
    assert [launcher.surroundings(place)["CUDA_VISIBLE_DEVICES"] for place in range(3)] == ["6", "GPU-1f", "6"]
    assert launcher.sharing == "3 ran at once on 2 GPUs"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert launch.visible_gpus() == ["0", "1"]
    assert local.Local(None).sharing is None


def test_workers_share_the_cores_unless_the_user_has_set_the_threads(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert local.Local(4).surroundings(0)["OMP_NUM_THREADS"] == "3"
    assert local.Local(100).surroundings(0)["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert local.Local(4).surroundings(0)["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (-signal.SIGSEGV, "its process was ended by SIGSEGV; log.txt beside it"),
        (-signal.SIGKILL, "its process was ended by SIGKILL, as the system does when memory runs out"),
        (3, "its process ended with status 3"),
        (0, "its process ended with status 0"),  # and yet there is no result
    ],
)
def test_how_a_process_ended(status, words):
    assert local.how_it_ended(status).startswith(words)


@pytest.mark.parametrize("kind", ["memory", "file", "part of a file"])
def test_workers_map_the_blocks(tmp_path, kind):
    blocks = np.arange(60, dtype=np.uint16).reshape(10, 6)
    if kind != "memory":
        blocks.tofile(tmp_path / "tokens")
        blocks = np.memmap(tmp_path / "tokens", np.uint16, "r")[:60].reshape(10, 6)
    if kind == "part of a file":
        blocks = blocks[4:9]
    mapped = local.Mapped.of(blocks, tmp_path / "written")
    found = pickle.loads(pickle.dumps(mapped)).read()
    assert isinstance(found, np.memmap)
    assert found.dtype == blocks.dtype
    assert np.array_equal(found, blocks)
    assert (tmp_path / "written").exists() == (kind == "memory")


def test_rows_are_read_whole_and_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    tail = local.Tail(path)
    with path.open("a") as file:
        file.write('{"step": 2}\n{"st')
        file.flush()
        assert tail.new_rows() == [{"step": 2}]
        file.write('ep": 3}\nnot JSON\n[4]\n')
        file.flush()
        assert tail.new_rows() == [{"step": 3}]
    assert tail.new_rows() == []
    path.write_text('{"step": 1}\n{"step": 2, "loss": 1}\n')
    assert tail.new_rows() == [{"step": 2, "loss": 1}], "the run went on after step 1"


# ---- Ray ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def test_ray_gives_the_same_numbers_and_isolates_runs(cluster, compare, alone, tmp_path):
    """One run as in one process, and one whose worker is killed; another launcher goes on from there."""
    out = tmp_path / "out"
    with killing_the_worker_of(out / "runs" / "mfa_kr-seed0"):
        done = compare(out, *TWO_RUNS, "--launcher", "ray")
    assert done.status == 1, done.err
    assert "2 runs at once" in done.out
    assert statuses(out) == {"mha-seed0": "done", "mfa_kr-seed0": "failed"}
    assert reasons(out)["mfa_kr-seed0"].startswith("its worker ended without a word, killed or crashed")
    assert "mha-seed0 step 6/6: loss " in done.err
    again = compare(out, *TWO_RUNS)
    assert again.status == 0, again.err
    assert "1 of 2 runs are done already" in again.err
    assert comparable(out) == comparable(alone)
    for name in statuses(alone):
        assert metrics(out, name) == metrics(alone, name)
        first, second = (folder / "runs" / name / "model" / "model.safetensors" for folder in (alone, out))
        assert first.read_bytes() == second.read_bytes()
    assert_nothing_is_left(out)


def test_tasks_that_are_stopped_let_go_of_their_runs(cluster, text, tmp_path):
    """An interrupt while tasks train: when the launcher returns, nothing is trained any more."""
    prepared, (run,) = endless(text, tmp_path)

    class Impatient:
        def start(self, run):
            raise KeyboardInterrupt

        def tick(self):
            """Nothing to do."""

    with pytest.raises(KeyboardInterrupt):
        OnRay(1).launch(prepared, [run], tmp_path, "a command", Impatient())
    assert state_of(run.directory).status in ("stopped", "missing")
