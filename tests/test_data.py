"""Corpora, tokenizers and packing."""

from __future__ import annotations

import gzip
import json
import lzma
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
import zstandard
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from multimatrix.data import BlockDataset, Corpus, load_corpus, load_tokenizer, pack
from multimatrix.errors import InputError

TOKENIZERS = Path(__file__).parents[2] / "shared" / "data" / "tokenizers"
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}
# What tokenizers get wrong: emoji of many code points, control characters, spaces, special tokens in a text.
AWKWARD = (
    "a<|endoftext|>b </s> <s>",
    "👩‍👩‍👧‍👦 naïve é é \u200d\ufeff\x00\x7f\u2028",
    "  two  spaces ,  .  n't 's \r\n\t ",
    "日本語 العربية ѣ 𝔘",
    "",
)


def documents(count: int = 40) -> list[str]:
    """`count` different texts of 50 to 1,000 characters."""
    rng = random.Random(0)
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta"]
    return [f"{i} " + " ".join(rng.choices(words, k=rng.randint(10, 150))) for i in range(count)]


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_parquet(path: Path, columns: dict[str, Any]) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


def texts(corpus: Corpus) -> set[str]:
    return {*corpus.train, *corpus.validation}


# Corpus: what is read


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("kind", [".txt", ".md", ".jsonl", ".parquet"])
def test_every_format_and_compression(tmp_path: Path, kind: str, compression: str) -> None:
    expected = {"one\u2028line\r\n", "two 👍"}
    plain = tmp_path / f"plain{kind}"
    if kind == ".jsonl":
        plain.write_text('\ufeff{"text": "one\u2028line\\r\\n"}\r\n\n{"text": null}\n{"text": "two 👍"}')
    elif kind == ".parquet":
        write_parquet(plain, {"id": [1, 2, 3], "text": ["one\u2028line\r\n", None, "two 👍"]})
    else:
        plain.write_bytes("\ufeffone\u2028line\r\n".encode())
        (tmp_path / "other.txt").write_text("two 👍")
    packed = tmp_path / "folder" / "deep" / f"data{kind}{compression}".upper()
    packed.parent.mkdir(parents=True)
    packed.write_bytes(COMPRESS[compression](plain.read_bytes()))
    others = [str(tmp_path / "other.txt")] if kind in (".txt", ".md") else []

    by_file = load_corpus([str(packed), *others])
    by_folder = load_corpus([str(tmp_path / "folder"), *others])
    assert texts(by_file) == texts(by_folder) == expected
    assert by_file.sha256 == by_folder.sha256
    assert by_file.name.startswith(packed.name)
    assert by_folder.name.startswith("folder")


def test_zst_of_several_frames(tmp_path: Path) -> None:
    data = b"".join(zstandard.compress(json.dumps({"text": t}).encode() + b"\n") for t in ("a", "b", "c"))
    (tmp_path / "x.jsonl.zst").write_bytes(data)
    assert texts(load_corpus([str(tmp_path)])) == {"a", "b", "c"}


def test_field_is_found_or_chosen(tmp_path: Path) -> None:
    rows = [{"n": i, "body": f"body {i}", "title": f"title {i}"} for i in range(4)]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    table = write_parquet(tmp_path / "x.parquet", {key: [row[key] for row in rows] for key in rows[0]})
    only = write_jsonl(tmp_path / "only.jsonl", [{"n": i, "body": f"body {i}"} for i in range(4)])
    bodies = {f"body {i}" for i in range(4)}
    assert texts(load_corpus([f"{path}::body"])) == bodies
    assert texts(load_corpus([f"{table}::body"])) == bodies
    assert texts(load_corpus([only])) == bodies
    assert texts(load_corpus([f"{tmp_path}::body"])) == bodies
    assert texts(load_corpus([f"{path}::title"])) == {f"title {i}" for i in range(4)}


