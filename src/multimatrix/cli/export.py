"""`multimatrix export`: a saved model as a folder in another format."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from multimatrix.errors import InputError

if TYPE_CHECKING:
    from multimatrix.model.modeling import MultimatrixForCausalLM

# What goes along as it is, where the model's folder has it: the tokenizer, and a README.md that is not ours.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "README.md",
)


def _portable(model: MultimatrixForCausalLM, folder: Path, checks: list[dict[str, Any]] | None) -> None:
    """Weights and code: loads with trust_remote_code=True where multimatrix is not installed."""
    from multimatrix.model.card import model_card, write_card

    model.save_pretrained(folder, include_code=True)
    write_card(folder, model_card(model, has_code=True, checks=checks))


# Name -> what writes the model, and the rows of its agreement table (None: not checked), into an empty folder.
FORMATS: dict[str, Callable[[MultimatrixForCausalLM, Path, list[dict[str, Any]] | None], None]] = {
    "portable": _portable,
}


def export(
    model: Annotated[str, typer.Argument(help="Folder of a saved multimatrix model.")],
    out: Annotated[str, typer.Argument(help="Folder to write; it must not be there yet.")],
    format_: Annotated[str, typer.Option("--format", help=f"One of: {', '.join(FORMATS)}.")] = "portable",
    check: Annotated[
        bool, typer.Option(help="Refuse a model that disagrees with itself; the card shows the table.")
    ] = True,
) -> None:
    """Write a saved model in another format; `portable` loads where multimatrix is not installed."""
    if format_ not in FORMATS:
        raise InputError(f"there is no format {format_!r}; the formats are {', '.join(FORMATS)}")
    from transformers.utils import logging

    from multimatrix.files import new_folder, writing
    from multimatrix.model.loading import load_model

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    source, target = Path(model), Path(out)
    with writing(target), new_folder(target) as folder:
        loaded = load_model(source)
        checks = _agreement(loaded, source) if check else None
        for name in COMPANIONS:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        FORMATS[format_](loaded, folder, checks)
        size = sum(path.stat().st_size for path in folder.iterdir())
    checked = f"{len(checks)} checks agree" if checks is not None else "not checked"
    print(f"{target}: {loaded.num_parameters():,} parameters, {size:,} bytes, {checked}")


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
