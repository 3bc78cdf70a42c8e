"""`multimatrix train`, from settings to exit status."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers

from multimatrix.attention import AttentionSpec
from multimatrix.attention.sizes import specs_from_labels
from multimatrix.data.prepare import PreparedText
from multimatrix.environment import command_line, environment
from multimatrix.errors import InputError, one_line
from multimatrix.files import write_json
from multimatrix.plan.numbers import decoder_parameters, kv_bytes_per_token
from multimatrix.train import processes
from multimatrix.train.arguments import check_trackers
from multimatrix.train.configuration import Training
from multimatrix.train.folder import check_free, read_ours, refuse_difference
from multimatrix.train.progress import Line
from multimatrix.train.protocol import STOPPED, Protocol, RunFailed, RunStopped
from multimatrix.train.run import train

FAILED, INTERRUPTED = 1, 130


def run_command(recipe: str | None, settings: dict[str, Any], out: str, *, dry_run: bool) -> int:
    """Train one model; 0 if it is done, 1 if the loss is no number, 75 after SIGTERM, 130 if interrupted.

    Raises:
        InputError: something the user can mend.
    """
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        status = _run(Training.from_recipe("train", recipe, settings), Path(out), dry_run=dry_run)
    except InputError as error:
        # Every process finds the same mistake; one on each machine says it.
        if processes.speaks():
            raise
        raise SystemExit(2) from error
    if processes.together() and status != FAILED:  # where one has failed, the others may never come to an end
        dist.destroy_process_group()
    return status


def _run(training: Training, out: Path, *, dry_run: bool) -> int:
    say, tell = (_say, _tell) if processes.is_first() else (_nothing, _nothing)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    protocol, execution = training.protocol(device.type), training.execution()
    # What fails in a blink comes before the text is read.
    spec = _spec(training)
    check_trackers(execution.report_to)
    micro, accumulation = execution.accumulation(protocol.batch_size, processes.started())
    say("reading the text")
    prepared = training.prepare_text(say)
    tell(_described(training, protocol, spec, prepared))
    tell(
        f"{protocol.steps} steps of {protocol.batch_size} x {protocol.context} tokens, {protocol.precision} on "
        f"{device.type}: {processes.started()} process(es), each {accumulation} time(s) {micro} sequences"
        + (", weights in shards" if execution.fsdp and processes.started() > 1 else "")
    )
    if dry_run:
        return 0
    identity = {
        **training.deciding(),
        "precision": protocol.precision,
        "corpus_sha256": prepared.facts["sha256"],
        "vocab_size": prepared.text.vocab_size,
    }
    identity = json.loads(json.dumps(identity))
    try:
        return _train(training, protocol, spec, prepared, identity, out, device, say)
    except RunStopped as stopped:
        say(f"{stopped}; the same command goes on from there")
        return STOPPED
    except KeyboardInterrupt:
        say("interrupted; the same command goes on from the last checkpoint")
        return INTERRUPTED
    except (RunFailed, torch.OutOfMemoryError) as error:
        if isinstance(error, torch.OutOfMemoryError) or processes.is_first():
            _say(f"multimatrix: the run failed: {one_line(error)}; the checkpoints in {out} are kept")
        return FAILED
    except OSError as error:
        where = error.filename or out
        raise InputError(
            f"cannot write {where}: {error.strerror or error}; the checkpoints from before are kept, and once this is "
            "mended the same command goes on from there"
        ) from error


def _train(
    training: Training,
    protocol: Protocol,
    spec: AttentionSpec,
    prepared: PreparedText,
    identity: dict[str, Any],
    out: Path,
    device: torch.device,
    say: Callable[[str], None],
) -> int:
    start = time.perf_counter()
    if _is_done(out, identity):
        if processes.is_first():
            _tell(f"{out} is done already")
        return 0

    def begin() -> None:
        write_json(out / "config.json", identity)
        write_json(out / "environment.json", {"command": command_line(), **environment(device)})

    line = Line(protocol.steps)
    try:
        trained = train(
            training.model_config(
                spec,
                prepared.tokenizer,
                prepared.text.vocab_size,
                intermediate_size=training.feed_forward_width,
                experts=training.experts,
            ),
            prepared.text,
            protocol,
            seed=training.seed,
            directory=out,
            device=device,
            execution=training.execution(),
            identity=identity,
            begin=begin,
            on_step=line.show,
            say=say,
        )
    finally:
        line.close()
    where = environment(device)
    provenance = {
        "protocol": dataclasses.asdict(protocol),
        "corpus": prepared.facts,
        "tokens": protocol.tokens,
        "seed": training.seed,
        "validation_loss": trained.validation_loss,
        "environment": where,
        "command": command_line(),
    }
    trained.save(out / "model", prepared.tokenizer, provenance)
    if processes.is_first():
        write_json(
            out / "result.json",
            {
                "validation_loss": trained.validation_loss,
                "train_tokens_per_second": trained.tokens_per_second,
                "peak_memory_bytes": trained.peak_memory_bytes,
                "processes": processes.count(),
                "wall_seconds_of_the_last_start": time.perf_counter() - start,
                "environment": where,
            },
        )
    if processes.is_first():
        _tell(f"validation loss {trained.validation_loss:.4f}; the model is in {out / 'model'}")
    return 0


def _is_done(out: Path, identity: dict[str, Any]) -> bool:
    """Whether the run in `out` is finished; InputError where the folder is not free for it.

    Every process looks, before the first one writes.
    """
    path = out / "config.json"
    if path.is_file():
        found = read_ours(path, ("variant", "seed", "corpus_sha256"), "train", "choose another --out")
        refuse_difference(out, found, identity, "run")
        return (out / "result.json").is_file()
    check_free(out, "run")
    return False


def _spec(training: Training) -> AttentionSpec:
    specs = specs_from_labels(
        (training.variant,),
        hidden_size=training.hidden_size,
        head_dim=training.head_dim,
        overrides=training.sizes,
        position=training.position,
        latent_scaling=training.latent_scaling,
    )
    return specs[training.variant]


def _described(training: Training, protocol: Protocol, spec: AttentionSpec, prepared: PreparedText) -> str:
    """What will be trained, and on what."""
    facts = prepared.facts
    specs = [spec] * training.num_hidden_layers
    parameters = decoder_parameters(
        specs,
        vocab_size=prepared.text.vocab_size,
        tie_word_embeddings=training.tie_word_embeddings,
        intermediate_size=training.feed_forward_width,
        experts=training.experts,
    )
    return (
        f"{facts['name']} (sha256 {facts['sha256'][:12]}): {facts['train_tokens']:,} training and "
        f"{facts['validation_tokens']:,} validation tokens ({facts['tokenizer']})\n"
        f"{training.variant}: {parameters:,} parameters, {spec.num_heads} heads of {spec.head_dims[0]}, "
        f"{kv_bytes_per_token(specs):,} KV bytes per token; {protocol.tokens:,} tokens to train on, "
        f"{protocol.tokens / facts['train_tokens']:.2f} passes"
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _tell(line: str) -> None:
    print(line, flush=True)


def _nothing(line: str) -> None:
    """What the other processes say."""
