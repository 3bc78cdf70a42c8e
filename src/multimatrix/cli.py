"""The command line: one function a command, heavy imports inside them."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import os
import sys
from typing import Annotated, Any

import typer

from multimatrix import __version__
from multimatrix.errors import InputError

app = typer.Typer(
    name="multimatrix",
    help="Attention that saves KV cache: MFA, MFA-KR and their peers, compared fairly.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Sizes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="LABEL.FIELD=VALUE", help="Set a size, for example mfa.num_heads=18; repeatable."),
]
Variants = Annotated[str, typer.Option(help="Comma-separated; NAME@TAG tells two settings of one variant apart.")]
Position = Annotated[str, typer.Option(help="Position encoding of every variant: rope, alibi or none.")]


def main() -> None:
    """Run the command line; what the user can mend is one sentence and exit status 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that has no × shows ? and the command goes on.
        sys.stdout.reconfigure(errors="replace")
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except InputError as error:
        print(f"multimatrix: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # `multimatrix ... | head` has read enough
        _drop_output()
        sys.exit(1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        _drop_output()
        place = error.filename or "the output"
        print(f"multimatrix: cannot write {place}: {error.strerror}; make room and run it again", file=sys.stderr)
        sys.exit(2)


def _drop_output() -> None:
    """Send what stdout still buffers nowhere: the interpreter would fail on it once more when it ends."""
    with contextlib.suppress(OSError):  # a stdout that is no file has nothing to fail on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@app.callback(invoke_without_command=True)
def version_option(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        print(f"multimatrix {__version__}")
        raise typer.Exit


@app.command()
def capacity(
    ctx: typer.Context,
    recipe: Annotated[str | None, typer.Option(help="Published sizes: paper-7b, paper-1b or step3.")] = None,
    hidden_size: Annotated[int, typer.Option(help="H, elements of the hidden vector.")] = 2048,
    layers: Annotated[int, typer.Option(help="Number of decoder layers.")] = 24,
    head_dim: Annotated[int, typer.Option(help="Head dim of MHA; the other variants' sizes follow.")] = 128,
    variants: Variants = "fpba,mha,gqa,mqa,mla,mfa,mfa_kr",
    position: Position = "rope",
    context: Annotated[int, typer.Option(help="Tokens, for the FLOPs per token.")] = 8192,
    sizes: Sizes = None,
    as_json: Json = False,
) -> None:
    """Print the paper's capacity table with numbers filled in: parameters, cache, heads and ranks of every variant."""
    from multimatrix.attention.sizes import specs_from_labels
    from multimatrix.plan.capacity import capacity_rows, load_recipe

    if recipe is not None:
        _refuse_beside(ctx, "--recipe", "hidden_size", "layers", "head_dim", "variants", "position", "sizes")
        known = load_recipe(recipe)
        specs, layers, title = known.specs, known.num_hidden_layers, f"{known.title}\n{known.source}"
    else:
        specs = specs_from_labels(
            split_labels(variants),
            hidden_size=hidden_size,
            head_dim=head_dim,
            overrides=sizes or (),
            position=position,
        )
        title = f"hidden size {hidden_size}, {layers} layers"
    rows = capacity_rows(specs, layers, context)
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        _print_capacity(rows, title)


def _refuse_beside(ctx: typer.Context, subject: str, *names: str) -> None:
    """InputError where an option was given that has no effect because `subject` brings its own sizes."""
    for option in ctx.command.params:
        source = ctx.get_parameter_source(option.name) if option.name in names else None
        if source is not None and source.name == "COMMANDLINE":
            raise InputError(
                f"{subject} has sizes of its own, which {option.opts[0]} cannot change; leave one of them out"
            )


def split_labels(text: str) -> list[str]:
    """`mha, mfa` -> ["mha", "mfa"]."""
    return [label.strip() for label in text.split(",") if label.strip()]


def _short(count: int) -> str:
    """All digits where they fit, else an SI prefix: 24,576 and 12.19 M."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if count >= size:
            return f"{count / size:.2f} {prefix}"
    return f"{count:,}"


def _print_capacity(rows: list[dict[str, Any]], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        box=None,
        title=title,
        title_justify="left",
        header_style="bold",
        pad_edge=False,
        collapse_padding=True,
    )
    columns = {
        "variant": "variant",
        "attention\nparams": "parameters",
        "KV elem.\n/tok/layer": "kv_elements_per_token_per_layer",
        "KV bytes\n/tok": "kv_bytes_per_token",
        "heads": "heads",
        "rank\n/head": "rank_per_head",
        "shared\nlatent": "shared_latent_dim",
        "total\neff. rank": "total_effective_rank",
        "decode\nFLOPs": "decode_flops_per_token",
    }
    for header in columns:
        table.add_column(header, justify="left" if header == "variant" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(_short(row[key]) if isinstance(row[key], int) else row[key] for key in columns.values()))
    console = Console()
    console.print(table)
    layers, context = rows[0]["num_hidden_layers"], rows[0]["context"]
    console.print(
        f"Parameters and FLOPs are one layer's; FLOPs of the attention for one decoded token at context {context:,}; "
        f"KV bytes are those of {layers} layers at 16 bit.",
        style="dim",
    )


@app.command()
def check(
    ctx: typer.Context,
    model: Annotated[str | None, typer.Argument(help="Folder of a saved multimatrix model.")] = None,
    variant: Annotated[str | None, typer.Option(help="Check a small random model of this variant instead.")] = None,
    hidden_size: Annotated[int, typer.Option(help="H of the random model.")] = 64,
    head_dim: Annotated[int, typer.Option(help="Head dim of MHA; the variant's sizes follow.")] = 16,
    position: Position = "rope",
    sizes: Sizes = None,
    dtype: Annotated[str, typer.Option(help="float64, float32, float16 or bfloat16.")] = "float32",
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, ...")] = "cpu",
    as_json: Json = False,
) -> None:
    """Print the agreement table of a saved model or a variant; exit status 1 if any check fails."""
    if (model is None) == (variant is None):
        raise InputError("give either the folder of a saved model or --variant NAME")
    if model is not None:
        _refuse_beside(ctx, "a saved model", "hidden_size", "head_dim", "position", "sizes")
    import torch
    from transformers.utils import logging

    from multimatrix.attention.sizes import specs_from_labels
    from multimatrix.evaluate import agreement

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    precisions = {str(known).removeprefix("torch."): known for known in agreement.TOLERANCES}
    if dtype not in precisions:
        raise InputError(f"dtype must be one of {', '.join(precisions)}; got {dtype!r}")
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
    if variant is not None:
        specs = specs_from_labels(
            [variant], hidden_size=hidden_size, head_dim=head_dim, overrides=sizes or (), position=position
        )
        subject = agreement.random_model(specs[variant], precisions[dtype], device)
    else:
        assert model is not None
        subject = agreement.load_model(model, precisions[dtype], device)
    checks = agreement.check_model(subject)
    failed = [row.name for row in checks if not row.passed]
    if as_json:
        rows = [
            {
                "check": c.name,
                "error": c.error if math.isfinite(c.error) else None,
                "tolerance": c.tolerance,
                "passed": c.passed,
                "detail": c.detail,
            }
            for c in checks
        ]
        about = {
            "subject": variant or model,
            "attention": subject.config.attention,
            "dtype": dtype,
            "device": device,
        }
        print(json.dumps({**about, "passed": not failed, "checks": rows}, indent=2))
    else:
        _print_checks(checks, f"{variant or model}: {dtype} on {device}")
    if failed:
        print(f"multimatrix: {len(failed)} of {len(checks)} checks failed: {', '.join(failed)}", file=sys.stderr)
        raise typer.Exit(1)


def _print_checks(checks: list[Any], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, title=title, title_justify="left", header_style="bold", pad_edge=False)
    for header in ("check", "largest error", "tolerance", "verdict", "what was run"):
        table.add_column(header, justify="right" if header in ("largest error", "tolerance") else "left")
    for row in checks:
        verdict = "[green]agrees[/]" if row.passed else "[bold red]DISAGREES[/]"
        table.add_row(row.name, f"{row.error:.1e}", f"{row.tolerance:.0e}", verdict, row.detail)
    Console().print(table)


@app.command()
def compare(
    preset: Annotated[str | None, typer.Option(help="Start from these settings: demo.")] = None,
    variants: Annotated[str | None, typer.Option(help="Comma-separated; NAME@TAG for two settings of one.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Comma-separated, for example 0,1,2.")] = None,
    sizes: Sizes = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="File, folder or hub:OWNER/NAME; repeatable. Default: Python's standard library."),
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="bytes, bpe:N, a file, a folder or a hub name.")] = None,
    validation_fraction: Annotated[float | None, typer.Option(help="Share of the text held out, by document.")] = None,
    validation_tokens: Annotated[int | None, typer.Option(help="Validate on at most so many tokens.")] = None,
    hidden_size: Annotated[int | None, typer.Option(help="H, elements of the hidden vector.")] = None,
    layers: Annotated[int | None, typer.Option(help="Number of decoder layers.")] = None,
    head_dim: Annotated[int | None, typer.Option(help="Head dim of MHA; the other variants' sizes follow.")] = None,
    intermediate_size: Annotated[int | None, typer.Option(help="Feed-forward width of the baseline.")] = None,
    match: Annotated[str | None, typer.Option(help="parameters: equal totals; none: equal feed-forward.")] = None,
    position: Annotated[str | None, typer.Option(help="rope, alibi or none.")] = None,
    rope_theta: Annotated[float | None, typer.Option(help="Base of the rotary frequencies.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens per training sequence.")] = None,
    max_positions: Annotated[int | None, typer.Option(help="Positions of the model; default: the context.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps per run.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences per step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak of the cosine schedule.")] = None,
    warmup_fraction: Annotated[float | None, typer.Option(help="Share of the steps that warm up.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Of AdamW.")] = None,
    evaluations: Annotated[int | None, typer.Option(help="Validation points per run.")] = None,
    precision: Annotated[str | None, typer.Option(help="auto, float32 or bfloat16.")] = None,
    latent_scaling: Annotated[bool | None, typer.Option(help="Scale low-rank latents by sqrt(H/rank).")] = None,
    zero_init_output: Annotated[bool | None, typer.Option(help="Start attention outputs at zero.")] = None,
    depth_scaled_init: Annotated[bool | None, typer.Option(help="Paper's 1/sqrt(2 layer) rule.")] = None,
    initializer_range: Annotated[float | None, typer.Option(help="Initial std; default: 1/sqrt(hidden size).")] = None,
    tie_embeddings: Annotated[bool | None, typer.Option(help="One matrix for embedding and head.")] = None,
    out: Annotated[str | None, typer.Option(help="Run directory; default: runs/PRESET or runs/compare.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Read the text, match the sizes, print them, stop.")] = False,
) -> None:
    """Train every variant on the same text under one protocol: what does each byte of cache buy?

    The same command again resumes; more variants or seeds extend a comparison.
    """
    from multimatrix.compare.command import run_command

    settings = {
        "variants": split_labels(variants) if variants is not None else None,
        "seeds": _whole_numbers("--seeds", seeds) if seeds is not None else None,
        "sizes": sizes or None,
        "data": data or None,
        "tokenizer": tokenizer,
        "validation_fraction": validation_fraction,
        "validation_tokens": validation_tokens,
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "head_dim": head_dim,
        "intermediate_size": intermediate_size,
        "match": match,
        "position": position,
        "rope_theta": rope_theta,
        "context": context,
        "max_position_embeddings": max_positions,
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "warmup_fraction": warmup_fraction,
        "weight_decay": weight_decay,
        "evaluations": evaluations,
        "precision": precision,
        "latent_scaling": latent_scaling,
        "zero_init_output": zero_init_output,
        "depth_scaled_init": depth_scaled_init,
        "initializer_range": initializer_range,
        "tie_word_embeddings": tie_embeddings,
    }
    raise typer.Exit(run_command(preset, settings, out or f"runs/{preset or 'compare'}", dry_run=dry_run))


def _whole_numbers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in split_labels(text)]
    except ValueError:
        raise InputError(f"{option} takes whole numbers separated by commas, got {text!r}") from None
