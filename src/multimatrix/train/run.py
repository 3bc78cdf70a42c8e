"""One training run: a model, a text, a protocol and a seed, through transformers' Trainer."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from multimatrix.data.packing import BlockDataset, PackedText
from multimatrix.evaluate.measure import now
from multimatrix.model.configuration import MultimatrixConfig
from multimatrix.model.modeling import MultimatrixForCausalLM


class RunFailed(RuntimeError):
    """The run cannot go on; the message says at which step and why."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a model is trained; the same for every model of a comparison.

    steps: optimizer steps. batch_size: sequences per step. context: tokens per sequence. learning_rate: the peak of
    a cosine schedule after a linear warmup over warmup_fraction of the steps. weight_decay: of AdamW (betas 0.9 and
    0.95), gradients clipped at norm 1. evaluations: how often the validation loss is taken, evenly spaced, the last
    after the last step. precision: "float32", or "bfloat16" autocast.
    """

    steps: int
    batch_size: int
    context: int
    learning_rate: float
    warmup_fraction: float
    weight_decay: float
    evaluations: int
    precision: str

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.context

    @property
    def tokens(self) -> int:
        return self.steps * self.tokens_per_step


@dataclass(frozen=True)
class TrainedRun:
    """The model and what its training showed."""

    model: MultimatrixForCausalLM
    validation_loss: float
    tokens_per_second: float


def train(
    config: MultimatrixConfig,
    text: PackedText,
    protocol: Protocol,
    *,
    seed: int,
    directory: Path,
    device: torch.device,
    on_step: Callable[[dict[str, Any]], None] = lambda row: None,
) -> TrainedRun:
    """Train from scratch; `directory/metrics.jsonl` gets one row per logged step and per evaluation.

    With a mixture of experts the training loss has the load-balancing loss in it, the validation loss never.

    seed: of the initial weights and of the data order, which is the same for every model of that seed. on_step: sees
    every metrics row as it is written.

    Raises:
        RunFailed: the loss is no longer a number.
    """
    directory.mkdir(parents=True, exist_ok=True)
    set_seed(seed)
    model = MultimatrixForCausalLM(config)
    with (directory / "metrics.jsonl").open("w", encoding="utf-8") as file:

        def write(row: dict[str, Any]) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()
            on_step(row)

        recorder = _Recorder(protocol, write, device)
        trainer = Trainer(
            model=model,
            args=_arguments(protocol, seed, directory, device),
            train_dataset=BlockDataset(text.train),
            eval_dataset=BlockDataset(text.validation),
            callbacks=[recorder],
        )
        trainer.remove_callback(PrinterCallback)  # progress is ours to show
        # This is how a model is told to balance its experts; nobody asks for it once it is trained.
        asked, model.config.output_router_logits = config.output_router_logits, config.mixture_of_experts is not None
        trainer.train()
        model.config.output_router_logits = asked
    assert recorder.validation_loss is not None, "the last step is always evaluated"
    return TrainedRun(model, recorder.validation_loss, recorder.tokens_per_second)


def _arguments(protocol: Protocol, seed: int, directory: Path, device: torch.device) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(directory),
        max_steps=protocol.steps,
        per_device_train_batch_size=protocol.batch_size,
        per_device_eval_batch_size=protocol.batch_size,
        learning_rate=protocol.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(protocol.warmup_fraction * protocol.steps),
        weight_decay=protocol.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        seed=seed,
        data_seed=seed,
        bf16=protocol.precision == "bfloat16",
        use_cpu=device.type == "cpu",
        eval_strategy="steps",
        eval_steps=math.ceil(protocol.steps / protocol.evaluations),
        logging_steps=max(1, protocol.steps // 50),
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=device.type == "cuda",
        prediction_loss_only=True,
    )


class _Recorder(TrainerCallback):
    """Writes metrics rows and times the steps, evaluations left out."""

    def __init__(self, protocol: Protocol, write: Callable[[dict[str, Any]], None], device: torch.device) -> None:
        self.protocol = protocol
        self.write = write
        self.device = device
        self.validation_loss: float | None = None
        self._step_start = 0.0
        self._timed_seconds = 0.0
        self._timed_steps = 0

    @property
    def tokens_per_second(self) -> float:
        return self._timed_steps * self.protocol.tokens_per_step / max(self._timed_seconds, 1e-9)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step_start = now(self.device)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > min(2, self.protocol.steps - 1):  # the first steps warm up
            self._timed_seconds += now(self.device) - self._step_start
            self._timed_steps += 1
        if state.global_step == self.protocol.steps:
            control.should_evaluate = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        _check_loss("training", logs["loss"], state.global_step)
        row = {**self._at(state), "loss": logs["loss"], "learning_rate": logs["learning_rate"]}
        self.write({**row, "tokens_per_second": round(self.tokens_per_second, 1)})

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        _check_loss("validation", metrics["eval_loss"], state.global_step)
        self.validation_loss = metrics["eval_loss"]
        self.write({**self._at(state), "validation_loss": self.validation_loss})

    def _at(self, state: Any) -> dict[str, int]:
        return {"step": state.global_step, "tokens": state.global_step * self.protocol.tokens_per_step}


def _check_loss(kind: str, loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise RunFailed(f"the {kind} loss is {loss} at step {step}; lower the learning rate")
