"""The tables of a plan, made once for the terminal and for the page. No torch.

Every table is made from the rows of `answer.answer`; a line belongs to a model, whose colour the page gives it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from multimatrix.words import number, short_count, short_tokens

Row = dict[str, Any]


class Cell(NamedTuple):
    """Text and its kind, a CSS class."""

    text: str
    kind: str = ""


class Line(NamedTuple):
    """The model that a line belongs to, and its cells."""

    model: str
    cells: list[Cell]


class Table(NamedTuple):
    headings: list[str]
    lines: list[Line]


def _table(headings: list[str], lines: Iterator[tuple[str, list[str | Cell]]]) -> Table:
    made = [Line(model, [c if isinstance(c, Cell) else Cell(c) for c in cells]) for model, cells in lines]
    return Table(headings, made)


def once_per_model(rows: Sequence[Row]) -> list[Row]:
    """The first row of every model."""
    return list({row["model"]: row for row in reversed(rows)}.values())[::-1]


def labels(rows: Sequence[Row]) -> list[str]:
    """The model's name, with the context where there are several."""
    several = len({row["context"] for row in rows}) > 1
    return [row["model"] + (f" at {short_tokens(row['context'])}" if several else "") for row in rows]


def parameter_table(rows: Sequence[Row]) -> Table:
    models = once_per_model(rows)
    parts = [part for part in models[0]["parameters_by_part"] if any(row["parameters_by_part"][part] for row in models)]

    def lines() -> Iterator[tuple[str, list[str | Cell]]]:
        for row in models:
            counts = [row["parameters"], row["active_parameters"], *(row["parameters_by_part"][part] for part in parts)]
            yield row["model"], [row["model"], *map(short_count, counts)]

    return _table(["model", "parameters", "active", *(part.replace("_", " ") for part in parts)], lines())


def cache_table(rows: Sequence[Row]) -> Table:
    def lines() -> Iterator[tuple[str, list[str | Cell]]]:
        for label, row in zip(labels(rows), rows, strict=True):
            per_token = row["kv_bytes_per_token_by_bits"]
            scales = row["kv_scale_bytes_per_token_by_bits"]
            kv = [number(count) + (f" + {scales[bits]:,}" if scales[bits] else "") for bits, count in per_token.items()]
            ranks = [number(row["total_effective_rank"]), number(row["shared_latent_dim"])]
            yield row["model"], [label, *ranks, *kv, short_count(row["kv_stored_bytes"])]

    bits = [f"bytes a token, {bits} bit" for bits in rows[0]["kv_bytes_per_token_by_bits"]]
    stored = f"one sequence, {rows[0]['kv_bits']} bit"
    return _table(["KV cache", "total effective rank", "shared latent", *bits, stored], lines())


def cost_table(rows: Sequence[Row]) -> Table:
    keys = {
        "KV bytes read": "kv_bytes",
        "attention core": "attention_core_flops",
        "linear": "linear_flops",
        "feed-forward": "feed_forward_flops",
        "router": "router_flops",
        "output head": "output_head_flops",
        "all": "flops",
    }

    def lines() -> Iterator[tuple[str, list[str | Cell]]]:
        for label, row in zip(labels(rows), rows, strict=True):
            counts = [short_count(row[key]) for key in keys.values()]
            intensity, prefill = f"{row['arithmetic_intensity']:.1f}", short_count(row["prefill_flops"])
            yield row["model"], [label, *counts, intensity, prefill]

    return _table(["model", *keys, "core FLOPs a KV byte", "prefill"], lines())


def price_table(rows: Sequence[Row]) -> Table:
    names = [chip["hardware"] for chip in rows[0]["hardware"]]
    headings = [f"{name}: {part}" for name in names for part in ("attention", "its core waits for", "rest")]

    def lines() -> Iterator[tuple[str, list[str | Cell]]]:
        for label, row in zip(labels(rows), rows, strict=True):
            cells: list[str | Cell] = [label]
            for chip in row["hardware"]:
                cells += [number(chip["attention_dollars"], 3), _bound(chip["bound"]), number(chip["other_dollars"], 3)]
            yield row["model"], cells

    return _table(["$ per million tokens", *headings], lines())


