"""The tables of `training.py`, on the terminal and in Markdown, and the bars it is held to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console

from lines import Lines

MFU_BARS = {"350m": 0.45, "1b": 0.50}  # of MFA, at a context of 2048
BAR_CONTEXT = 2048
SPEED = ["", "heads", "tokens/s", "min-max", "MFU", "TFLOP/s", "peak GB", "sequences x passes", "compiled in, s"]
KERNELS = ("attention", "matrix products", "compiled", "optimizer", "other")
SHARES = [
    "",
    "MFLOPs a token",
    "attention core / linear / feed-forward / head",
    "time: attention / products / compiled / optimizer / other",
    "attention of a layer, ms: cuDNN / flash / efficient",
]


def tables(report: dict[str, Any]) -> Iterator[Lines]:
    """Speed, and what it is made of, for every size and context."""
    for size, context in dict.fromkeys((row["size"], row["context"]) for row in report["rows"]):
        rows = [row for row in report["rows"] if (row["size"], row["context"]) == (size, context)]
        title = f"{size}, context {context:,}: {rows[0]['parameters'] / 1e6:,.0f}M parameters"
        yield Lines(title, SPEED, [speed(row) for row in rows])
        yield Lines(f"{size}, context {context:,}: FLOPs and time by part", SHARES, [shares(row) for row in rows])


def name(row: dict[str, Any]) -> str:
    return f"transformers {row['model']}" if row["model"].startswith("llama") else row["model"]


def speed(row: dict[str, Any]) -> list[str]:
    dims = row["head_dims"]
    first = [name(row), f"{row['heads']} x {dims[0]}" + ("" if dims[0] == dims[1] else f"/{dims[1]}")]
    if row["reason"] is not None:
        absent = "wrong" if row["reason"].startswith("wrong") else "-"
        return [*first, absent, *["-"] * (len(SPEED) - 3)]
    tokens = row["tokens_per_second"] * row["seconds_per_step"]
    return [
        *first,
        f"**{row['tokens_per_second']:,.0f}**",
        f"{tokens / row['seconds_max']:,.0f}-{tokens / row['seconds_min']:,.0f}",
        "-" if row["mfu"] is None else f"**{100 * row['mfu']:.1f} %**",
        f"{row['model_tflops_per_second']:,.0f}",
        "-" if row["peak_memory_bytes"] is None else f"{row['peak_memory_bytes'] / 1e9:.1f}",
        f"{row['batch']} x {row['passes']}",
        f"{row['compile_seconds']:.0f}",
    ]


def shares(row: dict[str, Any]) -> list[str]:
    total, parts = row["flops_per_token"], row["flops_by_part"]
    split = [parts[part] for part in ("attention_core", "attention_linear", "feed_forward", "output_head")]
    kernels, attention = row.get("kernels"), row.get("attention")
    time, layer = "-", "-"
    if kernels:
        ms = sum(kernels["ms"].values())
        time = " / ".join(f"{100 * kernels['ms'].get(kind, 0.0) / ms:.0f}" for kind in KERNELS) + " %"
    if attention:
        layer = " / ".join("-" if ms is None else f"{ms:.2f}" for ms in attention["ms"].values())
        layer += f"; taken: {attention['chosen'].removesuffix('_ATTENTION').lower()}"
    flops = " / ".join(f"{100 * part / total:.0f}" for part in split) + " %"
    return [name(row), f"{total / 1e6:,.0f}", flops, time, layer]


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
    console = Console(width=200, soft_wrap=True, highlight=False)
    for line in origin(report):
        console.print(line, markup=False)
    for lines in tables(report):
        lines.show(console)
    console.print()
    for line in bars(report):
        console.print(line, markup=False)


def markdown(report: dict[str, Any]) -> str:
    """The same for a file in results/."""
    parts = ["# Training throughput", f"    {report['command']}", "\n".join(f"- {line}" for line in origin(report))]
    for lines in tables(report):
        parts += [f"**{lines.title}**", lines.markdown()]
    if sentences := bars(report):
        parts.append("\n".join(f"- {sentence}" for sentence in sentences))
    return "\n\n".join(parts) + "\n"
