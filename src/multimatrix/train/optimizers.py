"""Muon beside AdamW, as one optimizer.

Muon (Jordan et al., 2024; torch.optim.Muon) orthogonalizes the update of a matrix. It is for the matrices of the
layers; embeddings, the language-modelling head, norms, gates and stacked experts take AdamW. Updates are scaled to
the size of AdamW's (Moonlight, arXiv 2502.16982), so that both share the learning rate and the weight decay.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn


class MuonWithAdamW(torch.optim.Optimizer):
    """Two optimizers of torch that share one list of groups and one state."""

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW) -> None:
        self.muon = muon
        self.adamw = adamw
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], {})
        self._share()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.muon.step()
        self.adamw.step()
        return loss

    def _share(self) -> None:
        """Groups and state are replaced whenever a state is loaded."""
        self.muon.param_groups = [group for group in self.param_groups if "ns_steps" in group]
        self.adamw.param_groups = [group for group in self.param_groups if "ns_steps" not in group]
        self.muon.state = self.adamw.state = self.state


def muon_with_adamw(model: nn.Module, decayed: Collection[str], *, lr: float, weight_decay: float) -> MuonWithAdamW:
    """The optimizer of a model; decayed: names of the parameters that are decayed where AdamW has them."""
    ends = {id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    matrices = [parameter for _, parameter in trained if parameter.ndim == 2 and id(parameter) not in ends]
    taken = {id(parameter) for parameter in matrices}
    others = [(name in decayed, parameter) for name, parameter in trained if id(parameter) not in taken]
    groups = [
        {"params": [parameter for is_decayed, parameter in others if is_decayed], "weight_decay": weight_decay},
        {"params": [parameter for is_decayed, parameter in others if not is_decayed], "weight_decay": 0.0},
    ]
    return MuonWithAdamW(
        torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, betas=(0.9, 0.95)),
    )
