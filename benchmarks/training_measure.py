"""Measuring one model of `training.py`: the gradient is checked first, then steps are timed."""

from __future__ import annotations

import collections
import contextlib
import gc
import math
import re
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from multimatrix import MultimatrixForCausalLM
from multimatrix.errors import one_line
from multimatrix.plan.training import flop_utilization
from timing import back_to_back
from training_models import Case

WARM_UPS = 3  # as `timing.back_to_back` makes them
GRADIENT_TOLERANCE = 0.1  # of the whole gradient's norm, both sides in bfloat16
LOSS_TOLERANCE = 0.02
KINDS = {  # of a kernel, by its name
    "attention": r"flash|fmha|sdpa|attention|cudnn_generated",
    "matrix products": r"gemm|nvjet|cutlass|cublas|xmma|sm90_.*tn|sm80_.*tn",
    "compiled": r"^triton_",
    "optimizer": r"multi_tensor|adam",
}
BACKENDS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass(frozen=True)
class Settings:
    """How all models are trained.

    compile: "layers" each by itself, the "model" as a whole, or "none". backend: of torch.compile.
    """

    device: torch.device
    weights: torch.dtype
    compile: str
    backend: str
    steps: int
    tokens_per_step: int
    seed: int
    profile: bool
    learning_rate: float = 5e-4

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.weights == torch.bfloat16:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)


class Wrong(Exception):
    """The model does not compute what it should; there is no time for it."""


def measure(case: Case, settings: Settings) -> dict[str, Any]:
    """One row of the report; with fewer sequences in a pass where they do not fit, the same tokens in a step."""
    batch = max(1, case.size.tokens_per_pass // case.context)
    while True:
        try:
            return _measure(case, settings, batch)
        except torch.OutOfMemoryError as error:
            reason = one_line(error)
        except Wrong as error:
            return {"reason": str(error)}
        except Exception as error:  # the other models go on
            traceback.print_exc()
            return {"reason": f"{type(error).__name__}: {one_line(error)[:200]}"}
        finally:
            _free()
        if batch == 1:
            return {"reason": reason[:200]}
        batch //= 2
        print(f"{case.label}: out of memory, {batch} sequences in a pass instead", file=sys.stderr, flush=True)


def _measure(case: Case, settings: Settings, batch: int) -> dict[str, Any]:
    device, cost = settings.device, case.cost
    torch.manual_seed(settings.seed)
    passes = max(1, settings.tokens_per_step // (batch * case.context))
    data = make_data(settings, case, passes * (WARM_UPS + settings.steps), batch)
    data[-passes:] = data[:passes]  # so that the first and the last loss are of the same tokens
    model = case.make_model(device, settings.weights)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if parameters != case.sizes.parameters:
        raise Wrong(f"the model has {parameters:,} parameters and its specs state {case.sizes.parameters:,}")
    expected_loss, expected = eager_gradient(case, model, data[0], settings)
    compile_model(model, settings)
    compile_seconds, error = check_gradient(model, data[0], expected_loss, expected, settings)
    del expected
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=0.1,
        fused=device.type == "cuda",
    )
    losses: list[Tensor] = []
    batches = iter(data)

    def step() -> None:
        total = torch.zeros((), device=device)
        for _ in range(passes):
            with settings.autocast():
                loss = model(input_ids=(ids := next(batches)), labels=ids, use_cache=False).loss / passes
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)

    _reset_peak(device)
    seconds = time_steps(step, settings)
    told = [float(loss) for loss in losses]
    check_losses(told)
    tokens = passes * batch * case.context
    speed = tokens / statistics.median(seconds)
    row = {
        "batch": batch,
        "passes": passes,
        "tokens_per_second": speed,
        "seconds_per_step": statistics.median(seconds),
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "mfu": flop_utilization(cost.flops, speed, device_name(device)),
        "model_tflops_per_second": cost.flops * speed * 1e-12,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "compile_seconds": compile_seconds,
        "gradient_error": error,
        "first_loss": told[0],
        "last_loss": told[-1],
        "reason": None,
    }
    if device.type == "cuda":
        batches = iter(data)
        row["kernels"] = attempt(lambda: kernel_times(step)) if settings.profile else None
        del model, optimizer
        _free()
        row["attention"] = attempt(lambda: attention_times(case, batch, device))
    return row


def attempt(of: Callable[[], dict[str, Any] | None]) -> dict[str, Any] | None:
    """What explains a time must not cost it."""
    try:
        return of()
    except RuntimeError:
        traceback.print_exc()
        return None


def make_data(settings: Settings, case: Case, count: int, batch: int) -> list[Tensor]:
    """Batches of token ids [B, T] whose frequencies fall as Zipf's law has it, so that there is something to learn."""
    generator = torch.Generator(settings.device).manual_seed(settings.seed)
    frequencies = 1 / torch.arange(1, case.size.vocab_size + 1, device=settings.device, dtype=torch.float32)
    shape = (batch, case.context)
    return [
        torch.multinomial(frequencies, math.prod(shape), replacement=True, generator=generator).view(shape)
        for _ in range(count)
    ]


