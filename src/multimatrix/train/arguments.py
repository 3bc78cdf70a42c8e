"""The Trainer's arguments for a protocol."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import TrainingArguments

from multimatrix.errors import InputError
from multimatrix.train import processes
from multimatrix.train.protocol import TRACKERS, Execution, Protocol


def make_arguments(
    protocol: Protocol,
    execution: Execution,
    *,
    seed: int,
    directory: Path,
    device: torch.device,
    validation_blocks: int,
) -> TrainingArguments:
    """The arguments; where torchrun or accelerate started several processes, they meet here.

    Raises:
        InputError: the batch cannot be shared out to the processes, or a tracker is not installed.
    """
    check_trackers(execution.report_to)
    micro, accumulation = execution.accumulation(protocol.batch_size, processes.started())
    interval = execution.checkpoint_interval or math.ceil(protocol.steps / 10)
    arguments = TrainingArguments(
        output_dir=str(directory),
        run_name=directory.name,
        max_steps=protocol.steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        per_device_eval_batch_size=evaluation_batch(validation_blocks, micro, processes.started()),
        learning_rate=protocol.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(protocol.warmup_fraction * protocol.steps),
        weight_decay=protocol.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        seed=seed,
        bf16=protocol.precision == "bfloat16",
        use_cpu=device.type == "cpu",
        eval_strategy="steps",
        eval_steps=math.ceil(protocol.steps / protocol.evaluations),
        logging_steps=execution.log_interval or max(1, protocol.steps // 50),
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=interval,
        log_level="error",  # what is said is ours to say
        log_level_replica="error",
        report_to=[name for name in execution.report_to if name != "tensorboard"] or "none",
        disable_tqdm=True,
        dataloader_pin_memory=device.type == "cuda",
        prediction_loss_only=True,
        ddp_find_unused_parameters=False,
        **_sharding(execution, protocol),
    )
    assert arguments.world_size == processes.started(), "the processes that were started have met"
    # One process trains on one device, also where it sees several: DataParallel would multiply the batch.
    arguments._n_gpu = min(1, arguments.n_gpu)
    if arguments.fsdp_plugin_args is not None and protocol.precision == "bfloat16":
        # Gradients are summed over the processes in float32, as they are where one process accumulates them.
        arguments.fsdp_plugin_args["mixed_precision_policy"] = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32
        )
    return arguments


def check_trackers(names: tuple[str, ...]) -> None:
    """InputError where a tracker's package is not installed."""
    for name in names:
        if importlib.util.find_spec(TRACKERS[name]) is None:
            raise InputError(f"report_to {name} needs its package: pip install {TRACKERS[name]}")


def evaluation_batch(blocks: int, limit: int, count: int) -> int:
    """Sequences that a process evaluates at once, so that no sequence is counted twice.

    Where the blocks do not fill the last batch of every process, accelerate repeats some: with batches of one it drops
    them again exactly.
    """
    share, rest = divmod(blocks, count)
    if count == 1:
        return limit
    return 1 if rest else max(size for size in range(1, min(limit, share) + 1) if share % size == 0)


def _sharding(execution: Execution, protocol: Protocol) -> dict[str, Any]:
    """FSDP2 over the decoder layers, through the Trainer's own configuration."""
    if not execution.fsdp or processes.started() == 1:
        return {}
    return {
        "fsdp": True,
        "fsdp_config": {
            "version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": ["DecoderLayer"],
            "reshard_after_forward": True,
            "state_dict_type": "SHARDED_STATE_DICT",
            "activation_checkpointing": execution.activation_checkpointing,
        },
    }
