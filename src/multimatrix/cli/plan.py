"""`multimatrix plan`: what a model's cache and decoding cost, and what devices make of it."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from multimatrix.cli.options import (
    Json,
    Position,
    Sizes,
    Variants,
    amount,
    given,
    refuse_beside,
    refuse_without,
    share,
    split_labels,
    token_counts,
)
from multimatrix.errors import InputError

if TYPE_CHECKING:
    from multimatrix.plan.answer import Question
    from multimatrix.plan.hardware import Hardware
    from multimatrix.plan.model import DecoderSizes

REPORTED = "h800,h20,a800,910b"  # those that the Step-3 report prices
SPEC_OPTIONS = (
    *("hidden_size", "layers", "head_dim", "vocab_size", "intermediate_size", "tie_word_embeddings"),
    *("variants", "position"),
)
LAYOUT_OPTIONS = ("tensor_parallel", "attention_data_parallel", "data_parallel")


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
    context: Annotated[str, typer.Option(help="Tokens that a decoded token sees; 8192,128k,1M for three.")] = "8192",
    kv_bits: Annotated[int, typer.Option(help="Bits of a cached element: 16, 8 or 4.")] = 16,
    page_size: Annotated[int, typer.Option(help="Tokens of a page of the cache; pages are kept whole.")] = 1,
    gpu: Annotated[
        str | None,
        typer.Option(help="Accelerators of the table, comma-separated; default h800,h20,a800,910b."),
    ] = None,
    memory: Annotated[str | None, typer.Option(help="Bytes of an accelerator of your own, such as 141GB.")] = None,
    bandwidth: Annotated[str | None, typer.Option(help="Its bytes per second, such as 4.8TB.")] = None,
    flops: Annotated[str | None, typer.Option(help="Its peak of dense products per second, such as 989T.")] = None,
    price: Annotated[str | None, typer.Option(help="Its dollars per hour.")] = None,
    batch: Annotated[
        str, typer.Option(help="Sequences decoded at once on all devices; 1,64 for two. The largest is always shown.")
    ] = "1",
    tensor_parallel: Annotated[int, typer.Option(help="Devices that share the heads and all else.")] = 1,
    attention_data_parallel: Annotated[
        int, typer.Option(help="Copies of attention, each for sequences of its own; all else is shared by them.")
    ] = 1,
    data_parallel: Annotated[int, typer.Option(help="Copies of the whole model.")] = 1,
    weight_bits: Annotated[int, typer.Option(help="Bits of a weight: 16, 8 or 4.")] = 16,
    workspace: Annotated[str, typer.Option(help="Share of the memory that is neither weights nor cache.")] = "10%",
    efficiency: Annotated[str, typer.Option(help="Share of the peaks that is reached; 100% is the bound.")] = "100%",
    replace: Annotated[
        list[str] | None,
        typer.Option(help="Also plan each model with its attention replaced: mfa or mfa_kr; repeatable."),
    ] = None,
    equal: Annotated[
        str, typer.Option(help="What a replacement keeps: parameters, cache (and parameters), or parameters,cache.")
    ] = "parameters",
    target_kv: Annotated[
        str | None, typer.Option(help="Search MFA and MFA-KR sizes whose cache is at most this share: 10%.")
    ] = None,
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
    html: Annotated[Path | None, typer.Option(help="Also write one page with tables and figures to this file.")] = None,
    as_json: Json = False,
) -> None:
    """Print what whole models cost to decode, and what devices make of it.

    Parameters, KV bytes, FLOPs of one decoded token, and on each accelerator what bounds decoding, how fast it is at
    best, what fits and its price. Models are recipes, config.json files, or sizes given by options. --batch beside
    --gpu, or --target-kv, searches MFA sizes that fit.
    """
    from multimatrix.attention.sizes import sizes_by_label
    from multimatrix.files import check_writable
    from multimatrix.plan.answer import Question, answer
    from multimatrix.plan.parallel import Layout
    from multimatrix.plan.search import REPLACEMENTS
    from multimatrix.plan.sources import from_places, from_recipe

    contexts, batches = token_counts("--context", context), token_counts("--batch", batch)
    if html is not None:
        check_writable(html)
    own = _own_hardware(memory, bandwidth, flops, price)
    chips = _table_hardware("" if own and gpu is None else gpu) + own
    layout = Layout(tensor_parallel, attention_data_parallel, data_parallel)
    question = Question(
        chips=tuple(chips),
        kv_bits=kv_bits,
        weight_bits=weight_bits,
        page_size=page_size,
        workspace=share("--workspace", workspace),
        efficiency=share("--efficiency", efficiency),
        layout=layout if given(ctx, LAYOUT_OPTIONS) else None,
        batches=tuple(batches),
        target_kv=_target(target_kv),
    )
    names = list(dict.fromkeys(split_labels(recipe or "")))
    if recipe is not None and not names:
        raise InputError("--recipe names no model; give one, for example step3")
    if names or models:
        refuse_beside(ctx, "a recipe or config.json has sizes of its own", *SPEC_OPTIONS)
        planned = [from_recipe(name) for name in names] + from_places(models or (), names)
    else:
        planned = _described(
            split_labels(variants),
            sizes or (),
            layers,
            {"hidden_size": hidden_size, "head_dim": head_dim, "position": position},
            {
                "vocab_size": vocab_size,
                "intermediate_size": intermediate_size,
                "tie_word_embeddings": tie_word_embeddings,
            },
        )
    if given(ctx, ("batch",)) and chips and (own or gpu is not None) and not replace:
        question = dataclasses.replace(question, searched=len(planned) == 1)
    if names or models:
        if not replace and not question.searches:
            refuse_without(ctx, "--replace or --target-kv where models are read", "sizes")
        question = dataclasses.replace(question, fixed=sizes_by_label(sizes or (), REPLACEMENTS))
    for model in planned:
        for warning in model.warnings:
            print(f"warning: {model.name}: {warning}", file=sys.stderr)
    if not replace:
        refuse_without(ctx, "--replace", "equal")
    planned = [each for model in planned for each in (model, *_replacements(model, replace or [], equal, question))]
    rows = [answer(model, tokens, question) for model in planned for tokens in contexts]
    if html is not None:
        from multimatrix.plan.page import write_page

        write_page(html, planned, rows, question)
    if as_json:
        print(json.dumps(rows[0] if len(rows) == 1 else rows, indent=2))
    else:
        from multimatrix.cli.plan_tables import print_plan

        print_plan(rows, question)
        if html is not None:
            print(f"wrote {html}")


def _described(
    labels: list[str], overrides: Sequence[str], layers: int, attention: dict[str, Any], others: dict[str, Any]
) -> list[DecoderSizes]:
    """The models that options describe, one for each variant.

    attention: what `specs_from_labels` takes beside labels and overrides. others: the sizes of everything else.
    """
    from multimatrix.attention.sizes import specs_from_labels
    from multimatrix.plan.model import DecoderSizes, check_layers

    specs = specs_from_labels(labels, overrides=overrides, **attention)
    check_layers("--layers", layers)
    return [DecoderSizes(name=label, specs=(spec,) * layers, **others) for label, spec in specs.items()]


def _table_hardware(names: str | None) -> list[Hardware]:
    """The accelerators of --gpu, each once; those that the report prices where it is not given."""
    from multimatrix.plan.hardware import find_hardware

    return find_hardware(list(dict.fromkeys(split_labels(REPORTED if names is None else names))))


def _target(text: str | None) -> float | None:
    """The share of --target-kv."""
    value = None if text is None else share("--target-kv", text)
    if value == 0:
        raise InputError("--target-kv must be above 0 %, got 0 %; no cache takes nothing")
    return value


def _own_hardware(*given: str | None) -> list[Hardware]:
    """The accelerator that --memory, --bandwidth, --flops and --price describe, if any does."""
    from multimatrix.plan.hardware import Hardware

    options = ("--memory", "--bandwidth", "--flops", "--price")
    numbers = {option: amount(option, text) for option, text in zip(options, given, strict=True) if text is not None}
    missing = [option for option in options[:3] if option not in numbers]
    if not numbers:
        return []
    if missing:
        raise InputError(f"an accelerator of your own needs {', '.join(missing)} beside {', '.join(numbers)}")
    return [
        Hardware(
            name="own",
            title="your own numbers",
            memory_bytes=numbers["--memory"],
            bytes_per_second=numbers["--bandwidth"],
            flops_per_second=numbers["--flops"],
            dollars_per_hour=numbers.get("--price"),
        )
    ]


def _replacements(model: DecoderSizes, variants: list[str], equal: str, question: Question) -> list[DecoderSizes]:
    from multimatrix.plan.search import EQUAL, replaced

    kept = [known for known in EQUAL if known in split_labels(equal)]
    if not kept or not set(split_labels(equal)) <= set(kept):
        raise InputError(f"--equal takes {' or '.join(EQUAL)}, or both separated by a comma; got {equal!r}")
    multiple = question.layout.tensor if question.layout else 1
    return [
        replaced(model, variant, keeps, fixed=question.fixed.get(variant), multiple=multiple)
        for variant in dict.fromkeys(variants)
        for keeps in kept
    ]
