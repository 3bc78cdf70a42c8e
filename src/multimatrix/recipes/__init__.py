"""Settings that ship with the package, one TOML file each: `sizes` of attentions, whole `models`, `compare` presets."""

from __future__ import annotations

import tomllib
from importlib import resources
from typing import Any, Literal

from multimatrix.errors import InputError

Kind = Literal["sizes", "models", "compare"]
# What a message calls one of them, and all of them.
_CALLED: dict[Kind, tuple[str, str]] = {
    "sizes": ("recipe", "recipes"),
    "models": ("model recipe", "recipes"),
    "compare": ("preset", "presets"),
}


def recipe_names(kind: Kind) -> list[str]:
    """The recipes of this kind, sorted."""
    return sorted(entry.name.removesuffix(".toml") for entry in _folder(kind).iterdir() if entry.name.endswith(".toml"))


def read_recipe(kind: Kind, name: str) -> dict[str, Any]:
    """A recipe's fields; InputError with the known names where there is none of this name."""
    known = recipe_names(kind)
    if name not in known:
        one, many = _CALLED[kind]
        raise InputError(f"there is no {one} {name!r}; the {many} are {', '.join(known)}")
    return tomllib.loads((_folder(kind) / f"{name}.toml").read_text(encoding="utf-8"))


def _folder(kind: Kind) -> resources.abc.Traversable:
    return resources.files("multimatrix") / "recipes" / kind
