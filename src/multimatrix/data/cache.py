"""Text that is tokenized once: a folder of token files that every later start, and every process, maps into memory.

An entry is named by what decides its contents: the bytes of the sources, the share held out, the tokenizer. It holds
the tokens of either side as one stream, so that any context is a cut of it; the tokenizer; and `meta.json`, written
with the length and checksum of each. It is written aside and renamed, and may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from multimatrix import __version__
from multimatrix.data.corpus import Corpus, fingerprint, load_corpus, source_names
from multimatrix.data.packing import check_packing, token_stream, vocabulary_size
from multimatrix.data.tokenizer import load_tokenizer
from multimatrix.errors import InputError
from multimatrix.files import checksum, sync, write_json, writing
from multimatrix.locks import locked

SIDES = ("train", "validation")
META = "meta.json"
TOKENIZER = "tokenizer"


@dataclass(frozen=True, eq=False)
class Tokens:
    """The streams of both sides `[tokens]`, read from the disk as they are needed; meta: what `_write` says of them."""

    train: NDArray[np.integer]
    validation: NDArray[np.integer]
    tokenizer: PreTrainedTokenizerFast
    name: str
    meta: dict[str, Any]


def default_cache() -> Path:
    """MULTIMATRIX_CACHE, or the folder for caches of this user."""
    if found := os.environ.get("MULTIMATRIX_CACHE"):
        return Path(found)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "multimatrix" / "tokens"


def cached_tokens(
    sources: Sequence[str],
    tokenizer_name: str,
    *,
    validation_fraction: float,
    cache: Path,
    say: Callable[[str], None],
) -> Tokens:
    """The tokens of a corpus, from the cache or made for it; several processes that ask at once wait for one of them.

    Raises:
        InputError: as `load_corpus` and `load_tokenizer`, or the cache cannot be written.
    """
    existing = None if _is_trained(tokenizer_name) else load_tokenizer(tokenizer_name, ())
    if existing is not None:
        check_packing(existing)
    key = _key(sources, tokenizer_name, existing, validation_fraction)
    folder = cache / key
    try:
        with locked(
            cache / f"{key}.lock",
            "choose another folder with --token-cache",
            patience=-1,
            waiting=lambda: say("waiting for another process that tokenizes the same text"),
        ):
            found = _read(folder)
            if found is None:
                if folder.exists():
                    say(f"warning: {folder} is damaged; the text is tokenized again")
                corpus = load_corpus(sources, validation_fraction=validation_fraction)
                found = _write(folder, corpus, existing or load_tokenizer(tokenizer_name, corpus.train))
    except OSError as error:
        raise InputError(
            f"the tokens cannot be kept in {error.filename or cache}: {error.strerror}; make room, or choose another "
            "folder with --token-cache"
        ) from error
    train, validation = (np.memmap(folder / f"{side}.bin", dtype=found["dtype"], mode="r") for side in SIDES)
    tokenizer = existing or PreTrainedTokenizerFast.from_pretrained(folder / TOKENIZER)
    # The same documents may lie under other names.
    return Tokens(train, validation, tokenizer, source_names(sources), found)


def _is_trained(tokenizer_name: str) -> bool:
    return tokenizer_name.startswith("bpe:")


def _key(
    sources: Sequence[str], name: str, existing: PreTrainedTokenizerFast | None, validation_fraction: float
) -> str:
    """What decides the contents of an entry, as a name for a folder."""
    if existing is None:
        tokenizer: list[Any] = [name, tokenizers.__version__]
    else:
        tokenizer = [existing.backend_tokenizer.to_str(), existing.special_tokens_map]
    deciding = [__version__, fingerprint(sources), validation_fraction, tokenizer]
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:32]


def _read(folder: Path) -> dict[str, Any] | None:
    """meta.json of a whole entry; None where there is none."""
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        whole = all(checksum(folder / name) == found for name, found in meta["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return meta if whole else None


def _write(folder: Path, corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    check_packing(tokenizer)
    vocab_size = vocabulary_size(tokenizer)
    kind = np.dtype(np.uint16 if vocab_size <= 2**16 else np.int32)
    for left in folder.parent.glob(f".{folder.name}.*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        counts = {}
        for side in SIDES:
            counts[side] = 0
            with (temporary / f"{side}.bin").open("wb") as file:
                for tokens in token_stream(getattr(corpus, side), tokenizer):
                    file.write(tokens.astype(kind).tobytes())
                    counts[side] += len(tokens)
        with writing(temporary):
            tokenizer.save_pretrained(temporary / TOKENIZER)
        files = [str(path.relative_to(temporary)) for path in temporary.rglob("*") if path.is_file()]
        for name in files:
            sync(temporary / name)
        meta = {
            "sha256": corpus.sha256,
            "documents": len(corpus.train) + len(corpus.validation),
            "duplicates_dropped": corpus.duplicates,
            "vocab_size": vocab_size,
            "validation_bytes": sum(len(text.encode()) for text in corpus.validation),
            "tokens": counts,
            "dtype": kind.name,
            "files": {name: checksum(temporary / name) for name in files},
        }
        write_json(temporary / META, meta)
        sync(temporary / META)
        temporary.chmod(0o755)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return meta