def _bound(bound: str) -> Cell:
    return Cell(bound, bound)


def serving_table(rows: Sequence[Row], place: int, *, narrow: bool = False) -> Table:
    """Predictions on the accelerator at `place`; narrow: what the parts wait for as three letters, without prefill."""
    headings = ["", "devices", "batch", "ms/token", "tokens/s", "$/M tokens"]
    headings += (
        ["waits", "longest"] if narrow else ["core waits for", "linear", "rest", "longest context", "prefill, ms"]
    )

    def lines() -> Iterator[tuple[str, list[str | Cell]]]:
        for label, row in zip(labels(rows), rows, strict=True):
            chip = row["hardware"][place]
            for prediction in chip["predictions"]:
                largest = " *" if prediction["batch"] == chip["largest_batch"] else ""
                batch = number(prediction["batch"]) + largest
                yield row["model"], [label, layout_name(chip["layout"]), batch, *_prediction(prediction, chip, narrow)]

    return _table(headings, lines())


def _prediction(prediction: Row, chip: Row, narrow: bool) -> list[str | Cell]:
    """The cells behind batch; of what does not fit, how many devices it needs."""
    if not prediction["fits"]:
        dash, needed = Cell("–", "quiet"), prediction["devices_needed"]
        says = Cell("fits nowhere" if needed is None else f"needs {needed:,}", "alarm")
        return [*[dash] * 4, says] if narrow else [*[dash] * 6, says, dash]
    bounds = [prediction[f"{part}_bound"] for part in ("core", "linear", "rest")]
    longest = prediction["longest_context"]
    return [
        number(prediction["seconds_per_token"] * 1e3, 2),
        number(prediction["tokens_per_second"]),
        number(prediction["dollars_per_million_tokens"], 3),
        *(["".join(bound[0] for bound in bounds)] if narrow else map(_bound, bounds)),
        "unlimited" if longest is None else short_count(longest),
        *([] if narrow else [number(chip["prefill_seconds"] * 1e3)]),
    ]


def layout_name(layout: Row) -> str:
    """`8 (T4 A2)`: four ways of tensor and two of attention-data parallelism."""
    devices = layout["tensor"] * layout["attention_data"] * layout["data"]
    kinds = {"T": layout["tensor"], "A": layout["attention_data"], "D": layout["data"]}
    ways = " ".join(f"{letter}{count}" for letter, count in kinds.items() if count > 1)
    return f"{devices:,}" + (f" ({ways})" if ways else "")


def chip_facts(chip: Row) -> str:
    """`80 GB, 3.35 TB/s, 990 TFLOP/s at 16 bit, $2.00 an hour`."""
    peaks = [f"{peak / 1e12:,.0f} TFLOP/s at {bits} bit" for bits, peak in chip["flops_per_second"].items()]
    price = [] if chip["dollars_per_hour"] is None else [f"${chip['dollars_per_hour']:.2f} an hour"]
    memory = [f"{chip['memory_bytes'] / 1e9:,.0f} GB", f"{chip['bytes_per_second'] / 1e12:.2f} TB/s"]
    return ", ".join([*memory, *peaks, *price])


def device_table(rows: Sequence[Row]) -> Table:
    def lines() -> Iterator[tuple[str, list[str | Cell]]]:
        for row in once_per_model(rows):
            for kind in row["per_device"]:
                copies = kind["copies"]
                yield (
                    row["model"],
                    [
                        row["model"],
                        f"{kind['parallelism'].replace('_', ' ')} {kind['devices']}",
                        f"{kind['weight_bytes'] / 1e9:,.1f} GB",
                        number(kind["kv_bytes_per_token"]),
                        kind["sequences"],
                        number(kind["largest_batch"]),
                        "once" if copies == 1 else Cell(f"on {copies} devices", "arithmetic"),
                    ],
                )

    return _table(["", "parallelism", "weights", "KV/token", "sequences", "max.\nbatch", "cached"], lines())


