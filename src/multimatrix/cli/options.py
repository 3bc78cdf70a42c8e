"""Options and helpers that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

from multimatrix.errors import InputError

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Sizes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="LABEL.FIELD=VALUE", help="Set a size, for example mfa.num_heads=18; repeatable."),
]
Variants = Annotated[str, typer.Option(help="Comma-separated; NAME@TAG tells two settings of one variant apart.")]
Position = Annotated[str, typer.Option(help="Position encoding of every variant: rope, alibi or none.")]


def refuse_beside(ctx: typer.Context, subject: str, *names: str) -> None:
    """InputError where an option was given that has no effect because `subject` brings its own sizes."""
    for option in ctx.command.params:
        source = ctx.get_parameter_source(option.name) if option.name in names else None
        if source is not None and source.name == "COMMANDLINE":
            raise InputError(
                f"{subject} has sizes of its own, which {option.opts[0]} cannot change; leave one of them out"
            )


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
