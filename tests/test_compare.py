"""The main job on a small made-up text: what it leaves behind, what it keeps, and what it refuses."""

from __future__ import annotations

import csv
import errno
import functools
import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from transformers import AutoTokenizer

from command import Done, multimatrix
from multimatrix.compare import execute, figures, live, report
from multimatrix.compare import run as compare_run
from multimatrix.compare.configuration import Comparison
from multimatrix.compare.progress import Progress
from multimatrix.compare.results import loss_columns
from multimatrix.compare.statistics import judge, summary
from multimatrix.data import load_corpus, pack
from multimatrix.locks import locked
from multimatrix.model.modeling import MultimatrixForCausalLM
from multimatrix.train import run as train_run

STEPS = 6
SIZES = ["--hidden-size", 32, "--head-dim", 8, "--layers", 2, "--context", 32]
SMALL = [*SIZES, "--steps", STEPS, "--batch-size", 4, "--evaluations", 2, "--validation-tokens", 256]
SMALL += ["--learning-rate", 3e-3]
# Two runs, for tests of what happens between the first and the second.
TWO_RUNS = ["--variants", "mha,mfa_kr", "--seeds", "0"]
VARIANTS = ["mha", "mla", "mfa_kr", "mfa_kr@relative"]
FOUR_VARIANTS = ["--variants", ",".join(VARIANTS), "--set", "mfa_kr@relative.key_reuse=relative"]
SAME = [*FOUR_VARIANTS, "--seeds", "0,1"]


@pytest.fixture(autouse=True)
def quick_figures(monkeypatch):
    """Drawing takes longer than training; `finished` and the subprocess draw in earnest, and test_report looks."""
    monkeypatch.setattr(figures, "loss_against_tokens", lambda results, directory: Figure())
    monkeypatch.setattr(figures, "loss_against_kv_bytes", lambda results: Figure())


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Some 10,000 bytes in 60 documents with words that follow each other, so that there is something to learn."""
    shuffle = random.Random(0)
    nouns, verbs = ["fox", "hen", "barn", "rain", "hill"], ["sees", "finds", "leaves"]
    rows = [
        {"text": " ".join(f"The {shuffle.choice(nouns)} {shuffle.choice(verbs)} it." for _ in range(10))}
        for _ in range(60)
    ]
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def compare(text):
    """`compare(out, ...)` runs the command on the small text."""

    def run(out: Path, *words: object, **others: str) -> Done:
        return multimatrix("compare", "--data", text, *SMALL, "--out", out, *words, **others)

    return run


@pytest.fixture(scope="module")
def finished(compare, tmp_path_factory):
    """A finished comparison of four variants and two seeds, and what the command printed; look, do not touch."""
    out = tmp_path_factory.mktemp("finished") / "out"
    return out, compare(out, *SAME)


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished comparison that may be spoilt."""
    return shutil.copytree(finished[0], tmp_path / "out")


