"""Speed and memory of a model, measured."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from transformers import DynamicCache

from multimatrix.evaluate.cache_bytes import stored_bytes
from multimatrix.model.modeling import MultimatrixForCausalLM


@torch.no_grad()
def decode_tokens_per_second(model: MultimatrixForCausalLM, context: int, tokens: int) -> float:
    """Greedy decoding of one sequence after a prompt of `context` tokens; the prompt's own time is left out."""
    model.eval()
    cache = DynamicCache(config=model.config)
    ids = torch.zeros(1, context, dtype=torch.long, device=model.device)
    start = 0.0
    warm_up = 2
    for step in range(tokens + warm_up):
        if step == warm_up:
            start = now(model.device)
        logits = model(ids, cache=cache, logits_to_keep=1).logits
        ids = logits[:, -1:].argmax(-1)
    return tokens / (now(model.device) - start)


@torch.no_grad()
def counted_kv_bytes_per_token(model: MultimatrixForCausalLM, tokens: int) -> float:
    """Bytes per token in the storage of a real dynamic cache, in the model's dtype."""
    cache = DynamicCache(config=model.config)
    model.eval()(torch.zeros(1, tokens, dtype=torch.long, device=model.device), cache=cache)
    return stored_bytes(cache) / tokens


class PeakMemory:
    """Peak memory since construction: allocated on a CUDA device, or resident in this process on Linux."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif self._resident_is_known:
            _CLEAR_REFS.write_text("5")  # resets the peak that the kernel keeps, see proc(5)

    @property
    def _resident_is_known(self) -> bool:
        return os.access(_CLEAR_REFS, os.W_OK) and os.access(_STATUS, os.R_OK)

    def bytes(self) -> int | None:
        """The peak, or None where the system does not tell."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if self._resident_is_known:
            peak = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
            return int(peak.split()[1]) * 1024
        return None


_CLEAR_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def now(device: torch.device) -> float:
    """Seconds on a clock that runs on, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
