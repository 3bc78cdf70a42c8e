"""Documents to blocks of equal length, and the blocks as a data set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from multimatrix.data.corpus import Corpus
from multimatrix.errors import InputError

# The tokenizer holds about 100 bytes a token while it works on a batch of documents.
BATCH_CHARACTERS = 1_000_000


@dataclass(frozen=True, eq=False)
class PackedText:
    """Token blocks of both sides of a corpus.

    Attributes:
        train: whole numbers `[blocks, context]`.
        validation: whole numbers `[blocks, context]`.
        vocab_size: one more than the largest token id the tokenizer knows.
        validation_bytes_per_token: UTF-8 bytes of the validation text over its tokens, the eos of every
            document counted as a token of no bytes. Bits per byte = mean loss in nats / ln 2 / this.
    """

    train: NDArray[np.integer]
    validation: NDArray[np.integer]
    vocab_size: int
    validation_bytes_per_token: float


class BlockDataset(torch.utils.data.Dataset):
    """Blocks `[blocks, context]` for the transformers Trainer: `input_ids` and equal `labels` `[context]`."""

    def __init__(self, blocks: NDArray[np.integer]) -> None:
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.from_numpy(self.blocks[index].astype(np.int64))  # [context]
        return {"input_ids": tokens, "labels": tokens}


class OrderedBlocks(BlockDataset):
    """Blocks in the order of training: pass after pass, each in a random order of its own.

    What is at an index depends on the seed, the index and the blocks alone, never on who asks or what was asked before.
    So the order is the same for any number of processes, and wherever a run goes on.

    length: how many blocks training takes.
    """

    def __init__(self, blocks: NDArray[np.integer], length: int, seed: int) -> None:
        super().__init__(blocks)
        self.length = length
        self.seed = seed
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        epoch, place = divmod(index, len(self.blocks))
        if epoch != self._epoch:
            self._order = np.random.default_rng((self.seed, epoch)).permutation(len(self.blocks))
            self._epoch = epoch
        return super().__getitem__(int(self._order[place]))


def pack(corpus: Corpus, tokenizer: PreTrainedTokenizerFast, context: int) -> PackedText:
    """Join the documents of each side, each followed by eos, and cut them into blocks of `context` tokens.

    Documents keep the order of the corpus; the remainder of each side is dropped. Special tokens written out
    in a text, such as "<|endoftext|>" in a page about tokenizers, are encoded as the characters they are.

    Raises:
        InputError: `context` is below 2, the tokenizer has no eos, or a side is shorter than one block.
    """
    check_packing(tokenizer)
    train, validation = (
        np.concatenate(list(token_stream(side, tokenizer)))  # [tokens]
        for side in (corpus.train, corpus.validation)
    )
    return PackedText(
        train=cut_blocks(train, context, "train"),
        validation=cut_blocks(validation, context, "validation"),
        vocab_size=vocabulary_size(tokenizer),
        validation_bytes_per_token=sum(len(text.encode()) for text in corpus.validation) / len(validation),
    )


def check_packing(tokenizer: PreTrainedTokenizerFast) -> None:
    """InputError where documents cannot be ended."""
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no eos token to end documents with; get it from load_tokenizer")


def vocabulary_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """One more than the largest token id that the tokenizer knows."""
    return 1 + max(tokenizer.get_vocab().values())


def token_stream(documents: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> Iterator[NDArray[np.int32]]:
    """The tokens of each document, each followed by eos."""
    for ids in encode(documents, tokenizer):
        yield np.array([*ids, tokenizer.eos_token_id], dtype=np.int32)


def cut_blocks(tokens: NDArray[np.integer], context: int, side: str) -> NDArray[np.integer]:
    """A stream as blocks `[blocks, context]`, the remainder dropped.

    Raises:
        InputError: `context` is below 2, or there is not a single block.
    """
    if context < 2:
        raise InputError(f"context must be at least 2, to have a next token to predict, got {context}")
    blocks = len(tokens) // context
    if blocks == 0:
        raise InputError(
            f"the {side} text has {len(tokens)} tokens and one block needs {context}; "
            f"set context to at most {len(tokens)} or add text"
        )
    return tokens[: blocks * context].reshape(blocks, context)


def encode(documents: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> Iterator[list[int]]:
    """The token ids of each document, without bos and eos.

    Special tokens written out in a text are encoded as the characters they are.
    """
    for batch in _batches(documents):
        encoded = tokenizer(
            batch,
            add_special_tokens=False,
            split_special_tokens=True,
            truncation=False,
            padding=False,
            return_attention_mask=False,
            verbose=False,
        )
        yield from encoded["input_ids"]


def _batches(documents: Sequence[str]) -> Iterator[list[str]]:
    """Neighbouring documents, as many as make up `BATCH_CHARACTERS`; a longer document is alone."""
    batch: list[str] = []
    size = 0
    for text in documents:
        if batch and size + len(text) > BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    yield batch