def test_standard_library_is_the_default() -> None:
    corpus = load_corpus()
    version = ".".join(map(str, sys.version_info[:3]))
    assert corpus.name == f"python-{version}-stdlib"
    assert corpus == load_corpus("stdlib") == load_corpus(["stdlib"])
    assert Path(json.__file__).parent.with_name("argparse.py").read_text(encoding="utf-8") in texts(corpus)
    characters = sum(map(len, texts(corpus)))
    assert characters > 3_000_000
    assert sum(map(len, corpus.validation)) / characters == pytest.approx(0.1, abs=0.02)


def test_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fake(name: str, config: str | None, split: str) -> datasets.Dataset:
        calls.append((name, config, split))
        return datasets.Dataset.from_dict({"n": [1, 2, 3], "prose": ["a", "b", None], "tags": [["x"], ["y"], []]})

    monkeypatch.setattr(datasets, "load_dataset", fake)
    assert texts(load_corpus(["hub:owner/name"])) == {"a", "b"}
    assert texts(load_corpus(["hub:owner/name:config::prose"])) == {"a", "b"}
    assert calls == [("owner/name", None, "train"), ("owner/name", "config", "train")]
    assert load_corpus(["hub:owner/name:config"]).name == "owner/name:config"
    with pytest.raises(InputError, match=r"no text in the field 'n'.*: prose"):
        load_corpus(["hub:owner/name::n"])
    with pytest.raises(InputError, match="no field 'prse'; it has n, prose, tags"):
        load_corpus(["hub:owner/name::prse"])


def test_hub_failure_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach\n  'owner/name'.\n")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(InputError, match=r"^hub:owner/name .*: Couldn't reach 'owner/name'$"):
        load_corpus(["hub:owner/name"])


# Corpus: how it is split


def test_duplicates_are_dropped_before_the_split(tmp_path: Path) -> None:
    originals = documents()
    rows = [{"text": variant} for text in originals for variant in (text, text, f"\n{text} ")]
    corpus = load_corpus([write_jsonl(tmp_path / "x.jsonl", [*rows, {"text": " \n"}])], validation_fraction=0.5)
    assert corpus.duplicates == 80
    assert len(corpus.train) + len(corpus.validation) == 40
    train, validation = ({text.strip() for text in side} for side in (corpus.train, corpus.validation))
    assert train | validation == set(originals)
    assert not train & validation


def test_split_does_not_depend_on_order_or_files(tmp_path: Path) -> None:
    originals = [*documents(), "twin", "twin "]
    for i, text in enumerate(originals):
        path = tmp_path / "files" / f"{(i * 17) % 43}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    rows = [{"text": text} for text in originals]
    first = load_corpus([str(tmp_path / "files")])
    second = load_corpus([write_jsonl(tmp_path / "x.jsonl", rows[::-1])])
    halves = [write_jsonl(tmp_path / "y.jsonl", rows[20:]), write_jsonl(tmp_path / "z.jsonl", rows[:30])]
    third = load_corpus(halves)
    assert first.train == second.train == third.train
    assert first.validation == second.validation == third.validation
    assert first.sha256 == second.sha256 == third.sha256
    assert third.name == "y.jsonl and 1 more"
    changed = load_corpus([write_jsonl(tmp_path / "w.jsonl", [*rows[1:], {"text": "another"}])])
    assert changed.sha256 != first.sha256


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.3, 0.5])
def test_share_is_of_characters(tmp_path: Path, fraction: float) -> None:
    rows = [{"text": text} for text in documents(100)]
    corpus = load_corpus([write_jsonl(tmp_path / "x.jsonl", rows)], validation_fraction=fraction)
    share = sum(map(len, corpus.validation)) / sum(map(len, texts(corpus)))
    assert share == pytest.approx(fraction, abs=0.01)


@pytest.mark.parametrize("fraction", [1e-9, 0.1, 0.5])
@pytest.mark.parametrize("lengths", [(1, 1), (1, 10_000), (500, 501), (3, 3, 3)])
def test_no_side_is_empty(tmp_path: Path, lengths: tuple[int, ...], fraction: float) -> None:
    rows = [{"text": "abc"[i] * length} for i, length in enumerate(lengths)]
    corpus = load_corpus([write_jsonl(tmp_path / "x.jsonl", rows)], validation_fraction=fraction)
    assert corpus.train
    assert corpus.validation
    if lengths == (1, 10_000):
        assert corpus.validation == ("a",)


