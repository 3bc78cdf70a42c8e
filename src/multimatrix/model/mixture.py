"""Mixture-of-experts feed-forward, and the loss that keeps its experts equally busy.

    p = softmax(x W_r)                      over all E experts, in float32 at least
    y = sum over e in top_K(p) of w_e expert_e(x)  +  shared(x)      w = p, divided by its sum over top_K(p) if asked

Every expert is a SwiGLU. The layout of DeepSeekMoE (arXiv 2401.06066) and Step-3 (arXiv 2507.19427): one shared expert,
which every token takes with weight one. The balancing loss is that of Switch Transformer (arXiv 2101.03961,
equations 4 to 6).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimatrix.model.experts import ExpertsSpec
from multimatrix.model.feed_forward import SwiGLU
from multimatrix.ops.grouped import grouped_products


class MixtureOfExperts(nn.Module):
    """x [B, T, H] -> y [B, T, H] and the router's logits [B * T, E]."""

    def __init__(self, spec: ExpertsSpec, hidden_size: int) -> None:
        super().__init__()
        self.spec = spec
        self.router = nn.Linear(hidden_size, spec.num_experts, bias=False)
        self.experts = Experts(spec, hidden_size)
        shared = spec.shared_intermediate_size
        self.shared_expert = SwiGLU(hidden_size, shared) if shared else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = x.flatten(0, 1)  # [B * T, H]
        router_logits = self.router(tokens)  # [B * T, E]
        weights, chosen = route(router_logits, self.spec)  # [B * T, K]
        # One row for every token and expert of its choice, sorted by expert.
        expert, order = chosen.flatten().sort(stable=True)  # [B * T * K]
        numbers = torch.arange(self.spec.num_experts, device=x.device)
        ends = torch.searchsorted(expert, numbers, right=True, out_int32=True)  # [E]
        rows = self.experts(tokens[order // self.spec.experts_per_token], ends)  # [B * T * K, H]
        of_token = rows[order.argsort()].unflatten(0, chosen.shape)  # [B * T, K, H]
        y = (of_token * weights[..., None]).sum(1).to(rows.dtype).view_as(x)  # [B, T, H]
        if self.shared_expert is not None:
            y = y + self.shared_expert(x)
        return y, router_logits

    def set_output_std(self, std: float) -> None:
        """Initial std of the matrices that write to the residual stream."""
        self.experts.output_std = std
        if self.shared_expert is not None:
            self.shared_expert.set_output_std(std)


class Experts(nn.Module):
    """The matrices of all experts, stacked.

    output_std: initial std of down_proj, None for that of all other matrices.
    """

    def __init__(self, spec: ExpertsSpec, hidden_size: int) -> None:
        super().__init__()
        experts, width = spec.num_experts, spec.intermediate_size
        self.gate_proj = nn.Parameter(torch.empty(experts, width, hidden_size))
        self.up_proj = nn.Parameter(torch.empty(experts, width, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden_size, width))
        self.output_std: float | None = None
        for matrices in self.parameters():
            nn.init.normal_(matrices, std=matrices.shape[2] ** -0.5)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """x [R, H], rows in order of their expert, `ends` as in `ops.grouped` -> [R, H]."""
        gate = grouped_products(x, self.gate_proj, ends)  # [R, I]
        up = grouped_products(x, self.up_proj, ends)  # [R, I]
        return grouped_products(F.silu(gate) * up, self.down_proj, ends)  # [R, H]


def route(router_logits: Tensor, spec: ExpertsSpec) -> tuple[Tensor, Tensor]:
    """Logits [N, E] -> weights, in float32 at least, and numbers of the chosen experts, both [N, K]."""
    weights, chosen = probabilities(router_logits).topk(spec.experts_per_token, dim=-1)
    if spec.normalize_weights:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, chosen


def probabilities(router_logits: Tensor) -> Tensor:
    """Softmax over the experts, in float32 at least."""
    return router_logits.softmax(-1, dtype=torch.promote_types(router_logits.dtype, torch.float32))


def load_balancing_loss(router_logits: Sequence[Tensor], experts_per_token: int, mask: Tensor | None = None) -> Tensor:
    """E * sum over experts of f_e P_e: K where all experts are equally busy, more where they are not.

    f_e: how often a token chooses e. P_e: mean probability of e. Both over the tokens of all layers together, as
    transformers has it. router_logits: [B * T, E] per layer. mask: [B, S], 0 for padding, which is left out; its last
    T columns are those of the tokens. Masks of other ranks are not used.
    """
    device = router_logits[0].device
    p = probabilities(torch.cat([logits.to(device) for logits in router_logits]))  # [L * B * T, E]
    chosen = torch.zeros_like(p).scatter(-1, p.topk(experts_per_token, dim=-1).indices, 1.0)
    if mask is None or mask.dim() != 2:
        return p.shape[1] * (chosen.mean(0) * p.mean(0)).sum()
    tokens = router_logits[0].shape[0] // mask.shape[0]  # T
    real = mask[:, -tokens:].flatten().to(p).repeat(len(router_logits))[:, None]  # [L * B * T, 1]
    return p.shape[1] * ((real * chosen).sum(0) * (real * p).sum(0)).sum() / real.sum().square()


def share_of_step(labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor | float:
    """Which part of an optimizer step's predicted tokens these labels are.

    Trainer gives the number of all where it accumulates gradients; losses that are summed then weigh as their tokens.
    """
    if num_items_in_batch is None:
        return 1.0
    return (labels[..., 1:] != -100).sum() / num_items_in_batch
