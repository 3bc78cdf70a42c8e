"""`multimatrix export`: a saved model as a folder in another format."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from multimatrix.cli.options import MaxShardSize, byte_count, quiet_transformers, refuse_beside
from multimatrix.errors import InputError

if TYPE_CHECKING:
    from multimatrix.model.modeling import MultimatrixForCausalLM


def _portable(source: Path, out: Path, max_shard_size: int, check: bool) -> list[str]:
    """Weights and code: loads with trust_remote_code=True where multimatrix is not installed."""
    from multimatrix.convert.checkpoint import copy_companions
    from multimatrix.files import new_folder, writing
    from multimatrix.model.card import FILE, model_card, write_card
    from multimatrix.model.loading import load_model

    quiet_transformers()
    with new_folder(out) as folder:
        model = load_model(source)
        checks = _agreement(model, source) if check else None
        with writing(out):
            copy_companions(source, folder)
            if (source / FILE).is_file():  # one that is not ours is kept
                shutil.copyfile(source / FILE, folder / FILE)
            model.save_pretrained(folder, include_code=True, max_shard_size=max_shard_size)
            write_card(folder, model_card(model, has_code=True, checks=checks))
        size = sum(path.stat().st_size for path in folder.iterdir())
    checked = f"{len(checks)} checks agree" if checks is not None else "not checked"
    return [f"{out}: {model.num_parameters():,} parameters, {size:,} bytes, {checked}"]


def _step3(source: Path, out: Path, max_shard_size: int, check: bool) -> list[str]:
    """What an engine loads as `Step3TextForCausalLM`; the weights are copied and never loaded."""
    from multimatrix.convert.step3 import export_step3

    return export_step3(source, out, max_shard_size).lines


# Name -> function of the model's folder, the folder to write, bytes of its largest file and whether to check the model
# first; it returns the lines to print.
FORMATS: dict[str, Callable[[Path, Path, int, bool], list[str]]] = {"portable": _portable, "step3": _step3}


def export(
    ctx: typer.Context,
    model: Annotated[Path, typer.Argument(help="Folder of a saved multimatrix model.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; new or empty.")],
    format_: Annotated[str, typer.Option("--format", help=f"One of: {', '.join(FORMATS)}.")] = "portable",
    max_shard_size: MaxShardSize = "5GB",
    check: Annotated[
        bool, typer.Option(help="portable: refuse a model that disagrees with itself; the card shows the table.")
    ] = True,
) -> None:
    """Write a saved model in another format.

    portable loads where multimatrix is not installed; step3 is for engines that know Step3TextForCausalLM.
    """
    if format_ not in FORMATS:
        raise InputError(f"--format must be one of {', '.join(FORMATS)}; got {format_!r}")
    if format_ != "portable":
        refuse_beside(ctx, f"--format {format_} copies weights without running them", "check")
    for line in FORMATS[format_](model, out, byte_count("--max-shard-size", max_shard_size), check):
        print(line)


def _agreement(model: MultimatrixForCausalLM, source: Path) -> list[dict[str, Any]]:
    from multimatrix.evaluate.agreement import check_model

    rows = [check.row() for check in check_model(model)]
    failed = [row["check"] for row in rows if not row["passed"]]
    if failed:
        raise InputError(
            f"{len(failed)} of {len(rows)} checks of {source} failed ({', '.join(failed)}); see multimatrix check "
            f"{source}, or export it with --no-check"
        )
    return rows