# Corpus: what is refused


def test_refused_arguments(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": "a"}, {"text": "b"}])
    for fraction in (0.0, -0.1, 0.51, float("nan")):
        with pytest.raises(InputError, match=f"at most 0.5, got {fraction}"):
            load_corpus([path], validation_fraction=fraction)
    with pytest.raises(InputError, match=r"nowhere\.txt does not exist; .*hub:owner/name"):
        load_corpus([path, str(tmp_path / "nowhere.txt")])
    (tmp_path / "x.csv").write_text("a,b")
    with pytest.raises(InputError, match=r"x\.csv is of no supported kind; supported are \.txt.*\.zst"):
        load_corpus([str(tmp_path / "x.csv")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty holds no supported file; supported are \.txt.*\.zst"):
        load_corpus([str(tmp_path / "empty")])
    (tmp_path / "x.txt").write_text("a")
    with pytest.raises(InputError, match="has no fields; leave out ::body"):
        load_corpus([f"{tmp_path / 'x.txt'}::body"])


def test_too_little_text(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"x\.jsonl holds no text"):
        load_corpus([write_jsonl(tmp_path / "x.jsonl", [{"text": " \n"}, {"text": ""}])])
    with pytest.raises(InputError, match="at least 2 documents, got 1; split"):
        load_corpus([write_jsonl(tmp_path / "x.jsonl", [{"text": "a"}])])
    with pytest.raises(InputError, match=r"at least 2 documents, got 1 \(2 more had the same text\)"):
        load_corpus([write_jsonl(tmp_path / "x.jsonl", [{"text": t} for t in ("a", "a", "a ")])])


@pytest.mark.parametrize("cut", [True, False], ids=["cut", "garbage"])
@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst"])
def test_damaged_compression(tmp_path: Path, compression: str, cut: bool) -> None:
    whole = COMPRESS[compression]("\n".join(documents()).encode())
    path = tmp_path / f"x.txt{compression}"
    path.write_bytes(whole[:-20] if cut else b"no such format")
    with pytest.raises(InputError, match=rf"x\.txt\{compression} (is damaged|cannot be read)"):
        load_corpus([str(path)])


def test_damaged_text(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(b"abc\xff")
    with pytest.raises(InputError, match=r"x\.txt is not UTF-8 at byte 3"):
        load_corpus([str(path)])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "b"', "row 3 of .* is not JSON"),
        ('"b"', "row 3 of .* is not a JSON object"),
        ('{"body": "b"}', "row 3 of .* has no string in the field 'text'"),
        ('{"text": 1}', "row 3 of .* has no string in the field 'text'"),
        ('{"text": "\\ud83d"}', "row 3 of .* half of a surrogate pair"),
    ],
)
def test_damaged_jsonl(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(f'{{"text": "a"}}\n\n{line}\n')
    with pytest.raises(InputError, match=message):
        load_corpus([str(path)])


def test_unclear_field(tmp_path: Path) -> None:
    both = write_jsonl(tmp_path / "both.jsonl", [{"n": 1, "title": "a", "body": "b"}])
    none = write_jsonl(tmp_path / "none.jsonl", [{"n": 1}])
    table = write_parquet(tmp_path / "both.parquet", {"title": ["a"], "body": ["b"]})
    with pytest.raises(InputError, match=r"2 fields of strings among n, title, body; .*both\.jsonl::field"):
        load_corpus([both])
    with pytest.raises(InputError, match="0 fields of strings among n;"):
        load_corpus([none])
    with pytest.raises(InputError, match=r"2 fields of strings among title, body; .*both\.parquet::field"):
        load_corpus([table])
    for path in (both, table):
        with pytest.raises(InputError, match=r"no field 'nobody'; it has .*title, body"):
            load_corpus([f"{path}::nobody"])


def test_damaged_parquet(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    path.write_bytes(b"PAR1 no parquet")
    with pytest.raises(InputError, match=r"x\.parquet is not a readable parquet file"):
        load_corpus([str(path)])
    invalid = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(np.array([0, 1], np.int32)), pa.py_buffer(b"\xff")]
    )
    with pytest.raises(InputError, match=r"x\.parquet is not a readable parquet file"):
        load_corpus([write_parquet(path, {"text": invalid})])
    with pytest.raises(InputError, match="holds int64 in the column 'text'"):
        load_corpus([write_parquet(path, {"text": [1, 2]})])


# Tokenizers


@pytest.mark.parametrize("name", ["bytes", "bpe:280"])
def test_our_tokenizers_give_every_text_back(tmp_path: Path, name: str) -> None:
    tokenizer = load_tokenizer(name, documents())
    tokenizer.save_pretrained(tmp_path / "saved")
    size = 257 if name == "bytes" else 280
    loaded = [load_tokenizer(str(tmp_path / "saved"), ()), AutoTokenizer.from_pretrained(tmp_path / "saved")]
    for each in (tokenizer, *loaded):
        eos = each.eos_token_id
        assert len(each) == each.vocab_size == size
        assert eos == each.bos_token_id == each.pad_token_id == (256 if name == "bytes" else 0)
        for text in AWKWARD:
            ids = each(text)["input_ids"]
            assert ids == tokenizer.encode(text)
            assert eos not in ids
            assert each.decode(ids) == text
            assert each.decode([*ids, eos], skip_special_tokens=True) == text


def test_bytes_are_their_own_ids() -> None:
    tokenizer = load_tokenizer("bytes", ())
    text = "".join(map(chr, range(0x250))) + "".join(AWKWARD)
    assert bytes(tokenizer.encode(text)) == text.encode()
    assert tokenizer.vocab_size == len(tokenizer) == 257


def test_bpe_is_trained_on_the_train_documents() -> None:
    tokenizer = load_tokenizer("bpe:280", documents())
    assert tokenizer.get_vocab() == load_tokenizer("bpe:280", documents()[::-1]).get_vocab()
    other = load_tokenizer("bpe:280", [text.replace("alpha", "omega") for text in documents()])
    assert tokenizer.get_vocab() != other.get_vocab()
    assert len(tokenizer.encode(" alpha beta gamma")) < 8
    assert len(load_tokenizer("bpe:257", ())) == 257
    special = load_tokenizer("bpe:265", ["<|endoftext|>" * 3] * 3)
    assert special.decode(special.encode("<|endoftext|>")) == "<|endoftext|>"
    assert special.eos_token_id not in special.encode("<|endoftext|>")


@pytest.mark.parametrize("name", ["bpe:256", "bpe:", "bpe:x", "bpe:-300", "bpe:1e3"])
def test_bpe_of_no_size(name: str) -> None:
    with pytest.raises(InputError, match=f"^{name} .*at least 257"):
        load_tokenizer(name, documents())


def test_bpe_larger_than_the_text() -> None:
    with pytest.raises(InputError, match=r"5000 entries and the train text yields (\d+); write bpe:\1 or"):
        load_tokenizer("bpe:5000", documents())


def word_level(special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(special)
    return tokenizer


@pytest.mark.parametrize(
    ("special", "config", "eos"),
    [
        (["<x>", "</s>"], {}, ("</s>", 4)),
        (["<x>"], {}, ("<|endoftext|>", 4)),
        (["<x>"], {"bos_token": "<x>"}, ("<x>", 3)),
        (["</s>", "<x>"], {"eos_token": "<x>"}, ("<x>", 4)),
    ],
    ids=["by custom", "added", "bos", "stated"],
)
def test_eos_of_a_tokenizer_folder(
    tmp_path: Path, special: list[str], config: dict[str, str], eos: tuple[str, int]
) -> None:
    word_level(special).save(str(tmp_path / "tokenizer.json"))
    if config:
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(str(tmp_path), ())
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == eos
    assert tokenizer.pad_token_id == eos[1]
    assert len(tokenizer) == 5 if eos[0] != "<x>" or len(special) == 2 else 4


def test_tokenizer_file(tmp_path: Path) -> None:
    path = tmp_path / "renamed.json"
    word_level(["</s>"]).save(str(path))
    tokenizer = load_tokenizer(str(path), ())
    assert tokenizer.encode("a b") == [0, 1]
    assert tokenizer.eos_token_id == 3


def test_unreadable_tokenizers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("./nowhere", str(tmp_path / "nowhere"), "nowhere/tokenizer.json", "a/b/c"):
        with pytest.raises(InputError, match=f"^{name} does not exist"):
            load_tokenizer(name, ())
    (tmp_path / "tokenizer.json").write_text("{}")
    for name in (str(tmp_path), str(tmp_path / "tokenizer.json")):
        with pytest.raises(InputError, match=f"^the tokenizer {name} cannot be read: .*[^.]$"):
            load_tokenizer(name, ())
    (tmp_path / "x.txt").write_text("a")
    with pytest.raises(InputError, match=r"x\.txt is not a tokenizer; name"):
        load_tokenizer(str(tmp_path / "x.txt"), ())

    def fail(*_: object, **__: object) -> None:
        raise OSError("We couldn't\nconnect.")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(InputError, match=r"^the tokenizer owner/name cannot be found .*: We couldn't connect$"):
        load_tokenizer("owner/name", ())


def test_slow_tokenizer_is_refused(tmp_path: Path) -> None:
    transformers.ByT5Tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"is a ByT5Tokenizer, which has no tokenizer\.json form"):
        load_tokenizer(str(tmp_path), ())


def test_sentencepiece_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("sentencepiece", "sentencepiece.sentencepiece_model_pb2"):
        monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "tokenizer.model").write_bytes(b"\n")
    for name in (tmp_path, tmp_path / "tokenizer.model"):
        with pytest.raises(InputError, match=r"pip install 'multimatrix\[sentencepiece\]'"):
            load_tokenizer(str(name), ())


def train_sentencepiece(folder: Path, **options: Any) -> Any:
    library = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(documents(100)),
        model_prefix=str(folder / "tokenizer"),
        **{"model_type": "bpe", "normalization_rule_name": "identity"} | options,
        vocab_size=330,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return library.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


@pytest.mark.parametrize("collapse", [False, True], ids=["every space", "extra spaces removed"])
def test_sentencepiece_agrees_with_its_library(tmp_path: Path, collapse: bool) -> None:
    library = train_sentencepiece(tmp_path, byte_fallback=True, remove_extra_whitespaces=collapse)
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.model"), ())
    rng = random.Random(1)
    random_texts = ["".join(rng.choices("abeglmpt   \n\té👍", k=60)) for _ in range(100)]
    for text in [*documents(10), *random_texts, *AWKWARD, " a", "a ", "  ", "\n a"]:
        ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ids == library.encode(text), repr(text)
        assert tokenizer.decode(ids) == library.decode(ids)
    assert tokenizer.eos_token_id == library.eos_id()
    assert tokenizer.encode("alpha") == [library.bos_id(), *library.encode("alpha")]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("model_type", "unigram", "of type UNIGRAM with identity normalization"),
        ("normalization_rule_name", "nmt_nfkc", "of type BPE with nmt_nfkc normalization"),
        ("treat_whitespace_as_suffix", True, "of type BPE with identity"),
    ],
)
def test_sentencepiece_that_would_differ(tmp_path: Path, option: str, value: Any, message: str) -> None:
    train_sentencepiece(tmp_path, **{option: value})
    with pytest.raises(InputError, match=message):
        load_tokenizer(str(tmp_path), ())


