"""A comparison as people read it: report.html, a table for the terminal, and results.csv.

Each table is a list of `Column`s, and a column's `cell` is the one place where its numbers become text; the
report and the terminal show the same cells.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.table import Table
from rich.text import Text

from multimatrix.compare import figures
from multimatrix.files import write_text
from multimatrix.pages.drawing import display_name, format_bytes, inline, style_of
from multimatrix.pages.frame import page_template
from multimatrix.words import number

Row = dict[str, Any]
SHOWN = 5  # reasons of failed runs above the tables
# Seconds after which a browser reads the page again while runs are under way.
REFRESH = 20
STATUSES = ("running", "waiting", "done", "failed", "stopped", "missing")


class Cell(NamedTuple):
    """Text and its kind: "", "alarm", "quiet" or a verdict; a CSS class in HTML, a style in the terminal."""

    text: str
    kind: str = ""


class Column(NamedTuple):
    """A heading, in which `{baseline}` is filled in, and the row's text below it.

    needs: a key without which, in every row, the column is left out.
    """

    heading: str
    cell: Callable[[Row], Cell | str]
    terminal: bool = True
    needs: str | None = None


def percent(fraction: float | None, digits: int = 1, sign: bool = False) -> str:
    """`12.5 %` for 0.125; a dash for None."""
    return "–" if fraction is None else f"{number(100 * fraction, digits, sign)} %"


def duration(seconds: float | None) -> str:
    """`45 s`, `12 min`, `3 h 05 min`; a dash for None."""
    if seconds is None:
        return "–"
    if seconds < 100:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def _short(count: int | None) -> str:
    """`940 k`, `12.34 M`: counts of parameters and tokens."""
    if count is None or count < 10_000:
        return number(count)
    scale, unit = next((s, u) for s, u in ((1e9, "B"), (1e6, "M"), (1e3, "k")) if count >= s)
    return f"{count / scale:.4g} {unit}"


def _bytes_cell(row: Row) -> Cell:
    stated, counted = row.get("kv_bytes_per_token"), row.get("kv_bytes_per_token_counted")
    if _disagrees(row):
        return Cell(f"{format_bytes(stated)} ≠ {format_bytes(counted)}", "alarm")
    return Cell(format_bytes(stated))


def _counted_cell(row: Row) -> Cell:
    if _disagrees(row):
        return Cell("disagrees", "alarm")
    counted = row.get("kv_bytes_per_token_counted")
    return Cell("not counted", "quiet") if counted is None else Cell("agrees")


def _width_cell(row: Row) -> str:
    return row.get("feed_forward", "").replace(" x ", "×") or number(row.get("intermediate_size"))


def _statistic(key: str, part: str, digits: int) -> Callable[[Row], str]:
    return lambda row: number((row.get(key) or {}).get(part), digits)


def _difference_cell(row: Row) -> str:
    return number(None if row.get("verdict") == "baseline" else row.get("difference"), 4, sign=True)


def _verdict_cell(row: Row) -> Cell:
    verdict = row.get("verdict")
    return Cell(verdict, verdict.replace(" ", "-")) if verdict else Cell("–", "quiet")


def _share(row: Row) -> float | None:
    """What the row stores as a fraction of what MHA stores."""
    reduction = row.get("kv_reduction")
    return None if reduction is None else 1 - reduction


def _judged(results: dict[str, Any]) -> list[Row]:
    """The rows with a finite loss to set against the baseline's, without the baseline."""
    rows = [row for row in results.get("rows") or [] if row["variant"] != results.get("baseline")]
    return [row for row in rows if row.get("difference") is not None and math.isfinite(row["difference"])]


def _disagrees(row: Row) -> bool:
    counted = row.get("kv_bytes_per_token_counted")
    return counted is not None and counted != row.get("kv_bytes_per_token")


