"""Next-token cross entropy that never holds the logits of all tokens.

    loss = sum over tokens of logsumexp(W h) - (W h)[label]          h: hidden states, W: the output head [V, H]

Tokens pass through the head in chunks. A chunk's logits give its part of the loss and at once of both gradients,
softmax(W h) - onehot(label), so that they are made once and dropped, as Liger Kernel does (arXiv 2410.10989). Plain
torch operations: they run on every device, and `MultimatrixForCausalLM.compile_layers` fuses what stands between the
products.

torch has the like from 2.12 on, `torch.nn.functional.linear_cross_entropy`, but outside of compiled graphs only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Tokens that pass through the head together. Fewer would save memory that is small beside a layer's activations, and
# add to the weight's gradient so often that it shows.
CHUNK = 4096


def loss_terms(logits: Tensor, target: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Logits [n, V] and target [n, 1] -> log probability of the target [n, 1] and the logits' gradient [n, V].

    The gradient is that of the negative log probability, softmax - onehot, in the logits' dtype. Everything else is
    taken in float32 at least.
    """
    log_p = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))  # [n, V]
    of_target = log_p.gather(1, target)
    if not with_gradient:
        return of_target, None
    # Not scatter, which a compiler cannot fuse; and 1 is taken off before rounding, which near 1 is too coarse.
    is_target = torch.arange(logits.shape[-1], device=logits.device) == target  # [n, V]
    return of_target, log_p.exp_().sub_(is_target.to(logits.dtype)).to(logits.dtype)


def next_token_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    chunk: int = CHUNK,
    terms: Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor | None]] = loss_terms,
    **_: Any,
) -> Tensor:
    """The loss that transformers' `ForCausalLMLoss` gives for the logits hidden @ weight.T.

    hidden: [B, T, H]. weight: [V, H]. labels: [B, T], of which token t predicts label t + 1; shift_labels: [B, T],
    where they are shifted already. Labels of ignore_index do not count. num_items_in_batch: what the sum is divided by,
    None for the labels that count. Under autocast the products are taken in its dtype. terms: `loss_terms`, or the
    same compiled.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = shift_labels.flatten().to(hidden.device)  # [B * T]
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    total = _LinearCrossEntropy.apply(hidden.flatten(0, 1), weight, targets, ignore_index, dtype, chunk, terms)
    if num_items_in_batch is None:
        num_items_in_batch = (targets != ignore_index).sum()
    elif isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


class _LinearCrossEntropy(torch.autograd.Function):
    """hidden [N, H], weight [V, H], targets [N] -> sum of the cross entropies, in float32 at least."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, *others: Any) -> Tensor:
        needed = ctx.needs_input_grad[:2]
        with torch.autocast(hidden.device.type, enabled=False):  # every dtype is chosen here
            total, *gradients = _sum_and_gradients(hidden, weight, *others, *needed)
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = (None if of is None else of * grad.to(of.dtype) for of in ctx.saved_tensors)
        return hidden, weight, None, None, None, None, None


def _sum_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    dtype: torch.dtype,
    chunk: int,
    terms: Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor | None]],
    for_hidden: bool,
    for_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The sum, and its gradients for hidden [N, H] and weight [V, H] where they are needed."""
    precision = torch.promote_types(dtype, torch.float32)
    # Products of odd widths are slow on a GPU; a padded column has no probability and no gradient.
    size, padding = len(weight), -len(weight) % 8
    head = F.pad(weight.to(dtype), (0, 0, 0, padding))  # [V + padding, H]
    total = torch.zeros((), dtype=precision, device=hidden.device)
    of_hidden = []
    of_weight = torch.zeros_like(head, dtype=precision) if for_weight else None
    for rows, labels in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        x = rows.to(dtype)  # [n, H]
        counts = (labels != ignore_index)[:, None]  # [n, 1]
        target = labels[:, None].where(counts, 0)  # [n, 1]
        logits = x @ head.T  # [n, V + padding]
        if padding:
            logits[:, size:] = float("-inf")
        log_p, gradient = terms(logits, target, for_hidden or for_weight)  # [n, 1], [n, V + padding]
        total -= log_p.where(counts, 0).sum()
        if gradient is None:
            continue
        if for_hidden:
            of_hidden.append((gradient @ head).where(counts, 0))  # [n, H]
        if of_weight is not None:
            of_weight += gradient.T @ x.where(counts, 0)  # [V + padding, H]
    return (
        total,
        torch.cat(of_hidden).to(hidden.dtype) if of_hidden else None,
        None if of_weight is None else of_weight[:size].to(weight.dtype),
    )
