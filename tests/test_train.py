"""`multimatrix train`: what it leaves behind, what it goes on from, what it refuses, and what it says."""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from command import Done, multimatrix
from multimatrix.data import OrderedBlocks
from multimatrix.errors import InputError
from multimatrix.locks import locked
from multimatrix.model.modeling import MultimatrixForCausalLM
from multimatrix.plan.numbers import decoder_parameters
from multimatrix.train import arguments, checkpoints, command, run, trainer
from multimatrix.train.arguments import evaluation_batch
from multimatrix.train.configuration import Training
from multimatrix.train.metrics import MetricsFile
from multimatrix.train.optimizers import MuonWithAdamW, muon_with_adamw
from multimatrix.train.progress import row_text
from multimatrix.train.protocol import Execution, RunStopped
from multimatrix.train.stopping import stop_on_sigterm, stop_requests
from train_settings import SMALL, STEPS, losses, rows, steps_kept, weights, write_text


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.fixture(scope="module")
def train(text):
    """`train(out, ...)` runs the command on the small text."""

    def run_command(out: Path, *words: object) -> Done:
        return multimatrix("train", "--data", text, *SMALL, "--out", out, *words)

    return run_command


@pytest.fixture(scope="module")
def finished(train, tmp_path_factory):
    """A finished run and what the command printed; look, do not touch."""
    out = tmp_path_factory.mktemp("finished") / "out"
    return out, train(out)


def stop_after(patch, step: int, error: BaseException) -> None:
    """Raise after the row of a step is written."""
    write = MetricsFile.write

    def failing(self, row):
        write(self, row)
        if row["step"] == step:
            raise error

    patch.setattr(MetricsFile, "write", failing)


# ---- what a finished run leaves behind ---------------------------------------------------------------------------


def test_the_run_folder_is_self_contained(finished, text):
    out, done = finished
    assert done.status == 0
    names = {path.name for path in out.iterdir()}
    assert names == {"config.json", "environment.json", "metrics.jsonl", "checkpoints", "model", "result.json"}
    assert json.loads((out / "config.json").read_text())["steps"] == STEPS
    assert json.loads((out / "environment.json").read_text())["command"].startswith(f"multimatrix train --data {text}")
    assert steps_kept(out) == [STEPS - 2, STEPS]
    result = json.loads((out / "result.json").read_text())
    assert result["validation_loss"] == rows(out)[-1]["validation_loss"]
    assert f"validation loss {result['validation_loss']:.4f}" in done.out


