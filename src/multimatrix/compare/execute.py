"""One run of a comparison, from start to result.json: what every launcher calls, in whatever process."""

from __future__ import annotations

import dataclasses
import errno
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.checkpoint import CheckpointException

from multimatrix.compare.folder import FAILURE, RESULT
from multimatrix.compare.prepare import Prepared, Run
from multimatrix.environment import environment
from multimatrix.errors import InputError, one_line
from multimatrix.evaluate.measure import counted_kv_bytes_per_token, decode_tokens_per_second
from multimatrix.files import write_json
from multimatrix.locks import locked
from multimatrix.train.folder import RUN_LOCK
from multimatrix.train.protocol import RunFailed
from multimatrix.train.run import train

# Errors of a disk on which no other run could write either.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
# Seconds that a run waits for the process that trained it before, and was told to stop, to write its checkpoint.
PATIENCE = 300.0


def attempt(
    prepared: Prepared,
    run: Run,
    command: str,
    show: Callable[[dict[str, Any]], None],
    say: Callable[[str], None],
) -> str | None:
    """Train and measure one run; None when it is done, else why it failed, which failed.json says too.

    A run that was stopped goes on from its newest checkpoint. show: gets every metrics row. say: gets one line for the
    person who waits. Nothing that goes wrong with the run itself is raised, for the others go on.

    Raises:
        OSError: the disk is full or read-only.
        KeyboardInterrupt: somebody wants it to stop; RunStopped after SIGTERM, in training with a checkpoint.
    """
    lock = locked(run.directory / RUN_LOCK, "it trains this run already", PATIENCE)
    try:
        lock.__enter__()
    except InputError as error:
        return str(error)  # failed.json is not ours to write then
    try:
        (run.directory / FAILURE).unlink(missing_ok=True)
        _execute(prepared, run, command, show, say)
        return None
    except (Exception, CheckpointException) as error:
        if isinstance(error, OSError) and error.errno in DISK:
            raise
        return record_failure(run, _reason(error), traceback.format_exc())
    finally:
        lock.__exit__(None, None, None)


def record_failure(run: Run, reason: str, details: str | None = None) -> str:
    """Write failed.json, in which a later command finds the reason; returns the reason."""
    write_json(run.directory / FAILURE, {"identity": run.identity, "reason": reason, "traceback": details})
    return reason


def _reason(error: BaseException) -> str:
    """Why the run failed, in a line; what nobody foresaw is named by its kind."""
    if isinstance(error, RunFailed | InputError | torch.OutOfMemoryError):
        return one_line(error)
    return f"{type(error).__name__}: {one_line(error)}"


def _execute(
    prepared: Prepared,
    run: Run,
    command: str,
    show: Callable[[dict[str, Any]], None],
    say: Callable[[str], None],
) -> None:
    """Train and measure one run; its result.json is written last, so that it is there only when all is done."""
    start = time.perf_counter()
    trained = train(
        run.config,
        prepared.text,
        prepared.protocol,
        seed=run.seed,
        directory=run.directory,
        device=prepared.device,
        execution=prepared.comparison.execution(),
        identity=run.identity,
        held=True,
        on_step=show,
        say=lambda line: say(f"{run.name}: {line}"),
    )
    context = prepared.protocol.context
    decode_speed = decode_tokens_per_second(trained.model, context=max(1, context // 2), tokens=min(64, context // 2))
    where = environment(prepared.device)
    provenance = {
        "protocol": dataclasses.asdict(prepared.protocol),
        "corpus": prepared.corpus,
        "tokens": prepared.protocol.tokens,
        "seed": run.seed,
        "validation_loss": trained.validation_loss,
        "environment": where,
        "command": command,
    }
    trained.save(run.directory / "model", prepared.tokenizer, provenance)
    # Stated bytes are at 16 bit, so the real cache is filled at 16 bit.
    counted = counted_kv_bytes_per_token(trained.model.to(torch.bfloat16), tokens=context)
    result = {
        "identity": run.identity,
        "validation_loss": trained.validation_loss,
        "train_tokens_per_second": trained.tokens_per_second,
        "decode_tokens_per_second": decode_speed,
        "peak_memory_bytes": trained.peak_memory_bytes,
        "kv_bytes_per_token_counted": counted,
        "wall_seconds": time.perf_counter() - start,
        "environment": where,
    }
    write_json(run.directory / RESULT, result)
    run.drop_checkpoints()
