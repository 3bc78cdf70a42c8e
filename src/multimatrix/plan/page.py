"""A plan as people read it: one HTML page with tables and figures that needs no network and no other file."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from multimatrix import __version__
from multimatrix.files import write_text
from multimatrix.pages.drawing import inline
from multimatrix.pages.frame import page_template
from multimatrix.plan import figures, tables
from multimatrix.plan.answer import Question
from multimatrix.plan.model import DecoderSizes

Row = dict[str, Any]


def write_page(path: Path, planned: Sequence[DecoderSizes], rows: Sequence[Row], question: Question) -> None:
    """Write the page to `path`, whole or not at all.

    rows: of `answer.answer`, for every model at every context.

    Raises:
        OSError: the file cannot be written.
    """
    write_text(path, render(planned, rows, question))


def render(planned: Sequence[DecoderSizes], rows: Sequence[Row], question: Question) -> str:
    """The page; speeds against context are those of the layouts at the first context."""
    styles = figures.model_styles([sizes.name for sizes in planned])
    context, longest = rows[0]["context"], max(row["context"] for row in rows)
    batch = max(question.batches) if max(question.batches) > 1 else None
    first = [row for row in rows if row["context"] == context]

    def coloured(table: tables.Table) -> tuple[list[str], list[tuple[str, list[tables.Cell]]]]:
        return table.headings, [(styles[line.model].colour, line.cells) for line in table.lines]

    chips = []
    for place, chip in enumerate(question.chips):
        servings = [question.served(sizes, chip, context) for sizes in planned]
        chips.append(
            {
                "title": chip.title,
                "facts": tables.chip_facts(rows[0]["hardware"][place]),
                "table": coloured(tables.serving_table(rows, place)),
                "speed": inline(figures.speed_against_context(servings, styles, batch, longest)),
            }
        )
    speeds = tables.form_speed_table(first)
    return page_template("multimatrix.plan", "page.html.jinja").render(
        title="multimatrix plan",
        version=__version__,
        command=shlex.join(["multimatrix", *sys.argv[1:]]),
        headline=headline(rows),
        warnings=[
            f"{sizes.name}: {warning}" for sizes in planned if sizes.instead_of is None for warning in sizes.warnings
        ],
        context=f"{context:,}",
        batch=batch,
        question=question,
        parameters=coloured(tables.parameter_table(rows)),
        cache=coloured(tables.cache_table(rows)),
        costs=coloured(tables.cost_table(rows)),
        chips=chips,
        prices=coloured(tables.price_table(rows)),
        per_device=coloured(tables.device_table(rows)) if chips else None,
        copied=bool(chips) and tables.copies(rows),
        forms=coloured(tables.form_table(first)),
        form_speeds=speeds and coloured(speeds),
        searches=[
            (tables.search_title(row), coloured(tables.search_table(row)), tables.nothing_found(row))
            for row in rows
            if "search" in row
        ],
        kv_bytes=inline(figures.kv_bytes_against_context(planned, styles, question.chips, question.kv_bits, longest)),
        roofline=inline(figures.roofline(first, styles, question.chips)),
        reuse=inline(figures.forms_against_queries(planned, styles, context)),
    )


def headline(rows: Sequence[Mapping[str, Any]]) -> str:
    """The smallest cache in one sentence."""
    least = min(rows, key=lambda row: row["kv_bytes_per_token"])
    most = max(rows, key=lambda row: row["kv_bytes_per_token"])
    says = f"{least['model']} keeps {least['kv_bytes_per_token']:,} bytes of cache a token"
    if most["kv_bytes_per_token"] == least["kv_bytes_per_token"]:
        return f"{says}."
    return f"{says}, {most['kv_bytes_per_token'] / least['kv_bytes_per_token']:.3g} times less than {most['model']}."