@pytest.mark.skipif(not TOKENIZERS.exists(), reason="needs the tokenizers in ../shared/data")
def test_published_tokenizers() -> None:
    gpt2 = load_tokenizer(str(TOKENIZERS / "gpt2"), ())
    assert gpt2.encode("Hello world<|endoftext|>") == [15496, 995, 50256]
    assert (gpt2.eos_token_id, len(gpt2)) == (50256, 50257)
    neox = load_tokenizer(str(TOKENIZERS / "gpt_neox_20b"), ())
    assert (neox.eos_token, neox.eos_token_id, len(neox)) == ("<|endoftext|>", 0, 50277)
    for text in AWKWARD:
        assert gpt2.decode(gpt2.encode(text)) == text
    for folder in ("mistral_v1", "mistral_v3"):
        library = pytest.importorskip("sentencepiece")
        reference = library.SentencePieceProcessor(model_file=str(TOKENIZERS / folder / "tokenizer.model"))
        tokenizer = load_tokenizer(str(TOKENIZERS / folder), ())
        for text in (*documents(5), *AWKWARD, *("x" + " " * n + "y" for n in range(40)), "[INST] a"):
            ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
            assert ids == reference.encode(text), repr(text)
            assert tokenizer.decode(ids) == reference.decode(ids)


