"""Options and helpers that several commands share."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Any

import typer

from multimatrix.errors import InputError

if TYPE_CHECKING:
    import torch

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
    if option := given(ctx, names):
        raise InputError(f"{fact}, which {option} cannot change; leave one of them out")


def refuse_without(ctx: typer.Context, needed: str, *names: str) -> None:
    """InputError where an option was given that has no effect because `needed` was not."""
    if option := given(ctx, names):
        raise InputError(f"{option} has no effect without {needed}; give both or leave it out")


def given(ctx: typer.Context, names: Collection[str]) -> str:
    """The first of these options that stands on the command line, as it is written there; "" for none."""
    for option in ctx.command.params:
        source = ctx.get_parameter_source(option.name) if option.name in names else None
        if source is not None and source.name == "COMMANDLINE":
            return "/".join([*option.opts[:1], *option.secondary_opts])
    return ""


def check_device(device: str) -> None:
    """InputError unless a tensor can be made on this device."""
    import torch

    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of this name; InputError where weights cannot have it."""
    from multimatrix.model.saved_files import DTYPES

    known = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
    if name not in known:
        raise InputError(f"dtype must be one of {', '.join(known)}; got {name!r}")
    return known[name]


def quiet_transformers() -> None:
    """No bars and no warnings from transformers: what a command prints is ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def plain_table(title: str, headers: Collection[str], right: Collection[str] = ()) -> Any:
    """A rich Table without lines; right: the headers of columns that hold numbers."""
    from rich.table import Table

    table = Table(box=None, title=title, title_justify="left", header_style="bold", pad_edge=False)
    for header in headers:
        table.add_column(header, justify="right" if header in right else "left", overflow="fold")
    return table


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


def token_counts(option: str, text: str) -> list[int]:
    """`8192, 128k, 1M` -> [8192, 131072, 1048576]; k and M are 1024 and its square.

    Raises:
        InputError: it is anything else, or a number below 1.
    """
    counts = []
    for part in split_labels(text):
        found = re.fullmatch(r"([+-]?\d+(?:\.\d+)?) *([kM]?)", part, re.IGNORECASE)
        count = Fraction(found[1]) * 1024 ** " KM".index(found[2].upper() or " ") if found else Fraction(1, 2)
        if count != int(count):
            raise InputError(
                f"{option} takes whole numbers such as 8192, 128k or 1M, separated by commas, got {part!r}"
            )
        if count < 1:
            raise InputError(f"{option} must be at least 1, got {part}")
        counts.append(int(count))
    if not counts:
        raise InputError(f"{option} names no number; give one, for example 8192")
    return counts


def amount(option: str, text: str) -> float:
    """`4.8TB`, `989T`, `1.98e15` -> a number; InputError that names the option where it is none, or not positive."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?(?:[eE][+-]?\d+)?) *([KMGTP]?)B?", text.strip(), re.IGNORECASE)
    value = float(found[1]) * 1000.0 ** " KMGTP".index(found[2].upper() or " ") if found else 0.0
    if not 0 < value < math.inf:
        raise InputError(f"{option} takes a positive number such as 4.8TB, 989T or 1.98e15, got {text!r}")
    return value


def share(option: str, text: str) -> float:
    """`10%` or `0.1` -> 0.1; InputError that names the option where it is anything else or not within 0 and 100 %."""
    found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+) *(%?)", text.strip())
    value = float(found[1]) / (100 if found[2] else 1) if found else -1
    if not 0 <= value <= 1:
        raise InputError(f"{option} takes a share of 0 to 100 %, such as 10% or 0.1; got {text!r}")
    return value
