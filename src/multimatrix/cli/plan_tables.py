"""What `multimatrix plan` prints: sizes and costs, a table for every accelerator, and what was searched."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from multimatrix.cli.options import plain_table
from multimatrix.plan import tables
from multimatrix.plan.answer import Question
from multimatrix.words import number, short_count

Row = dict[str, Any]
COPIED = (
    "Tensor parallelism cannot cut a key head: where there are fewer than devices they are copied, a single one to "
    "every device."
)


def print_plan(rows: list[Row], question: Question) -> None:
    console = Console()
    console.print(_costs(rows))
    console.print("FLOPs and bytes are those of one decoded token of the whole model, dollars those of a million.")
    for place in range(len(question.chips)):
        chip = rows[0]["hardware"][place]
        title = f"{chip['title']}: {tables.chip_facts(chip)}"
        console.print("", _printed(tables.serving_table(rows, place, narrow=True), title), sep="\n")
    if question.chips:
        console.print(_assumptions(question))
        if question.layout is not None and question.layout.devices > 1:
            title = f"One of {question.layout.devices} devices holds"
            console.print("", _printed(tables.device_table(rows), title), sep="\n")
            if tables.copies(rows):
                console.print(COPIED)
    for row in rows:
        if "search" in row:
            _print_search(console, row)


def _costs(rows: list[Row]) -> Any:
    columns = [f"{row['model']}\nat {row['context']:,}" for row in rows]
    table = plain_table("", ["", *columns], right=columns)
    table.columns[0].no_wrap = True

    def line(label: str, values: list[Any]) -> None:
        table.add_row(label, *(short_count(value) if isinstance(value, int) else value for value in values))

    def lines(labels: dict[str, str], of: list[Row]) -> None:
        for label, key in labels.items():
            line(label, [row[key] for row in of])

    lines({"parameters": "parameters", "  of them active": "active_parameters"}, rows)
    for part in rows[0]["parameters_by_part"]:
        line(f"  {part.replace('_', ' ')}", [row["parameters_by_part"][part] for row in rows])
    line("total effective rank", [row["total_effective_rank"] for row in rows])
    for bits in rows[0]["kv_bytes_per_token_by_bits"]:
        line(f"KV bytes/token, {bits} bit", [row["kv_bytes_per_token_by_bits"][bits] for row in rows])
        scales = [row["kv_scale_bytes_per_token_by_bits"][bits] for row in rows]
        if any(scales):
            line("  and scales", scales)
    table.add_section()
    lines(
        {
            f"KV bytes read, {rows[0]['kv_bits']} bit": "kv_bytes",
            **({"  and scales": "kv_scale_bytes"} if rows[0]["kv_bits"] < 16 else {}),
            "KV bytes stored": "kv_stored_bytes",
            "FLOPs, attention core": "attention_core_flops",
            "  linear": "linear_flops",
            "  feed-forward": "feed_forward_flops",
            "  router": "router_flops",
            "  output head": "output_head_flops",
        },
        rows,
    )
    line("core FLOPs/KV byte", [f"{row['arithmetic_intensity']:.1f}" for row in rows])
    line("FLOPs of the prompt", [row["prefill_flops"] for row in rows])
    line("recompute K, V from", [_recompute(row["forms"]) for row in rows])
    for chips in zip(*(row["hardware"] for row in rows), strict=True):
        line(f"{chips[0]['hardware']}: $ of attention", [number(chip["attention_dollars"], 4) for chip in chips])
        line("  its core waits for", [chip["bound"] for chip in chips])
        line("  $ of the rest", [number(chip["other_dollars"], 4) for chip in chips])
    return table


def _recompute(forms: Row) -> str:
    if not forms["expands"]:
        return "nothing"
    queries = forms["recompute_from_queries"]
    return "never" if queries is None else f"{queries:,} queries"


def _printed(made: tables.Table, title: str) -> Any:
    """A table for the terminal; the first cell is left out where it says what the line above says."""
    table = plain_table(title, made.headings, right=made.headings[1:])
    before = ""
    for line in made.lines:
        first, *others = (cell.text for cell in line.cells)
        table.add_row("" if first == before else first, *others)
        before = first
    return table


def _assumptions(question: Question) -> str:
    return (
        f"Lower bounds of time: {question.weight_bits} bit weights, nothing lost to communication; "
        f"{100 * question.workspace:g} % of the memory is left free. * is the largest batch at this context, longest "
        "the longest context at this batch; what does not fit needs so many devices. Core, linear maps and the "
        "rest wait for m memory or a arithmetic. Devices are cut T tensor, A attention-data, D data parallel."
    )


def _print_search(console: Console, row: Row) -> None:
    found, title = row["search"], tables.search_title(row)
    if not found["found"]:
        console.print("", f"{title}: {tables.nothing_found(row)}", sep="\n")
        return
    made = tables.search_table(row)
    table = plain_table(title, made.headings, right=made.headings[1:])
    for line in made.lines:
        table.add_row(*(cell.text for cell in line.cells))
    console.print("", table, sep="\n")
    own = row["total_effective_rank"]
    console.print(f"{len(found['found'])} of {found['found_in_all']} that fit; {row['model']} has rank {own:,}.")
