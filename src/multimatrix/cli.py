"""The command line: one function a command, heavy imports inside them."""

from __future__ import annotations

import json
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
    try:
        app()
    except InputError as error:
        print(f"multimatrix: {error}", file=sys.stderr)
        sys.exit(2)


@app.callback(invoke_without_command=True)
def version_option(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        print(f"multimatrix {__version__}")
        raise typer.Exit


@app.command()
def capacity(
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
        if sizes:
            raise InputError("--set changes customary sizes, and --recipe has its own; give one of them")
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

    table = Table(box=None, title=title, title_justify="left", header_style="bold", pad_edge=False, collapse_padding=True)
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
    import torch
    from transformers.utils.logging import disable_progress_bar

    from multimatrix.attention.sizes import specs_from_labels
    from multimatrix.evaluate import agreement

    disable_progress_bar()

    precisions = {str(known).removeprefix("torch."): known for known in agreement.TOLERANCES}
    if dtype not in precisions:
        raise InputError(f"dtype must be {', '.join(precisions)}; got {dtype!r}")
    try:
        torch.empty(1, device=device)
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
            {"check": c.name, "error": c.error, "tolerance": c.tolerance, "passed": c.passed, "detail": c.detail}
            for c in checks
        ]
        about = {"subject": variant or model, "attention": subject.config.attention, "dtype": dtype, "device": device}
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
