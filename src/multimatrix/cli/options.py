"""Options and helpers that several commands share."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from multimatrix.errors import InputError

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Sizes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="LABEL.FIELD=VALUE", help="Set a size, for example mfa.num_heads=18; repeatable."),
]
Variants = Annotated[str, typer.Option(help="Comma-separated; NAME@TAG tells two settings of one variant apart.")]
MaxShardSize = Annotated[str, typer.Option(help="Size of the largest weight file: 5GB, 500MB, or bytes.")]
Position = Annotated[str, typer.Option(help="Position encoding of every variant: rope, alibi or none.")]


def refuse_beside(ctx: typer.Context, fact: str, *names: str) -> None:
    """InputError where an option was given that has no effect, because of `fact`."""
    for option in ctx.command.params:
        source = ctx.get_parameter_source(option.name) if option.name in names else None
        if source is not None and source.name == "COMMANDLINE":
            raise InputError(f"{fact}, which {option.opts[0]} cannot change; leave one of them out")


def refuse_without(ctx: typer.Context, needed: str, *names: str) -> None:
    """InputError where an option was given that has no effect because `needed` was not."""
    for option in ctx.command.params:
        source = ctx.get_parameter_source(option.name) if option.name in names else None
        if source is not None and source.name == "COMMANDLINE":
            raise InputError(f"{option.opts[0]} has no effect without {needed}; give both or leave it out")


def check_device(device: str) -> None:
    """InputError unless a tensor can be made on this device."""
    import torch

    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error


def split_labels(text: str) -> list[str]:
    """`mha, mfa` -> ["mha", "mfa"]."""
    return [label.strip() for label in text.split(",") if label.strip()]


def whole_numbers(option: str, text: str) -> list[int]:
    """`0, 1` -> [0, 1]; InputError that names the option where it is anything else."""
    try:
        return [int(part) for part in split_labels(text)]
    except ValueError:
        raise InputError(f"{option} takes whole numbers separated by commas, got {text!r}") from None


def byte_count(option: str, text: str) -> int:
    """`5GB` -> 5,000,000,000; InputError that names the option where it is no size."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]?)B?", text.strip(), re.IGNORECASE)
    size = int(float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " ")) if found else 0
    if size < 1:
        raise InputError(f"{option} takes a size such as 5GB, 500MB or a number of bytes, got {text!r}")
    return size
