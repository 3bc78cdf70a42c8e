"""The results of a comparison as one dictionary, results.json, whatever part of it is done."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from multimatrix import __version__
from multimatrix.compare.statistics import judge, summary
from multimatrix.environment import environment

if TYPE_CHECKING:
    from multimatrix.compare.run import Prepared, Run


def gather_results(
    prepared: Prepared,
    runs: list[Run],
    results: dict[str, dict[str, Any]],
    failures: dict[str, str],
    command: str,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """The whole comparison as one dictionary: results.json."""
    done = {
        candidate.label: [run for run in runs if run.candidate is candidate and run.name in results]
        for candidate in prepared.candidates
    }
    losses = {label: [results[run.name]["validation_loss"] for run in mine] for label, mine in done.items()}
    verdicts = judge(losses, prepared.comparison.baseline)
    rows = []
    for candidate in prepared.candidates:
        mine = [results[run.name] for run in done[candidate.label]]
        rows.append(
            candidate.row()
            | {"seeds": [run.seed for run in done[candidate.label]]}
            | loss_columns(losses[candidate.label], prepared.text.validation_bytes_per_token)
            | _measured_columns(mine)
            | verdicts[candidate.label]
        )
    complete = all(run.name in results for run in runs)
    return {
        "title": "multimatrix compare",
        "version": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "complete": complete,
        "baseline": prepared.comparison.baseline,
        "config": settings,
        "environment": environment(prepared.device),
        "corpus": prepared.corpus_facts(),
        "can_show": _can_show(prepared),
        "cannot_show": _cannot_show(prepared, verdicts),
        "rows": rows,
        "runs": [
            {
                "variant": run.candidate.label,
                "seed": run.seed,
                "directory": f"runs/{run.name}",
                "status": "done" if run.name in results else "failed" if run.name in failures else "missing",
                "reason": failures.get(run.name),
            }
            for run in runs
        ],
    }


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


def _cannot_show(prepared: Prepared, verdicts: dict[str, dict[str, Any]]) -> list[str]:
    found = []
    judged = [verdict for verdict in verdicts.values() if verdict["margin"] is not None]
    if judged:
        margin = max(verdict["margin"] for verdict in judged)
        found.append(
            f"a difference below its margin, here up to {margin:.3f} nats: seeds alone move the loss that "
            "much, and it is called a tie"
        )
    elif len(prepared.comparison.seeds) < 2:
        found.append("any verdict on loss: with one seed there is no spread to hold a difference against")
    parameters, tokens = prepared.candidates[0].parameters, prepared.protocol.tokens
    if tokens < 20 * parameters:
        found.append(
            f"a ranking for trained models: {tokens / parameters:.1f} tokens per parameter is far from the 20 of a "
            "compute-optimal run, and the order of variants changes with size and length"
        )
    if prepared.device.type == "cpu":
        found.append("speed on a GPU: these are CPU speeds, where small caches gain little")
    return found
