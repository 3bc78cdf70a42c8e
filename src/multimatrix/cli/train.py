"""`multimatrix train`: one model, on one device or on many."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from multimatrix.cli.settings import training_options


@training_options
def train(
    settings: dict[str, Any],
    recipe: Annotated[str | None, typer.Option(help="Start from these settings: a name, or a file NAME.toml.")] = None,
    variant: Annotated[str | None, typer.Option(help="Of the attention, for example mfa.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the initial weights and the data order.")] = None,
    fsdp: Annotated[bool | None, typer.Option(help="Shard the model over the processes (FSDP2).")] = None,
    out: Annotated[str | None, typer.Option(help="Run folder; default: runs/train or runs/train-RECIPE.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Read the text, print the sizes, stop.")] = False,
) -> None:
    """Train one model.

    Several devices: torchrun --nproc-per-node N -m multimatrix train ... The same command again goes on from the last
    checkpoint. Exit status: 0 done, 1 the loss is no number, 2 something to mend, 75 stopped by SIGTERM after a
    checkpoint.
    """
    from multimatrix.train.command import run_command

    settings |= {"variant": variant, "seed": seed, "fsdp": fsdp}
    name = f"train-{Path(recipe).stem}" if recipe is not None else "train"
    raise typer.Exit(run_command(recipe, settings, out or f"runs/{name}", dry_run=dry_run))
