"""The README's commands and code run as they stand."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)


COMMANDS = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines() if line.strip()]


def test_the_readme_names_every_command():
    commands = {shlex.split(line)[1] for line in COMMANDS if line.startswith("multimatrix ")}
    assert commands == {"capacity", "compare", "check"}
    assert "make demo" in COMMANDS
    assert "make test" in COMMANDS


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("multimatrix ")])
def test_command(line, tmp_path):
    # Training takes minutes, so comparisons stop after reading the text and matching the sizes.
    words = shlex.split(line)[1:] + (["--dry-run"] if " compare " in line else [])
    text = "\n".join('{"text": "' + f"story {i} of the fox and the hen " * 40 + '"}' for i in range(400))
    import zstandard

    (tmp_path / "corpus.jsonl.zst").write_bytes(zstandard.compress(text.encode()))
    words = ["bpe:300" if word == "bpe:4096" else word for word in words]
    done = subprocess.run(
        [sys.executable, "-m", "multimatrix", *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("make ")])
def test_make_targets_exist(line):
    subprocess.run([*shlex.split(line), "--dry-run"], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("code", blocks("python"))
def test_python(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})


def test_capacity_table_is_what_the_command_prints(capsys):
    from multimatrix.cli.capacity import _print_capacity
    from multimatrix.plan.capacity import capacity_rows, load_recipe

    recipe = load_recipe("paper-7b")
    _print_capacity(capacity_rows(recipe.specs, recipe.num_hidden_layers, 8192), recipe.title)
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    shown = blocks("text")[0].rstrip().splitlines()
    assert printed[: len(shown)] == shown


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target
