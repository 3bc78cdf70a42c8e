"""`multimatrix evaluate`: benchmarks through lm-evaluation-harness, and perplexity."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Annotated

import typer

from multimatrix.cli.options import (
    Json,
    check_device,
    quiet_transformers,
    refuse_without,
    split_labels,
    torch_dtype,
)
from multimatrix.cli.scores import print_names, print_results
from multimatrix.errors import InputError


def evaluate(
    ctx: typer.Context,
    model: Annotated[str | None, typer.Argument(help="Folder of a saved model with its tokenizer.")] = None,
    files: Annotated[list[str] | None, typer.Argument(help="More files for --perplexity.")] = None,
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
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**32 - 1, help="Of everything random in tasks; default: lm-eval's.")
    ] = None,
    stride: Annotated[int | None, typer.Option(min=1, help="Of the sliding window; default: half the context.")] = None,
    max_bytes: Annotated[int | None, typer.Option(min=1, help="Score only the first so many bytes of text.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens the model may see; default: its positions.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences at once; changes no score.")] = 8,
    dtype: Annotated[str, typer.Option(help="auto (as saved), float64, float32, float16 or bfloat16.")] = "auto",
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, ...")] = "cpu",
    out: Annotated[str | None, typer.Option(help="Write the results to this JSON file too.")] = None,
    as_json: Json = False,
) -> None:
    """Score a saved model on benchmarks, by perplexity, or both.

    Benchmarks (--tasks) run through lm-evaluation-harness; texts (--perplexity) are scored with a sliding window.
    """
    if tasks is not None and importlib.util.find_spec("lm_eval") is None:
        raise InputError("--tasks needs lm-evaluation-harness: pip install 'multimatrix[lm-eval]'")
    if tasks == "list":
        print_names()
        return
    if model is None:
        raise InputError("give the folder of a saved model, for example runs/demo/runs/mfa-seed0/model")
    names = split_labels(tasks or "")
    if not names:
        refuse_without(ctx, "--tasks", "data_dir", "limit", "num_fewshot", "max_new_tokens", "seed")
    if not perplexity:
        refuse_without(ctx, "--perplexity", "stride", "max_bytes", "files")
    if not (names or perplexity):
        raise InputError("give --tasks, --perplexity or both; --tasks list shows the tasks")
    precision = None if dtype == "auto" else torch_dtype(dtype)
    check_device(device)
    from multimatrix.evaluate.command import evaluate_folder
    from multimatrix.files import check_writable, write_json

    if out is not None:
        check_writable(Path(out))
    quiet_transformers()
    results = evaluate_folder(
        model,
        tasks=names,
        task_settings={
            "data_dir": data_dir,
            "limit": limit,
            "num_fewshot": num_fewshot,
            "max_new_tokens": max_new_tokens,
            "seed": seed,
        },
        texts=[*(perplexity or ()), *(files or ())],
        stride=stride,
        max_bytes=max_bytes,
        context=context,
        batch_size=batch_size,
        dtype=precision,
        device=device,
    )
    if as_json:
        print(json.dumps(results, indent=2))
    else:
        print_results(results)
    if out is not None:
        write_json(Path(out), results)