def test_a_row_and_a_line_for_every_step(finished):
    out, done = finished
    found = rows(out)
    assert [row["step"] for row in found if "loss" in row] == list(range(1, STEPS + 1))
    assert [row["step"] for row in found if "validation_loss" in row] == [STEPS // 2, STEPS]
    assert found[-1]["tokens"] == STEPS * 4 * 16
    lines = [line for line in done.err.splitlines() if line.startswith("step ")]
    assert len(lines) == STEPS + 2
    for fragment in (f"step 3/{STEPS}: loss ", "learning rate ", "tokens per second ", "memory ", "left 0:00:0"):
        assert fragment in lines[2]
    values = [row["loss"] for row in found if "loss" in row]
    assert values[-1] < values[0] - 0.3


def test_the_model_loads_and_has_the_stated_loss(finished, text):
    out, _ = finished
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    assert type(model) is MultimatrixForCausalLM
    assert model.config.provenance["validation_loss"] == rows(out)[-1]["validation_loss"]
    assert AutoTokenizer.from_pretrained(out / "model").eos_token == "<|endoftext|>"
    done = multimatrix("generate", out / "model", "--prompt", "The fox", "--max-new-tokens", 4)
    assert done.status == 0


def test_a_finished_run_is_not_trained_again(finished, train, monkeypatch):
    out, _ = finished
    monkeypatch.setattr("multimatrix.train.command.train", lambda *args, **words: pytest.fail("trained again"))
    done = train(out)
    assert done.status == 0
    assert f"{out} is done already" in done.out


# ---- going on ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [("--log-interval", 3), ("--optimizer", "muon"), ("--micro-batch-size", 1), ("--batch-size", 60)],
    ids=lambda words: words[0],
)
def test_an_interrupted_run_ends_as_an_uninterrupted_one(train, tmp_path, monkeypatch, words):
    """In the midst of a logged interval, with momentum, while gradients accumulate, and past the end of the text."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert train(whole, *words).status == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 6, KeyboardInterrupt())
        done = train(out, *words)
    assert done.status == 130
    assert "interrupted; the same command goes on from the last checkpoint" in done.err
    again = train(out, *words)
    assert again.status == 0, again.err
    assert "continuing from the checkpoint of step " in again.err
    assert rows(out) == rows(whole)
    assert weights(out) == weights(whole)


def test_what_changes_no_result_may_change(finished, train, tmp_path, monkeypatch):
    whole, _ = finished
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(patch, 5, KeyboardInterrupt())
        train(out)
    words = ["--micro-batch-size", 2, "--activation-checkpointing", "--checkpoint-interval", 3, "--keep-checkpoints", 1]
    assert train(out, *words).status == 0
    assert losses(out) == pytest.approx(losses(whole), abs=1e-5)
    assert steps_kept(out) == [STEPS]


def test_sigterm_checkpoints_and_stops(finished, train, tmp_path, monkeypatch):
    whole, _ = finished
    out = tmp_path / "out"

    def signalled(self, row):
        write(self, row)
        if row["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    write = MetricsFile.write
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(MetricsFile, "write", signalled)
        done = train(out)
    assert done.status == 75
    # The step after the signal: that of the signal was over.
    assert "stopped after step 4 of 8, with a checkpoint; the same command goes on from there" in done.err
    assert signal.getsignal(signal.SIGTERM) is before
    assert steps_kept(out)[-1] == 4
    assert not (out / "result.json").exists()
    assert train(out).status == 0
    assert rows(out) == rows(whole)
    assert weights(out) == weights(whole)


def interrupted(train, out: Path, monkeypatch, step: int = 5) -> list[int]:
    """A run that ended before its time; the steps of its checkpoints."""
    with monkeypatch.context() as patch:
        stop_after(patch, step, KeyboardInterrupt())
        train(out)
    return steps_kept(out)


DAMAGE = {
    "cut": lambda folder: os.truncate(folder / "state" / "__0_0.distcp", 1000),
    "flipped": lambda folder: flip(folder / "state" / "__0_0.distcp"),
    "missing": lambda folder: (folder / "scheduler.pt").unlink(),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "cut manifest": lambda folder: os.truncate(folder / "manifest.json", 20),
}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_sigterm_in_the_last_step_goes_to_who_is_around():
    """The run is done then, and the others of a comparison must not begin."""
    before = signal.getsignal(signal.SIGTERM)

    def late():
        with stop_on_sigterm(), stop_requests() as asked:
            os.kill(os.getpid(), signal.SIGTERM)
            assert asked()

    with pytest.raises(RunStopped, match="stopped by SIGTERM"):
        late()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_skipped(finished, train, tmp_path, monkeypatch, damage):
    whole, _ = finished
    out = tmp_path / "out"
    assert interrupted(train, out, monkeypatch) == [2, 4]
    DAMAGE[damage](out / "checkpoints" / "step-4")
    done = train(out)
    assert done.status == 0
    assert f"warning: the checkpoint {out / 'checkpoints' / 'step-4'} is damaged and is skipped: " in done.err
    assert "continuing from the checkpoint of step 2" in done.err
    assert rows(out) == rows(whole)
    assert weights(out) == weights(whole)


def test_without_a_checkpoint_that_works_it_begins_again(finished, train, tmp_path, monkeypatch):
    out = tmp_path / "out"
    for step in interrupted(train, out, monkeypatch):
        (out / "checkpoints" / f"step-{step}" / "manifest.json").unlink()
    done = train(out)
    assert done.status == 0
    assert done.err.count("is damaged and is skipped") == 2
    assert rows(out) == rows(finished[0])


# ---- what goes wrong ---------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_the_run_before_it_is_kept(train, tmp_path, monkeypatch):
    """Rows come every 4 steps and checkpoints every step: the loss of step 6 must not wait for its row."""
    forward, out, steps = MultimatrixForCausalLM.forward, tmp_path / "out", []

    @functools.wraps(forward)  # the Trainer drops what the signature does not name
    def spoilt(self, input_ids=None, **words):
        result = forward(self, input_ids, **words)
        if self.training:
            steps.append(None)
            result.loss = result.loss * (float("nan") if len(steps) == 6 else 1.0)
        return result

    monkeypatch.setattr(MultimatrixForCausalLM, "forward", spoilt)
    done = train(out, "--log-interval", 4, "--checkpoint-interval", 1)
    assert done.status == 1
    assert "the run failed: the training loss is nan at step 6; lower the learning rate" in done.err
    assert "Traceback" not in done.err
    assert steps_kept(out) == [4, 5]


def test_weights_that_are_no_numbers_are_not_kept(train, tmp_path, monkeypatch):
    """The loss of a step is finite, its gradient is not."""
    clip, out, steps = torch.nn.utils.clip_grad_norm_, tmp_path / "out", []

    def spoilt(parameters, *args, **words):
        parameters = list(parameters)
        steps.append(None)
        if len(steps) == 4:
            parameters[0].grad[0, 0] = float("nan")
        return clip(parameters, *args, **words)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spoilt)
    done = train(out, "--evaluations", 1)
    assert done.status == 1
    assert "no longer numbers at step 4" in done.err
    assert steps_kept(out) == [2]


def test_a_full_disk_keeps_the_last_checkpoint(finished, train, tmp_path, monkeypatch):
    out = tmp_path / "out"
    save = trainer.dcp.save

    def full(*args, storage_writer, **words):
        if "step-4" in str(storage_writer.path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return save(*args, storage_writer=storage_writer, **words)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.dcp, "save", full)
        done = train(out)
    place = out / "checkpoints" / ".step-4.writing"
    assert done.sentence.startswith(f"multimatrix: cannot write {place}: No space left")
    assert steps_kept(out) == [2]
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-2"]
    assert train(out).status == 0
    assert weights(out) == weights(finished[0])


def test_a_file_system_that_is_really_full(finished, train, tmp_path):
    """At whatever file it fills up: one sentence, and the same command goes on once there is room."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if not mount or subprocess.run([mount, "-t", "tmpfs", "tmpfs", disk], capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs the rights of root")
    try:
        for size in (300, 700, 1150, 1200):
            subprocess.run([mount, "-o", f"remount,size={size}k", disk], check=True)
            done = train(disk / "out")
            assert f"cannot write {disk / 'out'}" in done.sentence
            assert "No space left on device; the checkpoints from before are kept" in done.sentence
        assert steps_kept(disk / "out")
        subprocess.run([mount, "-o", "remount,size=16m", disk], check=True)
        assert train(disk / "out").status == 0
        assert rows(disk / "out") == rows(finished[0])
    finally:
        subprocess.run(["umount", disk], check=True)


