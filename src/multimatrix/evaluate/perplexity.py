"""Perplexity with a sliding window: nats per token, bits per byte, and loss by position in the document.

A window of `context` tokens moves on by `stride`. The first window of a document scores all of its tokens, a later one
those that no window before it has scored, so every token is scored exactly once and, after the first window, sees at
least `context - stride + 1` tokens. A window never holds tokens of two documents.

Before every document stands the tokenizer's bos, or its eos where there is no bos, which is how lm-evaluation-harness
starts a text and what `multimatrix.data.pack` puts between documents. So the first token is scored too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from multimatrix.data.packing import encode
from multimatrix.errors import InputError


@dataclass(frozen=True)
class Bucket:
    """Mean loss of the tokens at the positions first, ..., last of their documents; the first token is at 0."""

    first: int
    last: int
    tokens: int
    nats_per_token: float


@dataclass(frozen=True)
class Perplexity:
    """What a model makes of a text.

    Attributes:
        documents, tokens, bytes: what was scored; bytes are those of the text in UTF-8.
        nats_per_token: mean negative log-likelihood of a token, the prefix not counted.
        bits_per_byte: negative log2-likelihood of the text over its bytes; comparable between tokenizers.
        perplexity: e to the nats per token; comparable only with one tokenizer.
        context, stride: of the window, in tokens.
        prefix: the token put before every document.
        unknown_tokens: how many tokens stand for text that the tokenizer cannot write; bits per byte are then too low.
        by_position: loss by position in the document, in buckets 0, 1, 2-3, 4-7, ...
    """

    documents: int
    tokens: int
    bytes: int
    nats_per_token: float
    bits_per_byte: float
    perplexity: float
    context: int
    stride: int
    prefix: str
    unknown_tokens: int
    by_position: tuple[Bucket, ...]


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    documents: Sequence[str],
    *,
    context: int,
    stride: int,
    batch_size: int = 8,
) -> Perplexity:
    """Score every token of `documents` once.

    Raises:
        InputError: stride is not in 1, ..., context, the tokenizer has neither bos nor eos, there is no text, or the
            model gives NaN.
    """
    if not 1 <= stride <= context:
        raise InputError(f"stride must be at least 1 and at most the context of {context} tokens, got {stride}")
    prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if not any(documents):
        raise InputError("there is no text to score; give at least one character")
    if prefix is None:
        raise InputError(
            "the tokenizer has neither a bos nor an eos token to put before a document; "
            "name one in its tokenizer_config.json"
        )
    tokens = [np.array([prefix, *ids]) for ids in encode(documents, tokenizer)]  # of each document, [1 + T]
    losses = token_losses(model, tokens, context=context, stride=stride, batch_size=batch_size)
    scored = sum(len(loss) for loss in losses)
    if bad := sum(int((~np.isfinite(loss)).sum()) for loss in losses):
        raise InputError(
            f"the loss is not finite at {bad} of {scored} tokens: the weights are damaged, or {model.dtype} cannot "
            "hold what they give; try --dtype float32"
        )
    nats = math.fsum(loss.sum() for loss in losses)
    size = sum(len(text.encode()) for text in documents)
    unknown = tokenizer.unk_token_id
    return Perplexity(
        documents=len(documents),
        tokens=scored,
        bytes=size,
        nats_per_token=nats / scored,
        bits_per_byte=nats / math.log(2) / size,
        perplexity=float(np.exp(nats / scored)),
        context=context,
        stride=stride,
        prefix=tokenizer.convert_ids_to_tokens(prefix),
        unknown_tokens=0 if unknown is None else sum(int((ids[1:] == unknown).sum()) for ids in tokens),
        by_position=tuple(loss_by_position(losses)),
    )


def windows(length: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(begin, first, end) of each window over `length` inputs: it reads begin:end and scores what first:end predict."""
    begin = first = 0
    while first < length:
        end = min(begin + context, length)
        yield begin, first, end
        begin, first = begin + stride, end


@torch.no_grad()
def token_losses(
    model: PreTrainedModel, documents: Sequence[NDArray], *, context: int, stride: int, batch_size: int
) -> list[NDArray[np.float64]]:
    """Nats of every token but the first of each document: ids [1 + T] -> losses [T].

    Windows of a batch are filled up on the right, where a causal model does not look.
    """
    model.eval()
    losses = [np.full(len(ids) - 1, np.nan) for ids in documents]
    jobs = [(i, *window) for i, loss in enumerate(losses) for window in windows(len(loss), context, stride)]
    jobs.sort(key=lambda job: job[1] - job[3])  # the longest first: least filling, and too large a batch fails at once
    with tqdm(total=sum(map(len, losses)), unit="token", desc="perplexity", disable=None) as bar:
        for start in range(0, len(jobs), batch_size):
            batch = jobs[start : start + batch_size]
            ids = torch.zeros(len(batch), batch[0][3] - batch[0][1], dtype=torch.long)  # [B, T]
            for row, (i, begin, _, end) in enumerate(batch):
                ids[row, : end - begin] = torch.from_numpy(documents[i][begin:end])
            logits = model(input_ids=ids.to(model.device), use_cache=False).logits  # [B, T, vocab_size]
            for scores, (i, begin, first, end) in zip(logits, batch, strict=True):
                scores = scores[first - begin : end - begin]
                targets = torch.from_numpy(documents[i][first + 1 : end + 1]).to(scores.device)
                scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
                losses[i][first:end] = F.cross_entropy(scores, targets, reduction="none").double().cpu().numpy()
                bar.update(end - first)
    return losses


def loss_by_position(losses: Iterable[NDArray[np.float64]]) -> Iterator[Bucket]:
    """Losses of each document, [T] -> buckets whose edges are the powers of two."""
    sums: dict[int, float] = {}
    counts: dict[int, int] = {}
    longest = 0
    for loss in losses:
        longest = max(longest, len(loss))
        buckets = np.frexp(np.arange(len(loss)))[1]  # the number of bits of the position
        for bucket in np.unique(buckets).tolist():
            inside = loss[buckets == bucket]
            sums[bucket] = sums.get(bucket, 0.0) + inside.sum()
            counts[bucket] = counts.get(bucket, 0) + len(inside)
    for bucket in sorted(counts):
        yield Bucket(
            first=2 ** (bucket - 1) if bucket else 0,
            last=min(2**bucket, longest) - 1,
            tokens=counts[bucket],
            nats_per_token=float(sums[bucket] / counts[bucket]),
        )


def cut(documents: Sequence[str], max_bytes: int) -> list[str]:
    """The first `max_bytes` bytes of text, in UTF-8, the last character whole."""
    kept = []
    for text in documents:
        data = text.encode()[:max_bytes]
        max_bytes -= len(data)
        if part := data.decode(errors="ignore"):
            kept.append(part)
        if max_bytes <= 0:
            break
    return kept
