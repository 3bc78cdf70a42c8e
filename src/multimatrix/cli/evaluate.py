"""`multimatrix evaluate`: benchmarks through lm-evaluation-harness, and perplexity."""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from multimatrix.cli.options import Json, check_device, refuse_without, split_labels
from multimatrix.errors import InputError

DTYPES = ("auto", "float64", "float32", "float16", "bfloat16")


def evaluate(
    ctx: typer.Context,
    model: Annotated[str | None, typer.Argument(help="Folder of a saved model with its tokenizer.")] = None,
    texts: Annotated[
        list[str] | None, typer.Argument(help="More files for --perplexity.", metavar="[FILES]...")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Comma-separated, for example piqa,hellaswag; `list` shows what there is.")
    ] = None,
    perplexity: Annotated[
        list[str] | None, typer.Option(metavar="FILES", help="Files and folders: txt, md, jsonl, parquet, packed too.")
    ] = None,
    data_dir: Annotated[
        str | None,
        typer.Option(envvar="MULTIMATRIX_BENCH", help="Folder with the tasks' rows as jsonl; else lm-eval's own data."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="First rows of each task and subtask.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Examples per question; default: lm-eval's.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of tasks that generate; default: lm-eval's.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random in tasks; default: lm-eval's.")] = None,
    stride: Annotated[int | None, typer.Option(min=1, help="Of the sliding window; default: half the context.")] = None,
    max_bytes: Annotated[int | None, typer.Option(min=1, help="Score only the first so many bytes of text.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens the model may see; default: its positions.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences at once; changes no score.")] = 8,
    dtype: Annotated[str, typer.Option(help="auto (as saved), float64, float32, float16 or bfloat16.")] = "auto",
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, ...")] = "cpu",
    out: Annotated[str | None, typer.Option(help="Write the results to this JSON file too.")] = None,
    as_json: Json = False,
) -> None:
    """Score a saved model: benchmarks (--tasks), the perplexity of texts (--perplexity), or both."""
    if tasks is not None and importlib.util.find_spec("lm_eval") is None:
        raise InputError("--tasks needs lm-evaluation-harness: pip install 'multimatrix[lm-eval]'")
    if tasks == "list":
        _print_names()
        return
    if model is None:
        raise InputError("give the folder of a saved model, for example runs/demo/runs/mfa-seed0/model")
    names, sources = split_labels(tasks or ""), [*(perplexity or ()), *(texts or ())]
    if not names:
        refuse_without(ctx, "--tasks", "data_dir", "limit", "num_fewshot", "max_new_tokens", "seed")
    if not perplexity:
        refuse_without(ctx, "--perplexity", "stride", "max_bytes", "texts")
    if not (names or perplexity):
        raise InputError("give --tasks, --perplexity or both; --tasks list shows the tasks")
    if dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    if out is not None and Path(out).is_dir():
        raise InputError(f"{out} is a folder; give --out a file, for example {Path(out) / 'results.json'}")
    check_device(device)
    results = _run(
        model,
        names,
        sources,
        context=context,
        stride=stride,
        max_bytes=max_bytes,
        task_settings={
            "data_dir": data_dir,
            "limit": limit,
            "num_fewshot": num_fewshot,
            "max_new_tokens": max_new_tokens,
            "seed": seed,
        },
        batch_size=batch_size,
        dtype=dtype,
        device=device,
    )
    if out is not None:
        from multimatrix.files import write_json

        write_json(Path(out), results)
    if as_json:
        print(json.dumps(results, indent=2))
    else:
        _print_results(results)


