"""What `multimatrix plan` prints: sizes and costs, a table for every accelerator, and what was searched."""

from __future__ import annotations

import re
from typing import Any

from rich.console import Console

from multimatrix.cli.options import plain_table
from multimatrix.plan import tables
from multimatrix.plan.answer import Question
from multimatrix.words import number, short_count

Row = dict[str, Any]
GAP = 2  # characters between the columns of a table
SHORTEST = 9  # characters that a first column keeps
COPIED = (
    "Tensor parallelism cannot cut a key head: where there are fewer than devices they are copied, a single one to "
    "every device."
)


def print_plan(rows: list[Row], question: Question) -> None:
    console = Console(markup=False)  # names of models may have brackets
    console.print(_costs(rows, console.width))
    console.print("FLOPs and bytes are those of one decoded token of the whole model, dollars those of a million.")
    for place in range(len(question.chips)):
        chip = rows[0]["hardware"][place]
        title = f"{chip['title']}: {tables.chip_facts(chip)}"
        _print_table(console, tables.serving_table(rows, place, narrow=True), title)
    if question.chips:
        console.print(_assumptions(question))
        if question.layout is not None and question.layout.devices > 1:
            _print_table(console, tables.device_table(rows), f"One of {question.layout.devices} devices holds")
            if tables.copies(rows):
                console.print(COPIED)
    for row in rows:
        if "search" in row:
            _print_search(console, row)


def _costs(rows: list[Row], width: int) -> Any:
    shown: list[list[str]] = []

    def line(label: str, values: list[Any]) -> None:
        shown.append([label, *(short_count(value) if isinstance(value, int) else value for value in values)])

    def lines(labels: dict[str, str]) -> None:
        for label, key in labels.items():
            line(label, [row[key] for row in rows])

    lines({"parameters": "parameters", "  of them active": "active_parameters"})
    for part in rows[0]["parameters_by_part"]:
        line(f"  {part.replace('_', ' ')}", [row["parameters_by_part"][part] for row in rows])
    line("total effective rank", [row["total_effective_rank"] for row in rows])
    for bits in rows[0]["kv_bytes_per_token_by_bits"]:
        line(f"KV bytes/token, {bits} bit", [row["kv_bytes_per_token_by_bits"][bits] for row in rows])
        scales = [row["kv_scale_bytes_per_token_by_bits"][bits] for row in rows]
        if any(scales):
            line("  and scales", scales)
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
        }
    )
    line("core FLOPs/KV byte", [f"{row['arithmetic_intensity']:.1f}" for row in rows])
    line("FLOPs of the prompt", [row["prefill_flops"] for row in rows])
    line("recompute K, V from", [_recompute(row["forms"]) for row in rows])
    for chips in zip(*(row["hardware"] for row in rows), strict=True):
        line(f"{chips[0]['hardware']}: $ of attention", [number(chip["attention_dollars"], 4) for chip in chips])
        line("  its core waits for", [chip["bound"] for chip in chips])
        line("  $ of the rest", [number(chip["other_dollars"], 4) for chip in chips])
    return _fitted(["", *(f"{row['model']}\nat {row['context']:,}" for row in rows)], shown, width)


def _recompute(forms: Row) -> str:
    """The fewest queries at once for which keys and values are better made anew."""
    if not forms["expands"]:
        return "nothing"
    queries = forms["recompute_from_queries"]
    return "never" if queries is None else f"{queries:,} queries"


def _print_table(console: Console, made: tables.Table, title: str, *, repeat: bool = False) -> None:
    """A table below its title; repeat: also a first cell that says what the line above says."""
    shown = [[cell.text for cell in line.cells] for line in made.lines]
    if not repeat:
        firsts = ["", *(line[0] for line in shown)]
        shown = [["" if line[0] == above else line[0], *line[1:]] for above, line in zip(firsts, shown, strict=False)]
    console.print("", title, _fitted(made.headings, shown, console.width), sep="\n")


def _fitted(headings: list[str], lines: list[list[str]], width: int) -> Any:
    """A table for a terminal of so many characters; numbers stay on one line wherever there is room for it.

    One that is too wide has gaps of one character and breaks in its headings and in its first column.
    """
    texts = [max(map(len, column)) for column in zip(*lines, strict=True)]
    whole = [max(text, *map(len, heading.split("\n"))) for text, heading in zip(texts, headings, strict=True)]
    if sum(whole) + GAP * (len(whole) - 1) <= width:
        return _filled(plain_table("", headings, right=headings[1:]), lines)
    least = [max(text, *map(len, _pieces(heading))) for text, heading in zip(texts, headings, strict=True)][1:]
    room = max(SHORTEST, width - sum(least) - len(least))
    broken = ["", *(_broken(heading, most) for heading, most in zip(headings[1:], least, strict=True))]
    table = plain_table("", broken, right=broken[1:])
    table.padding = (0, 1, 0, 0)
    for column in table.columns[1:]:
        column.no_wrap = sum(least) + len(least) + SHORTEST <= width
    return _filled(table, [[_broken(first, room), *others] for first, *others in lines])


def _filled(table: Any, lines: list[list[str]]) -> Any:
    for line in lines:
        table.add_row(*line)
    return table


def _pieces(text: str) -> list[str]:
    """What a text can be broken into: behind spaces and hyphens, and at ends of lines."""
    return re.split(r"(?<=[ -])|\n", text)


def _broken(text: str, room: int) -> str:
    """A text in lines of at most `room` characters where it can be broken, its own ends of lines kept."""
    made = []
    for line in text.split("\n"):
        made.append("")
        for piece in _pieces(line):
            if made[-1].strip() and len((made[-1] + piece).rstrip()) > room:
                made.append("")
            made[-1] += piece
    return "\n".join(line.rstrip() for line in made)


def _assumptions(question: Question) -> str:
    return (
        f"Times are lower bounds: {question.weight_bits} bit weights, nothing lost to communication, "
        f"{100 * question.workspace:g} % of the memory left free. *: the largest batch at this context; longest: the "
        "longest context at this batch; needs: how many devices would do. waits: what core, linear maps and the rest "
        "wait for, memory (m) or arithmetic (a). devices: T tensor, A attention-data, D data parallel."
    )


def _print_search(console: Console, row: Row) -> None:
    found, title = row["search"], tables.search_title(row)
    if not found["found"]:
        console.print("", f"{title}: {tables.nothing_found(row)}", sep="\n")
        return
    _print_table(console, tables.search_table(row), title, repeat=True)
    own = row["total_effective_rank"]
    console.print(f"{len(found['found'])} of {found['found_in_all']} that fit; {row['model']} has rank {own:,}.")
