"""What a run shows while it goes on: losses, speed, memory, time left; and the check that the losses are numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from multimatrix.evaluate.measure import PeakMemory, now
from multimatrix.train import processes
from multimatrix.train.protocol import Protocol, RunFailed

# Steps whose time is left out of the mean speed: caches are cold, and torch.compile works.
WARM_UP = 2
NEVER = 2**31 - 1


class Recorder(TrainerCallback):
    """Collects the losses of every step and makes metrics rows of them.

    write: takes every row. stop: whether the run is asked to stop, asked by all processes together after every step.
    utilization: the model FLOP utilization at so many tokens per second, None where the device's peak is not known.
    """

    def __init__(
        self,
        protocol: Protocol,
        device: torch.device,
        *,
        write: Callable[[dict[str, Any]], None],
        stop: Callable[[], bool],
        utilization: Callable[[float], float | None] = lambda tokens_per_second: None,
    ) -> None:
        self.protocol = protocol
        self.device = device
        self.write = write
        self.stop = stop
        self.utilization = utilization
        self.validation_loss: float | None = None
        self.stopped_at: int | None = None
        self.memory = PeakMemory(device)
        self._loss_sum = torch.zeros((), device=device)  # of the steps since the last row
        self._first_bad = torch.full((), NEVER, device=device)  # step whose loss is no number, and that loss
        self._bad_loss = torch.zeros((), device=device)
        self._steps = 0  # since the last row
        self._seconds = 0.0  # since the last row, evaluations and checkpoints left out
        self._mean_steps = 0
        self._mean_seconds = 0.0
        self._cold = min(WARM_UP, protocol.steps - 1)
        self._mark = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Mean over all steps but the first ones of every start."""
        return self._mean_steps * self.protocol.tokens_per_step / max(self._mean_seconds, 1e-9)

    def state(self) -> dict[str, Any]:
        """What a later start must know to write the rows that an uninterrupted run writes; called by all processes."""
        return {
            "loss_sum": self._mean_loss_sum(),
            "steps": self._steps,
            "validation_loss": self.validation_loss,
            "mean_steps": self._mean_steps,
            "mean_seconds": self._mean_seconds,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._loss_sum.fill_(state["loss_sum"])
        self._steps = state["steps"]
        self.validation_loss = state["validation_loss"]
        self._mean_steps, self._mean_seconds = state["mean_steps"], state["mean_seconds"]

    def saw(self, loss: torch.Tensor, step: int) -> None:
        """The loss of a step, or of a part of it where gradients accumulate; stays on the device."""
        self._loss_sum += loss
        first = ~loss.isfinite() & (self._first_bad > step)
        self._first_bad = torch.where(first, step, self._first_bad)
        self._bad_loss = torch.where(first, loss, self._bad_loss)

    def check(self, step: int, weights: list[torch.Tensor] | None = None) -> None:
        """RunFailed where a loss so far, or one of the weights, is no number; called by all processes together."""
        bad = self._first_bad.clone()
        if weights is not None:
            whole = torch.stack([weight.isfinite().all() for weight in weights]).all()
            bad = torch.where(whole, bad, bad.clamp(max=step))
        if processes.together():
            dist.all_reduce(bad, op=dist.ReduceOp.MIN)
        if (found := int(bad)) == NEVER:
            return
        if int(self._first_bad) == found:
            raise RunFailed(f"the training loss is {self._bad_loss.item()} at step {found}; lower the learning rate")
        raise RunFailed(f"the weights or losses are no longer numbers at step {found}; lower the learning rate")

    def row(self, learning_rate: float, step: int) -> dict[str, Any]:
        """The metrics of the steps since the last row."""
        self.check(step)
        speed = self._steps * self.protocol.tokens_per_step / max(self._seconds, 1e-9)
        left = (self.protocol.steps - step) * self._seconds / max(self._steps, 1)
        found: dict[str, Any] = {
            "loss": self._mean_loss_sum() / self._steps,
            "learning_rate": learning_rate,
            "tokens_per_second": round(speed, 1),
        }
        if (share := self.utilization(speed)) is not None:
            found["mfu"] = round(share, 4)
        if (memory := self.memory.bytes()) is not None:
            found["memory_bytes"] = memory
        found["seconds_left"] = round(left, 1)
        self._loss_sum.zero_()
        self._steps, self._seconds = 0, 0.0
        return found

    def _mean_loss_sum(self) -> float:
        total = self._loss_sum.clone()
        if processes.together():
            dist.all_reduce(total)
            total /= processes.count()
        return total.item()

    def _settle(self) -> None:
        """Count the time since the last mark as training."""
        time = now(self.device)
        self._seconds += time - self._mark
        self._mean_seconds += (time - self._mark) if self._cold == 0 else 0.0
        self._mark = time

    # ---- what the Trainer calls ----

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.compute_steps(args, state.max_steps)  # intervals may be other ones than in the start before
        self._mark = now(self.device)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step, last = state.global_step, self.protocol.steps
        self._steps += 1
        if self._cold:
            self._cold -= 1
            if self._cold == 0:
                self._cold = 1  # so that the time up to here is not in the mean
                self._settle()
                self._cold = 0
        else:
            self._mean_steps += 1
        control.should_evaluate = control.should_evaluate or step == last
        if self.stop() and step < last:
            self.stopped_at = step
            control.should_save = control.should_training_stop = True
        if control.should_log or control.should_evaluate or control.should_save:
            self._settle()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            shown = {name: value for name, value in logs.items() if name != "epoch"}
            self.write({**self._at(state), **shown})

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        loss = metrics["eval_loss"]
        if not math.isfinite(loss):
            raise RunFailed(f"the validation loss is {loss} at step {state.global_step}; lower the learning rate")
        self.validation_loss = loss
        self.write({**self._at(state), "validation_loss": loss})
        self._mark = now(self.device)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._mark = now(self.device)

    def _at(self, state: Any) -> dict[str, int]:
        return {"step": state.global_step, "tokens": state.global_step * self.protocol.tokens_per_step}