def compile_model(model: nn.Module, settings: Settings) -> None:
    """In place: every layer by itself, which compiles once for all of them, or the model as a whole."""
    options: dict[str, Any] = {"backend": settings.backend, "dynamic": False}
    if settings.compile == "model":
        model.compile(**options)
    elif settings.compile == "layers" and isinstance(model, MultimatrixForCausalLM):
        model.compile_layers(**options)
    elif settings.compile == "layers":
        for module in (*model.model.layers, model.model.norm):
            module.compile(**options)


def eager_gradient(case: Case, model: nn.Module, ids: Tensor, settings: Settings) -> tuple[float, list[Tensor]]:
    """Loss and gradient of the plain model with plain logits, a sequence at a time."""
    plain = {} if case.is_llama else {"skip_logits": False}
    total = 0.0
    for row in ids.split(1):
        with settings.autocast():
            loss = model(input_ids=row, labels=row, use_cache=False, **plain).loss / len(ids)
        loss.backward()
        total += float(loss.detach())
    return total, _take_gradient(model)


def check_gradient(
    model: nn.Module, ids: Tensor, expected_loss: float, expected: list[Tensor], settings: Settings
) -> tuple[float, float]:
    """Seconds of the first pass, which compiles, and the gradient's relative error; `Wrong` where that is large."""
    _synchronize(settings.device)
    start = time.perf_counter()
    with settings.autocast():
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    value = float(loss.detach())
    _synchronize(settings.device)
    seconds = time.perf_counter() - start
    if not abs(value - expected_loss) <= LOSS_TOLERANCE:
        raise Wrong(f"wrong: the compiled loss is {value:.4f}, the plain one {expected_loss:.4f}")
    distance = norm = 0.0
    for ours, plain in zip(_take_gradient(model), expected, strict=True):
        distance += float((ours - plain).float().square().sum())
        norm += float(plain.float().square().sum())
    error = math.sqrt(distance / norm)
    if not error <= GRADIENT_TOLERANCE:
        raise Wrong(f"wrong: the compiled gradient is off by {error:.2g} of its norm, above {GRADIENT_TOLERANCE}")
    return seconds, error


def check_losses(losses: list[float]) -> None:
    if not all(map(math.isfinite, losses)):
        raise Wrong(f"wrong: a loss is not finite: {losses}")
    if not losses[-1] < losses[0]:
        raise Wrong(f"wrong: the loss does not fall, from {losses[0]:.4f} to {losses[-1]:.4f}")


def time_steps(step: Callable[[], None], settings: Settings) -> list[float]:
    """Seconds of every step after the warm-ups."""
    if settings.device.type == "cuda":
        return [us * 1e-6 for us in back_to_back(step, settings.steps)]
    seconds = []
    for _ in range(WARM_UPS + settings.steps):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return seconds[WARM_UPS:]


def kernel_times(step: Callable[[], None]) -> dict[str, Any] | None:
    """Milliseconds on the device of one step, by kind of kernel, and the longest kernels."""
    from torch.profiler import ProfilerActivity, profile

    step()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    kinds: collections.Counter[str] = collections.Counter()
    names: collections.Counter[str] = collections.Counter()
    for event in seen.key_averages():
        ms = event.self_device_time_total * 1e-3
        kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, event.key)), "other")
        kinds[kind] += ms
        names[f"{event.key[:90]} x{event.count}"] += ms
    if not kinds:
        return None
    return {"ms": dict(kinds.most_common()), "longest": dict(names.most_common(16))}


def attention_times(case: Case, batch: int, device: torch.device) -> dict[str, Any]:
    """One layer's attention by itself, forward and backward: ms by backend, and which one torch takes."""
    spec = case.spec
    (dim, value_dim), groups = spec.head_dims, _key_heads(case)
    shapes = [(spec.num_heads, dim), (groups, dim), (groups, value_dim)]
    # Laid out as the projections leave them.
    q, k, v = (
        torch.randn(batch, case.context, heads, width, device=device, dtype=torch.bfloat16)
        .transpose(1, 2)
        .requires_grad_()
        for heads, width in shapes
    )
    how = {"is_causal": True, "enable_gqa": groups < spec.num_heads}
    chosen = SDPBackend(torch._fused_sdp_choice(q, k, v, **how))
    do = torch.randn_like(F.scaled_dot_product_attention(q, k, v, **how))

    def run() -> None:
        torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, **how), (q, k, v), do)

    times: dict[str, float | None] = {}
    for name, backend in BACKENDS.items():
        try:
            with sdpa_kernel(backend):
                times[name] = statistics.median(back_to_back(run, 5)) * 1e-3
        except RuntimeError:
            times[name] = None
    return {"chosen": chosen.name, "ms": times}


def _key_heads(case: Case) -> int:
    """Key heads of the training form; MLA expands one for each head."""
    return case.spec.num_heads if case.model == "mla" else case.spec.cache.key[0]


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _take_gradient(model: nn.Module) -> list[Tensor]:
    gradient = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    assert all(part is not None for part in gradient)
    return gradient


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _free() -> None:
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
