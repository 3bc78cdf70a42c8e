"""SwiGLU feed-forward (Shazeer, arXiv 2002.05202): (silu(x W_gate) * x W_up) W_down, without biases."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from multimatrix.attention.gmha import side_by_side


class SwiGLU(nn.Module):
    """x [B, T, H] -> [B, T, H] through intermediate_size."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = side_by_side(x, self.gate_proj, self.up_proj)  # [B, T, I]
        return self.down_proj(F.silu(gate) * up)  # [B, T, H]

    def set_output_std(self, std: float) -> None:
        """Initial std of the matrix that writes to the residual stream."""
        self.down_proj.init_std = std