@pytest.fixture
def no_training(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a finished run is trained again")

    monkeypatch.setattr(execute, "train", refuse)


def snapshot(folder: Path) -> dict[str, tuple]:
    """Every file below a folder: its bytes and when it was written."""
    return {
        str(path.relative_to(folder)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def read(path: Path) -> dict:
    """A JSON file as every reader accepts it: Python's would let NaN and Infinity pass."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{path} holds {constant}, which is not JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def metrics(out: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (out / "runs" / name / "metrics.jsonl").read_text().splitlines()]


def statuses(out: Path) -> dict[str, str]:
    return {run["directory"].removeprefix("runs/"): run["status"] for run in read(out / "results.json")["runs"]}


# ---- what a finished comparison leaves behind --------------------------------------------------------------------


def test_it_prints_progress_and_a_table(finished):
    _, done = finished
    assert done.status == 0
    lines = done.err.splitlines()
    assert lines[0] == "reading the text"
    for name in ("mha-seed0", "mfa_kr@relative-seed1"):
        for step in range(1, STEPS + 1):
            assert any(line.startswith(f"{name} step {step}/{STEPS}: loss ") for line in lines), (name, step)
        assert any(line.startswith(f"{name} step {STEPS}/{STEPS}: validation loss ") for line in lines)
    assert len(lines) == 1 + len(VARIANTS) * 2 * (STEPS + 2)
    assert "MFA-KR" in done.out
    assert "report.html" in done.out


def test_every_file_is_there(finished):
    out, _ = finished
    names = set(snapshot(out))
    runs = [f"{variant}-seed{seed}" for variant in VARIANTS for seed in (0, 1)]
    expected = {"config.json", "results.json", "results.csv", "report.html"}
    expected |= {f"figures/loss_against_{x}.{kind}" for x in ("tokens", "kv_bytes") for kind in ("png", "svg")}
    expected |= {f"runs/{run}/{name}" for run in runs for name in ("metrics.jsonl", "result.json")}
    expected |= {f"runs/{run}/model/{name}" for run in runs for name in ("config.json", "model.safetensors")}
    assert expected <= names
    others = {name for name in names - expected if "/model/" not in name}
    assert not others
    for figure in (out / "figures").glob("*.png"):
        assert figure.read_bytes().startswith(b"\x89PNG")


def test_a_model_alone_says_how_it_was_made(finished):
    out, _ = finished
    results, result = read(out / "results.json"), read(out / "runs" / "mla-seed1" / "result.json")
    folder = out / "runs" / "mla-seed1" / "model"
    found = read(folder / "config.json")["provenance"]
    assert found["corpus"] == results["corpus"]
    assert found["command"] == results["command"]
    assert found["environment"] == result["environment"]
    assert found["validation_loss"] == result["validation_loss"]
    assert (found["seed"], found["tokens"]) == (1, STEPS * 4 * 32)
    assert found["protocol"].items() <= result["identity"].items()
    assert found["protocol"]["steps"] == STEPS
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"| corpus.sha256 | {results['corpus']['sha256']} |" in card
    assert f"| validation_loss | {result['validation_loss']} |" in card
    assert "not recorded" not in card


def test_results_agree_with_the_runs(finished):
    out, _ = finished
    results = read(out / "results.json")
    assert results["complete"] is True
    assert results["baseline"] == "mha"
    assert results["config"] == read(out / "config.json")
    assert set(statuses(out).values()) == {"done"}
    for row in results["rows"]:
        assert row["seeds"] == [0, 1]
        stored = [read(out / "runs" / f"{row['variant']}-seed{seed}" / "result.json") for seed in row["seeds"]]
        losses = [result["validation_loss"] for result in stored]
        assert row["validation_loss"]["values"] == losses
        assert row["validation_loss"]["mean"] == pytest.approx(sum(losses) / 2)
        assert row["validation_loss"]["spread"] == pytest.approx(abs(losses[0] - losses[1]))
        assert row["perplexity"]["values"] == pytest.approx([math.exp(loss) for loss in losses])
        assert row["wall_seconds"] == pytest.approx(sum(result["wall_seconds"] for result in stored))
        for seed, result in zip(row["seeds"], stored, strict=True):
            rows = metrics(out, f"{row['variant']}-seed{seed}")
            assert [r["step"] for r in rows if "loss" in r] == list(range(1, STEPS + 1))
            assert [r["step"] for r in rows if "validation_loss" in r] == [STEPS // 2, STEPS]
            assert rows[-1]["validation_loss"] == result["validation_loss"]
            assert rows[-1]["tokens"] == STEPS * 4 * 32
            assert result["identity"]["seed"] == seed
            assert result["identity"]["variant"] == row["variant"]
            assert result["identity"]["attention"] == row["sizes"]


def test_csv_and_report_agree_with_the_results(finished):
    out, _ = finished
    results = read(out / "results.json")
    with (out / "results.csv").open(newline="") as file:
        table = {line["variant"]: line for line in csv.DictReader(file)}
    page = re.sub(r"<svg.*?</svg>", "", (out / "report.html").read_text(encoding="utf-8"), flags=re.S)
    assert list(table) == VARIANTS
    for row in results["rows"]:
        line, loss = table[row["variant"]], row["validation_loss"]
        assert float(line["validation_loss_mean"]) == loss["mean"]
        assert [float(line[f"validation_loss_seed{seed}"]) for seed in row["seeds"]] == loss["values"]
        assert int(line["parameters"]) == row["parameters"]
        assert int(line["kv_bytes_per_token"]) == row["kv_bytes_per_token"]
        assert line["verdict"] == row["verdict"]
        for shown in (f"{loss['mean']:.4f}", f"{loss['spread']:.4f}", row["verdict"]):
            assert f"<span>{shown}</span>" in page, (row["variant"], shown)
    for value in (results["command"], results["corpus"]["sha256"], results["environment"]["torch"]):
        assert value in page
    for limit in results["cannot_show"]:
        assert limit in page


def test_where_the_numbers_come_from(finished, text):
    out, _ = finished
    results = read(out / "results.json")
    environment = results["environment"]
    assert environment["torch"] == torch.__version__
    assert environment["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"commit", "multimatrix", "transformers", "accelerate", "platform", "device", "cores"} <= set(environment)
    stored = read(out / "runs" / "mha-seed0" / "result.json")["environment"]
    assert stored | {"commit": None} == environment | {"commit": None}  # somebody may commit meanwhile
    corpus = load_corpus([str(text)])
    assert results["corpus"]["sha256"] == corpus.sha256 == results["config"]["corpus_sha256"]
    assert results["corpus"]["documents"] == 60
    assert results["command"].startswith(f"multimatrix compare --data {text} ")


def test_parameters_are_matched_and_bytes_are_counted(finished):
    out, _ = finished
    rows = read(out / "results.json")["rows"]
    target = rows[0]["parameters"]
    stated = {row["variant"]: row["kv_bytes_per_token"] for row in rows}
    for row in rows:
        model = MultimatrixForCausalLM.from_pretrained(out / "runs" / f"{row['variant']}-seed1" / "model")
        assert sum(parameter.numel() for parameter in model.parameters()) == row["parameters"]
        assert abs(row["parameters"] / target - 1) <= 0.005
        assert row["parameter_mismatch"] == row["parameters"] / target - 1
        assert row["kv_bytes_per_token_counted"] == row["kv_bytes_per_token"]
        assert row["kv_reduction"] == 1 - stated[row["variant"]] / stated["mha"]
    # Two layers of 16-bit elements: two tensors of 4 x 8, a latent of 32 + 4, and one key of 16.
    assert stated == {"mha": 256, "mla": 144, "mfa_kr": 64, "mfa_kr@relative": 64}
    assert rows[3]["sizes"]["key_reuse"] == "relative"
    assert "key_reuse" not in rows[2]["sizes"]


@pytest.mark.parametrize("name", ["mha-seed0", "mfa_kr@relative-seed1"])
def test_the_saved_model_has_the_stated_loss(finished, text, name):
    out, _ = finished
    folder = out / "runs" / name / "model"
    model = MultimatrixForCausalLM.from_pretrained(folder).eval()
    packed = pack(load_corpus([str(text)]), AutoTokenizer.from_pretrained(folder), context=32)
    ids = torch.from_numpy(packed.validation[: 256 // 32]).long()
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    assert loss == pytest.approx(read(out / "runs" / name / "result.json")["validation_loss"], abs=1e-5)


def test_the_saved_model_is_checked(finished):
    out, _ = finished
    done = multimatrix("check", out / "runs" / "mfa_kr@relative-seed0" / "model", "--json")
    assert done.status == 0
    found = json.loads(done.out)
    assert found["passed"] is True
    assert found["attention"]["key_reuse"] == "relative"


def test_every_variant_learns(finished):
    out, _ = finished
    for variant in VARIANTS:
        losses = [row["loss"] for row in metrics(out, f"{variant}-seed0") if "loss" in row]
        assert losses[-1] < losses[0] - 0.2, variant


# ---- one protocol for all ----------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_losses(finished, compare, tmp_path):
    out, _ = finished
    assert compare(tmp_path / "again", *TWO_RUNS).status == 0

    def without_speed(rows: list[dict]) -> list[dict]:
        measured = ("tokens_per_second", "seconds_left", "memory_bytes")
        return [{key: value for key, value in row.items() if key not in measured} for row in rows]

    for name in ("mha-seed0", "mfa_kr-seed0"):
        assert without_speed(metrics(tmp_path / "again", name)) == without_speed(metrics(out, name))
        first, second = (folder / "runs" / name / "model" / "model.safetensors" for folder in (out, tmp_path / "again"))
        assert first.read_bytes() == second.read_bytes()
    assert without_speed(metrics(out, "mha-seed0")) != without_speed(metrics(out, "mha-seed1"))


def test_the_data_order_is_the_seeds_alone(compare, tmp_path, monkeypatch):
    """What the models are really given, step by step: equal for all variants of a seed, other for another seed."""
    forward, seen = MultimatrixForCausalLM.forward, {}

    @functools.wraps(forward)  # the Trainer drops what the signature does not name
    def spy(self, input_ids=None, **words):
        kind = "training" if self.training else "validation"
        if words.get("labels") is not None:
            seen.setdefault((id(self), kind), []).append(input_ids.clone())
        return forward(self, input_ids, **words)

    monkeypatch.setattr(MultimatrixForCausalLM, "forward", spy)
    kept = []  # an id may be given again once its model is gone
    train = train_run.train
    monkeypatch.setattr(execute, "train", lambda *args, **words: kept.append(train(*args, **words)) or kept[-1])
    assert compare(tmp_path / "out", "--variants", "mfa,mha,mfa_kr", "--seeds", "0,1").status == 0

    training = [torch.stack(seen[id(run.model), "training"]) for run in kept]
    validation = [torch.cat(seen[id(run.model), "validation"]) for run in kept]
    assert [order.shape for order in training] == [(STEPS, 4, 32)] * 6
    for order in training[1:3]:
        assert torch.equal(order, training[0])
    for order in training[4:6]:
        assert torch.equal(order, training[3])
    assert not torch.equal(training[3], training[0])
    for blocks in validation:
        assert torch.equal(blocks, validation[0])
    assert not set(map(tuple, validation[0].tolist())) & set(map(tuple, training[0].flatten(0, 1).tolist()))


def test_every_step_is_a_whole_batch(compare, tmp_path, monkeypatch):
    """Through the ends of epochs too, so that the tokens that are stated are tokens that were seen."""
    forward, shapes = MultimatrixForCausalLM.forward, []

    @functools.wraps(forward)
    def spy(self, input_ids=None, **words):
        if self.training:
            shapes.append(tuple(input_ids.shape))
        return forward(self, input_ids, **words)

    monkeypatch.setattr(MultimatrixForCausalLM, "forward", spy)
    done = compare(tmp_path / "out", "--variants", "mha", "--seeds", 0, "--context", 128, "--batch-size", 30)
    assert done.status == 0, done.err
    results = read(tmp_path / "out" / "results.json")
    assert shapes == [(30, 128)] * STEPS
    assert results["corpus"]["train_tokens"] % (30 * 128) != 0
    assert results["corpus"]["train_tokens"] < STEPS * 30 * 128


def test_unmatched_widths_stay_equal(compare, tmp_path):
    done = compare(tmp_path / "out", *TWO_RUNS, "--match", "none")
    assert done.status == 0
    rows = read(tmp_path / "out" / "results.json")["rows"]
    assert rows[0]["intermediate_size"] == rows[1]["intermediate_size"]
    assert rows[1]["parameter_mismatch"] != 0


def test_one_seed_gives_no_verdict(compare, tmp_path):
    done = compare(tmp_path / "out", *TWO_RUNS)
    assert done.status == 0
    results = read(tmp_path / "out" / "results.json")
    assert [row["verdict"] for row in results["rows"]] == ["baseline", "one seed"]
    assert [row["margin"] for row in results["rows"]] == [None, None]
    assert any(limit.startswith("any verdict on loss") for limit in results["cannot_show"])
    assert "with one seed, so no verdict" in " ".join(done.out.split())


def test_the_default_text_is_the_standard_library(tmp_path):
    done = multimatrix("compare", *SMALL, "--variants", "mfa_kr", "--seeds", 0, "--out", tmp_path / "out")
    assert done.status == 0, done.err
    results = read(tmp_path / "out" / "results.json")
    assert results["corpus"]["name"].endswith("-stdlib")
    assert results["corpus"]["documents"] > 100
    assert results["baseline"] == "mfa_kr"


# ---- resume and extend -------------------------------------------------------------------------------------------


def test_the_same_command_again_trains_nothing(copy, compare, no_training):
    before = snapshot(copy)
    done = compare(copy, *SAME)
    assert done.status == 0
    assert "8 of 8 runs are done already" in done.err
    after = snapshot(copy)
    assert set(after) == set(before)
    for name in before:
        if name.startswith("runs/"):
            assert after[name] == before[name], name


def test_a_terminal_without_unicode_gets_its_table(copy, compare, no_training):
    done = compare(copy, *SAME, encoding="ascii")
    assert done.status == 0
    assert "4?8" in done.out


@pytest.mark.parametrize(
    ("words", "new"),
    [
        ([*FOUR_VARIANTS, "--seeds", "2,0,1"], [f"{variant}-seed2" for variant in VARIANTS]),
        (
            ["--variants", "mqa,mha,mla,mfa_kr,mfa_kr@relative", *FOUR_VARIANTS[2:], "--seeds", "0,1"],
            ["mqa-seed0", "mqa-seed1"],
        ),
    ],
    ids=["seed", "variant"],
)
def test_more_seeds_or_variants_extend(copy, compare, monkeypatch, words, new):
    trained, train = [], train_run.train

    def spy(*args, directory, **others):
        trained.append(directory.name)
        return train(*args, directory=directory, **others)

    monkeypatch.setattr(execute, "train", spy)
    before = snapshot(copy)
    done = compare(copy, *words)
    assert done.status == 0
    assert f"8 of {8 + len(new)} runs are done already" in done.err
    assert trained == new
    after = snapshot(copy)
    assert all(after[name] == before[name] for name in before if name.startswith("runs/"))
    assert set(statuses(copy).values()) == {"done"}
    assert set(new) <= set(statuses(copy))
    results = read(copy / "results.json")
    assert len(results["runs"]) == 8 + len(new)
    assert results["baseline"] == "mha"


# ---- what does not belong together is refused, and nothing is touched --------------------------------------------

OTHER_SETTINGS = [
    ([*SAME, "--steps", 8], ["steps = 6", "this comparison has 8"]),
    ([*SAME, "--learning-rate", 1e-3], ["learning_rate = 0.003", "has 0.001"]),
    ([*SAME, "--hidden-size", 64], ["hidden_size = 32", "has 64"]),
    ([*SAME, "--context", 16], ["context = 32", "has 16"]),
    ([*SAME, "--tokenizer", "bpe:260"], ["tokenizer = bytes", "has bpe:260"]),
    ([*SAME, "--position", "none"], ["position = rope", "has none"]),
    ([*SAME, "--zero-init-output"], ["zero_init_output = False", "has True"]),
    ([*SAME, "--set", "mla.latent_dim=24"], ["mla-seed0", "attention.latent_dim = 32", "has 24"]),
    ([*FOUR_VARIANTS, "--seeds", "0"], ["seeds include 1", "name them again"]),
    (["--variants", "mha,mla,mfa_kr", "--seeds", "0,1"], ["variants include mfa_kr@relative", "name them again"]),
    (
        [*FOUR_VARIANTS[:2], "--set", "mfa_kr@relative.key_reuse=unrotated", "--seeds", "0,1"],
        ["sizes include mfa_kr@relative.key_reuse=relative", "name them again"],
    ),
]


@pytest.mark.parametrize(("words", "fragments"), OTHER_SETTINGS, ids=lambda case: " ".join(map(str, case))[-40:])
def test_a_folder_of_other_settings(finished, compare, no_training, words, fragments):
    out, _ = finished
    before = snapshot(out)
    done = compare(out, *words)
    for fragment in [*fragments, str(out), "choose another --out"]:
        assert fragment in done.sentence
    assert snapshot(out) == before


def test_a_folder_of_another_text(copy, text, tmp_path, no_training):
    other, config = tmp_path / "text.jsonl", copy / "config.json"
    other.write_text(text.read_text().replace("hen", "owl"))
    # As if the file had the same name and other contents.
    config.write_text(config.read_text().replace(str(text), str(other)))
    before, (ours, theirs) = snapshot(copy), (load_corpus([str(path)]).sha256 for path in (text, other))
    done = multimatrix("compare", "--data", other, *SMALL, "--out", copy, *SAME)
    assert f"corpus_sha256 = {ours} and this comparison has {theirs}" in done.sentence
    assert snapshot(copy) == before


FOREIGN = {
    "cut config": ("config.json", '{"variants": ["mha"', "config.json is damaged"),
    "list for a config": ("config.json", "[1, 2]", "config.json is damaged"),
    "config of a model": ("config.json", '{"model_type": "llama"}', "was not written by multimatrix compare"),
    "cut result": ("runs/mla-seed1/result.json", '{"identity": {"var', "result.json is damaged"),
    "empty result": ("runs/mla-seed1/result.json", "", "delete it to train that run again"),
    "list for a result": ("runs/mla-seed1/result.json", "[]", "result.json is damaged"),
    "result of others": ("runs/mla-seed1/result.json", '{"accuracy": 1}', "was not written by multimatrix compare"),
}


@pytest.mark.parametrize(("name", "contents", "fragment"), FOREIGN.values(), ids=FOREIGN)
def test_damaged_and_foreign_files(copy, compare, no_training, name, contents, fragment):
    (copy / name).write_text(contents)
    before = snapshot(copy)
    done = compare(copy, *SAME)
    assert fragment in done.sentence
    assert str(copy / name) in done.sentence
    assert snapshot(copy) == before


def test_a_deleted_result_is_trained_again(copy, compare, finished):
    (copy / "runs/mla-seed1/result.json").unlink()
    done = compare(copy, *SAME)
    assert done.status == 0
    assert "7 of 8 runs are done already" in done.err
    name = "mla-seed1"
    assert (
        read(copy / f"runs/{name}/result.json")["validation_loss"] == metrics(finished[0], name)[-1]["validation_loss"]
    )


def test_a_result_of_another_run(copy, compare, no_training):
    shutil.copy(copy / "runs/mla-seed0/result.json", copy / "runs/mla-seed1/result.json")
    before = snapshot(copy)
    done = compare(copy, *SAME)
    assert "mla-seed1 was made with seed = 0 and this comparison has 1" in done.sentence
    assert snapshot(copy) == before


def test_a_folder_of_somebody_else(compare, tmp_path, no_training):
    folder, file = tmp_path / "photos", tmp_path / "notes.txt"
    folder.mkdir()
    (folder / "cat.jpg").write_bytes(b"cat")
    file.write_text("notes")
    assert f"{folder} is not empty and holds no comparison of ours" in compare(folder, *SAME).sentence
    assert f"{file} is a file; choose another --out" in compare(file, *SAME).sentence
    assert "Not a directory" in compare(file / "below", *SAME).sentence
    assert set(snapshot(tmp_path)) == {"photos/cat.jpg", "notes.txt"}


def test_a_dry_run_touches_nothing(finished, compare, tmp_path):
    out, _ = finished
    before = snapshot(out)
    assert compare(out, *SAME, "--dry-run").status == 0
    assert compare(tmp_path / "new", *SAME, "--dry-run").status == 0
    assert snapshot(out) == before
    assert not (tmp_path / "new").exists()


# ---- Ctrl-C ------------------------------------------------------------------------------------------------------


def fail_in_run(monkeypatch, name: str, error: BaseException, step: int = 3) -> None:
    """Raise `error` in the middle of the training of one run."""
    train = train_run.train

    def failing(*args, directory, on_step, **words):
        def stop(row):
            on_step(row)
            if row["step"] == step:
                raise error

        return train(*args, directory=directory, on_step=stop if directory.name == name else on_step, **words)

    monkeypatch.setattr(execute, "train", failing)


def test_an_interrupt_keeps_what_is_done_and_resumes(compare, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        fail_in_run(patch, "mfa_kr-seed0", KeyboardInterrupt())
        done = compare(out, *TWO_RUNS)
    assert done.status == 130
    assert done.err.splitlines()[-1].startswith(f"interrupted; what was finished is in {out}")
    assert "Traceback" not in done.err
    assert statuses(out) == {"mha-seed0": "done", "mfa_kr-seed0": "stopped"}
    results = read(out / "results.json")
    assert results["complete"] is False
    assert results["rows"][1]["validation_loss"] is None
    assert "Incomplete: 1 of 2 runs are done." in (out / "report.html").read_text()
    assert (out / "figures" / "loss_against_tokens.png").exists()

    before = snapshot(out / "runs" / "mha-seed0")
    again = compare(out, *TWO_RUNS)
    assert again.status == 0
    assert "1 of 2 runs are done already" in again.err
    assert snapshot(out / "runs" / "mha-seed0") == before
    assert set(statuses(out).values()) == {"done"}


@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM"])
def test_a_run_in_its_middle_goes_on_from_its_checkpoint(finished, compare, tmp_path, monkeypatch, how):
    """And ends as it would have; with SIGTERM the checkpoint is one step old at most."""
    out, name = tmp_path / "out", "mfa_kr-seed0"
    train = train_run.train

    def stopped(*args, directory, on_step, **words):
        def stop(row):
            on_step(row)
            if row["step"] == 4 and directory.name == name and how == "SIGTERM":
                os.kill(os.getpid(), signal.SIGTERM)
            elif row["step"] == 4 and directory.name == name:
                raise KeyboardInterrupt

        return train(*args, directory=directory, on_step=stop, **words)

    words = [*TWO_RUNS, "--checkpoint-interval", 3]
    with monkeypatch.context() as patch:
        patch.setattr(execute, "train", stopped)
        done = compare(out, *words)
    assert done.status == (75 if how == "SIGTERM" else 130)
    assert statuses(out) == {"mha-seed0": "done", name: "stopped"}
    assert not (out / "runs" / "mha-seed0" / "checkpoints").exists()
    again = compare(out, *words)
    assert again.status == 0, again.err
    assert f"{name}: continuing from the checkpoint of step {5 if how == 'SIGTERM' else 3}" in again.err
    weights = (folder / "runs" / name / "model" / "model.safetensors" for folder in (out, finished[0]))
    assert next(weights).read_bytes() == next(weights).read_bytes()
    assert [row.get("loss") for row in metrics(out, name)] == [row.get("loss") for row in metrics(finished[0], name)]
    assert not (out / "runs" / name / "checkpoints").exists()


def test_checkpoints_of_other_sizes_are_refused(compare, tmp_path, monkeypatch):
    """Sizes may be added to a comparison, but not to a run that has begun."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        fail_in_run(patch, "mfa_kr-seed0", KeyboardInterrupt())
        compare(out, *TWO_RUNS)
    done = compare(out, *TWO_RUNS, "--set", "mfa_kr.num_heads=3")
    assert "num_heads = " in done.sentence
    assert "and this run has" in done.sentence


def test_an_interrupt_before_anything_is_done(compare, tmp_path, monkeypatch):
    out = tmp_path / "out"
    fail_in_run(monkeypatch, "mha-seed0", KeyboardInterrupt(), step=1)
    assert compare(out, *TWO_RUNS).status == 130
    assert statuses(out) == {"mha-seed0": "stopped", "mfa_kr-seed0": "missing"}
    assert "Incomplete: 0 of 2 runs are done." in (out / "report.html").read_text()


def test_an_interrupt_while_the_text_is_read(compare, tmp_path, monkeypatch):
    def interrupt(*args, **words):
        raise KeyboardInterrupt

    monkeypatch.setattr(Comparison, "prepare_text", interrupt)
    done = compare(tmp_path / "out", *TWO_RUNS)
    assert done.status == 130
    assert "Traceback" not in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_real_ctrl_c(compare, text, tmp_path):
    out, words = tmp_path / "out", [*TWO_RUNS[:2], "--seeds", "0,1,2"]
    command = [sys.executable, "-m", "multimatrix", "compare", "--data", text, *SMALL, "--out", out, *words]
    with (tmp_path / "err").open("w+") as err:
        process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=err)
        try:
            for _ in range(6000):
                if list(out.glob("runs/*/result.json")) or process.poll() is not None:
                    break
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            status = process.wait(timeout=60)
        finally:
            process.kill()
        err.seek(0)
        said = err.read()
    assert status == 130, said
    assert "interrupted; what was finished is in" in said
    assert "Traceback" not in said
    found = statuses(out)
    assert found["mha-seed0"] == "done"
    assert found["mfa_kr-seed2"] == "missing"
    assert "Incomplete: " in (out / "report.html").read_text()
    ended = [name for name, state in found.items() if state == "done"]
    before = {name: snapshot(out / "runs" / name) for name in ended}
    again = compare(out, *words)
    assert again.status == 0
    assert f"{len(ended)} of 6 runs are done already" in again.err
    assert all(snapshot(out / "runs" / name) == files for name, files in before.items())


# ---- a disk that fills up ----------------------------------------------------------------------------------------

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_while_training(patch):
    fail_in_run(patch, "mfa_kr-seed0", FULL)


def full_while_saving_weights(patch):
    """safetensors writes in Rust, and what it raises is no OSError."""
    import safetensors.torch

    write = safetensors.torch.serialize_file

    def failing(tensors, path, *args, **words):
        if "mfa_kr-seed0" in str(path):
            raise safetensors.SafetensorError("Error while serializing: I/O error: No space left (os error 28)")
        return write(tensors, path, *args, **words)

    patch.setattr(safetensors.torch, "serialize_file", failing)


def full_while_writing_the_result(patch):
    replace = os.replace

    def failing(source, target):
        if str(target).endswith("mfa_kr-seed0/result.json"):
            raise FULL
        replace(source, target)

    patch.setattr(os, "replace", failing)


def full_while_writing_the_report(patch):
    replace = os.replace

    def failing(source, target):
        if str(target).endswith("report.html"):
            raise FULL
        replace(source, target)

    patch.setattr(os, "replace", failing)


@pytest.mark.parametrize(
    "fill",
    [full_while_training, full_while_saving_weights, full_while_writing_the_result, full_while_writing_the_report],
)
def test_a_full_disk_keeps_what_is_done_and_resumes(compare, tmp_path, monkeypatch, fill):
    out = tmp_path / "out"
    first, second = (out / "runs" / name for name in ("mha-seed0", "mfa_kr-seed0"))
    with monkeypatch.context() as patch:
        fill(patch)
        done = compare(out, *TWO_RUNS)
    assert f"cannot write {out}" in done.sentence
    assert "No space left on device; finished runs are kept" in done.sentence
    assert "the same command goes on from there" in done.sentence
    before = snapshot(first)
    assert read(first / "result.json")["identity"]["variant"] == "mha"
    assert MultimatrixForCausalLM.from_pretrained(first / "model").num_parameters() > 0
    assert (second / "result.json").exists() == (fill is full_while_writing_the_report)
    hidden = {path.name for path in out.rglob(".*")} - {".metadata"}  # that is in every checkpoint
    assert not hidden, "half-written files are left"

    again = compare(out, *TWO_RUNS)
    assert again.status == 0
    assert snapshot(first) == before
    assert set(statuses(out).values()) == {"done"}


def test_a_disk_that_is_really_full(compare, text, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    # Room for one run and its checkpoint, and not for a second beside it.
    mounted = (
        mount
        and not subprocess.run(
            [mount, "-t", "tmpfs", "-o", "size=950k", "tmpfs", disk], capture_output=True, check=False
        ).returncode
    )
    if not mounted:
        pytest.skip("mounting a small disk needs the rights of root")
    try:
        done = compare(disk / "out", *TWO_RUNS, "--checkpoint-interval", 9)
        assert f"cannot write {disk / 'out'}" in done.sentence
        assert "No space left on device; finished runs are kept" in done.sentence
        first = disk / "out" / "runs" / "mha-seed0"
        assert read(first / "result.json")["validation_loss"] > 0
        assert MultimatrixForCausalLM.from_pretrained(first / "model").num_parameters() > 0
        assert not (disk / "out" / "runs" / "mfa_kr-seed0" / "result.json").exists()
        before = snapshot(first)
        assert "No space left on device" in compare(disk / "out", *TWO_RUNS, "--checkpoint-interval", 9).sentence
        assert snapshot(first) == before
        subprocess.run([mount, "-o", "remount,size=16m", disk], check=True)
        done = compare(disk / "out", *TWO_RUNS, "--checkpoint-interval", 9)
        assert done.status == 0
        assert "1 of 2 runs are done already" in done.err
        assert snapshot(first) == before
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_folder_that_cannot_be_made(compare, monkeypatch, tmp_path):
    mkdir = Path.mkdir

    def refuse(self, *args, **words):
        if self.is_relative_to(tmp_path / "out"):
            raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "out"))
        mkdir(self, *args, **words)

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert f"cannot write {tmp_path / 'out'}: Permission denied" in compare(tmp_path / "out", *TWO_RUNS).sentence


# ---- a run that fails --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["training", "validation"])
def test_a_loss_that_is_no_number_fails_its_run_alone(compare, tmp_path, monkeypatch, where):
    forward, out = MultimatrixForCausalLM.forward, tmp_path / "out"

    @functools.wraps(forward)
    def spoilt(self, input_ids=None, **words):
        result = forward(self, input_ids, **words)
        if (
            self.config.attention["variant"] == "mha"
            and self.training == (where == "training")
            and result.loss is not None
        ):
            result.loss = result.loss * float("nan")
        return result

    with monkeypatch.context() as patch:
        patch.setattr(MultimatrixForCausalLM, "forward", spoilt)
        done = compare(out, *TWO_RUNS)
    assert done.status == 1
    step = {"training": 1, "validation": 3}[where]
    reason = f"the {where} loss is nan at step {step}; lower the learning rate"
    assert f"mha-seed0 failed: {reason}" in done.err
    assert statuses(out) == {"mha-seed0": "failed", "mfa_kr-seed0": "done"}
    results = read(out / "results.json")
    assert [run["reason"] for run in results["runs"]] == [reason, None]
    assert results["complete"] is False
    assert results["rows"][0]["validation_loss"] is None
    assert results["rows"][1]["verdict"] is None
    page = (out / "report.html").read_text()
    assert reason in page
    assert "Incomplete: 1 of 2 runs are done." in page
    assert all(math.isfinite(value) for row in metrics(out, "mha-seed0") for value in row.values())

    again = compare(out, *TWO_RUNS)
    assert again.status == 0
    assert "1 of 2 runs are done already" in again.err


def test_an_absurd_learning_rate(compare, tmp_path):
    done = compare(tmp_path / "out", *TWO_RUNS, "--learning-rate", 1e30)
    assert done.status == 1
    assert set(statuses(tmp_path / "out").values()) == {"failed"}
    assert "No variant can be set against MHA yet." in done.out
    assert "Traceback" not in done.err


def test_out_of_memory_fails_its_run_alone(compare, tmp_path, monkeypatch):
    fail_in_run(monkeypatch, "mha-seed0", torch.OutOfMemoryError("no memory\nat all"))
    done = compare(tmp_path / "out", *TWO_RUNS)
    assert done.status == 1
    assert "mha-seed0 failed: no memory at all" in done.err
    assert statuses(tmp_path / "out") == {"mha-seed0": "failed", "mfa_kr-seed0": "done"}


def test_a_diverged_loss_has_no_perplexity():
    columns = loss_columns([5.0, 4e6], bytes_per_token=1.0)
    assert columns["perplexity"] is None
    assert columns["validation_loss"]["mean"] == pytest.approx(2_000_002.5)
    assert loss_columns([], bytes_per_token=1.0)["validation_loss"] is None


# ---- the report while runs go on ---------------------------------------------------------------------------------


def test_the_report_is_made_anew_while_runs_go_on(compare, tmp_path, monkeypatch):
    out, seen = tmp_path / "out", []
    write = report.write_report

    def spy(results, directory):
        path = write(results, directory)
        states = [(run["status"], run["step"]) for run in results["runs"]]
        if not seen or states != seen[-1][0]:
            seen.append((states, "http-equiv" in path.read_text()))
        assert read(out / "results.json")["running"] == results["running"]
        return path

    monkeypatch.setattr(report, "write_report", spy)
    monkeypatch.setattr(live, "INTERVAL", 0)
    monkeypatch.setattr(compare_run, "SHARE_IN_PROCESS", 1e9)
    assert compare(out, *TWO_RUNS).status == 0
    assert [states for states, _ in seen if states[0][0] == "running"] == [
        [("running", step), ("waiting", 0)] for step in range(STEPS + 1)
    ]
    assert [states for states, _ in seen if states[1][0] == "running"] == [
        [("done", STEPS), ("running", step)] for step in range(STEPS + 1)
    ]
    assert [reads_itself_again for _, reads_itself_again in seen] == [True] * (len(seen) - 1) + [False]
    assert "http-equiv" not in (out / "report.html").read_text()
    assert read(out / "results.json")["running"] is False


def test_the_report_takes_little_of_the_time(monkeypatch):
    """What took 30 seconds is not done again before 50 times as many have passed."""
    now, rendered = [1000.0], []

    def render():
        rendered.append(now[0])
        now[0] += 30

    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    watch = live.Watch([], Progress(10), render, share=0.02)
    for later in (0, 100, 1000, 1499, 1501):
        now[0] = 1000.0 + later
        watch.tick()
    assert rendered == [1000.0, 2501.0]


def test_a_report_that_cannot_be_written_meanwhile_stops_nothing(compare, tmp_path, monkeypatch):
    write, failed = report.write_report, []

    def failing(results, directory):
        if results["running"]:
            failed.append(results)
            raise FULL
        return write(results, directory)

    monkeypatch.setattr(report, "write_report", failing)
    assert compare(tmp_path / "out", *TWO_RUNS).status == 0
    assert failed
    assert (tmp_path / "out" / "report.html").exists()


def test_a_report_made_by_another_command(copy, no_training):
    """From the runs' own files: what `compare` had no time to gather before it was killed is there."""
    whole = read(copy / "results.json")
    (copy / "runs/mla-seed1/result.json").unlink()
    (copy / "report.html").unlink()
    done = multimatrix("report", copy)
    assert done.status == 0
    assert statuses(copy)["mla-seed1"] == "stopped"
    assert "Incomplete: 7 of 8 runs are done." in (copy / "report.html").read_text()
    with locked(copy / "runs/mla-seed1/run.lock", ""), locked(copy / "compare.lock", ""):
        assert multimatrix("report", copy).status == 0
        assert "http-equiv" in (copy / "report.html").read_text()
        assert statuses(copy)["mla-seed1"] == "stopped", "results.json is for whoever is at work to write"
    shutil.copy(copy / "runs/mla-seed0/result.json", copy / "runs/mla-seed1/result.json")
    assert multimatrix("report", copy).status == 0
    again = read(copy / "results.json")
    assert again["complete"] is True
    assert {key: again[key] for key in ("config", "corpus", "environment")} == {
        key: whole[key] for key in ("config", "corpus", "environment")
    }
    assert again["rows"][0] == whole["rows"][0]
    (copy / "runs/mla-seed1/result.json").write_text("{")
    assert "mla-seed1/result.json is damaged" in multimatrix("report", copy).sentence


# ---- progress on a terminal --------------------------------------------------------------------------------------


def test_a_terminal_gets_bars(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)

    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    progress = Progress(10)
    for name in ("mha-seed0", "mfa-seed0"):
        progress.start(name)
    progress.show("mha-seed0", {"step": 4, "loss": 2.5, "tokens_per_second": 1234.0})
    progress.show("mfa-seed0", {"step": 10, "validation_loss": 2.25})
    time.sleep(0.3)  # bars are drawn ten times a second
    progress.say("a line between")
    progress.end("mha-seed0")
    progress.close()
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err).splitlines()
    assert "a line between" in lines
    bar = next(line for line in lines if line.startswith("mha-seed0") and "4/10" in line)
    assert "loss 2.500 1,234/s" in bar
    assert any(line.startswith("mfa-seed0") and "10/10" in line and "valid. 2.250" in line for line in lines)
    assert all(len(line) <= 100 for line in lines)


