"""The results of a comparison as one dictionary, results.json, whatever part of it is done.

`describe` makes the part that no run changes, `gather` fills in what the runs' files say; it can be called again by any
process at any time on what it returned.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multimatrix import __version__
from multimatrix.compare.folder import MEASURED, RESULT, State
from multimatrix.compare.statistics import judge, summary
from multimatrix.train.folder import METRICS, read_ours

if TYPE_CHECKING:
    from multimatrix.compare.prepare import Prepared, Run


def describe(
    prepared: Prepared, runs: list[Run], command: str, settings: dict[str, Any], sharing: str | None
) -> dict[str, Any]:
    """What will be trained: results.json without results.

    sharing: see `launch.Launcher`.
    """
    return {
        "title": "multimatrix compare",
        "version": __version__,
        "created": None,
        "command": command,
        "complete": False,
        "running": False,
        "baseline": prepared.comparison.baseline,
        "config": settings,
        "tokens": prepared.protocol.tokens,
        "device_type": prepared.device.type,
        "sharing": sharing,
        "environment": None,
        "corpus": prepared.corpus,
        "can_show": _can_show(prepared),
        "cannot_show": [],
        "rows": [candidate.row() for candidate in prepared.candidates],
        "runs": [
            {
                "variant": run.candidate.label,
                "seed": run.seed,
                "directory": f"runs/{run.name}",
                "steps": prepared.protocol.steps,
            }
            for run in runs
        ],
    }


def gather(description: dict[str, Any], out: Path, states: Mapping[str, State], running: bool) -> dict[str, Any]:
    """The whole comparison: results.json.

    states: of every run, by its directory below `out`. running: whether a process is at work on it.
    """
    runs, stored = [], {}
    for run in description["runs"]:
        state = states[run["directory"]]
        if state.status == "done":
            path = out / run["directory"] / RESULT
            way_out = "delete it to train that run again"
            stored[run["directory"]] = read_ours(path, ("identity", *MEASURED), "compare", way_out)
        step = run["steps"] if state.status == "done" else latest(out / run["directory"] / METRICS).get("step", 0)
        runs.append({**run, "status": state.status, "reason": state.reason, "step": step})
    done = {
        row["variant"]: [run for run in runs if run["variant"] == row["variant"] and run["directory"] in stored]
        for row in description["rows"]
    }
    losses = {label: [stored[run["directory"]]["validation_loss"] for run in mine] for label, mine in done.items()}
    verdicts = judge(losses, description["baseline"])
    rows = []
    for row in description["rows"]:
        label = row["variant"]
        rows.append(
            row
            | {"seeds": [run["seed"] for run in done[label]]}
            | loss_columns(losses[label], description["corpus"]["bytes_per_token"])
            | _measured_columns([stored[run["directory"]] for run in done[label]])
            | verdicts[label]
        )
    return {
        **description,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "complete": len(stored) == len(runs),
        "running": running,
        # Where the first of the runs was trained; each result.json has its own.
        "environment": next((result["environment"] for result in stored.values()), None),
        "cannot_show": _cannot_show(description, verdicts),
        "rows": rows,
        "runs": runs,
    }


def latest(metrics: Path) -> dict[str, Any]:
    """The last value of everything that a metrics.jsonl tells of."""
    found: dict[str, Any] = {}
    for line in metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []:
        with contextlib.suppress(ValueError):  # it is being written
            row = json.loads(line)
            found |= row if isinstance(row, dict) else {}
    return found


def loss_columns(losses: list[float], bytes_per_token: float) -> dict[str, Any]:
    """Loss in nats per token, perplexity and bits per byte over seeds; None where there is none."""
    if not losses:
        return {"validation_loss": None, "perplexity": None, "bits_per_byte": None}
    return {
        "validation_loss": summary(losses),
        # A diverged run's may be more than a float holds.
        "perplexity": summary([math.exp(loss) for loss in losses]) if max(losses) < 700 else None,
        "bits_per_byte": summary([loss / math.log(2) / bytes_per_token for loss in losses]),
    }


def _measured_columns(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Speeds as means over seeds, memory as the highest, wall time as the sum."""

    def mean(name: str) -> float | None:
        return sum(result[name] for result in results) / len(results) if results else None

    peaks = [result["peak_memory_bytes"] for result in results if result["peak_memory_bytes"] is not None]
    counted = sorted({result["kv_bytes_per_token_counted"] for result in results})
    return {
        # Should seeds ever differ, the largest is shown, and it will not equal the stated one.
        "kv_bytes_per_token_counted": counted[-1] if counted else None,
        "train_tokens_per_second": mean("train_tokens_per_second"),
        "decode_tokens_per_second": mean("decode_tokens_per_second"),
        "peak_memory_bytes": max(peaks) if peaks else None,
        "wall_seconds": sum(result["wall_seconds"] for result in results) if results else None,
    }


def _can_show(prepared: Prepared) -> list[str]:
    tokens = prepared.protocol.tokens
    epochs = tokens / prepared.text.train.size
    return [
        "what each variant caches: the bytes its spec states, and the bytes counted in a real cache",
        "that training and decoding agree: multimatrix check runs/NAME/model in this folder prints the table",
        f"that every variant learns: {tokens:,} tokens each, {epochs:.2f} passes over the training text",
        "parameters, and speeds of this code on this machine",
    ]


def _cannot_show(description: dict[str, Any], verdicts: dict[str, dict[str, Any]]) -> list[str]:
    found = []
    judged = [verdict for verdict in verdicts.values() if verdict["margin"] is not None]
    if judged:
        margin = max(verdict["margin"] for verdict in judged)
        found.append(
            f"a difference below its margin, here up to {margin:.3f} nats: seeds alone move the loss that "
            "much, and it is called a tie"
        )
    elif len(description["config"]["seeds"]) < 2:
        found.append("any verdict on loss: with one seed there is no spread to hold a difference against")
    parameters, tokens = description["rows"][0]["parameters"], description["tokens"]
    if tokens < 20 * parameters:
        found.append(
            f"a ranking for trained models: {tokens / parameters:.1f} tokens per parameter is far from the 20 of a "
            "compute-optimal run, and the order of variants changes with size and length"
        )
    if description["device_type"] == "cpu":
        found.append("speed on a GPU: these are CPU speeds, where small caches gain little")
    if description["sharing"]:
        found.append(f"the speed of a run that is alone on its device: {description['sharing']}")
    return found
