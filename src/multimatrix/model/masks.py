"""Which slots a token sees where rows are padded or hold several documents."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def within_documents(
    mask: Tensor | None,
    position_ids: Tensor,
    attention_mask: Tensor | None,
    positions: Tensor,
    slots: int,
) -> Tensor | None:
    """`mask`, narrowed so that a token at position p of its document sees itself and the p tokens before it.

    That is all a document needs, with or without a cache: no boundary has to be remembered between calls, and a
    later token with a position of its own continues the document it belongs to.

    mask: [B or 1, 1, T, S], boolean or additive, or None where nothing but causality hides a slot. position_ids:
    [B or 1, T], rising by one within a document, 0 where one starts. attention_mask: [B, S'], S' <= S, 0 at padding,
    which does not count; None without padding. positions: slot numbers of the T tokens. slots: S.

    Returns None where there was no mask and every row is one document.

    Raises:
        ValueError: position_ids jump inside a document.
    """
    if attention_mask is None:
        ranks = torch.arange(slots, device=positions.device)[None]  # [1, S]
    else:
        ranks = attention_mask.long().cumsum(-1) - 1  # [B, S']
        ranks = F.pad(ranks, (0, slots - ranks.shape[1]), value=-1)
    first = ranks[:, positions] - position_ids  # [B, T], the first token that is seen, counted without padding
    if not torch.compiler.is_compiling():
        kept = None if attention_mask is None else attention_mask[:, positions].bool()  # [B, T]
        _check_positions(position_ids, kept)
        if bool((first if kept is None else first.masked_fill(~kept, 0)).le(0).all()):
            return mask
    seen = (ranks[:, None] >= first[:, :, None])[:, None]  # [B, 1, T, S]
    if mask is None:
        return seen & (torch.arange(slots, device=positions.device) <= positions[:, None])
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, torch.finfo(mask.dtype).min)


def _check_positions(position_ids: Tensor, kept: Tensor | None) -> None:
    """ValueError where a position neither follows the one before it nor starts a document."""
    after = position_ids[:, 1:]
    jumps = (after != position_ids[:, :-1] + 1) & (after != 0)  # [B, T - 1]
    if kept is not None:
        jumps = jumps & kept[:, 1:] & kept[:, :-1]
    if bool(jumps.any()):
        row, token = jumps.nonzero()[0].tolist()
        before, then = position_ids[row, token : token + 2].tolist()
        raise ValueError(
            f"position_ids must rise by one within a document and start the next at 0; row {row} goes from {before} to "
            f"{then} at token {token + 1}"
        )
