"""Run a comparison: every variant and seed that is not done yet, then the results, figures and report."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from multimatrix.compare import figures, report
from multimatrix.compare.configuration import Comparison
from multimatrix.compare.matching import Candidate, match
from multimatrix.compare.results import gather_results
from multimatrix.data import Corpus, PackedText, load_corpus, load_tokenizer, pack
from multimatrix.environment import environment
from multimatrix.errors import InputError, one_line
from multimatrix.evaluate.measure import PeakMemory, counted_kv_bytes_per_token, decode_tokens_per_second
from multimatrix.files import write_json, writing
from multimatrix.model.configuration import MultimatrixConfig
from multimatrix.train.run import Protocol, RunFailed, train

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
    corpus: Corpus
    tokenizer: PreTrainedTokenizerFast
    text: PackedText

    def corpus_facts(self) -> dict[str, Any]:
        """What the models read; the hash is over the documents."""
        return {
            "name": self.corpus.name,
            "sha256": self.corpus.sha256,
            "documents": len(self.corpus.train) + len(self.corpus.validation),
            "duplicates_dropped": self.corpus.duplicates,
            "tokenizer": self.comparison.tokenizer,
            "vocab_size": self.text.vocab_size,
            "bytes_per_token": round(self.text.validation_bytes_per_token, 4),
            "train_tokens": int(self.text.train.size),
            "validation_tokens": int(self.text.validation.size),
        }


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

    def finished(self) -> dict[str, Any] | None:
        """The stored result, or None where the run is not done.

        Raises:
            InputError: the folder holds a finished run of another configuration, or a result that is damaged.
        """
        path = self.directory / "result.json"
        if not path.is_file():
            return None
        stored = _read_ours(path, ("identity", *MEASURED), "delete it to train that run again")
        _refuse_difference(self.directory, stored["identity"], self.identity)
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
    corpus = load_corpus(comparison.data, validation_fraction=comparison.validation_fraction)
    tokenizer = load_tokenizer(comparison.tokenizer, corpus.train)
    text = pack(corpus, tokenizer, comparison.context)
    if len(text.train) < comparison.batch_size:
        raise InputError(
            f"the train text has {len(text.train)} blocks of {comparison.context} tokens and one step needs "
            f"{comparison.batch_size}; set the batch size to at most {len(text.train)} or add text"
        )
    # Whole batches only, so that every step sees the tokens that are counted for it.
    train_blocks = len(text.train) // comparison.batch_size * comparison.batch_size
    validation_blocks = max(1, comparison.validation_tokens // comparison.context)
    text = dataclasses.replace(text, train=text.train[:train_blocks], validation=text.validation[:validation_blocks])
    candidates = match(comparison, text.vocab_size)
    return Prepared(comparison, candidates, comparison.protocol(device.type), device, corpus, tokenizer, text)


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
        KeyboardInterrupt: the results of what was finished are written first.
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
                continue
            try:
                results[run.name] = _execute(prepared, run, show)
            except (RunFailed, torch.OutOfMemoryError) as error:
                failures[run.name] = one_line(error)
                say(f"{run.name} failed: {failures[run.name]}")
    except KeyboardInterrupt:
        gather()
        raise
    return gather()


def _claim(out: Path, prepared: Prepared) -> dict[str, Any]:
    """The resolved settings of this comparison; InputError where `out` belongs to another one."""
    settings = {
        **dataclasses.asdict(prepared.comparison),
        "precision": prepared.protocol.precision,
        "corpus_sha256": prepared.corpus.sha256,
    }
    settings = json.loads(json.dumps(settings))
    path = out / "config.json"
    if path.is_file():
        found = _read_ours(path, ("variants", "seeds", "sizes", "corpus_sha256"), "choose another --out")
        # More variants or seeds continue a comparison; fewer would drop finished rows from its tables.
        for name in ("variants", "seeds", "sizes"):
            dropped = [item for item in found[name] if item not in settings[name]]
            if dropped:
                raise InputError(
                    f"{out} holds a comparison whose {name} include {', '.join(map(str, dropped))}; "
                    "name them again or choose another --out"
                )
            found[name] = settings[name]
        _refuse_difference(out, found, settings)
    elif out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; choose another --out")
    elif out.exists() and any(out.iterdir()):
        raise InputError(f"{out} is not empty and holds no comparison of ours; choose another --out")
    return settings


def _read_ours(path: Path, keys: Sequence[str], way_out: str) -> dict[str, Any]:
    """What a comparison stored in `path`; InputError where it is damaged or somebody else's."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict) or any(key not in found for key in keys):
        raise InputError(f"{path} is damaged, or was not written by multimatrix compare; {way_out}")
    return found


