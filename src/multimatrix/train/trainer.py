"""transformers' Trainer with the data order, the checkpoints and the optimizers of ours."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback

from multimatrix.train import processes
from multimatrix.train.checkpoints import Checkpoints
from multimatrix.train.metrics import MetricsFile
from multimatrix.train.optimizers import muon_with_adamw
from multimatrix.train.protocol import Protocol
from multimatrix.train.recorder import Recorder

STATE, PROGRESS, SCHEDULER = "state", "progress.json", "scheduler.pt"


class PretrainingTrainer(Trainer):
    """A Trainer whose data set is in the order of training, and whose checkpoints any number of processes reads.

    metrics: the file whose rows a checkpoint vouches for; None in all processes but the first.
    """

    def __init__(
        self,
        *,
        protocol: Protocol,
        recorder: Recorder,
        checkpoints: Checkpoints,
        metrics: MetricsFile | None,
        **words: Any,
    ) -> None:
        super().__init__(callbacks=[recorder, *words.pop("callbacks", ())], **words)
        self.remove_callback(PrinterCallback)  # progress is ours to show
        self.protocol = protocol
        self.recorder = recorder
        self.checkpoints = checkpoints
        self.metrics = metrics

    def create_accelerator_and_postprocess(self) -> None:
        """Shard on CPUs as well, where accelerate (1.15) forgets the FSDP plugin that it was given."""
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if state.distributed_type == DistributedType.MULTI_CPU and self.args.fsdp_plugin_args is not None:
            plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, plugin
            self.is_fsdp_enabled = True

    def training_step(self, *args: Any, **words: Any) -> torch.Tensor:
        loss = super().training_step(*args, **words)
        self.recorder.saw(loss, self.state.global_step + 1)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self.recorder.row(logs["learning_rate"], self.state.global_step)
        super().log(logs, start_time)

    def create_optimizer(self, *args: Any, **words: Any) -> torch.optim.Optimizer:
        if getattr(self, "optimizer", None) is None and self.protocol.optimizer == "muon":
            self.optimizer = muon_with_adamw(
                self.model,
                self.get_decay_parameter_names(self.model),
                lr=self.protocol.learning_rate,
                weight_decay=self.protocol.weight_decay,
            )
        return super().create_optimizer(*args, **words)

    def _get_train_sampler(self, *args: Any, **words: Any) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    # ---- checkpoints: one format for one process, for several, and for shards ----

    def unwrapped(self) -> torch.nn.Module:
        """The model as it was given, its weights sharded or not."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        local = [p.to_local() if isinstance(p, DTensor) else p for p in self.unwrapped().parameters()]
        self.recorder.check(self.state.global_step, [weight.detach() for weight in local])
        if self.metrics is not None:
            self.metrics.sync()
        self.checkpoints.write(self.state.global_step, self._fill)

    def _fill(self, folder: Path) -> None:
        weights, optimizer = get_state_dict(self.unwrapped(), self.optimizer.optimizer)
        progress = self.recorder.state()
        # First what all processes do together: where one fails, all of them hear of it.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.save(
                {"model": weights, "optimizer": optimizer},
                storage_writer=dcp.FileSystemWriter(folder / STATE),
                no_dist=not processes.together(),
            )
        self._save_rng_state(str(folder))
        if processes.number() == 0:
            torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER)
            (folder / PROGRESS).write_text(json.dumps(progress), encoding="utf-8")
            self.state.save_to_json(str(folder / TRAINER_STATE_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing yet: weights are loaded together with the optimizer, when both are where they stay."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder, model, optimizer = Path(checkpoint), self.unwrapped(), self.optimizer.optimizer
        weights, moments = get_state_dict(model, optimizer)
        state = {"model": weights, "optimizer": moments}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(state, storage_reader=dcp.FileSystemReader(folder / STATE), no_dist=not processes.together())
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=StateDictOptions(strict=True),
        )
        self.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER, weights_only=True))
        self.recorder.restore(json.loads((folder / PROGRESS).read_text(encoding="utf-8")))
