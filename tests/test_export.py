"""The model card, and `multimatrix export`: whole or not at all."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cases import DECODERS, random_model
from command import multimatrix
from multimatrix.data.tokenizer import load_tokenizer
from multimatrix.evaluate import agreement
from multimatrix.evaluate.agreement import Check
from multimatrix.model import card
from multimatrix.model.loading import load_model
from multimatrix.plan.numbers import kv_bytes_per_token


def read_card(folder: Path) -> tuple[dict, str]:
    """Metadata as the hub reads it, and the text."""
    _, header, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(header), text


def tables(text: str) -> list[list[list[str]]]:
    found: list[list[list[str]]] = [[]]
    for line in text.splitlines():
        if line.startswith("| "):
            found[-1].append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif found[-1]:
            found.append([])
    return [table for table in found if table]


@pytest.mark.parametrize("name", DECODERS)
def test_card_states_the_model(tmp_path, name):
    specs = DECODERS[name]
    model = random_model(specs)
    model.config.provenance = {"seed": 3}
    model.save_pretrained(tmp_path)
    metadata, text = read_card(tmp_path)
    assert (metadata["library_name"], metadata["pipeline_tag"]) == ("transformers", "text-generation")
    assert set(metadata["tags"]) == {"multimatrix", "kv-cache", *(spec.variant for spec in specs)}
    assert "license" not in metadata
    sizes, cache, training = tables(text)
    sizes = dict(sizes)
    stored = load_file(tmp_path / "model.safetensors")
    assert sizes["parameters"] == f"{sum(tensor.numel() for tensor in stored.values()):,}"
    assert sizes["dtype"] == "float64"
    assert sizes["num_hidden_layers"] == str(len(specs))
    assert f"Each token adds {kv_bytes_per_token(specs):,} bytes to the cache of all {len(specs)} layers" in text
    total = 0
    for layers, attention, elements, cached in cache[2:]:
        first, _, last = layers.partition(" to ")
        for layer in range(int(first), int(last or first) + 1):
            stated = dict(size.split(" ") for size in attention.split(", "))
            sizes_that_are_set = {k: v for k, v in specs[layer].to_dict().items() if v not in (None, False)}
            assert stated == {name: str(value) for name, value in sizes_that_are_set.items()}
            assert int(elements.replace(",", "")) == specs[layer].cache.elements
            total += int(cached.replace(",", ""))
    assert total == kv_bytes_per_token(specs)
    assert ["seed", "3"] in training
    assert ["corpus", "not recorded"] in training
    assert "Not checked." in text


def test_card_without_provenance_and_with_a_licence(tmp_path):
    model = random_model(DECODERS["mfa"], torch.float32)
    model.save_pretrained(tmp_path)
    assert "## How it was trained\n\nNot recorded.\n" in read_card(tmp_path)[1]
    model.config.provenance = {"license": "apache-2.0", "corpus": {"name": "a | b\nc", "sha256": None}}
    model.save_pretrained(tmp_path)
    metadata, text = read_card(tmp_path)
    assert metadata["license"] == "apache-2.0"
    rows = tables(text)[2]
    assert [r"corpus.name", r"a \| b c"] in rows
    assert ["corpus.sha256", "not recorded"] in rows


def test_card_of_somebody_else_is_kept(tmp_path):
    model = random_model(DECODERS["mfa"], torch.float32)
    model.save_pretrained(tmp_path)
    ours = (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text(ours.replace(card.MARK, "") + "mine")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text().endswith("mine")
    (tmp_path / "README.md").write_text(ours + "changed")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == ours


def test_provenance_survives_everything(tmp_path):
    facts = {"seed": 3, "corpus": {"name": "text", "tokens": 10}, "validation_loss": 1.25}
    model = random_model(DECODERS["mfa"], torch.float32)
    model.config.provenance = facts
    model.save_pretrained(tmp_path / "a")
    assert multimatrix("export", tmp_path / "a", tmp_path / "b", "--no-check").status == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "b").config.provenance == facts
    assert ["corpus.tokens", "10"] in tables(read_card(tmp_path / "b")[1])[2]


# ---- multimatrix export ------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path) -> Path:
    tokenizer = load_tokenizer("bytes", [])
    random_model(DECODERS["mfa_kr"], torch.float32, vocab_size=len(tokenizer)).save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def contents(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_export_writes_a_checked_card_and_the_same_weights(source, tmp_path):
    done = multimatrix("export", source, tmp_path / "new" / "out", "--format", "portable")
    assert (done.status, done.err) == (0, "")
    out = tmp_path / "new" / "out"
    assert "8 checks agree" in done.out
    assert contents(out) > {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "README.md"}
    assert contents(tmp_path / "new") == {"out"}
    assert out.stat().st_mode & 0o777 == 0o755
    old, new = (load_file(folder / "model.safetensors") for folder in (source, out))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)
    rows = tables(read_card(out)[1])[-1][2:]
    assert [row[0] for row in rows] == [check.name for check in agreement.check_model(load_model(out))]
    assert all(row[3] == "agrees" for row in rows)
    assert "`multimatrix check` in float32 on cpu: 8 of 8 agree." in read_card(out)[1]
    assert multimatrix("check", out).status == 0


def test_export_without_a_check_says_so(source, tmp_path):
    assert "not checked" in multimatrix("export", source, tmp_path / "out", "--no-check").out
    assert "Not checked. `multimatrix check FOLDER`" in read_card(tmp_path / "out")[1]


def test_export_keeps_a_readme_that_is_not_ours(source, tmp_path):
    (source / "README.md").write_text("mine")
    multimatrix("export", source, tmp_path / "out", "--no-check")
    assert (tmp_path / "out" / "README.md").read_text() == "mine"


def test_export_refuses_what_disagrees(source, tmp_path, monkeypatch):
    bad = Check("padded / not", float("nan"), 1e-3, "")
    monkeypatch.setattr(agreement, "check_model", lambda model: [Check("oracle", 0.0, 1e-3, ""), bad])
    done = multimatrix("export", source, tmp_path / "out")
    assert "1 of 2 checks" in done.sentence
    assert "(padded / not)" in done.sentence
    assert "--no-check" in done.sentence
    assert contents(tmp_path) == {"source"}


def make_file(path: Path) -> None:
    path.write_text("x")


def make_full(path: Path) -> None:
    path.mkdir()
    make_file(path / "other")


@pytest.mark.parametrize(
    ("prepare", "words", "fragments"),
    [
        (make_full, [], ["out is not empty"]),
        (make_file, [], ["out is a file"]),
        (None, ["--format", "gguf"], ["must be one of portable, step3; got 'gguf'", "portable"]),
    ],
)
def test_export_refuses(source, tmp_path, prepare, words, fragments):
    if prepare:
        prepare(tmp_path / "out")
    before = contents(tmp_path)
    done = multimatrix("export", source, tmp_path / "out", *words)
    for fragment in fragments:
        assert fragment in done.sentence
    assert contents(tmp_path) == before


def test_export_below_a_file_and_from_nowhere(source, tmp_path):
    make_file(tmp_path / "file")
    assert "no folder can be made at" in multimatrix("export", source, tmp_path / "new" / ("x" * 300)).sentence
    assert "no folder can be made at" in multimatrix("export", source, tmp_path / "file" / "out").sentence
    assert "there is no folder" in multimatrix("export", tmp_path / "nowhere", tmp_path / "a" / "b" / "out").sentence
    assert contents(tmp_path) == {"source", "file"}


@pytest.mark.parametrize("name", ["out", "."])
def test_export_takes_an_empty_folder(source, tmp_path, monkeypatch, name):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out" if name == "." else tmp_path)
    assert multimatrix("export", source, name, "--no-check").status == 0
    assert "model.safetensors" in contents(tmp_path / "out")


def full_weights(patch) -> None:
    import safetensors.torch

    def failing(*args, **words):
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left (os error 28)")

    patch.setattr(safetensors.torch, "serialize_file", failing)


def full_code(patch) -> None:
    from multimatrix.model import portable

    def failing(path, text):
        raise OSError(28, "No space left on device", str(path))

    patch.setattr(portable, "write_text", failing)


@pytest.mark.parametrize("fill", [full_weights, full_code])
def test_a_full_disk_leaves_nothing_behind(source, tmp_path, monkeypatch, fill):
    fill(monkeypatch)
    done = multimatrix("export", source, tmp_path / "new" / "out", "--no-check")
    assert "cannot write" in done.sentence
    assert str(tmp_path / "new" / "out") in done.sentence
    assert "No space left on device" in done.sentence
    assert contents(tmp_path) == {"source"}


def test_an_interrupt_leaves_nothing_behind(source, tmp_path, monkeypatch):
    def interrupt(*args, **words):
        raise KeyboardInterrupt

    monkeypatch.setattr(card, "write_card", interrupt)
    done = multimatrix("export", source, tmp_path / "new" / "out", "--no-check")
    assert done.status not in (0, 2)
    assert contents(tmp_path) == {"source"}
