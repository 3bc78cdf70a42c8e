"""The one entry to softmax attention: scores over the cached latents, values read off them, backend chosen here."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from multimatrix.errors import InputError
from multimatrix.ops.alibi import alibi_bias
from multimatrix.ops.decode import MAX_TOKENS, decode_attention, why_not
from multimatrix.ops.rotary import Rotation, SlotRotation

if TYPE_CHECKING:
    from multimatrix.attention.gmha import ValueSource

logger = logging.getLogger(__name__)

# (q, key, value, mask, causal, scale) -> o
Backend = Callable[[Tensor, Tensor, Tensor, Tensor | None, bool, float], Tensor]


def attend(
    q: Tensor,
    latents: tuple[Tensor, ...],
    *,
    scale: float,
    source: ValueSource = "own",
    value_dim: int | None = None,
    slot_rope: Callable[[int], Rotation] | None = None,
    rotation: SlotRotation | None = None,
    mask: Tensor | None = None,
    slopes: Sequence[float] | None = None,
    query_positions: Tensor | None = None,
    lengths: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(scale * q . keys(latents)) values(latents), causal.

    q: [B, N, T, D]. latents: [B, G, S, D], and [B, G, S, V] where the value is a tensor of its own. N is a multiple
    of G. source: where values are read, see `gmha.ValueSource`; "slice" takes the leading `value_dim` elements of
    the key, "unrotated" takes the latent as it is and turns the keys with `slot_rope(S)`, the rotation at slots 0..S-1,
    or `rotation`, which says the same to the kernel.
    mask: [B or 1, 1, T, S], boolean (True is seen) or additive; None where the queries are the last T of the S
    slots and see all before them. slopes: of every head, where ALiBi's bias is added; query_positions: slot numbers [T]
    of the queries, by default the last T of S. lengths: int32 [1], slots that are filled, where that is known.
    backend: "auto", "triton", "sdpa" or "eager"; auto decodes with the Triton kernel where that serves.

    Returns o [B, N, T, V].
    """
    tokens, slots = q.shape[2], latents[0].shape[2]
    if backend in ("auto", "triton") and lengths is not None and tokens < slots and tokens <= MAX_TOKENS:
        value = latents[1] if source == "own" else None
        how: dict[str, Any] = {"source": source, "value_dim": value_dim, "rotation": rotation, "mask": mask}
        reason = why_not(q, latents[0], value, **how)
        if reason is None:
            of_heads = None if slopes is None else _on_device(tuple(slopes), q.device)
            return decode_attention(q, latents[0], value, lengths=lengths, scale=scale, slopes=of_heads, **how)[0]
        if backend == "triton":
            raise InputError(f"the decode kernel does not take this: {reason}; choose another attn_implementation")
    key, value = _keys_and_values(latents, source, value_dim, slot_rope)
    causal = mask is None and tokens == slots and tokens > 1 and slopes is None
    if mask is None and tokens > 1 and not causal:
        mask = causal_mask(tokens, slots, q.device)
    if slopes is not None:
        if query_positions is None:
            query_positions = torch.arange(slots - tokens, slots, device=q.device)
        bias = alibi_bias(slopes, query_positions, slots, q.dtype)  # [N, T, S]
        mask = _add_bias(mask, bias)
    return _backend(backend)(q, key, value, mask, causal, scale)


def causal_mask(tokens: int, slots: int, device: torch.device) -> Tensor:
    """True where query t, the (slots - tokens + t)-th token, sees slot s; [1, 1, T, S]."""
    seen = torch.ones(tokens, slots, dtype=torch.bool, device=device).tril(slots - tokens)
    return seen[None, None]


def _keys_and_values(
    latents: tuple[Tensor, ...],
    source: ValueSource,
    value_dim: int | None,
    slot_rope: Callable[[int], Rotation] | None,
) -> tuple[Tensor, Tensor]:
    key = latents[0]
    if source == "own":
        return key, latents[1]
    if source == "key":
        return key, key
    if source == "slice":
        return key, key[..., :value_dim]
    assert slot_rope is not None, "un-rotated latents need the rotation at every slot"
    return slot_rope(key.shape[2])(key), key


def _on_device(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    # A compiler makes a constant of them; without one, copying them at every step would wait for the device.
    return _make(numbers, device) if torch.compiler.is_compiling() else _cached(numbers, device)


def _make(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32, device=device)


_cached = functools.lru_cache(maxsize=8)(_make)


def _add_bias(mask: Tensor | None, bias: Tensor) -> Tensor:
    if mask is None:
        return bias[None]
    if mask.dtype == torch.bool:
        return bias.masked_fill(~mask, float("-inf"))  # [B, N, T, S]
    return mask + bias


def eager(q: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """Plain softmax attention; the softmax is taken in float32 at least."""
    groups = key.shape[1]
    tokens = q.shape[2]
    # Heads of a group are rows of one product, so that no key is copied for each of them.
    rows = q.unflatten(1, (groups, -1)).flatten(2, 3)  # [B, G, N / G * T, D]
    scores = (rows @ key.transpose(-1, -2)).unflatten(2, (-1, tokens)).flatten(1, 2) * scale  # [B, N, T, S]
    if causal:
        mask = causal_mask(q.shape[2], key.shape[2], q.device)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    # A row that sees nothing (left padding) must give zeros, not NaN.
    empty = (scores == float("-inf")).all(-1, keepdim=True)
    precision = torch.promote_types(q.dtype, torch.float32)
    weights = scores.masked_fill(empty, 0.0).softmax(-1, dtype=precision).masked_fill(empty, 0.0)
    o = weights.to(q.dtype).unflatten(1, (groups, -1)).flatten(2, 3) @ value  # [B, G, N / G * T, V]
    return o.unflatten(2, (-1, tokens)).flatten(1, 2)  # [B, N, T, V]


def sdpa(q: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """torch's scaled_dot_product_attention without copies of grouped keys."""
    heads, groups = q.shape[1], key.shape[1]
    if q.shape[2] == 1 and groups < heads:
        # One new token: the heads of a group become query rows, so that each cached byte is read once for all.
        if mask is not None and mask.shape[1] == heads:
            mask = mask.unflatten(1, (groups, -1)).squeeze(3)  # [B, G, N / G, S]
        rows = q.unflatten(1, (groups, -1)).squeeze(3)  # [B, G, N / G, D]
        return _decode(rows, key, value, mask, scale).flatten(1, 2).unsqueeze(2)
    if q.shape[2] == 1:
        return _decode(q, key, value, mask, scale)
    return F.scaled_dot_product_attention(
        q, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=groups < heads
    )


def _decode(q: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Ungrouped attention over a cache that grows: cuDNN, which plans anew for every length, is left out."""
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return F.scaled_dot_product_attention(q, key, value, attn_mask=mask, scale=scale)


BACKENDS: dict[str, Backend] = {
    "eager": eager,
    "sdpa": sdpa,
}


def _backend(name: str) -> Backend:
    chosen = "sdpa" if name in ("auto", "triton") else name
    if chosen not in BACKENDS:
        raise ValueError(f"there is no attention backend {name!r}; choose auto, triton, {', '.join(BACKENDS)}")
    if not torch.compiler.is_compiling():
        _say_once(chosen, "asked for" if name == chosen else "fused, for whole sequences and where no kernel serves")
    return BACKENDS[chosen]


@functools.cache
def _say_once(chosen: str, why: str) -> None:
    logger.info("attention runs on %s: %s", chosen, why)