def copies(rows: Sequence[Row]) -> bool:
    """Whether a kind of parallelism keeps a cached element on several devices."""
    return any(kind["copies"] > 1 for row in rows for kind in row["per_device"])


def form_table(rows: Sequence[Row]) -> Table:
    """FLOPs of attention by form and number of query tokens, all at one context."""
    queries = [one["queries"] for one in rows[0]["forms"]["by_queries"]]

    def lines() -> Iterator[tuple[str, list[str | Cell]]]:
        for row in rows:
            forms, by_queries = row["forms"], row["forms"]["by_queries"]
            if not forms["expands"]:
                counts = [short_count(one["absorbed_flops"]) for one in by_queries]
                yield row["model"], [f"{row['model']}, as cached", number(row["kv_bytes_per_token"]), *counts]
                continue
            for form in ("absorbed", "recomputed", "kept"):
                kv = forms["kept_kv_bytes_per_token"] if form == "kept" else row["kv_bytes_per_token"]
                cells: list[str | Cell] = [f"{row['model']}, {form}", number(kv)]
                for one in by_queries:
                    flops = one[f"{form}_flops"]
                    best = form != "kept" and flops == min(one["absorbed_flops"], one["recomputed_flops"])
                    cells.append(Cell(short_count(flops), "better" if best else ""))
                yield row["model"], cells

    headings = [f"{count:,} {'query' if count == 1 else 'queries'}" for count in queries]
    return _table(["FLOPs of attention", "KV bytes a token", *headings], lines())


def form_speed_table(rows: Sequence[Row]) -> Table | None:
    """From how many query tokens a form is faster than the absorbed one, by accelerator; None where none expands."""
    shown = [row for row in rows if row["forms"]["expands"]]
    if not shown or not shown[0]["hardware"]:
        return None
    names = [chip["hardware"] for chip in shown[0]["hardware"]]

    def lines() -> Iterator[tuple[str, list[str | Cell]]]:
        for row in shown:
            cells: list[str | Cell] = [row["model"]]
            for chip in row["hardware"]:
                cells += [_from(chip["forms"][f"{form}_faster_from"]) for form in ("recomputed", "kept")]
            yield row["model"], cells

    headings = [f"{name}: {form}" for name in names for form in ("recomputed", "kept")]
    return _table(["faster than absorbed, from", *headings], lines())


def _from(queries: int | None) -> str:
    return "never" if queries is None else f"{queries:,}"


def search_title(row: Row) -> str:
    """What a search was for: `qwen3-32b with a cache of at most 10 %, no more parameters`."""
    found, wanted = row["search"], []
    if found["target_kv"] is not None:
        wanted.append(f"a cache of at most {100 * found['target_kv']:g} %")
    if found["hardware"]:
        wanted.append(
            f"batch {found['batch']:,} at {row['context']:,} tokens on {found['devices']} x {found['hardware']}"
        )
    return f"{row['model']} with {' and '.join(wanted)}, no more parameters"


def nothing_found(row: Row) -> str:
    """That a search found nothing, and the way out."""
    if row["search"]["hardware"] is None:
        return "no MFA or MFA-KR is that small; allow a larger share"
    return "no MFA or MFA-KR fits; take more devices, fewer bits or a shorter context"


def search_table(row: Row) -> Table:
    """What a search has found."""
    fast = row["search"]["hardware"] is not None
    headings = ["", "heads", "C", "R", "rank", "KV/token", "of own", "weights"]
    headings += ["ms/token", "max.\nbatch"] if fast else []

    def lines() -> Iterator[tuple[str, list[str | Cell]]]:
        for one in row["search"]["found"]:
            yield (
                row["model"],
                [
                    one["variant"],
                    *(number(one[key]) for key in ("num_heads", "head_dim", "query_rank", "total_effective_rank")),
                    number(one["kv_bytes_per_token"]),
                    f"{100 * one['of_own_kv']:.1f} %",
                    short_count(one["attention_parameters"]),
                    *((number(one["seconds_per_token"] * 1e3, 2), number(one["largest_batch"])) if fast else ()),
                ],
            )

    return _table(headings, lines())
