"""The README's commands and code run as they stand."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
import zstandard

from cases import DECODERS, random_model
from command import multimatrix
from multimatrix import cli
from multimatrix.data import load_tokenizer

ROOT = Path(__file__).parent.parent
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


README = (ROOT / "README.md").read_text(encoding="utf-8")
# (language, text) in the order of the page.
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.M | re.S)
COMMANDS = [
    line.split("#")[0].strip()
    for language, text in BLOCKS
    if language == "bash"
    for line in text.splitlines()
    if line.strip()
]


def test_the_readme_names_every_command():
    named = {shlex.split(line)[1] for line in COMMANDS if line.startswith("multimatrix ")}
    assert named == {command.__name__.strip("_") for command in cli.COMMANDS}
    assert "make demo" in COMMANDS
    assert "make test" in COMMANDS


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder but for what the README says is the reader's own, and what `make demo` leaves behind."""
    text = "\n".join('{"text": "' + f"story {i} of the fox and the hen " * 40 + '"}' for i in range(400))
    (tmp_path / "corpus.jsonl.zst").write_bytes(zstandard.compress(text.encode()))
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "piqa_valid.jsonl").write_text(
        '{"goal": "open a jar", "sol1": "twist the lid", "sol2": "eat it", "label": 0}\n'
    )
    choices = '[{"text": "wet", "label": "A"}, {"text": "dry", "label": "B"}]'
    (tmp_path / "bench" / "arc_easy_test.jsonl").write_text(
        f'{{"id": "1", "question": {{"stem": "What is water?", "choices": {choices}}}, "answerKey": "A"}}\n'
    )
    trained, tokenizer = tmp_path / "runs" / "demo" / "runs" / "mfa-seed0" / "model", load_tokenizer("bytes", [])
    random_model(DECODERS["mfa"], torch.float32, vocab_size=len(tokenizer)).save_pretrained(trained)
    tokenizer.save_pretrained(trained)
    (trained.parent / "metrics.jsonl").write_text('{"step": 1, "tokens": 128, "loss": 5.0}\n')
    (tmp_path / "README.md").write_text("A page of the checkout.")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "page.md").write_text("Another one.")
    monkeypatch.chdir(tmp_path)


def test_the_readme_from_top_to_bottom(folder):
    """Every command and every block of Python in the order of the page: later ones use what earlier ones wrote."""
    for language, text in BLOCKS:
        if language == "python":
            exec(compile(text, "README.md", "exec"), {})
        if language != "bash":
            continue
        for line in text.splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] != ["multimatrix"]:
                continue
            # Training takes minutes, so it stops after reading the text and matching the sizes.
            words += ["--dry-run"] if words[1] in ("compare", "train") else []
            done = multimatrix(*("bpe:300" if word == "bpe:4096" else word for word in words[1:]))
            assert done.status == 0, (line, done.err)
            assert done.out.strip(), line


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("make ")])
def test_make_targets_exist(line):
    subprocess.run([*shlex.split(line), "--dry-run"], cwd=ROOT, check=True, capture_output=True)


def test_capacity_table_is_what_the_command_prints(capsys):
    from multimatrix.cli.capacity import _print_capacity
    from multimatrix.plan.capacity import capacity_rows, load_recipe

    recipe = load_recipe("paper-7b")
    _print_capacity(capacity_rows(recipe.specs, recipe.num_hidden_layers, 8192), recipe.title)
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    shown = next(text for language, text in BLOCKS if language == "text").rstrip().splitlines()
    assert printed[: len(shown)] == shown


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target
