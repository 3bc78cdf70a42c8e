"""A small run for tests of training: text, settings, and what two runs are compared by."""

from __future__ import annotations

import json
import random
from pathlib import Path

STEPS = 8
SMALL = ["--hidden-size", 32, "--head-dim", 8, "--layers", 2, "--context", 16, "--steps", STEPS, "--batch-size", 4]
SMALL += ["--evaluations", 2, "--validation-tokens", 96, "--learning-rate", 3e-3, "--checkpoint-interval", 2]
# What depends on the machine and the hour.
MEASURED = ("tokens_per_second", "seconds_left", "memory_bytes")


def write_text(path: Path) -> Path:
    """Some 10,000 bytes in 60 documents with words that follow each other, so that there is something to learn."""
    shuffle = random.Random(0)
    nouns, verbs = ["fox", "hen", "barn", "rain", "hill"], ["sees", "finds", "leaves"]
    rows = [
        {"text": " ".join(f"The {shuffle.choice(nouns)} {shuffle.choice(verbs)} it." for _ in range(10))}
        for _ in range(60)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def rows(out: Path) -> list[dict]:
    """The metrics rows without what is measured."""
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in MEASURED} for row in found]


def losses(out: Path) -> list[float]:
    return [row["loss"] if "loss" in row else row["validation_loss"] for row in rows(out)]


def weights(out: Path) -> bytes:
    return (out / "model" / "model.safetensors").read_bytes()


def steps_kept(out: Path) -> list[int]:
    """The steps of the checkpoints that are there."""
    return sorted(int(path.name.removeprefix("step-")) for path in (out / "checkpoints").glob("step-*"))
