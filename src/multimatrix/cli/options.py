"""Options and helpers that several commands share."""

from __future__ import annotations

import re
from collections.abc import Collection
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
    if option := _given(ctx, names):
        raise InputError(f"{fact}, which {option} cannot change; leave one of them out")


def refuse_without(ctx: typer.Context, needed: str, *names: str) -> None:
    """InputError where an option was given that has no effect because `needed` was not."""
    if option := _given(ctx, names):
        raise InputError(f"{option} has no effect without {needed}; give both or leave it out")


def _given(ctx: typer.Context, names: Collection[str]) -> str:
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


def short_count(count: int) -> str:
    """All digits where they fit, else an SI prefix: 24,576 and 12.19 M."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if count >= size:
            return f"{count / size:.2f} {prefix}"
    return f"{count:,}"