# ---- statistics --------------------------------------------------------------------------------------------------


def test_summary():
    assert summary([1.0, 3.0, 2.0]) == {"mean": 2.0, "spread": 2.0, "values": [1.0, 3.0, 2.0]}
    assert summary([1.5]) == {"mean": 1.5, "spread": None, "values": [1.5]}


def test_the_margin_is_students_interval_of_the_pooled_variance():
    losses = {"mha": [1.0, 1.2], "mfa": [1.1, 1.4], "mla": [2.0, 2.0, 2.3]}
    # Sums of squares 0.02, 0.045 and 0.06 over 1 + 1 + 2 degrees of freedom; t of 4 at 97.5 % is 2.776445.
    pooled = (0.02 + 0.045 + 0.06) / 4
    found = judge(losses, "mha")
    assert found["mfa"]["difference"] == pytest.approx(0.15)
    assert found["mfa"]["margin"] == pytest.approx(2.776445 * math.sqrt(pooled * (1 / 2 + 1 / 2)))
    assert found["mla"]["margin"] == pytest.approx(2.776445 * math.sqrt(pooled * (1 / 3 + 1 / 2)))
    assert {name: verdict["verdict"] for name, verdict in found.items()} == {
        "mha": "baseline",
        "mfa": "tie",
        "mla": "worse",
    }


