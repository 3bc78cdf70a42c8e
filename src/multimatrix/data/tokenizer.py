"""Tokenizers by name: bytes, a byte-level BPE trained here, or one that exists already."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast

from multimatrix.errors import InputError, one_line

END_OF_TEXT = "<|endoftext|>"
# What end of text is called where a tokenizer.json comes without the tokenizer_config.json that says so.
END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>", "<eos>")


def load_tokenizer(name: str, corpus_train: Sequence[str]) -> PreTrainedTokenizerFast:
    """The tokenizer called `name`, with an eos token.

    Args:
        name: "bytes": a token id is a byte, 256 is eos. "bpe:N": byte-level BPE of N entries, eos and the 256
            bytes among them, trained on `corpus_train` and nothing else. These two give every text back
            exactly and encode a special token that is written out in a text as the characters it is.
            A folder: whatever AutoTokenizer reads, or only tokenizer.json, or GPT-2's encoder.json and
            vocab.bpe, or only a SentencePiece tokenizer.model. A file: tokenizer.json or tokenizer.model,
            taken alone; name its folder to have tokenizer_config.json obeyed. Anything else: a hub name.
        corpus_train: the train documents; only "bpe:N" looks at them.

    A tokenizer that names no eos gets, in this order: the one of its own special tokens that is called so by
    custom (`END_NAMES`), its bos (which separates documents as well), or a new entry "<|endoftext|>", so that
    its vocabulary grows by one. Padding falls back to eos.

    Raises:
        InputError: the name means nothing, the files or the hub cannot be read, N is below 257 or more than
            the text yields, or SentencePiece is needed and not installed.
    """
    if name == "bytes":
        vocab = {token: i for i, token in enumerate([*_byte_characters(), END_OF_TEXT])}
        return _byte_level(models.BPE(vocab=vocab, merges=[]), whole=True)
    if name.startswith("bpe:"):
        return _train_bpe(name, corpus_train)
    path = Path(name)
    try:
        tokenizer = _load_existing(name, path)
    except InputError:
        raise
    except Exception as error:  # readers raise OSError, ValueError, and bare Exception from Rust
        where = "read" if path.exists() else "found here or on the hub"
        raise InputError(f"the tokenizer {name} cannot be {where}: {one_line(error)}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        kind = type(tokenizer).__name__
        raise InputError(f"the tokenizer {name} is a {kind}, which has no tokenizer.json form; choose a fast one")
    return _with_eos(tokenizer)


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary, as GPT-2 chose them."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    substitutes = iter(range(256, 512))
    return [chr(byte if byte in printable else next(substitutes)) for byte in range(256)]


def _byte_level(model: models.BPE, *, whole: bool) -> PreTrainedTokenizerFast:
    """A tokenizer over bytes. `whole`: do not split the text into words first.

    Without merges the split changes nothing and costs half of the time.
    """
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not whole)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )


def _train_bpe(name: str, documents: Sequence[str]) -> PreTrainedTokenizerFast:
    size = name.removeprefix("bpe:")
    if not size.isdecimal() or int(size) < 257:
        raise InputError(f"{name} asks for no vocabulary: write bpe:N with N at least 257, the 256 bytes and eos")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=int(size),
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    trained = _byte_level(tokenizer.model, whole=False)
    if len(trained) < int(size):
        raise InputError(
            f"{name} asks for {size} entries and the train text yields {len(trained)}; "
            f"write bpe:{len(trained)} or add text"
        )
    return trained


def _load_existing(name: str, path: Path) -> Any:
    if path.is_file():
        if path.suffix == ".model":
            return _load_sentencepiece(path)
        if path.suffix == ".json":
            return PreTrainedTokenizerFast(tokenizer_file=str(path))
        raise InputError(f"{path} is not a tokenizer; name a tokenizer.json, a tokenizer.model or a folder")
    if path.is_dir():
        files = {file.name for file in path.iterdir()}
        if {"encoder.json", "vocab.bpe"} <= files and "tokenizer.json" not in files:
            return GPT2Tokenizer(vocab=str(path / "encoder.json"), merges=str(path / "vocab.bpe"))
        if "tokenizer.model" in files and not {"tokenizer.json", "tokenizer_config.json"} & files:
            return _load_sentencepiece(path / "tokenizer.model")
    elif name.startswith((".", "/", "~")) or name.count("/") > 1 or path.suffix in (".json", ".model"):
        raise InputError(f"{name} does not exist; name a tokenizer as bytes, bpe:N, a path or a hub name")
    return AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def _load_sentencepiece(path: Path) -> PreTrainedTokenizerFast:
    """A tokenizer that agrees with the sentencepiece library, from a model of type BPE (Llama 2, Mistral).

    AutoTokenizer of transformers 5.23 does not: it leaves out the space before the first word, and it ranks
    merges by id where the score decides, so that runs of spaces come out otherwise.
    """
    try:
        proto = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    except ImportError as error:
        raise InputError(
            f"{path} is a SentencePiece model, which needs: pip install 'multimatrix[sentencepiece]'"
        ) from error
    model = proto.ModelProto()
    model.ParseFromString(path.read_bytes())
    training, spelling = model.trainer_spec, model.normalizer_spec
    kind = training.ModelType.Name(training.model_type)
    if kind != "BPE" or training.treat_whitespace_as_suffix or spelling.precompiled_charsmap:
        raise InputError(
            f"{path} is a SentencePiece model of type {kind} with {spelling.name} normalization; only BPE "
            "with identity normalization and spaces before words can be read exactly: name a tokenizer.json"
        )

    pieces = list(model.pieces)
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece.piece: i for i, piece in enumerate(pieces)},
            merges=_merges({piece.piece: piece.score for piece in pieces if piece.type == piece.NORMAL}),
            unk_token=training.unk_piece,
            fuse_unk=True,
            byte_fallback=training.byte_fallback,
        )
    )
    steps: list[Any] = []
    if spelling.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spelling.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    back: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if spelling.add_dummy_prefix:
        back.append(decoders.Strip(content=" ", left=1, right=0))
    tokenizer.decoder = decoders.Sequence(back)
    tokenizer.add_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=piece.type == piece.CONTROL)
            for piece in pieces
            if piece.type in (piece.CONTROL, piece.USER_DEFINED)
        ]
    )
    ends = {"unk_token": training.unk_id, "bos_token": training.bos_id, "eos_token": training.eos_id}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        add_bos_token=training.bos_id >= 0,
        clean_up_tokenization_spaces=False,
        **{role: pieces[i].piece for role, i in ends.items() if i >= 0},
    )


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every way to put a piece together from two, best score first.

    Among equals the longer left half: runs of spaces, whose pieces score the same, then grow from the left.
    """
    pairs = [
        (score, piece[:cut], piece[cut:])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    pairs.sort(key=lambda pair: (pair[0], len(pair[1]), len(pair[2])), reverse=True)
    return [(left, right) for _, left, right in pairs]


def _with_eos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    if tokenizer.eos_token is None:
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        known = [end for end in END_NAMES if end in special]
        end = known[0] if known else tokenizer.bos_token or END_OF_TEXT
        tokenizer.add_special_tokens({"eos_token": end})
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
