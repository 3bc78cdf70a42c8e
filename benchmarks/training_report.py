"""The tables of `training.py`, on the terminal and in Markdown, and the bars it is held to."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

MFU_BARS = {"350m": 0.45, "1b": 0.50}  # of MFA, at a context of 2048
BAR_CONTEXT = 2048
HEADER = [
    "",
    "heads",
    "tokens/s",
    "min-max",
    "MFU",
    "peak GB",
    "sequences",
    "compile, s",
    "MFLOPs/token",
    "attention core / linear / feed-forward / head",
    "time: attention / products / compiled / optimizer / other",
    "one layer's attention, ms: cuDNN / flash / efficient",
]


def groups(report: dict[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A title and its rows for every size and context."""

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["size"], row["context"]

    order = list(dict.fromkeys(key(row) for row in report["rows"]))
    for (size, context), found in itertools.groupby(sorted(report["rows"], key=lambda row: order.index(key(row))), key):
        rows = list(found)
        yield f"{size}, context {context:,}: {rows[0]['parameters'] / 1e6:,.0f}M parameters", rows


def cells(row: dict[str, Any]) -> list[str]:
    dims = row["head_dims"]
    shape = f"{row['heads']} x {dims[0]}" + ("" if dims[0] == dims[1] else f"/{dims[1]}")
    name = f"transformers {row['model']}" if row["model"].startswith("llama") else row["model"]
    total = row["flops_per_token"]
    split = [row["flops_by_part"][part] for part in ("attention_core", "attention_linear", "feed_forward")]
    split.append(row["flops_by_part"]["output_head"])
    flops = " / ".join(f"{100 * part / total:.0f}" for part in split) + " %"
    if row["reason"] is not None:
        absent = "wrong" if row["reason"].startswith("wrong") else "-"
        return [name, shape, absent, *["-"] * 5, f"{total / 1e6:,.0f}", flops, "-", "-"]
    tokens = row["tokens_per_second"] * row["seconds_per_step"]
    return [
        name,
        shape,
        f"{row['tokens_per_second']:,.0f}",
        f"{tokens / row['seconds_max']:,.0f}-{tokens / row['seconds_min']:,.0f}",
        "-" if row["mfu"] is None else f"{100 * row['mfu']:.1f} %",
        "-" if row["peak_memory_bytes"] is None else f"{row['peak_memory_bytes'] / 1e9:.1f}",
        f"{row['batch']} x {row['passes']}",
        f"{row['compile_seconds']:.0f}",
        f"{total / 1e6:,.0f}",
        flops,
        _kernels(row.get("kernels")),
        _attention(row.get("attention")),
    ]


def _kernels(kernels: dict[str, Any] | None) -> str:
    if not kernels:
        return "-"
    total = sum(kernels["ms"].values())
    kinds = ("attention", "matrix products", "compiled", "optimizer", "other")
    return " / ".join(f"{100 * kernels['ms'].get(kind, 0.0) / total:.0f}" for kind in kinds) + " %"


def _attention(attention: dict[str, Any] | None) -> str:
    if not attention:
        return "-"
    times = " / ".join("-" if ms is None else f"{ms:.2f}" for ms in attention["ms"].values())
    return f"{times}, takes {attention['chosen'].removesuffix('_ATTENTION').lower()}"


def bars(report: dict[str, Any]) -> list[str]:
    """A sentence for every bar: met, missed or not measured."""
    measured = {(row["size"], row["context"], row["model"]): row for row in report["rows"] if row["reason"] is None}
    lines = []
    for size, bar in MFU_BARS.items():
        row = measured.get((size, BAR_CONTEXT, "mfa"))
        if row is not None and row["mfu"] is not None:
            met = "met" if row["mfu"] >= bar else "missed"
            lines.append(f"MFA at {size}: MFU {100 * row['mfu']:.1f} %, the bar is {100 * bar:.0f} %: {met}.")
    for size, context in dict.fromkeys((row["size"], row["context"]) for row in report["rows"]):
        for ours, theirs in (("mha", "llama"), ("gqa", "llama_gqa")):
            a, b = (measured.get((size, context, model)) for model in (ours, theirs))
            if a is not None and b is not None:
                ratio = a["tokens_per_second"] / b["tokens_per_second"]
                lines.append(
                    f"{ours.upper()} at {size}, context {context:,}: {ratio:.2f} times the tokens/s of transformers' "
                    f"{theirs}."
                )
    return lines


def origin(report: dict[str, Any]) -> list[str]:
    """Where the numbers come from, a sentence a line."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    peak = report["dense_bf16_peak"]
    lines = [
        f"{report['card']}, {report['date']}"
        + ("." if peak is None else f"; MFU is of {peak / 1e12:,.0f} TFLOP/s, dense bfloat16."),
        f"Commit {report['commit'] or 'unknown'}; {versions}, transformers {report['transformers']}; "
        f"seed {report['seed']}.",
        f"Weights in {report['weights']}, compiled: {report['compile']}, {report['tokens_per_step']:,} tokens a step, "
        f"median of {report['steps']} steps.",
    ]
    if report["stopped_by_budget"]:
        lines.append(f"Stopped by --budget; not measured: {', '.join(report['not_measured'])}.")
    return lines


def print_tables(report: dict[str, Any]) -> None:
    console = Console(width=250, soft_wrap=True, highlight=False)
    for line in origin(report):
        console.print(line, markup=False)
    for title, rows in groups(report):
        table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
        for index, name in enumerate(HEADER):
            table.add_column(name, justify="right" if index else "left")
        for row in rows:
            table.add_row(*cells(row))
        console.print()
        console.print(table)
    console.print()
    for line in bars(report):
        console.print(line, markup=False)


def markdown(report: dict[str, Any]) -> str:
    """The same for a file in results/."""
    parts = ["# Training throughput", f"    {report['command']}", "\n".join(f"- {line}" for line in origin(report))]
    for title, rows in groups(report):
        lines = [f"## {title}", "", "| " + " | ".join(HEADER) + " |", "| --- |" + " ---: |" * (len(HEADER) - 1)]
        parts.append("\n".join([*lines, *("| " + " | ".join(cells(row)) + " |" for row in rows)]))
    if lines := bars(report):
        parts.append("\n".join(f"- {line}" for line in lines))
    return "\n\n".join(parts) + "\n"
