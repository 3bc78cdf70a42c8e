"""The tables of `decode.py`, on the terminal and in Markdown."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from rich.console import Console

from decode_modes import MODES
from lines import Lines

KERNEL = {
    "**multimatrix**, us": lambda row: f"{row['us']:,.1f}",
    "min-max, us": lambda row: f"{row['us_min']:,.1f}-{row['us_max']:,.1f}",
    "share of read bandwidth": lambda row: f"**{100 * row['share']:.1f} %**",
    "TFLOP/s": lambda row: f"{row['TFLOP/s']:,.0f}",
    "relative error": lambda row: f"{row['error']:.1e}",
}


def tables(report: dict[str, Any]) -> Iterator[Lines]:
    """A table for every mode, m and C; a column for every shape."""

    def group(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["mode"], row["m"], row["C"], row["V"]

    for (mode, m, dim, value_dim), found in itertools.groupby(report["rows"], group):
        rows = list(found)
        sizes = f"C = {dim}" if dim == value_dim else f"C = {dim}, value {value_dim}"
        per_token = rows[0]["bytes"] / (rows[0]["batch"] * rows[0]["context"])
        title = f"{MODES[mode].title}: m = {m}, {sizes}; {per_token:,.0f} bytes a cached token, each counted once"
        body = [
            [name, *(absent(row) if row["us"] is None else text(row) for row in rows)] for name, text in KERNEL.items()
        ]
        for peer in dict.fromkeys(name for row in rows for name in row["peers"]):
            body.append([f"{peer}: us, share", *(peer_cell(row["peers"].get(peer)) for row in rows)])
        yield Lines(title, ["batch x context", *(row["shape"] for row in rows)], body)


def absent(result: dict[str, Any]) -> str:
    return "wrong" if (result["reason"] or "").startswith("wrong") else "-"


def peer_cell(result: dict[str, Any] | None) -> str:
    if result is None:
        return "-"
    return absent(result) if result["us"] is None else f"{result['us']:,.1f}, {100 * result['share']:.0f} %"


def origin(report: dict[str, Any]) -> list[str]:
    """Where the numbers come from, a sentence a line."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        f"{report['card']}, measured read bandwidth {report['read_bandwidth_gb_per_s']:,.0f} GB/s, {report['date']}.",
        f"Commit {report['commit'] or 'unknown'}; {versions}; seed {report['seed']}.",
    ]
    if report["stopped_by_budget"]:
        left = ", ".join(report["not_measured"]) or "some peers"
        lines.append(f"Stopped by --budget; not measured: {left}.")
    return lines


def print_tables(report: dict[str, Any]) -> None:
    console = Console(width=160, soft_wrap=True, highlight=False)
    for line in origin(report):
        console.print(line, markup=False)
    for lines in tables(report):
        lines.show(console)


def markdown(report: dict[str, Any]) -> str:
    """The same for a file in results/."""
    parts = ["# Decode attention: time and share of read bandwidth", f"    {report['command']}"]
    parts.append("\n".join(f"- {line}" for line in origin(report)))
    parts.append(
        "Medians of CUDA graph replays over buffer sets larger than the L2 cache. The share counts the bytes that the "
        "cache of one call stores. Every time stands for a result that was compared with float64 in the same run; a "
        "peer that refuses or fails shows -."
    )
    for lines in tables(report):
        parts += [f"## {lines.title}", lines.markdown()]
    return "\n\n".join(parts) + "\n"