def test_an_error_that_is_no_disk_keeps_its_traceback(train, tmp_path, monkeypatch):
    def broken(*args, **words):
        raise RuntimeError("a bug")

    monkeypatch.setattr(trainer.dcp, "save", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        train(tmp_path / "out")


def test_two_starts_at_once(train, tmp_path, monkeypatch):
    """The second one is refused and touches nothing, not even a checkpoint that the first one is writing."""
    out = tmp_path / "out"
    interrupted(train, out, monkeypatch)
    (out / "checkpoints" / ".step-6.writing").mkdir()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with locked(out / "run.lock", ""):
        sentence = train(out).sentence
    assert f"is at work in {out}; wait for it, stop it, or choose another --out" in sentence
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert train(out).status == 0


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (["--steps", 9], ["steps = 8 and this run has 9"]),
        (["--learning-rate", 1e-3], ["learning_rate = 0.003 and this run has 0.001"]),
        (["--variant", "mha"], ["variant = mfa and this run has mha"]),
        (["--optimizer", "muon"], ["optimizer = adamw and this run has muon"]),
        (["--seed", 1], ["seed = 0 and this run has 1"]),
        (["--set", "mfa.num_heads=3"], ["sizes = [] and this run has ['mfa.num_heads=3']"]),
    ],
    ids=lambda case: str(case[0]),
)
def test_a_folder_of_other_settings(finished, train, words, fragments):
    out, _ = finished
    done = train(out, *words)
    for fragment in [*fragments, str(out), "choose another --out"]:
        assert fragment in done.sentence


