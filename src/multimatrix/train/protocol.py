"""What a run trains, and how it is carried out: the first decides the result, the second never does."""

from __future__ import annotations

from dataclasses import dataclass

from multimatrix.errors import InputError

OPTIMIZERS = ("adamw", "muon")
# What transformers calls each tracker, and the package it needs.
TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}
# Exit status after `RunStopped`: what batch systems read as "not done, try again".
STOPPED = 75


class RunFailed(RuntimeError):
    """The run cannot go on; the message says at which step and why."""


class RunStopped(KeyboardInterrupt):
    """SIGTERM asked to stop; where that was in the middle of a run, the message says after which step."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a model is trained; the same for every model of a comparison.

    steps: optimizer steps. batch_size: sequences per step, over all processes together. context: tokens per sequence.
    learning_rate: the peak of a cosine schedule after a linear warmup over warmup_fraction of the steps. weight_decay:
    of both optimizers. evaluations: how often the validation loss is taken, evenly spaced, the last after the last
    step. precision: "float32", or "bfloat16" autocast. optimizer: "adamw" (betas 0.9 and 0.95), or "muon" for the
    matrices of the layers and AdamW for everything else, see `train.optimizers`; gradients are clipped at norm 1.
    compile: every layer by torch.compile, which rounds otherwise.
    """

    steps: int
    batch_size: int
    context: int
    learning_rate: float
    warmup_fraction: float
    weight_decay: float
    evaluations: int
    precision: str
    optimizer: str = "adamw"
    compile: bool = False

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.context

    @property
    def tokens(self) -> int:
        return self.steps * self.tokens_per_step


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How a run is carried out: may be another in every start of it, and changes no result but by rounding.

    micro_batch_size: sequences that a process takes at once; more of its share of a step accumulate gradients; None
    for the whole share. activation_checkpointing: compute the activations of every layer again in the backward pass
    instead of keeping them. fsdp: shard weights, gradients and optimizer state over the processes (FSDP2); where there
    is one process nothing is sharded. checkpoint_interval: steps between checkpoints, None for a tenth of the run.
    keep_checkpoints: how many are kept. log_interval: steps between metrics rows, None for a fiftieth of the run.
    report_to: trackers, see `TRACKERS`.
    """

    micro_batch_size: int | None = None
    activation_checkpointing: bool = False
    fsdp: bool = False
    checkpoint_interval: int | None = None
    keep_checkpoints: int = 2
    log_interval: int | None = None
    report_to: tuple[str, ...] = ()

    def accumulation(self, batch_size: int, processes: int) -> tuple[int, int]:
        """Sequences that a process takes at once, and how many times it does so in a step.

        Raises:
            InputError: the batch cannot be shared out so.
        """
        share, rest = divmod(batch_size, processes)
        if rest:
            near = processes * max(1, round(batch_size / processes))
            raise InputError(
                f"a batch of {batch_size} sequences cannot be shared out evenly to {processes} processes; "
                f"set the batch size to a multiple of {processes}, for example {near}, or start another number of them"
            )
        micro = share if self.micro_batch_size is None else self.micro_batch_size
        if share % micro:
            fitting = max(size for size in range(1, min(micro, share) + 1) if share % size == 0)
            raise InputError(
                f"each of {processes} processes has {share} sequences of a step, which micro_batch_size {micro} does "
                f"not divide; set it to {fitting}"
            )
        return micro, share // micro