QUALITY = (
    Column("variant", lambda row: display_name(row["variant"])),
    Column("heads x dim", lambda row: (row.get("shape") or "–").replace(" x ", "×")),
    Column("KV per token", _bytes_cell),
    Column("in storage", _counted_cell, terminal=False),
    Column("of MHA", lambda row: percent(_share(row))),
    Column("seeds", lambda row: number(len(row.get("seeds") or []))),
    Column("valid. loss", _statistic("validation_loss", "mean", 4)),
    Column("spread", _statistic("validation_loss", "spread", 4)),
    Column("vs {baseline}", _difference_cell),
    Column("margin", lambda row: number(row.get("margin"), 4), terminal=False),
    Column("verdict", _verdict_cell),
)
COST = (
    Column("variant", lambda row: display_name(row["variant"])),
    Column("params", lambda row: _short(row.get("parameters"))),
    Column("active", lambda row: _short(row.get("active_parameters")), needs="active_parameters"),
    Column("vs {baseline}", lambda row: percent(row.get("parameter_mismatch"), 2, sign=True)),
    Column("of which attention", lambda row: _short(row.get("attention_parameters")), terminal=False),
    Column("FFN width", _width_cell, terminal=False),
    Column("rank", lambda row: number(row.get("total_effective_rank"))),
    Column("perplexity", _statistic("perplexity", "mean", 3), terminal=False),
    Column("bits per byte", _statistic("bits_per_byte", "mean", 4), terminal=False),
    Column("train tok/s", lambda row: number(row.get("train_tokens_per_second"))),
    Column("decode tok/s", lambda row: number(row.get("decode_tokens_per_second"))),
    Column("peak memory", lambda row: format_bytes(row.get("peak_memory_bytes"))),
    Column("time", lambda row: duration(row.get("wall_seconds"))),
)
TERMINAL_STYLES = {
    "alarm": "bold red",
    "quiet": "dim",
    "better": "green",
    "worse": "yellow",
    "tie": "cyan",
    "baseline": "dim",
}


def headline(results: dict[str, Any]) -> str:
    """The answer in one sentence: how much the smallest cache that holds up stores, and at what loss.

    Holding up is a tie or better; where no variant does, or none was judged, the smallest cache is named.
    Variants whose stated and counted bytes disagree cannot be the answer.
    """
    name = display_name(results.get("baseline") or "the baseline")
    sound = [row for row in _judged(results) if not _disagrees(row) and _share(row) is not None]
    if not sound:
        return f"No variant can be set against {name} yet."
    holding = [row for row in sound if row.get("verdict") in ("tie", "better")]
    row = min(holding or sound, key=lambda row: (row["kv_bytes_per_token"], row["difference"]))
    endings = {
        "tie": "a tie at this spread.",
        "better": f"better by more than the margin of {number(row.get('margin'), 4)}.",
        "worse": f"worse by more than the margin of {number(row.get('margin'), 4)}.",
    }
    return (
        f"{display_name(row['variant'])} stores {percent(_share(row))} of MHA's cache; its loss is "
        f"{number(abs(row['difference']), 4)} {'above' if row['difference'] > 0 else 'below'} {name}'s, "
        f"{endings.get(row.get('verdict') or '', 'with one seed, so no verdict.')}"
    )


def tally(results: dict[str, Any]) -> str:
    """How all variants did: `Against MHA: 1 better, 3 tie, 1 worse.`; empty where there is no verdict."""
    verdicts = [row.get("verdict") for row in _judged(results)]
    words = {"better": "better", "tie": "tie", "worse": "worse", "one seed": "with one seed only"}
    counts = [f"{verdicts.count(verdict)} {word}" for verdict, word in words.items() if verdict in verdicts]
    name = display_name(results.get("baseline") or "the baseline")
    return f"Against {name}: {', '.join(counts)}." if counts else ""


def alarms(results: dict[str, Any]) -> list[str]:
    """What a reader must know before any number: bytes that disagree, and runs that failed or are missing."""
    found = [
        f"{display_name(row['variant'])} states {number(row.get('kv_bytes_per_token'))} bytes of cache per "
        f"token, but {number(row['kv_bytes_per_token_counted'])} were counted in storage. "
        "Its saving is not proven."
        for row in results.get("rows") or []
        if _disagrees(row)
    ]
    runs = results.get("runs") or []
    failed = [run for run in runs if run.get("status") == "failed"]
    found += [
        f"{display_name(run['variant'])} with seed {run['seed']} failed: {run['reason']}" for run in failed[:SHOWN]
    ]
    if len(failed) > SHOWN:
        found.append(f"{len(failed) - SHOWN} more failed; the reasons are below, under Runs.")
    done = sum(run.get("status") == "done" for run in runs)
    if not results.get("running") and (done < len(runs) or not results.get("complete")):
        found.append(f"Incomplete: {done} of {len(runs)} runs are done.")
    return found


def console_table(results: dict[str, Any]) -> Table:
    """The headline, warnings, both tables and what they cannot show, for a terminal of 80 columns or more."""
    page = Table.grid(padding=(1, 0))
    page.add_row(Text(f"{headline(results)} {tally(results)}", style="bold"))
    if found := alarms(results):
        page.add_row(Text("\n".join(found), style="bold red"))
    for columns in (QUALITY, COST):
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
        shown = [column for column in _applicable(columns, results) if column.terminal]
        for place, heading in enumerate(_headings(shown, results)):
            left = place == 0 or heading == "verdict"
            table.add_column(Text(heading), justify="left" if left else "right", vertical="bottom", overflow="fold")
        for row in results.get("rows") or []:
            cells = _cells(shown, row)
            table.add_row(*(Text(cell.text, style=TERMINAL_STYLES.get(cell.kind, "")) for cell in cells))
        page.add_row(table)
    if limits := results.get("cannot_show"):
        page.add_row(Text("\n".join(["This cannot show", *(f"- {limit}" for limit in limits)])))
    return page


