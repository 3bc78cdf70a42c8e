"""Sizes: frozen dataclasses made from the tables of a config, and written back to them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

from multimatrix.errors import InputError

LARGEST = 10**9  # no model has a larger size


def check_most(what: str, value: int, most: int = LARGEST) -> None:
    """InputError where a whole number is larger than `most`."""
    if value > most:
        got = f"{value:,}" if value < 10**24 else f"{len(str(value))} digits"
        raise InputError(f"{what} must be at most {most:,}, got {got}")


def check_sizes(what: str, sizes: Mapping[str, Any], cls: type, besides: Collection[str] = ()) -> None:
    """InputError unless `sizes` name fields of the dataclass, and all that have no default.

    what: the subject of the sentence. besides: fields that do not come from the table.
    """
    known = {field.name: field for field in dataclasses.fields(cls) if field.init and field.name not in besides}
    for name in sizes:
        if name not in known:
            raise InputError(f"{what} has no size {name!r}; its sizes are {', '.join(known)}")
    missing = [name for name, field in known.items() if field.default is dataclasses.MISSING and name not in sizes]
    if missing:
        raise InputError(f"{what} needs {', '.join(missing)}; its sizes are {', '.join(known)}")


def changed_sizes(spec: Any, besides: Collection[str] = ()) -> dict[str, Any]:
    """The fields that the dataclass can be made from, where they are not at their defaults."""
    return {
        field.name: getattr(spec, field.name)
        for field in dataclasses.fields(spec)
        if field.init and field.name not in besides and getattr(spec, field.name) != field.default
    }


def nearest_divisor(number: int, near: int) -> int:
    """The divisor of `number` that is nearest to `near`, the smaller of two."""
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    divisors = {*small, *(number // divisor for divisor in small)}
    return min(divisors, key=lambda divisor: (abs(divisor - near), divisor))