def _run(
    folder: str,
    names: list[str],
    sources: list[str],
    *,
    context: int | None,
    stride: int | None,
    max_bytes: int | None,
    task_settings: dict[str, Any],
    batch_size: int,
    dtype: str,
    device: str,
) -> dict[str, Any]:
    """Everything that was asked for, as JSON."""
    import dataclasses

    import torch
    from transformers.utils import logging

    from multimatrix.data.corpus import read_documents
    from multimatrix.environment import environment
    from multimatrix.evaluate import loading
    from multimatrix.evaluate import perplexity as text

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if sources:  # before the model is loaded: a wrong name shall not cost minutes
        name, documents = read_documents(sources)
        documents = documents if max_bytes is None else text.cut(documents, max_bytes)
    model, tokenizer = loading.load(folder, dtype if dtype == "auto" else getattr(torch, dtype), device)
    positions = loading.positions(model)
    context = loading.context_of(model, context)
    results: dict[str, Any] = {
        "command": shlex.join(["multimatrix", *sys.argv[1:]]),
        "model": {
            "folder": folder,
            "model_type": model.config.model_type,
            "attention": getattr(model.config, "attention", None),
            "parameters": model.num_parameters(),
            "dtype": str(model.dtype).removeprefix("torch."),
            "max_position_embeddings": positions,
            "context": context,
        },
        "environment": environment(model.device),
    }
    if names:
        from multimatrix.evaluate.harness import run_tasks

        results["tasks"] = run_tasks(model, tokenizer, names, context=context, batch_size=batch_size, **task_settings)
    if sources:
        scored = text.perplexity(
            model,
            tokenizer,
            documents,
            context=context,
            stride=stride if stride is not None else max(context // 2, 1),
            batch_size=batch_size,
        )
        results["perplexity"] = {"text": name, "max_bytes": max_bytes, **dataclasses.asdict(scored)}
    return results


def _table(title: str, left: int, *headers: str) -> Any:
    """A table whose first `left` columns hold words and the others numbers."""
    from rich.table import Table

    table = Table(box=None, title=title, title_justify="left", header_style="bold", pad_edge=False)
    for i, header in enumerate(headers):
        table.add_column(header, justify="left" if i < left else "right", overflow="fold")
    return table


def _print_names() -> None:
    from rich.console import Console

    from multimatrix.evaluate.harness import NAMES
    from multimatrix.evaluate.tasks import SOURCES

    table = _table(
        "tasks that can read local rows (--data-dir)", 3, "name", "in lm-eval", "files, each .jsonl or .jsonl.gz"
    )
    for name, task in NAMES.items():
        source = SOURCES[task.data_set]
        table.add_row(name, task.task, ", ".join(source.files.values()).replace("|", " or "))
    Console().print(table)
    print("Every other name that lm-eval knows works too and fetches its rows from the hub.")


def _print_results(results: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console()
    model = results["model"]
    console.print(
        f"{model['folder']}: {model['model_type']}, {model['parameters']:,} parameters, {model['dtype']} "
        f"on {results['environment']['device']}, context {model['context']:,}",
        highlight=False,
        soft_wrap=True,
    )
    positions = model["max_position_embeddings"]
    if positions is not None and model["context"] > positions:
        console.print(f"The context is beyond the model's {positions:,} positions.", style="yellow", highlight=False)
    if "tasks" in results:
        _print_tasks(console, results["tasks"])
    if "perplexity" in results:
        _print_perplexity(console, results["perplexity"])


def _print_tasks(console: Any, tasks: dict[str, Any]) -> None:
    settings = tasks["settings"]
    table = _table("", 2, "task", "metric", "score", "stderr", "shots", "rows", "of", "version")
    for name, score in tasks["scores"].items():
        rows = (f"{score['num_fewshot']}", f"{score['rows']:,}", f"{score['rows_available']:,}", f"{score['version']}")
        for metric in score["metrics"]:
            label = metric["metric"] + ("" if metric["filter"] == "none" else f" ({metric['filter']})")
            table.add_row(name, label, _number(metric["value"]), _number(metric["stderr"]), *rows)
    console.print(table)
    seeds = ", ".join(f"{name} {seed}" for name, seed in settings["seeds"].items())
    console.print(
        f"lm-eval {settings['lm_eval']}, limit {settings['limit'] or 'none'}, seeds: {seeds}",
        highlight=False,
        soft_wrap=True,
    )
    for name, score in tasks["scores"].items():
        for difference in score["differences"]:
            console.print(f"{name}: {difference}", highlight=False, soft_wrap=True)
    if tasks["truncated_requests"]:
        console.print(
            f"{tasks['truncated_requests']:,} of {tasks['requests']:,} requests were longer than the context "
            f"of {settings['context']:,} tokens and lost their beginning.",
            style="yellow",
            highlight=False,
            soft_wrap=True,
        )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.4f}" if abs(value) < 1e6 else f"{value:.4g}"


def _print_perplexity(console: Any, scored: dict[str, Any]) -> None:
    table = _table(
        f"perplexity of {scored['text']}", 0, "documents", "tokens", "bytes", "nats/token", "bits/byte", "perplexity"
    )
    counts = (f"{scored[name]:,}" for name in ("documents", "tokens", "bytes"))
    scores = (_number(scored[name]) for name in ("nats_per_token", "bits_per_byte", "perplexity"))
    table.add_row(*counts, *scores)
    console.print(table)
    console.print(
        f"window {scored['context']:,}, stride {scored['stride']:,}, every document after {scored['prefix']}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    if scored["unknown_tokens"]:
        console.print(
            f"{scored['unknown_tokens']:,} tokens are unknown to the tokenizer: bits per byte are too low.",
            style="yellow",
            highlight=False,
        )
    table = _table("loss by position in the document", 0, "position", "tokens", "nats/token")
    for bucket in scored["by_position"]:
        first, last = bucket["first"], bucket["last"]
        place = f"{first:,}" if first == last else f"{first:,} to {last:,}"
        table.add_row(place, f"{bucket['tokens']:,}", _number(bucket["nats_per_token"]))
    console.print(table)
