"""The agreement table: every way of running a model against every other, and against the float64 oracle.

What goes wrong in this field is disagreement: training against decoding, batch against single, padded against not,
stated against stored bytes. Each check runs one model two ways and gives the largest difference, relative to the
largest reference value.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from multimatrix.attention import AttentionSpec
from multimatrix.attention.module import Attention
from multimatrix.errors import InputError, one_line
from multimatrix.evaluate.cache_bytes import stored_bytes
from multimatrix.files import writing
from multimatrix.model.configuration import MultimatrixConfig
from multimatrix.model.modeling import MultimatrixForCausalLM
from multimatrix.ops.reference import reference_attention
from multimatrix.plan.numbers import kv_bytes_per_token

# Largest accepted error, relative to the largest reference value.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# Tokens of the probe text: long enough to chunk and pad, short enough for the oracle's Python loops.
TOKENS = 12


@dataclass(frozen=True)
class Check:
    """One row: what was compared, the largest relative error, what is accepted."""

    name: str
    error: float
    tolerance: float
    detail: str

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # NaN fails


def check_model(model: MultimatrixForCausalLM) -> list[Check]:
    """Run every check on a model, in its dtype and on its device.

    Raises:
        InputError: the model has fewer positions than the probe text.
    """
    positions = model.config.max_position_embeddings
    if positions < TOKENS:
        raise InputError(f"the checks run {TOKENS} tokens and the model has {positions} positions; it needs {TOKENS}")
    model.eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (3, TOKENS), generator=generator).to(model.device)
    with torch.no_grad():
        return [check(model, ids) for check in CHECKS]


def random_model(spec: AttentionSpec, dtype: torch.dtype, device: str) -> MultimatrixForCausalLM:
    """A two-layer decoder of this variant with every weight random, gates and norms too, so that nothing is trivial."""
    config = MultimatrixConfig(
        vocab_size=97,
        hidden_size=spec.hidden_size,
        intermediate_size=2 * spec.hidden_size,
        num_hidden_layers=2,
        max_position_embeddings=64,
        attention=spec.to_dict(),
    )
    torch.manual_seed(0)
    model = MultimatrixForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2)
    return model.to(device=device, dtype=dtype).eval()


def load_model(folder: str, dtype: torch.dtype, device: str) -> MultimatrixForCausalLM:
    """A saved model of ours.

    Raises:
        InputError: the folder holds no multimatrix model that can be loaded.
    """
    if not (Path(folder) / "config.json").is_file():
        raise InputError(f"{folder} has no config.json; give the folder of a saved multimatrix model")
    try:
        kind = MultimatrixConfig.get_config_dict(folder)[0].get("model_type")
        if kind != MultimatrixConfig.model_type:
            raise InputError(f"it holds a {kind!r} model")
        model, found = MultimatrixForCausalLM.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
        for kind in ("missing", "mismatched", "unexpected"):  # transformers makes up for the first two at random
            if keys := sorted(found[f"{kind}_keys"]):
                raise InputError(f"its config.json and weights disagree, {len(keys)} {kind}, the first: {keys[0]}")
    except Exception as error:  # a damaged file is met by transformers, safetensors or our config, each in its way
        raise InputError(
            f"{folder} cannot be loaded: {one_line(error)}; give the folder of a saved multimatrix model"
        ) from error
    return _in_own_memory(model.to(device)).eval()


def _in_own_memory(model: MultimatrixForCausalLM) -> MultimatrixForCausalLM:
    """Weights mapped from a file may lie at any address, and alignment alone moves the last bit of a product."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def _oracle(model: MultimatrixForCausalLM, ids: Tensor) -> Check:
    """Every attention layer against the float64 reference, on the hidden states it really gets."""
    seen: list[tuple[Attention, Tensor, Tensor]] = []

    def remember(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append((module, args[0][0], output[0]))

    layers = [layer.self_attn for layer in model.model.layers]
    hooks = [layer.register_forward_hook(remember) for layer in layers]
    try:
        model(ids[:1], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    errors = []
    for module, x, output in seen:
        weights = {name.removesuffix(".weight"): p.cpu().double() for name, p in module.named_parameters()}
        expected = reference_attention(module.spec, weights, x.cpu().double(), theta=model.config.rope_theta)
        errors.append(_relative(output, expected))
    return _check(model, "oracle", max(errors), f"{len(seen)} attention layers against float64 equations")


def _training_and_decoding(model: MultimatrixForCausalLM, ids: Tensor) -> Check:
    model.train()
    whole = model(ids, use_cache=False).logits
    model.eval()
    stepped = _run(model, ids, [1] * TOKENS, DynamicCache(config=model.config))
    return _check(
        model, "training / decoding", _relative(stepped, whole), f"whole sequence, and {TOKENS} single tokens"
    )


def _chunked_prefill(model: MultimatrixForCausalLM, ids: Tensor) -> Check:
    whole = model(ids, use_cache=False).logits
    chunks = [5, 4, TOKENS - 9]
    pieces = _run(model, ids, chunks, DynamicCache(config=model.config))
    return _check(model, "prefill / chunked", _relative(pieces, whole), f"whole, and chunks of {chunks}")


def _batch_and_single(model: MultimatrixForCausalLM, ids: Tensor) -> Check:
    batch = model(ids, use_cache=False).logits
    singles = torch.cat([model(row[None], use_cache=False).logits for row in ids])
    return _check(model, "batch / single", _relative(batch, singles), f"{len(ids)} sequences together, and one by one")


def _padded_and_not(model: MultimatrixForCausalLM, ids: Tensor) -> Check:
    """Left padding: the prompt in one call, then the last three tokens one by one."""
    lengths, steps = (TOKENS, TOKENS - 4, TOKENS - 7), 3
    padded, mask = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        padded[row, TOKENS - length :] = ids[row, :length]
        mask[row, TOKENS - length :] = 1
    logits = _run(model, padded, [TOKENS - steps] + [1] * steps, DynamicCache(config=model.config), mask)
    errors = [
        _relative(logits[row, TOKENS - length :], model(ids[row : row + 1, :length], use_cache=False).logits[0])
        for row, length in enumerate(lengths)
    ]
    # A NaN in a padded slot would reach its neighbours one layer later.
    error = max(errors) if bool(logits.isfinite().all()) else float("nan")
    return _check(model, "padded / not", error, f"left-padded batch of lengths {list(lengths)}, and each alone")


def _dynamic_and_static(model: MultimatrixForCausalLM, ids: Tensor) -> Check:
    chunks = [TOKENS - 3, 1, 1, 1]
    dynamic = _run(model, ids, chunks, DynamicCache(config=model.config))
    static = _run(model, ids, chunks, StaticCache(config=model.config, max_cache_len=TOKENS + 5))
    return _check(model, "dynamic / static", _relative(static, dynamic), "prefill and three tokens in each cache")


def _saved_and_loaded(model: MultimatrixForCausalLM, ids: Tensor) -> Check:
    with tempfile.TemporaryDirectory() as folder:
        with writing(folder):
            model.save_pretrained(folder)
        loaded = MultimatrixForCausalLM.from_pretrained(folder, dtype=model.dtype).to(model.device).eval()
    _in_own_memory(loaded)
    difference = _relative(loaded(ids).logits, model(ids).logits)
    return Check("saved / loaded", difference, 0.0, "save_pretrained, from_pretrained, same logits to the bit")


def _stated_and_stored(model: MultimatrixForCausalLM, ids: Tensor) -> Check:
    stated = kv_bytes_per_token(model.config.layer_specs(), bits=8 * model.dtype.itemsize)
    dynamic = DynamicCache(config=model.config)
    static = StaticCache(config=model.config, max_cache_len=TOKENS)
    counted = []
    for cache in (dynamic, static):
        model(ids, cache=cache)
        counted.append(stored_bytes(cache) / ids.numel())
    error = max(abs(count - stated) for count in counted)
    detail = f"stated {stated:,} bytes a token, stored {counted[0]:,.0f} dynamic and {counted[1]:,.0f} static"
    return Check("stated / stored bytes", error, 0.0, detail)


CHECKS: tuple[Callable[[MultimatrixForCausalLM, Tensor], Check], ...] = (
    _oracle,
    _training_and_decoding,
    _chunked_prefill,
    _batch_and_single,
    _padded_and_not,
    _dynamic_and_static,
    _saved_and_loaded,
    _stated_and_stored,
)


def _run(
    model: MultimatrixForCausalLM,
    ids: Tensor,
    chunks: list[int],
    cache: DynamicCache | StaticCache,
    mask: Tensor | None = None,
) -> Tensor:
    """Logits of ids fed in chunks through a cache, [B, T, vocab_size]."""

    def steps() -> Iterator[Tensor]:
        done = 0
        for chunk in ids.split(chunks, dim=1):
            done += chunk.shape[1]
            seen = mask[:, :done] if mask is not None else None
            yield model(chunk, cache=cache, attention_mask=seen).logits

    return torch.cat(list(steps()), dim=1)


def _relative(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.cpu().double(), expected.cpu().double()
    return ((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()


def _check(model: MultimatrixForCausalLM, name: str, error: float, detail: str) -> Check:
    return Check(name, error, TOLERANCES[model.dtype], detail)