def _refuse_difference(directory: Path, found: dict[str, Any], wanted: dict[str, Any], within: str = "") -> None:
    """InputError that names the first setting in which two configurations differ."""
    for name in dict.fromkeys([*wanted, *found]):
        old, new = found.get(name), wanted.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            _refuse_difference(directory, old, new, f"{within}{name}.")
        elif old != new:
            raise InputError(
                f"{directory} was made with {within}{name} = {old} and this comparison has {new}; "
                "choose another --out or the same settings"
            )


def _make_run(prepared: Prepared, out: Path, candidate: Candidate, seed: int) -> Run:
    comparison = prepared.comparison
    config = MultimatrixConfig(
        vocab_size=prepared.text.vocab_size,
        hidden_size=comparison.hidden_size,
        intermediate_size=candidate.intermediate_size,
        num_hidden_layers=comparison.num_hidden_layers,
        max_position_embeddings=comparison.positions,
        attention=candidate.spec.to_dict(),
        rope_parameters={"rope_type": "default", "rope_theta": comparison.rope_theta},
        tie_word_embeddings=comparison.tie_word_embeddings,
        depth_scaled_init=comparison.depth_scaled_init,
        initializer_range=comparison.initial_std,
        zero_init_output=comparison.zero_init_output,
        mixture_of_experts=candidate.experts.to_dict() if candidate.experts is not None else None,
        bos_token_id=prepared.tokenizer.bos_token_id,
        eos_token_id=prepared.tokenizer.eos_token_id,
        pad_token_id=prepared.tokenizer.pad_token_id,
    )
    identity = {
        "variant": candidate.label,
        "seed": seed,
        "attention": candidate.spec.to_dict(),
        "intermediate_size": candidate.intermediate_size,
        "vocab_size": prepared.text.vocab_size,
        "corpus_sha256": prepared.corpus.sha256,
        **dataclasses.asdict(prepared.protocol),
    }
    if candidate.experts is not None:
        identity["mixture_of_experts"] = candidate.experts.to_dict()
    return Run(candidate, seed, out / "runs" / f"{candidate.label}-seed{seed}", config, identity)


def _execute(prepared: Prepared, run: Run, show: Callable[[Run, dict[str, Any]], None]) -> dict[str, Any]:
    """Train and measure one run; its result.json is written last, so that it is there only when all is done."""
    start = time.perf_counter()
    memory = PeakMemory(prepared.device)
    trained = train(
        run.config,
        prepared.text,
        prepared.protocol,
        seed=run.seed,
        directory=run.directory,
        device=prepared.device,
        on_step=lambda row: show(run, row),
    )
    peak = memory.bytes()
    context = prepared.protocol.context
    decode_speed = decode_tokens_per_second(trained.model, context=max(1, context // 2), tokens=min(64, context // 2))
    folder = run.directory / "model"
    with writing(folder):
        trained.model.save_pretrained(folder)
        prepared.tokenizer.save_pretrained(folder)
    # Stated bytes are at 16 bit, so the real cache is filled at 16 bit.
    counted = counted_kv_bytes_per_token(trained.model.to(torch.bfloat16), tokens=context)
    result = {
        "identity": run.identity,
        "validation_loss": trained.validation_loss,
        "train_tokens_per_second": trained.tokens_per_second,
        "decode_tokens_per_second": decode_speed,
        "peak_memory_bytes": peak,
        "kv_bytes_per_token_counted": counted,
        "wall_seconds": time.perf_counter() - start,
        "environment": environment(prepared.device),
    }
    write_json(run.directory / "result.json", result)
    return result
