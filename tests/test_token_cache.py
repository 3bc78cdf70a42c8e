"""Text is tokenized once, and what is kept of it is what would be made anew."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from damage import cut
from multimatrix.data import cache as token_cache
from multimatrix.data import load_corpus, load_tokenizer, pack, prepare_text
from multimatrix.data.cache import default_cache
from multimatrix.errors import InputError

SETTINGS = {"context": 16, "batch_size": 4, "validation_fraction": 0.2, "validation_tokens": 10**6}


@pytest.fixture
def text(tmp_path):
    """Two files whose documents have words in common, so that there is something to merge."""
    shuffle = random.Random(0)
    folder = tmp_path / "text"
    folder.mkdir()
    for name in ("one", "two"):
        rows = [{"text": " ".join(shuffle.choices(["fox", "hen", "barn", "rain"], k=60))} for _ in range(20)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def reads(monkeypatch):
    """How often the text was read."""
    found = []

    def counted(sources, **words):
        found.append(sources)
        return load_corpus(sources, **words)

    monkeypatch.setattr(token_cache, "load_corpus", counted)
    return found


def entry(cache: Path) -> Path:
    (found,) = (path for path in cache.iterdir() if path.is_dir())
    return found


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:270", "a folder"])
def test_blocks_are_those_of_pack(text, cache, reads, tmp_path, tokenizer):
    corpus = load_corpus([str(text)], validation_fraction=0.2)
    if tokenizer == "a folder":
        tokenizer = str(tmp_path / "tokenizer")
        load_tokenizer("bpe:265", corpus.train).save_pretrained(tokenizer)
    expected = pack(corpus, load_tokenizer(tokenizer, corpus.train), 16)
    for _ in range(2):
        prepared = prepare_text([str(text)], tokenizer, cache=cache, **SETTINGS)
        for side in ("train", "validation"):
            blocks = getattr(prepared.text, side)
            assert isinstance(blocks, np.memmap)
            assert blocks.dtype == np.uint16
            assert np.array_equal(blocks, getattr(expected, side))
        assert prepared.text.vocab_size == expected.vocab_size
        assert prepared.text.validation_bytes_per_token == expected.validation_bytes_per_token
        assert prepared.facts["sha256"] == corpus.sha256
        assert prepared.facts["documents"] == 40
        assert prepared.tokenizer.eos_token_id is not None
        ids = prepared.tokenizer("the fox <|endoftext|>")["input_ids"]
        assert ids == load_tokenizer(tokenizer, corpus.train)("the fox <|endoftext|>")["input_ids"]
    assert len(reads) == 1


def test_another_context_is_another_cut(text, cache, reads):
    for context in (16, 32):
        assert (
            prepare_text([str(text)], "bytes", cache=cache, **SETTINGS | {"context": context}).text.train.shape[1]
            == context
        )
    assert len(reads) == 1


def test_contents_decide_and_names_do_not(text, cache, reads, tmp_path):
    prepare_text([str(text)], "bytes", cache=cache, **SETTINGS)
    shutil.copytree(text, tmp_path / "copy")
    (tmp_path / "copy" / "one.jsonl").rename(tmp_path / "copy" / "zzz.jsonl")
    prepared = prepare_text([str(tmp_path / "copy")], "bytes", cache=cache, **SETTINGS)
    assert len(reads) == 1
    assert prepared.facts["name"] == "copy"

    one, two = (str(text / f"{name}.jsonl") for name in ("one", "two"))
    changed = [
        lambda: prepare_text([one], "bytes", cache=cache, **SETTINGS),
        lambda: prepare_text([f"{one}::text", two], "bytes", cache=cache, **SETTINGS),
        lambda: prepare_text([str(text)], "bpe:270", cache=cache, **SETTINGS),
        lambda: prepare_text([str(text)], "bytes", cache=cache, **SETTINGS | {"validation_fraction": 0.3}),
        lambda: (
            (text / "two.jsonl").write_text('{"text": "other words, as many as a batch needs, and then some more"}'),
            prepare_text([str(text)], "bytes", cache=cache, **SETTINGS),
        ),
    ]
    for number, change in enumerate(changed, start=2):
        change()
        assert len(reads) == number


DAMAGE = {
    "cut tokens": lambda folder: cut(folder / "train.bin", -2),
    "flipped bit": lambda folder: flip(folder / "validation.bin"),
    "cut meta": lambda folder: cut(folder / "meta.json", 30),
    "list for meta": lambda folder: (folder / "meta.json").write_text("[1]"),
    "no tokenizer": lambda folder: (folder / "tokenizer" / "tokenizer.json").unlink(),
}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_made_again(text, cache, reads, damage):
    expected = prepare_text([str(text)], "bytes", cache=cache, **SETTINGS)
    train = np.array(expected.text.train)
    DAMAGE[damage](entry(cache))
    said = []
    again = prepare_text([str(text)], "bytes", cache=cache, say=said.append, **SETTINGS)
    assert said == [f"warning: {entry(cache)} is damaged; the text is tokenized again"]
    assert np.array_equal(again.text.train, train)
    assert len(reads) == 2


def test_one_makes_it_and_the_others_wait(text, cache, monkeypatch):
    """A lock on the file system, so threads stand for processes: each has the file open for itself."""
    reads, said, found = [], [], []

    def slow(sources, **words):
        reads.append(sources)
        time.sleep(0.5)
        return load_corpus(sources, **words)

    monkeypatch.setattr(token_cache, "load_corpus", slow)

    def ask():
        found.append(prepare_text([str(text)], "bytes", cache=cache, say=said.append, **SETTINGS))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reads) == 1
    assert said == ["waiting for another process that tokenizes the same text"] * 2
    assert len(found) == 3
    assert all(np.array_equal(each.text.train, found[0].text.train) for each in found)


def test_nothing_half_made_is_left(text, cache, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")

    with monkeypatch.context() as patch:
        patch.setattr(token_cache, "sync", full)
        with pytest.raises(InputError, match="cannot be kept in somewhere: No space left on device; make room, or"):
            prepare_text([str(text)], "bytes", cache=cache, **SETTINGS)
    assert not list(cache.iterdir())
    prepare_text([str(text)], "bytes", cache=cache, **SETTINGS)
    shutil.move(entry(cache), cache / f".{entry(cache).name}.killed")  # by a process that had no time to tidy up
    prepare_text([str(text)], "bytes", cache=cache, **SETTINGS)
    assert not list(cache.glob(".*"))


def test_where_it_is_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("MULTIMATRIX_CACHE", str(tmp_path / "here"))
    assert default_cache() == tmp_path / "here"
    monkeypatch.delenv("MULTIMATRIX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "multimatrix" / "tokens"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache() == Path.home() / ".cache" / "multimatrix" / "tokens"
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="choose another folder with --token-cache"):
        prepare_text([], "bytes", cache=tmp_path / "file", **SETTINGS)
