"""Settings that ship with the package, one TOML file each.

`sizes` of attentions, whole `models`, presets of `compare`, and runs of `train`.
"""

from __future__ import annotations

import tomllib
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from multimatrix.errors import InputError, one_line

Kind = Literal["sizes", "models", "compare", "train"]
# What a message calls one of them, and all of them.
_CALLED: dict[Kind, tuple[str, str]] = {
    "sizes": ("recipe", "recipes"),
    "models": ("model recipe", "recipes"),
    "compare": ("preset", "presets"),
    "train": ("training recipe", "recipes"),
}


def recipe_names(kind: Kind) -> list[str]:
    """The recipes of this kind, sorted."""
    return sorted(entry.name.removesuffix(".toml") for entry in _folder(kind).iterdir() if entry.name.endswith(".toml"))


def read_recipe(kind: Kind, name: str) -> dict[str, Any]:
    """A recipe's fields; a name that ends in .toml is a file of one's own.

    Raises:
        InputError: there is none of this name, and which there are; or the file cannot be read.
    """
    if name.endswith(".toml"):
        try:
            return tomllib.loads(Path(name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"the recipe {name} cannot be read: {one_line(error)}") from error
    known = recipe_names(kind)
    if name not in known:
        one, many = _CALLED[kind]
        raise InputError(f"there is no {one} {name!r}; the {many} are {', '.join(known)}")
    return tomllib.loads((_folder(kind) / f"{name}.toml").read_text(encoding="utf-8"))


def _folder(kind: Kind) -> resources.abc.Traversable:
    return resources.files("multimatrix") / "recipes" / kind
