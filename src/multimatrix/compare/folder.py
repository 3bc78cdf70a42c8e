"""The folder of a comparison: whose it is, who works in it, and how each of its runs stands.

All of it is read from files, so that every process and every later command sees the same.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from multimatrix.errors import InputError
from multimatrix.locks import is_locked
from multimatrix.train.folder import METRICS, RUN_LOCK, check_free, read_ours, refuse_difference

if TYPE_CHECKING:
    from multimatrix.compare.prepare import Prepared

RESULT = "result.json"  # of a run: written last, so that it is there only when everything is
FAILURE = "failed.json"  # of a run: why it ended without a result
LOCK = "compare.lock"
SHARED = "shared"  # what the workers of a comparison read, while it runs
# What result.json holds of a run beside its identity and environment.
MEASURED = (
    "validation_loss",
    "train_tokens_per_second",
    "decode_tokens_per_second",
    "peak_memory_bytes",
    "kv_bytes_per_token_counted",
    "wall_seconds",
)


class State(NamedTuple):
    """How a run stands: done, running, failed, stopped (in its middle) or missing; and why, where it failed."""

    status: str
    reason: str | None = None


def claim(out: Path, prepared: Prepared) -> dict[str, Any]:
    """The resolved settings of this comparison; InputError where `out` belongs to another one."""
    settings = {
        **prepared.comparison.deciding(),
        "precision": prepared.protocol.precision,
        "corpus_sha256": prepared.corpus["sha256"],
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


def state_of(directory: Path) -> State:
    """How the run of this folder stands, as its files tell."""
    if (directory / RESULT).is_file():
        return State("done")
    metrics = directory / METRICS
    if is_locked(directory / RUN_LOCK):
        return State("running")
    if (directory / FAILURE).is_file():
        try:
            return State("failed", str(json.loads((directory / FAILURE).read_text(encoding="utf-8"))["reason"]))
        except (OSError, ValueError, TypeError, KeyError):
            return State("failed", f"{FAILURE} cannot be read")
    return State("stopped" if metrics.is_file() and metrics.stat().st_size else "missing")
