"""Means, spreads and ties over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from scipy import stats


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean, spread (highest minus lowest; None for one value) and the values themselves."""
    return {
        "mean": statistics.fmean(values),
        "spread": max(values) - min(values) if len(values) > 1 else None,
        "values": list(values),
    }


def judge(losses: Mapping[str, Sequence[float]], baseline: str) -> dict[str, dict[str, Any]]:
    """Every variant's loss against the baseline's: "tie", "better", "worse", "baseline", "one seed" or None.

    A difference of means is a tie unless it exceeds the margin, the largest of three numbers: the spread of either
    variant over its seeds, and the half-width of the 95 % confidence interval of the difference, with the variance
    between seeds pooled over all variants (they share one protocol) and Student's t.
    """
    pooled, freedom = _pooled_variance(losses)
    verdicts: dict[str, dict[str, Any]] = {}
    reference = losses.get(baseline) or ()
    for label, values in losses.items():
        verdict: dict[str, Any] = {"verdict": None, "difference": None, "margin": None}
        if label == baseline and values:
            verdict["verdict"] = "baseline"
        elif values and reference:
            difference = statistics.fmean(values) - statistics.fmean(reference)
            verdict["difference"] = difference
            if min(len(values), len(reference)) < 2:
                verdict["verdict"] = "one seed"
            else:
                error = (pooled * (1 / len(values) + 1 / len(reference))) ** 0.5
                interval = float(stats.t.ppf(0.975, freedom)) * error
                margin = max(interval, max(values) - min(values), max(reference) - min(reference))
                verdict["margin"] = margin
                verdict["verdict"] = "tie" if abs(difference) <= margin else "better" if difference < 0 else "worse"
        verdicts[label] = verdict
    return verdicts


def _pooled_variance(losses: Mapping[str, Sequence[float]]) -> tuple[float, int]:
    """Variance between seeds over all variants, and its degrees of freedom."""
    groups = [values for values in losses.values() if len(values) > 1]
    freedom = sum(len(values) - 1 for values in groups)
    squares = sum(statistics.variance(values) * (len(values) - 1) for values in groups)
    return (squares / freedom if freedom else 0.0), freedom