def test_a_folder_of_somebody_else(train, tmp_path):
    (tmp_path / "cat.jpg").write_bytes(b"cat")
    assert "is not empty and holds no run of ours" in train(tmp_path).sentence
    assert "is a file; choose another --out" in train(tmp_path / "cat.jpg").sentence


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        (["--micro-batch-size", 3], "1 processes has 4 sequences of a step, which micro_batch_size 3 does not divide"),
        (["--optimizer", "sgd"], "optimizer must be adamw or muon, got 'sgd'"),
        (["--report-to", "mlflow"], "there is no tracker 'mlflow'; report_to takes tensorboard, wandb, trackio"),
        (["--keep-checkpoints", 0], "keep_checkpoints must be at least 1, got 0"),
        (["--checkpoint-interval", 0], "checkpoint_interval must be at least 1, got 0"),
        (["--seed", -1], "the seed must be a whole number from 0"),
        (
            ["--recipe", "nothing"],
            "there is no training recipe 'nothing'; the recipes are demo, mfa-1b, mfa-350m, mfa-7b",
        ),
        (["--recipe", "nothing.toml"], "the recipe nothing.toml cannot be read"),
        (["--batch-size", 10_000], "one step needs 10000; set the batch size to at most"),
    ],
    ids=lambda case: "-".join(map(str, case)) if isinstance(case, list) else "",
)
def test_settings_that_cannot_work(train, tmp_path, words, fragment):
    assert fragment in train(tmp_path / "out", *words).sentence
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "billions", "processes"),
    [("demo", 0.0004, 1), ("mfa-350m", 0.354, 1), ("mfa-1b", 0.982, 8), ("mfa-1b", 0.982, 32), ("mfa-7b", 6.92, 64)],
)
def test_recipes_say_what_they_are(name, billions, processes):
    """Sizes as in the first line of each, 20 tokens for a parameter, and a batch that its processes share out."""
    training = Training.from_recipe("train", name, {})
    vocab_size = int(training.tokenizer.removeprefix("bpe:")) if training.tokenizer != "bytes" else 257
    parameters = decoder_parameters(
        [command._spec(training)] * training.num_hidden_layers,
        vocab_size=vocab_size,
        tie_word_embeddings=training.tie_word_embeddings,
        intermediate_size=training.feed_forward_width,
        experts=None,
    )
    assert parameters == pytest.approx(billions * 1e9, rel=0.04)
    protocol = training.protocol("cuda")
    training.execution().accumulation(protocol.batch_size, processes)
    assert name == "demo" or 19 < protocol.tokens / parameters < 21