def test_the_margin_is_at_least_either_spread():
    narrow = {f"other{i}": [1.0, 1.0, 1.0] for i in range(20)}
    for wide in ("mha", "mfa"):
        losses = {"mha": [1.0, 1.0], "mfa": [0.9, 0.9]} | narrow
        losses[wide] = [losses[wide][0] - 0.2, losses[wide][0] + 0.2]
        assert judge(losses, "mha")["mfa"]["margin"] == pytest.approx(0.4)
        assert judge(losses, "mha")["mfa"]["verdict"] == "tie"


@pytest.mark.parametrize(("loss", "verdict"), [(0.5, "better"), (1.5, "worse"), (1.0, "tie"), (1.001, "tie")])
def test_verdicts(loss, verdict):
    losses = {"mha": [0.99, 1.0, 1.01], "mfa": [loss - 0.01, loss, loss + 0.01]}
    assert judge(losses, "mha")["mfa"]["verdict"] == verdict


def test_a_difference_equal_to_the_margin_is_a_tie():
    # Spreads of 0.25 and many groups without variance: the margin is the spread, exactly.
    losses = {"mha": [1.0, 1.25], "mfa": [1.25, 1.5]} | {f"other{i}": [1.0] * 9 for i in range(99)}
    found = judge(losses, "mha")["mfa"]
    assert found["difference"] == found["margin"] == 0.25
    assert found["verdict"] == "tie"


def test_seeds_that_all_agree_have_no_margin():
    found = judge({"mha": [1.0, 1.0], "mfa": [1.0, 1.0], "mla": [0.9, 0.9]}, "mha")
    assert (found["mfa"]["verdict"], found["mfa"]["margin"]) == ("tie", 0.0)
    assert found["mla"]["verdict"] == "better"


def test_one_seed_on_either_side_is_no_verdict():
    for losses in ({"mha": [1.0], "mfa": [2.0, 2.1]}, {"mha": [1.0, 1.1], "mfa": [2.0]}):
        found = judge(losses, "mha")["mfa"]
        assert (found["verdict"], found["margin"]) == ("one seed", None)
        assert found["difference"] > 0


def test_runs_that_are_missing_are_not_judged():
    nothing = {"verdict": None, "difference": None, "margin": None}
    assert judge({"mha": [], "mfa": [1.0, 2.0]}, "mha") == {"mha": nothing, "mfa": nothing}
    assert judge({"mha": [1.0, 2.0], "mfa": []}, "mha")["mfa"] == nothing
    assert judge({"mfa": [1.0, 2.0]}, "mha")["mfa"] == nothing