# Packing


def corpus_of(train: list[str], validation: list[str]) -> Corpus:
    return Corpus(name="test", sha256="", train=tuple(train), validation=tuple(validation), duplicates=0)


@pytest.mark.parametrize("name", ["bytes", "bpe:280"])
def test_blocks_hold_the_documents_in_order(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("multimatrix.data.packing.BATCH_CHARACTERS", 700)  # some documents are longer
    corpus = corpus_of([*documents(), *AWKWARD[:4]], [*AWKWARD[:4], *documents(3)])
    tokenizer = load_tokenizer(name, corpus.train)
    packed = pack(corpus, tokenizer, 16)
    eos = tokenizer.eos_token_id
    for side, blocks in ((corpus.train, packed.train), (corpus.validation, packed.validation)):
        stream = [token for text in side for token in [*tokenizer.encode(text), eos]]
        assert blocks.shape == (len(stream) // 16, 16)
        assert blocks.dtype == np.int32
        assert blocks.ravel().tolist() == stream[: blocks.size]
        ends = np.flatnonzero(blocks.ravel() == eos)
        found = np.split(blocks.ravel(), ends + 1)[: len(ends)]
        assert [tokenizer.decode(part[:-1]) for part in found] == list(side[: len(ends)])
        assert len(ends) >= len(side) - 1
    size = sum(len(text.encode()) for text in corpus.validation)
    tokens = sum(len(tokenizer.encode(text)) + 1 for text in corpus.validation)
    assert packed.validation_bytes_per_token == size / tokens
    assert packed.vocab_size == len(tokenizer)


def test_special_tokens_in_a_text_are_text() -> None:
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate("</s>ab")}, merges=[]))
    backend.enable_truncation(3)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    assert tokenizer.encode("</s>") == [6]  # as any tokenizer of the hub has it
    packed = pack(corpus_of(["a</s>b"], ["ab"]), tokenizer, 3)
    assert packed.train.tolist() == [[4, 0, 1], [2, 3, 5]]
    assert packed.validation.tolist() == [[4, 5, 6]]
    assert packed.vocab_size == 7


