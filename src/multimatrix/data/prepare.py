"""From the names of texts and of a tokenizer to blocks of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from multimatrix.data.cache import cached_tokens, default_cache
from multimatrix.data.packing import PackedText, cut_blocks
from multimatrix.errors import InputError


@dataclass(frozen=True, eq=False)
class PreparedText:
    """Blocks to train and validate on, mapped from the token cache.

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
    cache: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> PreparedText:
    """Read, tokenize and pack, or take the tokens that an earlier start has kept.

    batch_size: sequences that a step needs. validation_tokens: how many are used at most. cache: the folder of
    `data.cache`, None for this user's. say: gets one line for the person who waits. The other arguments are those of
    `load_corpus` and `load_tokenizer`; blocks are those of `pack`.

    Raises:
        InputError: text that cannot be read or is too small, or a cache that cannot be written.
    """
    tokens = cached_tokens(
        sources,
        tokenizer_name,
        validation_fraction=validation_fraction,
        cache=cache or default_cache(),
        say=say,
    )
    train = cut_blocks(tokens.train, context, "train")
    validation = cut_blocks(tokens.validation, context, "validation")[: max(1, validation_tokens // context)]
    if len(train) < batch_size:
        raise InputError(
            f"the train text has {len(train)} blocks of {context} tokens and one step needs "
            f"{batch_size}; set the batch size to at most {len(train)} or add text"
        )
    meta = tokens.meta
    bytes_per_token = meta["validation_bytes"] / len(tokens.validation)
    facts = {
        "name": tokens.name,
        "sha256": meta["sha256"],
        "documents": meta["documents"],
        "duplicates_dropped": meta["duplicates_dropped"],
        "tokenizer": tokenizer_name,
        "vocab_size": meta["vocab_size"],
        "bytes_per_token": bytes_per_token,
        "train_tokens": int(train.size),
        "validation_tokens": int(validation.size),
    }
    return PreparedText(PackedText(train, validation, meta["vocab_size"], bytes_per_token), tokens.tokenizer, facts)
