"""One training run: a model, a text, a protocol and a seed, through transformers' Trainer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import PreTrainedTokenizerFast, TrainerCallback, set_seed

from multimatrix.data.packing import BlockDataset, OrderedBlocks, PackedText
from multimatrix.files import writing
from multimatrix.locks import locked
from multimatrix.model.configuration import MultimatrixConfig
from multimatrix.model.modeling import MultimatrixForCausalLM
from multimatrix.plan.training import flop_utilization, training_flops_per_token
from multimatrix.train import processes
from multimatrix.train.arguments import make_arguments
from multimatrix.train.checkpoints import Checkpoint, Checkpoints
from multimatrix.train.folder import CHECKPOINTS, METRICS, RUN_LOCK
from multimatrix.train.metrics import MetricsFile, metrics_file
from multimatrix.train.protocol import Execution, Protocol, RunFailed, RunStopped
from multimatrix.train.recorder import Recorder
from multimatrix.train.stopping import stop_requests
from multimatrix.train.trainer import PretrainingTrainer

__all__ = ["Execution", "Protocol", "RunFailed", "RunStopped", "TrainedRun", "train"]


@dataclass(frozen=True)
class TrainedRun:
    """The model and what its training showed; with FSDP the model's weights are shards."""

    model: MultimatrixForCausalLM
    validation_loss: float
    tokens_per_second: float
    peak_memory_bytes: int | None

    def save(self, folder: Path, tokenizer: PreTrainedTokenizerFast, provenance: dict[str, Any]) -> None:
        """Write model and tokenizer as `from_pretrained` reads them; called by all processes together.

        provenance: for the model card: whoever gets the checkpoint alone must know how it was made.
        """
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(self.model, options=whole) if processes.together() else None
        self.model.config.provenance = provenance
        if processes.number() == 0:
            with writing(folder):
                self.model.save_pretrained(folder, state_dict=weights)
                tokenizer.save_pretrained(folder)
        processes.wait()


def train(
    config: MultimatrixConfig,
    text: PackedText,
    protocol: Protocol,
    *,
    seed: int,
    directory: Path,
    device: torch.device,
    execution: Execution | None = None,
    identity: dict[str, Any] | None = None,
    held: bool = False,
    begin: Callable[[], None] = lambda: None,
    on_step: Callable[[dict[str, Any]], None] = lambda row: None,
    say: Callable[[str], None] = lambda line: None,
) -> TrainedRun:
    """Train from scratch, or from the newest checkpoint in `directory/checkpoints`.

    `directory/metrics.jsonl` gets one row per logged step and per evaluation. With a mixture of experts the training
    loss has the load-balancing loss in it, the validation loss never. Where torchrun or accelerate started several
    processes, each of them calls this, and the first one writes.

    seed: of the initial weights and of the data order, which is the same for every model of that seed and for any
    number of processes. identity: what decides the result; checkpoints of another one are refused. held: whether the
    caller holds the lock of the folder already. begin: called in the first process once the folder is its own.
    on_step: sees every metrics row as it is written. say: gets one line for the person who waits.

    Raises:
        RunFailed: the loss is no longer a number; the checkpoints from before are kept.
        RunStopped: SIGTERM came, and a checkpoint was written.
        InputError: the batch cannot be shared out to the processes, the checkpoints are of a run with another
            identity, or another process is training there.
        OSError: something cannot be written, for example because the disk is full; checkpoints from before are kept.
    """
    execution = execution or Execution()
    arguments = make_arguments(
        protocol,
        execution,
        seed=seed,
        directory=directory,
        device=device,
        validation_blocks=len(text.validation),
    )
    checkpoints = Checkpoints(directory / CHECKPOINTS, identity or {}, keep=execution.keep_checkpoints, say=say)
    with contextlib.ExitStack() as stack:
        opened: list[MetricsFile] = []

        def take() -> None:
            if not held:  # nothing is touched before
                stack.enter_context(locked(directory / RUN_LOCK, "wait for it, stop it, or choose another --out"))
            opened.append(stack.enter_context(metrics_file(directory / METRICS)))

        processes.first_does(take)
        metrics = opened[0] if opened else None
        processes.first_does(begin)
        found = checkpoints.newest()
        if found is not None:
            say(f"continuing from the checkpoint of step {found.step}")
        if metrics is not None:
            metrics.cut(found.step if found is not None else 0)
        stop = stack.enter_context(stop_requests())

        def write(row: dict[str, Any]) -> None:
            if metrics is not None:
                metrics.write(row)
                on_step(row)

        set_seed(seed)
        model = MultimatrixForCausalLM(config)
        if execution.activation_checkpointing and arguments.fsdp_plugin_args is None:
            # It was called otherwise before transformers 5.24.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()
        if protocol.compile:
            model.compile_layers()
        recorder = Recorder(
            protocol,
            arguments.device,
            write=write,
            stop=stop,
            utilization=_utilization(config, protocol.context, arguments.device),
        )
        trainer = PretrainingTrainer(
            protocol=protocol,
            recorder=recorder,
            checkpoints=checkpoints,
            metrics=metrics,
            model=model,
            args=arguments,
            callbacks=_tensorboard(directory, found) if "tensorboard" in execution.report_to else [],
            train_dataset=OrderedBlocks(text.train, protocol.steps * protocol.batch_size, seed),
            eval_dataset=BlockDataset(text.validation),
        )
        # What only training asks of a model: to balance its experts, and to keep no logits beside the loss.
        asked = {"output_router_logits": config.mixture_of_experts is not None, "skip_logits": True}
        before = {name: getattr(model.config, name) for name in asked}
        model.config.update(asked)
        trainer.train(resume_from_checkpoint=str(found.path) if found is not None else None)
        model.config.update(before)
        if recorder.stopped_at is not None:
            raise RunStopped(f"stopped after step {recorder.stopped_at} of {protocol.steps}, with a checkpoint")
    assert recorder.validation_loss is not None, "the last step is always evaluated"
    return TrainedRun(
        trainer.unwrapped(),
        recorder.validation_loss,
        recorder.tokens_per_second,
        recorder.memory.bytes(),
    )


def _utilization(config: MultimatrixConfig, context: int, device: torch.device) -> Callable[[float], float | None]:
    """The model FLOP utilization at so many tokens per second of all processes together."""
    if device.type != "cuda":
        return lambda tokens_per_second: None
    flops, name = training_flops_per_token(config, context), torch.cuda.get_device_name(device)
    return lambda tokens_per_second: flop_utilization(flops, tokens_per_second, name, processes.count())


def _tensorboard(directory: Path, found: Checkpoint | None) -> list[TrainerCallback]:
    """Events in `directory/tensorboard`; those after the checkpoint that the run goes on from are not shown."""
    if processes.number() > 0:
        return []
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    purged = None if found is None else found.step + 1
    return [TensorBoardCallback(SummaryWriter(log_dir=str(directory / "tensorboard"), purge_step=purged))]