@pytest.mark.parametrize("side", ["train", "validation"])
def test_less_than_one_block(side: str) -> None:
    tokenizer = load_tokenizer("bytes", ())
    sides = (["x" * 9], ["y" * 99]) if side == "train" else (["x" * 99], ["y" * 9])
    assert getattr(pack(corpus_of(*sides), tokenizer, 10), side).shape == (1, 10)
    with pytest.raises(InputError, match=f"the {side} text has 10 tokens and one block needs 11; .*at most 10"):
        pack(corpus_of(*sides), tokenizer, 11)


def test_refused_packing() -> None:
    corpus = corpus_of(["ab"], ["cd"])
    with pytest.raises(InputError, match=r"context must be at least 2.*got 1"):
        pack(corpus, load_tokenizer("bytes", ()), 1)
    with pytest.raises(InputError, match="no eos token"):
        pack(corpus, PreTrainedTokenizerFast(tokenizer_object=word_level([])), 2)


def test_blocks_as_batches() -> None:
    blocks = np.arange(12, dtype=np.int32).reshape(4, 3)
    dataset = BlockDataset(blocks)
    assert len(dataset) == 4
    batch = next(iter(DataLoader(dataset, batch_size=4)))
    for key in ("input_ids", "labels"):
        assert batch[key].dtype == torch.long
        assert batch[key].tolist() == blocks.tolist()
