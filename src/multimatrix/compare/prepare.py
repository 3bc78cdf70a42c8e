"""What a comparison will train: its text, its matched sizes, and one `Run` for every variant and seed."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from multimatrix.compare.configuration import Comparison
from multimatrix.compare.folder import MEASURED, RESULT
from multimatrix.compare.matching import Candidate, match
from multimatrix.data import PackedText, PreparedText
from multimatrix.model.configuration import MultimatrixConfig
from multimatrix.train.arguments import check_trackers
from multimatrix.train.checkpoints import check_identity
from multimatrix.train.folder import CHECKPOINTS, read_ours, refuse_difference
from multimatrix.train.protocol import Protocol


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

    @property
    def corpus(self) -> dict[str, Any]:
        """What the models read, without the documents; the hash is over the documents."""
        return self.source.facts

    def with_blocks(self, train: NDArray[np.integer], validation: NDArray[np.integer]) -> Prepared:
        """The same with these arrays as the blocks of the text."""
        text = dataclasses.replace(self.text, train=train, validation=validation)
        return dataclasses.replace(self, source=dataclasses.replace(self.source, text=text))


@dataclass(frozen=True)
class Run:
    """One variant and seed of a comparison, and its folder; with the text, all that it takes to train it."""

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
            InputError: the folder holds a finished run or a checkpoint of another configuration, or a result that is
                damaged.
        """
        path = self.directory / RESULT
        if not path.is_file():
            check_identity(self.directory / CHECKPOINTS, self.identity)
            return None
        stored = read_ours(path, ("identity", *MEASURED), "compare", "delete it to train that run again")
        refuse_difference(self.directory, stored["identity"], self.identity, "comparison")
        return stored

    def drop_checkpoints(self) -> None:
        """A finished run needs none."""
        shutil.rmtree(self.directory / CHECKPOINTS, ignore_errors=True)


def prepare(comparison: Comparison, *, device_type: str, say: Callable[[str], None]) -> Prepared:
    """Read the text, build the tokenizer, match the sizes.

    device_type: of the devices that will train, "cuda" or "cpu". say: gets one line for the person who waits.

    Raises:
        InputError: text that cannot be read or is too small, or settings that cannot work.
    """
    # What fails in a blink comes first: reading a corpus may take minutes.
    execution = comparison.execution()
    execution.accumulation(comparison.batch_size, 1)
    check_trackers(execution.report_to)
    match(comparison, vocab_size=257)
    say("reading the text")
    source = comparison.prepare_text(say)
    candidates = match(comparison, source.text.vocab_size)
    return Prepared(comparison, candidates, comparison.protocol(device_type), torch.device(device_type), source)


def make_runs(prepared: Prepared, out: Path) -> list[Run]:
    """Every run of the comparison, in the order in which they are trained."""
    return [
        _make_run(prepared, out, candidate, seed)
        for seed in prepared.comparison.seeds
        for candidate in prepared.candidates
    ]


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
        "corpus_sha256": prepared.corpus["sha256"],
        **dataclasses.asdict(prepared.protocol),
    }
    if candidate.experts is not None:
        identity["mixture_of_experts"] = candidate.experts.to_dict()
    return Run(candidate, seed, out / "runs" / f"{candidate.label}-seed{seed}", config, identity)