def write_csv(results: dict[str, Any], path: Path) -> None:
    """Write one line per variant, numbers unrounded; what has seeds gets `_mean`, `_spread` and `_seed<k>`.

    Raises:
        OSError: the file cannot be written.
    """
    flat = [_flat_row(row) for row in results.get("rows") or []]
    columns = list(dict.fromkeys(key for row in flat for key in row))
    text = StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    write_text(path, text.getvalue())


def render(results: dict[str, Any], directory: Path) -> str:
    """The report as one HTML document that needs no network, no scripts and no other file.

    `directory` is the run directory; the curves are read from the `metrics.jsonl` files below it.
    """
    rows, config = results.get("rows") or [], results.get("config") or {}
    return page_template("multimatrix.compare", "report.html.jinja").render(
        refresh=REFRESH if results.get("running") else None,
        states=count_states(results.get("runs") or []),
        title=results.get("title") or "multimatrix compare",
        version=results.get("version") or "",
        created=results.get("created") or "",
        command=results.get("command") or "",
        headline=headline(results),
        tally=tally(results),
        alarms=alarms(results),
        experts=bool(config.get("num_experts")),
        shared_expert=bool(config.get("shared_expert_size")),
        matched=config.get("match") != "none",
        can_show=results.get("can_show") or [],
        cannot_show=results.get("cannot_show") or [],
        tables={
            name: (
                _headings(columns, results),
                [(style_of(row["variant"])[0], _cells(columns, row)) for row in rows],
            )
            for name, columns in (("quality", QUALITY), ("cost", _applicable(COST, results)))
        },
        loss_against_tokens=inline(figures.loss_against_tokens(results, directory)),
        loss_against_kv_bytes=inline(figures.loss_against_kv_bytes(results)),
        runs=[
            {"step": 0, "steps": 0} | run | {"name": display_name(run["variant"])} for run in results.get("runs") or []
        ],
        facts={key: _flatten(results.get(key) or {}) for key in ("corpus", "config", "environment")},
    )


def count_states(runs: list[dict[str, Any]]) -> dict[str, int]:
    """How many runs are running, waiting, done and so on, without those of which there are none."""
    statuses = [run.get("status") for run in runs]
    return {status: statuses.count(status) for status in STATUSES if status in statuses}


def write_report(results: dict[str, Any], directory: Path) -> Path:
    """Write `render(results, directory)` to `directory/report.html` and return that path.

    Raises:
        OSError: the file cannot be written.
    """
    path = directory / "report.html"
    write_text(path, render(results, directory))
    return path


def _applicable(columns: tuple[Column, ...], results: dict[str, Any]) -> list[Column]:
    """The columns that have something to show."""
    rows = results.get("rows") or []
    return [column for column in columns if column.needs is None or any(column.needs in row for row in rows)]


def _headings(columns: tuple[Column, ...] | list[Column], results: dict[str, Any]) -> list[str]:
    name = display_name(results.get("baseline") or "baseline")
    return [column.heading.format(baseline=name) for column in columns]


def _cells(columns: tuple[Column, ...] | list[Column], row: Row) -> list[Cell]:
    cells = (column.cell(row) for column in columns)
    return [cell if isinstance(cell, Cell) else Cell(cell, "quiet" if cell == "–" else "") for cell in cells]


def _flatten(value: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as `training.learning_rate: 0.001`."""
    flat: dict[str, str] = {}
    for key, item in value.items():
        if isinstance(item, dict):
            flat |= _flatten(item, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = ", ".join(map(str, item)) if isinstance(item, list) else str(item)
    return flat


def _flat_row(row: Row) -> dict[str, Any]:
    """A row of the results without nesting."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if key in ("validation_loss", "perplexity", "bits_per_byte"):
            value = value or {}
            flat[f"{key}_mean"], flat[f"{key}_spread"] = value.get("mean"), value.get("spread")
            for seed, seed_value in zip(row.get("seeds") or [], value.get("values") or [], strict=False):
                flat[f"{key}_seed{seed}"] = seed_value
        else:
            flat[key] = " ".join(map(str, value)) if isinstance(value, list) else value
    return flat
