"""What a comparison will train: its text, its matched sizes, and one `Run` for every variant and seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from multimatrix.compare.configuration import Comparison
from multimatrix.compare.folder import MEASURED, RESULT, read_ours, refuse_difference
from multimatrix.compare.matching import Candidate, match
from multimatrix.data import PackedText, load_corpus, load_tokenizer, pack
from multimatrix.errors import InputError
from multimatrix.model.configuration import MultimatrixConfig
from multimatrix.train.run import Protocol


@dataclass(frozen=True)
class Prepared:
    """A comparison whose text is read and whose sizes are matched; nothing is trained yet.

    corpus: what the models read, without the documents; the hash is over the documents.
    """

    comparison: Comparison
    candidates: list[Candidate]
    protocol: Protocol
    device: torch.device
    corpus: dict[str, Any]
    tokenizer: PreTrainedTokenizerFast
    text: PackedText


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
            InputError: the folder holds a finished run of another configuration, or a result that is damaged.
        """
        path = self.directory / RESULT
        if not path.is_file():
            return None
        stored = read_ours(path, ("identity", *MEASURED), "delete it to train that run again")
        refuse_difference(self.directory, stored["identity"], self.identity)
        return stored


def prepare(comparison: Comparison, *, device_type: str, say: Callable[[str], None]) -> Prepared:
    """Read the text, build the tokenizer, match the sizes.

    device_type: of the devices that will train, "cuda" or "cpu". say: gets one line for the person who waits.

    Raises:
        InputError: text that cannot be read or is too small, or sizes that cannot work.
    """
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
    facts = {
        "name": corpus.name,
        "sha256": corpus.sha256,
        "documents": len(corpus.train) + len(corpus.validation),
        "duplicates_dropped": corpus.duplicates,
        "tokenizer": comparison.tokenizer,
        "vocab_size": text.vocab_size,
        "bytes_per_token": text.validation_bytes_per_token,
        "train_tokens": int(text.train.size),
        "validation_tokens": int(text.validation.size),
    }
    protocol, device = comparison.protocol(device_type), torch.device(device_type)
    return Prepared(comparison, match(comparison, text.vocab_size), protocol, device, facts, tokenizer, text)


def make_runs(prepared: Prepared, out: Path) -> list[Run]:
    """Every run of the comparison, in the order in which they are trained."""
    return [
        _make_run(prepared, out, candidate, seed)
        for seed in prepared.comparison.seeds
        for candidate in prepared.candidates
    ]


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
        "corpus_sha256": prepared.corpus["sha256"],
        **dataclasses.asdict(prepared.protocol),
    }
    if candidate.experts is not None:
        identity["mixture_of_experts"] = candidate.experts.to_dict()
    return Run(candidate, seed, out / "runs" / f"{candidate.label}-seed{seed}", config, identity)