def test_a_recipe_of_ones_own(text, tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text(
        f'variant = "mha"\nsteps = 2\nevaluations = 1\ndata = ["{text}"]\nhidden_size = 16\nhead_dim = 8\n'
    )
    done = multimatrix(
        "train", "--recipe", recipe, "--steps", 3, "--context", 16, "--dry-run", "--out", tmp_path / "out"
    )
    assert done.status == 0
    assert "mha: " in done.out
    assert "3 steps of 32 x 16 tokens" in done.out
    recipe.write_text("stesp = 2\n")
    done = multimatrix("train", "--recipe", recipe, "--out", tmp_path / "out")
    assert "has a setting 'stesp', which there is not" in done.sentence


# ---- parts -------------------------------------------------------------------------------------------------------


def test_the_batch_is_that_of_all_processes():
    assert Execution().accumulation(32, 4) == (8, 1)
    assert Execution(micro_batch_size=2).accumulation(32, 4) == (2, 4)
    with pytest.raises(InputError, match=r"32 sequences cannot be shared out evenly to 5 processes; .* example 30, or"):
        Execution().accumulation(32, 5)
    with pytest.raises(InputError, match=r"has 8 sequences of a step, which micro_batch_size 3 .* set it to 2"):
        Execution(micro_batch_size=3).accumulation(32, 4)


def test_blocks_come_in_an_order_of_the_seed_alone():
    blocks = torch.arange(14, dtype=torch.int32).view(7, 2).numpy()
    data = OrderedBlocks(blocks, 20, seed=3)
    order = [int(data[i]["input_ids"][0]) // 2 for i in range(20)]
    assert sorted(order[:7]) == sorted(order[7:14]) == list(range(7))
    assert order[:7] != order[7:14]
    again = OrderedBlocks(blocks, 20, seed=3)
    assert [int(again[i]["input_ids"][0]) // 2 for i in (19, 0, 8)] == [order[19], order[0], order[8]]
    other = OrderedBlocks(blocks, 20, seed=4)
    assert [int(other[i]["input_ids"][0]) // 2 for i in range(7)] != order[:7]


@pytest.mark.parametrize("blocks", [1, 6, 7, 12, 30])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_no_validation_block_is_counted_twice(blocks, processes):
    size = evaluation_batch(blocks, 4, processes)
    assert 1 <= size <= 4
    assert processes == 1 or size == 1 or blocks % (size * processes) == 0


def test_muon_takes_the_matrices_of_the_layers(finished):
    model = MultimatrixForCausalLM.from_pretrained(finished[0] / "model")
    optimizer = muon_with_adamw(model, {"model.embed_tokens.weight"}, lr=1e-3, weight_decay=0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    matrices = {names[id(p)] for group in optimizer.muon.param_groups for p in group["params"]}
    others = {names[id(p)] for group in optimizer.adamw.param_groups for p in group["params"]}
    assert matrices | others == set(names.values())
    assert not matrices & others
    assert all(name.startswith("model.layers.") and not name.endswith("norm.weight") for name in matrices)
    assert "model.embed_tokens.weight" in others
    assert {"model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"} <= matrices


def test_muon_with_adamw_is_both(finished):
    """Against the two optimizers of torch, also after its state went through a state_dict."""
    model, other = (MultimatrixForCausalLM.from_pretrained(finished[0] / "model") for _ in range(2))
    optimizer = muon_with_adamw(model, set(), lr=1e-2, weight_decay=0.1)
    matrices = [p for p in other.parameters() if p.ndim == 2 and p is not other.lm_head.weight]
    rest = [p for p in other.parameters() if not any(p is matrix for matrix in matrices)]
    reference = [
        torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=1e-2, weight_decay=0.0, betas=(0.9, 0.95)),
    ]
    for step in range(4):
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            mine.grad = torch.randn_like(mine)
            theirs.grad = mine.grad.clone()
        if step == 2:
            state = optimizer.state_dict()
            optimizer = muon_with_adamw(model, set(), lr=1e-2, weight_decay=0.1)
            optimizer.load_state_dict(state)
        optimizer.step()
        for each in reference:
            each.step()
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(mine, theirs)
    assert isinstance(optimizer, MuonWithAdamW)


def test_a_line_shows_what_a_row_has():
    row = {"step": 7, "loss": 2.5, "learning_rate": 3e-4, "tokens_per_second": 123_456.7, "mfu": 0.4567}
    row |= {"memory_bytes": 3_210_000_000, "seconds_left": 3_723.0}
    shown = "loss 2.5000, learning rate 0.0003, tokens per second 123,457, mfu 45.7%, memory 3.2 GB, left 1:02:03"
    assert row_text(row, 9) == f"step 7/9: {shown}"


def test_checksums_are_shared_out_to_the_processes():
    assert checkpoints._writer("state/__3_0.distcp") == 3
    assert checkpoints._writer("rng_state_12.pth") == 12
    assert checkpoints._writer("state/.metadata") == checkpoints._writer("rng_state.pth") == 0


def events(out: Path, name: str) -> dict[int, float]:
    accumulator = EventAccumulator(str(out / "tensorboard")).Reload()
    return {event.step: event.value for event in accumulator.Scalars(name)}


def test_tensorboard_sees_every_row_once(train, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(patch, 5, KeyboardInterrupt())
        assert train(out, "--report-to", "tensorboard").status == 130
    assert train(out, "--report-to", "tensorboard").status == 0
    expected = {row["step"]: row["loss"] for row in rows(out) if "loss" in row}
    assert events(out, "train/loss") == pytest.approx(expected)
    assert len(events(out, "train/tokens_per_second")) == STEPS
    expected = {row["step"]: row["validation_loss"] for row in rows(out) if "validation_loss" in row}
    assert events(out, "eval/loss") == pytest.approx(expected)


def test_utilization_where_the_peak_is_known(train, tmp_path, monkeypatch):
    """1,000 FLOPs a token on a device of 10^8 FLOPs a second: tokens per second over 10^5."""
    monkeypatch.setattr(run, "_utilization", lambda config, context, device: lambda speed: speed * 1e3 / 1e8)
    done = train(tmp_path / "out")
    found = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    shares = [(row["mfu"], row["tokens_per_second"] / 1e5) for row in found if "loss" in row]
    assert len(shares) == STEPS
    assert all(mfu == pytest.approx(expected, abs=1e-4) for mfu, expected in shares)
    assert done.err.count(", mfu ") == STEPS


def test_a_tracker_that_is_not_installed(train, tmp_path, monkeypatch):
    monkeypatch.setattr(arguments.importlib.util, "find_spec", lambda name: None)
    done = train(tmp_path / "out", "--report-to", "wandb")
    assert "report_to wandb needs its package: pip install wandb" in done.sentence


def test_execution_is_no_part_of_the_identity(finished):
    config = json.loads((finished[0] / "config.json").read_text())
    assert not {field.name for field in dataclasses.fields(Execution)} & set(config)
