"""Decoding one sequence on a static cache; on a GPU every step is one replay of a CUDA graph."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import StaticCache

from multimatrix.evaluate.measure import now
from multimatrix.model.modeling import MultimatrixForCausalLM
from multimatrix.plan.numbers import kv_bytes_per_token


@dataclass
class Speed:
    """What a generation took.

    prompt: tokens read before the first new one; its seconds are also those of capturing the graph. tokens: new ones
    after the first. bytes_read: what decoding them must read, the weights and the cache up to each.
    """

    prompt: int = 0
    prefill_seconds: float = 0.0
    tokens: int = 0
    decode_seconds: float = 0.0
    bytes_read: int = 0
    graph: bool = False

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(self.decode_seconds, 1e-9)

    @property
    def gigabytes_per_second(self) -> float:
        return self.bytes_read / max(self.decode_seconds, 1e-9) / 1e9


class Decoder:
    """Greedy or sampled continuation of one prompt.

    temperature: 0 takes the most likely token. top_p: sample from the smallest set of tokens of this probability.
    graph: capture the decode step in a CUDA graph; where the model is on no GPU there is none.
    """

    def __init__(
        self, model: MultimatrixForCausalLM, *, temperature: float = 0.0, top_p: float = 1.0, graph: bool = True
    ) -> None:
        self.model = model.eval()
        self.temperature = temperature
        self.top_p = top_p
        self.graph = graph and model.device.type == "cuda"
        self.speed = Speed()

    @torch.inference_mode()
    def stream(self, ids: Tensor, max_new_tokens: int, stop: frozenset[int] = frozenset()) -> Iterator[int]:
        """Tokens that follow ids [1, T], at most so many, up to and with the first of `stop`."""
        model, device = self.model, self.model.device
        cache = model.static_cache(1, ids.shape[1] + max_new_tokens)
        self.speed = Speed(prompt=ids.shape[1], graph=self.graph)
        start = now(device)
        token = self._choose(model(ids, cache=cache, logits_to_keep=1).logits)  # [1, 1]
        step = self._captured(cache, token) if self.graph and max_new_tokens > 1 else None
        self.speed.prefill_seconds = now(device) - start
        per_token = kv_bytes_per_token(model.config.layer_specs(), bits=8 * model.dtype.itemsize)
        weights = self._weight_bytes()
        start = time.perf_counter()
        for number in range(max_new_tokens):
            if number > 0:
                if step is not None:
                    step.replay()
                else:
                    token.copy_(self._choose(model(token, cache=cache).logits))
                self.speed.tokens += 1
                self.speed.bytes_read += weights + per_token * (ids.shape[1] + number)
            new = int(token.item())  # waits for the device
            self.speed.decode_seconds = time.perf_counter() - start
            yield new
            if new in stop:
                return

    def _choose(self, logits: Tensor) -> Tensor:
        """Logits [1, 1, vocab_size] -> the next token [1, 1]."""
        if self.temperature == 0:
            return logits[:, -1].argmax(-1, keepdim=True)
        p = (logits[:, -1].float() / self.temperature).softmax(-1)
        if self.top_p < 1:
            ordered, index = p.sort(descending=True)
            # A token stays while what lies before it has not reached top_p, so that one always does.
            ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= self.top_p, 0.0)
            p = torch.zeros_like(p).scatter(-1, index, ordered)
        return torch.multinomial(p, 1)

    def _captured(self, cache: StaticCache, token: Tensor) -> torch.cuda.CUDAGraph:
        """The step from `token` to the next, which it leaves in its place."""

        def step() -> None:
            token.copy_(self._choose(self.model(token, cache=cache).logits))

        lengths = [layer.cumulative_length.clone() for layer in cache.layers]
        first = token.clone()
        state = torch.cuda.get_rng_state(self.model.device)
        # Kernels are compiled and libraries make their plans outside of the capture.
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            step()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        # What the warm-up wrote lies behind the lengths and is written anew.
        for layer, length in zip(cache.layers, lengths, strict=True):
            layer.cumulative_length.copy_(length)
        token.copy_(first)
        torch.cuda.set_rng_state(state, self.model.device)
        return graph

    def _weight_bytes(self) -> int:
        """Bytes of the weights that a token needs: all, but one row of an embedding that is not the head as well."""
        model = self.model
        total = sum(p.numel() * p.element_size() for p in model.parameters())
        embedding = model.get_input_embeddings().weight
        tied = embedding is model.lm_head.weight
        return total - (0 if tied else (embedding.shape[0] - 1) * embedding.shape[1] * embedding.element_size())
