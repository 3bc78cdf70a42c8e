"""From what a user writes, `mha,mfa,mfa_kr@tied` and `mfa_kr@tied.value_map=tied`, to specs."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Sequence
from typing import Any

from multimatrix.attention import AttentionSpec, make_spec, spec_class
from multimatrix.errors import InputError
from multimatrix.fields import check_most, nearest_divisor

# Settings that every variant has, and whose customary sizes may depend on them.
SHARED = {field.name for field in dataclasses.fields(AttentionSpec)} - {"hidden_size", "num_heads"}


def specs_from_labels(
    labels: Sequence[str], *, hidden_size: int, head_dim: int, overrides: Sequence[str] = (), **options: Any
) -> dict[str, AttentionSpec]:
    """One spec per label, at the variant's customary sizes with the overrides applied.

    labels: variant names; `name@tag` tells two settings of one variant apart. head_dim: of the MHA of the same
    hidden_size, from which every variant's customary sizes follow. overrides: `label.field=value`. options: fields
    set on every variant.

    Raises:
        InputError: an unknown variant, field or label, or sizes that cannot work.
    """
    if not labels:
        raise InputError("no variants were given; name at least one, for example mha,mfa,mfa_kr")
    repeated = sorted({label for label in labels if list(labels).count(label) > 1})
    if repeated:
        raise InputError(f"variant {repeated[0]!r} is listed twice; write {repeated[0]}@name to tell settings apart")
    for label in labels:
        # Labels become names of folders.
        if "@" in label and not re.fullmatch(r"[^@]*@[A-Za-z0-9_.+-]+", label):
            raise InputError(f"cannot read {label!r}; after @ write a tag of letters, digits and _ . + -")
    if hidden_size < 1:
        raise InputError(f"hidden_size must be at least 1, got {hidden_size}")
    check_most("hidden_size", hidden_size)
    if not 1 <= head_dim <= hidden_size:
        raise InputError(f"head_dim must be between 1 and the hidden_size of {hidden_size}, got {head_dim}")
    if hidden_size % head_dim:
        nearest = nearest_divisor(hidden_size, head_dim)
        raise InputError(
            f"heads of {head_dim} do not fill a hidden_size of {hidden_size}; head_dim must divide it, the nearest "
            f"that does: {nearest}"
        )
    specs = {}
    for label, changed in sizes_by_label(overrides, labels).items():
        cls = spec_class(label.partition("@")[0])
        if "variant" in changed:
            raise InputError(f"{label} has no size 'variant'; choose the variant where variants are listed")
        shared = {field: value for field, value in changed.items() if field in SHARED}
        usual = cls.sized(hidden_size, head_dim, **options | shared)
        specs[label] = make_spec(hidden_size, usual.to_dict() | changed)
    return specs


def sizes_by_label(overrides: Sequence[str], labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`mfa.num_heads=18` -> {"mfa": {"num_heads": 18}, ...}, with an entry for every label.

    Raises:
        InputError: one of `overrides` cannot be read or names none of `labels`.
    """
    changes: dict[str, dict[str, Any]] = {label: {} for label in labels}
    for override in overrides:
        label, field, value = _parse_override(override)
        if label not in changes:
            raise InputError(f"{override!r} sets a size of {label!r}, which is not among {', '.join(labels)}")
        changes[label][field] = value
    return changes


def _parse_override(text: str) -> tuple[str, str, Any]:
    target, equals, value = text.partition("=")
    label, dot, field = target.strip().rpartition(".")
    if not (equals and dot and label and field):
        raise InputError(f"cannot read {text!r}; write label.field=value, for example mfa.num_heads=18")
    try:
        return label, field, tomllib.loads(f"value = {value.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        return label, field, value.strip()
