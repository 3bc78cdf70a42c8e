"""`multimatrix check`: the agreement table."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from multimatrix.cli.options import (
    Json,
    Position,
    Sizes,
    check_device,
    plain_table,
    quiet_transformers,
    refuse_beside,
    torch_dtype,
)
from multimatrix.errors import InputError


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
    """Print the agreement table of a saved model or a variant.

    The exit status is 1 if any check fails.
    """
    if (model is None) == (variant is None):
        raise InputError("give either the folder of a saved model or --variant NAME")
    if model is not None:
        refuse_beside(ctx, "a saved model has sizes of its own", "hidden_size", "head_dim", "position", "sizes")
    from multimatrix.attention.sizes import specs_from_labels
    from multimatrix.evaluate import agreement
    from multimatrix.model.loading import load_model

    quiet_transformers()
    precision = torch_dtype(dtype)
    check_device(device)
    if variant is not None:
        specs = specs_from_labels(
            [variant], hidden_size=hidden_size, head_dim=head_dim, overrides=sizes or (), position=position
        )
        subject = agreement.random_model(specs[variant], precision, device)
    else:
        assert model is not None
        subject = load_model(model, dtype=precision, device=device)
    checks = agreement.check_model(subject)
    failed = [row.name for row in checks if not row.passed]
    if as_json:
        about = {
            "subject": variant or model,
            "attention": subject.config.attention,
            "dtype": dtype,
            "device": device,
        }
        print(json.dumps({**about, "passed": not failed, "checks": [row.row() for row in checks]}, indent=2))
    else:
        _print_checks(checks, f"{variant or model}: {dtype} on {device}")
    if failed:
        print(f"multimatrix: {len(failed)} of {len(checks)} checks failed: {', '.join(failed)}", file=sys.stderr)
        raise typer.Exit(1)


def _print_checks(checks: list[Any], title: str) -> None:
    from rich.console import Console

    headers = ("check", "largest error", "tolerance", "verdict", "what was run")
    table = plain_table(title, headers, right=("largest error", "tolerance"))
    for row in checks:
        verdict = "[green]agrees[/]" if row.passed else "[bold red]DISAGREES[/]"
        table.add_row(row.name, f"{row.error:.1e}", f"{row.tolerance:.0e}", verdict, row.detail)
    Console().print(table)
