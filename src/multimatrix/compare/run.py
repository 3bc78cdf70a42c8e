"""Run a comparison: every variant and seed that is not done yet, then the results, figures and report."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from multimatrix.compare import figures, report
from multimatrix.compare.configuration import Comparison
from multimatrix.compare.matching import Candidate, match
from multimatrix.compare.results import gather_results
from multimatrix.data import PackedText, PreparedText
from multimatrix.environment import environment
from multimatrix.errors import InputError, one_line
from multimatrix.evaluate.measure import counted_kv_bytes_per_token, decode_tokens_per_second
from multimatrix.files import write_json
from multimatrix.model.configuration import MultimatrixConfig
from multimatrix.train.folder import check_free, read_ours, refuse_difference
from multimatrix.train.protocol import Protocol, RunFailed
from multimatrix.train.run import train

# What result.json holds of a run beside its identity and environment.
MEASURED = (
    "validation_loss",
    "train_tokens_per_second",
    "decode_tokens_per_second",
    "peak_memory_bytes",
    "kv_bytes_per_token_counted",
    "wall_seconds",
)


@dataclass(frozen=True)
class Prepared:
    """A comparison whose text is read and whose sizes are matched; nothing is trained yet."""

    comparison: Comparison
    candidates: list[Candidate]
    protocol: Protocol
    device: torch.device
    source: PreparedText

    @property
    def text(self) -> PackedText:
        return self.source.text

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return self.source.tokenizer

    def corpus_facts(self) -> dict[str, Any]:
        """What the models read; the hash is over the documents."""
        return self.source.facts


@dataclass(frozen=True)
class Run:
    """One variant and seed of a comparison, and its folder."""

    candidate: Candidate
    seed: int
    directory: Path
    config: MultimatrixConfig
    identity: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.candidate.label}-seed{self.seed}"

    def drop_checkpoints(self) -> None:
        """A finished run needs none."""
        shutil.rmtree(self.directory / "checkpoints", ignore_errors=True)

    def finished(self) -> dict[str, Any] | None:
        """The stored result, or None where the run is not done.

        Raises:
            InputError: the folder holds a finished run of another configuration, or a result that is damaged.
        """
        path = self.directory / "result.json"
        if not path.is_file():
            return None
        stored = read_ours(path, ("identity", *MEASURED), "compare", "delete it to train that run again")
        refuse_difference(self.directory, stored["identity"], self.identity, "comparison")
        return stored


def prepare(comparison: Comparison, *, say: Callable[[str], None]) -> Prepared:
    """Read the text, build the tokenizer, match the sizes.

    say: gets one line for the person who waits.

    Raises:
        InputError: text that cannot be read or is too small, or sizes that cannot work.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # Sizes first: they fail in a blink, and reading a corpus may take minutes.
    match(comparison, vocab_size=257)
    say("reading the text")
    source = comparison.prepare_text(say)
    candidates = match(comparison, source.text.vocab_size)
    return Prepared(comparison, candidates, comparison.protocol(device.type), device, source)


def run_comparison(
    prepared: Prepared,
    out: Path,
    *,
    command: str,
    say: Callable[[str], None],
    show: Callable[[Run, dict[str, Any]], None],
) -> dict[str, Any]:
    """Train what is missing under `out` and return the results, which are also written there.

    say: gets one line for the person who waits. show: gets every metrics row of the run that is under way.

    Raises:
        InputError: `out` holds a comparison of another configuration, or something that is not ours.
        OSError: `out` cannot be written, for example because the disk is full; finished runs are as they were.
        KeyboardInterrupt: the results of what was finished are written first; RunStopped after SIGTERM.
    """
    settings = _claim(out, prepared)
    runs = [
        _make_run(prepared, out, candidate, seed)
        for seed in prepared.comparison.seeds
        for candidate in prepared.candidates
    ]
    results = {run.name: result for run in runs if (result := run.finished()) is not None}
    if results:
        say(f"{len(results)} of {len(runs)} runs are done already")
    write_json(out / "config.json", settings)
    failures: dict[str, str] = {}

    def gather() -> dict[str, Any]:
        gathered = gather_results(prepared, runs, results, failures, command, settings)
        write_json(out / "results.json", gathered)
        report.write_csv(gathered, out / "results.csv")
        figures.save_figures(gathered, out)
        report.write_report(gathered, out)
        return gathered

    try:
        for run in runs:
            if run.name in results:
                run.drop_checkpoints()
                continue
            try:
                results[run.name] = _execute(prepared, run, command, say, show)
                run.drop_checkpoints()
            except (RunFailed, torch.OutOfMemoryError) as error:
                failures[run.name] = one_line(error)
                say(f"{run.name} failed: {failures[run.name]}")
    except KeyboardInterrupt:  # RunStopped too
        for run in runs:  # it may have come between a result and the line that notes it
            if (result := run.finished()) is not None:
                results[run.name] = result
                run.drop_checkpoints()
        gather()
        raise
    return gather()


def _claim(out: Path, prepared: Prepared) -> dict[str, Any]:
    """The resolved settings of this comparison; InputError where `out` belongs to another one."""
    settings = {
        **prepared.comparison.deciding(),
        "precision": prepared.protocol.precision,
        "corpus_sha256": prepared.source.facts["sha256"],
    }
    settings = json.loads(json.dumps(settings))
    path = out / "config.json"
    if path.is_file():
        found = read_ours(path, ("variants", "seeds", "sizes", "corpus_sha256"), "compare", "choose another --out")
        # More variants or seeds continue a comparison; fewer would drop finished rows from its tables.
        for name in ("variants", "seeds", "sizes"):
            dropped = [item for item in found[name] if item not in settings[name]]
            if dropped:
                raise InputError(
                    f"{out} holds a comparison whose {name} include {', '.join(map(str, dropped))}; "
                    "name them again or choose another --out"
                )
            found[name] = settings[name]
        refuse_difference(out, found, settings, "comparison")
    else:
        check_free(out, "comparison")
    return settings


def _make_run(prepared: Prepared, out: Path, candidate: Candidate, seed: int) -> Run:
    config = prepared.comparison.model_config(
        candidate.spec,
        prepared.tokenizer,
        prepared.text.vocab_size,
        intermediate_size=candidate.intermediate_size,
        experts=candidate.experts,
    )
    identity = {
        "variant": candidate.label,
        "seed": seed,
        "attention": candidate.spec.to_dict(),
        "intermediate_size": candidate.intermediate_size,
        "vocab_size": prepared.text.vocab_size,
        "corpus_sha256": prepared.source.facts["sha256"],
        **dataclasses.asdict(prepared.protocol),
    }
    if candidate.experts is not None:
        identity["mixture_of_experts"] = candidate.experts.to_dict()
    return Run(candidate, seed, out / "runs" / f"{candidate.label}-seed{seed}", config, identity)


def _execute(
    prepared: Prepared,
    run: Run,
    command: str,
    say: Callable[[str], None],
    show: Callable[[Run, dict[str, Any]], None],
) -> dict[str, Any]:
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
        on_step=lambda row: show(run, row),
        say=lambda line: say(f"{run.name}: {line}"),
    )
    context = prepared.protocol.context
    decode_speed = decode_tokens_per_second(trained.model, context=max(1, context // 2), tokens=min(64, context // 2))
    where = environment(prepared.device)
    provenance = {
        "protocol": dataclasses.asdict(prepared.protocol),
        "corpus": prepared.corpus_facts(),
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
    write_json(run.directory / "result.json", result)
    return result
