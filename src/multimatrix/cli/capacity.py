"""`multimatrix capacity`: the paper's capacity table."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from multimatrix.cli.options import Json, Position, Sizes, Variants, refuse_beside, split_labels
from multimatrix.words import short_count


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
    """Print the paper's capacity table with numbers filled in.

    Parameters, cache, heads and ranks of every variant.
    """
    from multimatrix.attention.sizes import specs_from_labels
    from multimatrix.plan.capacity import capacity_rows, load_recipe

    if recipe is not None:
        refuse_beside(
            ctx, "--recipe has sizes of its own", "hidden_size", "layers", "head_dim", "variants", "position", "sizes"
        )
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
        table.add_row(*(short_count(row[key]) if isinstance(row[key], int) else row[key] for key in columns.values()))
    console = Console()
    console.print(table)
    layers, context = rows[0]["num_hidden_layers"], rows[0]["context"]
    console.print(
        f"Parameters and FLOPs are one layer's; FLOPs of the attention for one decoded token at context {context:,}; "
        f"KV bytes are those of {layers} layers at 16 bit.",
        style="dim",
    )
