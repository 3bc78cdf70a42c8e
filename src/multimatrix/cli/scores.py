"""What `multimatrix evaluate` prints."""

from __future__ import annotations

from typing import Any

from multimatrix.cli.options import plain_table


def print_names() -> None:
    """The tasks that can read local rows, and the names of their files."""
    from rich.console import Console

    from multimatrix.evaluate.tasks import NAMES, SOURCES

    console = Console()
    headers = ("name", "in lm-eval", "files, each .jsonl or .jsonl.gz")
    table = plain_table("tasks that can read local rows (--data-dir)", headers)
    for name, task in NAMES.items():
        source = SOURCES[task.data_set]
        table.add_row(name, task.task, ", ".join(source.files.values()).replace("|", " or "))
    console.print(table)
    _line(console, "Every other name that lm-eval knows works too and fetches its rows from the hub.")


def print_results(results: dict[str, Any]) -> None:
    """The results of `evaluate_folder` as tables."""
    from rich.console import Console

    console, model = Console(), results["model"]
    _line(
        console,
        f"{model['folder']}: {model['model_type']}, {model['parameters']:,} parameters, {model['dtype']} "
        f"on {results['environment']['device']}, context {model['context']:,}",
    )
    positions = model["max_position_embeddings"]
    if positions is not None and model["context"] > positions:
        _line(console, f"The context is beyond the model's {positions:,} positions.", style="yellow")
    if "tasks" in results:
        _print_tasks(console, results["tasks"])
    if "perplexity" in results:
        _print_perplexity(console, results["perplexity"])


def _print_tasks(console: Any, tasks: dict[str, Any]) -> None:
    settings = tasks["settings"]
    numbers = ("score", "stderr", "shots", "rows", "of", "version")
    table = plain_table("", ("task", "metric", *numbers), right=numbers)
    for name, score in tasks["scores"].items():
        rows = (f"{score['num_fewshot']}", f"{score['rows']:,}", f"{score['rows_available']:,}", f"{score['version']}")
        for metric in score["metrics"]:
            label = metric["metric"] + ("" if metric["filter"] == "none" else f" ({metric['filter']})")
            table.add_row(name, label, _number(metric["value"]), _number(metric["stderr"]), *rows)
    console.print(table)
    seeds = ", ".join(f"{name} {seed}" for name, seed in settings["seeds"].items())
    _line(console, f"lm-eval {settings['lm_eval']}, limit {settings['limit'] or 'none'}, seeds: {seeds}")
    for name, score in tasks["scores"].items():
        for difference in score["differences"]:
            _line(console, f"{name}: {difference}")
    if tasks["truncated_requests"]:
        _line(
            console,
            f"{tasks['truncated_requests']:,} of {tasks['requests']:,} requests were longer than the context "
            f"of {settings['context']:,} tokens and lost their beginning.",
            style="yellow",
        )


def _print_perplexity(console: Any, scored: dict[str, Any]) -> None:
    headers = ("documents", "tokens", "bytes", "nats/token", "bits/byte", "perplexity")
    table = plain_table("", headers, right=headers)
    counts = (f"{scored[name]:,}" for name in ("documents", "tokens", "bytes"))
    scores = (_number(scored[name]) for name in ("nats_per_token", "bits_per_byte", "perplexity"))
    table.add_row(*counts, *scores)
    _line(console, f"perplexity of {scored['text']}", style="italic")
    console.print(table)
    _line(
        console, f"window {scored['context']:,}, stride {scored['stride']:,}, every document after {scored['prefix']}"
    )
    if scored["unknown_tokens"]:
        _line(
            console,
            f"{scored['unknown_tokens']:,} tokens are unknown to the tokenizer: bits per byte are too low.",
            style="yellow",
        )
    columns = ("position", "tokens", "nats/token")
    table = plain_table("", columns, right=columns)
    for bucket in scored["by_position"]:
        first, last = bucket["first"], bucket["last"]
        place = f"{first:,}" if first == last else f"{first:,} to {last:,}"
        table.add_row(place, f"{bucket['tokens']:,}", _number(bucket["nats_per_token"]))
    _line(console, "loss by position in the document", style="italic")
    console.print(table)


def _line(console: Any, text: str, style: str | None = None) -> None:
    """Print as it is: names of files and tokens may look like rich's markup, and a line is the terminal's to fold."""
    console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.4f}" if abs(value) < 1e6 else f"{value:.4g}"
