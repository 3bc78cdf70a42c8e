"""`multimatrix plan`: what a model's cache and decoding cost."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from multimatrix.cli.options import (
    Json,
    Position,
    Sizes,
    Variants,
    plain_table,
    refuse_beside,
    short_count,
    split_labels,
    whole_numbers,
)
from multimatrix.errors import InputError

SPEC_OPTIONS = (
    *("hidden_size", "layers", "head_dim", "vocab_size", "intermediate_size", "tie_word_embeddings"),
    *("variants", "position", "sizes"),
)


def plan(
    ctx: typer.Context,
    models: Annotated[
        list[str] | None,
        typer.Argument(help="config.json files, their folders, or owner/name on the Hugging Face hub; each a column."),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="Published models by name: step3, deepseek-v3, kimi-k2, qwen3-235b-a22b, qwen3-32b."),
    ] = None,
    context: Annotated[str, typer.Option(help="Tokens that a decoded token sees; 8192,32768 for both.")] = "8192",
    kv_bits: Annotated[int, typer.Option(help="Bits of a cached element: 16, 8 or 4.")] = 16,
    page_size: Annotated[int, typer.Option(help="Tokens of a page of the cache, which is kept whole.")] = 1,
    gpu: Annotated[str, typer.Option(help="Accelerators of the table, comma-separated.")] = "h800,h20,a800,910b",
    hidden_size: Annotated[int, typer.Option(help="H, elements of the hidden vector.")] = 2048,
    layers: Annotated[int, typer.Option(help="Number of decoder layers.")] = 24,
    head_dim: Annotated[int, typer.Option(help="Head dim of MHA; the other variants' sizes follow.")] = 128,
    vocab_size: Annotated[int, typer.Option(help="Entries of the vocabulary.")] = 32_000,
    intermediate_size: Annotated[int, typer.Option(help="Width of the feed-forward.")] = 5632,
    tie_word_embeddings: Annotated[
        bool, typer.Option("--tie-word-embeddings", help="The output head is the embedding table.")
    ] = False,
    variants: Variants = "mha,gqa,mla,mfa,mfa_kr",
    position: Position = "rope",
    sizes: Sizes = None,
    as_json: Json = False,
) -> None:
    """Print what whole models cost to decode.

    Parameters, KV bytes, FLOPs of one decoded token, and its price. Models are recipes, config.json files, or sizes
    given by options.
    """
    from multimatrix.attention.sizes import specs_from_labels
    from multimatrix.plan.hardware import find_hardware
    from multimatrix.plan.model import DecoderSizes, check_layers, decode_cost, plan_row
    from multimatrix.plan.sources import from_place, from_recipe

    names = split_labels(recipe or "")
    if recipe is not None and not names:
        raise InputError("--recipe names no model; give one, for example step3")
    planned = [from_recipe(name) for name in names] + [from_place(place) for place in models or ()]
    if planned:
        refuse_beside(ctx, "a recipe or config.json has sizes of its own", *SPEC_OPTIONS)
    else:
        specs = specs_from_labels(
            split_labels(variants),
            hidden_size=hidden_size,
            head_dim=head_dim,
            overrides=sizes or (),
            position=position,
        )
        check_layers("--layers", layers)
        planned = [
            DecoderSizes(
                name=label,
                specs=(spec,) * layers,
                vocab_size=vocab_size,
                intermediate_size=intermediate_size,
                tie_word_embeddings=tie_word_embeddings,
            )
            for label, spec in specs.items()
        ]
    for model in planned:
        for warning in model.warnings:
            print(f"warning: {model.name}: {warning}", file=sys.stderr)
    accelerators = find_hardware(split_labels(gpu))
    rows = [
        plan_row(model, tokens, kv_bits, page_size)
        | {"hardware": [chip.row(decode_cost(model, tokens, kv_bits)) for chip in accelerators]}
        for model in planned
        for tokens in whole_numbers("--context", context)
    ]
    if not rows:
        raise InputError("--context names no number of tokens; give one, for example 8192")
    if as_json:
        print(json.dumps(rows[0] if len(rows) == 1 else rows, indent=2))
    else:
        _print_plan(rows)


def _print_plan(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console

    columns = [f"{row['model']}\nat {row['context']:,}" for row in rows]
    table = plain_table("", ["", *columns], right=columns)

    def line(label: str, values: list[Any]) -> None:
        table.add_row(label, *(short_count(value) if isinstance(value, int) else value for value in values))

    def lines(labels: dict[str, str], of: list[dict[str, Any]]) -> None:
        for label, key in labels.items():
            line(label, [row[key] for row in of])

    lines({"parameters": "parameters", "  of them active": "active_parameters"}, rows)
    for part in rows[0]["parameters_by_part"]:
        line(f"  {part.replace('_', ' ')}", [row["parameters_by_part"][part] for row in rows])
    for bits in rows[0]["kv_bytes_per_token_by_bits"]:
        line(f"KV bytes/token, {bits} bit", [row["kv_bytes_per_token_by_bits"][bits] for row in rows])
        scales = [row["kv_scale_bytes_per_token_by_bits"][bits] for row in rows]
        if any(scales):
            line("  scales beside them", scales)
    table.add_section()
    lines(
        {
            f"KV bytes read, {rows[0]['kv_bits']} bit": "kv_bytes",
            **({"  scales beside them": "kv_scale_bytes"} if rows[0]["kv_bits"] < 16 else {}),
            "  stored, scales and pages": "kv_stored_bytes",
            "FLOPs, attention core": "attention_core_flops",
            "  linear": "linear_flops",
            "  feed-forward": "feed_forward_flops",
            "  router": "router_flops",
            "  output head": "output_head_flops",
        },
        rows,
    )
    line("core FLOPs/KV byte", [f"{row['arithmetic_intensity']:.1f}" for row in rows])
    for chips in zip(*(row["hardware"] for row in rows), strict=True):
        line(f"{chips[0]['hardware']}: $ of attention", [_dollars(chip["attention_dollars"]) for chip in chips])
        line("  its core waits for", [chip["bound"] for chip in chips])
        line("  $ of the rest", [_dollars(chip["other_dollars"]) for chip in chips])
    console = Console()
    console.print(table)
    console.print("FLOPs and bytes are those of one decoded token of the whole model, dollars those of a million.")


def _dollars(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
