"""From the names of texts and of a tokenizer to blocks of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

from multimatrix.data.corpus import load_corpus
from multimatrix.data.packing import PackedText, pack
from multimatrix.data.tokenizer import load_tokenizer
from multimatrix.errors import InputError


@dataclass(frozen=True, eq=False)
class PreparedText:
    """Blocks to train and validate on.

    facts: what the models read, for results and model cards; `sha256` is over the documents.
    """

    text: PackedText
    tokenizer: PreTrainedTokenizerFast
    facts: dict[str, Any]


def prepare_text(
    sources: Sequence[str],
    tokenizer_name: str,
    *,
    context: int,
    batch_size: int,
    validation_fraction: float,
    validation_tokens: int,
) -> PreparedText:
    """Read, tokenize and pack.

    batch_size: sequences that a step needs. validation_tokens: how many are used at most. The other arguments are
    those of `load_corpus`, `load_tokenizer` and `pack`.

    Raises:
        InputError: text that cannot be read or is too small.
    """
    corpus = load_corpus(sources, validation_fraction=validation_fraction)
    tokenizer = load_tokenizer(tokenizer_name, corpus.train)
    packed = pack(corpus, tokenizer, context)
    if len(packed.train) < batch_size:
        raise InputError(
            f"the train text has {len(packed.train)} blocks of {context} tokens and one step needs "
            f"{batch_size}; set the batch size to at most {len(packed.train)} or add text"
        )
    validation = packed.validation[: max(1, validation_tokens // context)]
    text = PackedText(packed.train, validation, packed.vocab_size, packed.validation_bytes_per_token)
    facts = {
        "name": corpus.name,
        "sha256": corpus.sha256,
        "documents": len(corpus.train) + len(corpus.validation),
        "duplicates_dropped": corpus.duplicates,
        "tokenizer": tokenizer_name,
        "vocab_size": text.vocab_size,
        "bytes_per_token": text.validation_bytes_per_token,
        "train_tokens": int(text.train.size),
        "validation_tokens": int(text.validation.size),
    }
    return PreparedText(text, tokenizer, facts)
