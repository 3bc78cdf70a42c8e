"""The model card: README.md beside the weights, as the Hugging Face hub reads it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.modeling_utils import PreTrainedModel

from multimatrix.attention.gmha import AttentionSpec
from multimatrix.files import write_text

FILE = "README.md"
MARK = "<!-- Written by multimatrix with the model. Without this line it is yours and is never overwritten. -->"
# What a reader must know about the training of a model; the card says so where one of them was not recorded.
EXPECTED = ("protocol", "corpus", "tokens", "seed", "validation_loss", "environment", "command")
# Fields of the config that the card states in sections of their own, and those that are no sizes.
ELSEWHERE = ("attention", "provenance")
SWITCHES = ("use_cache", "output_router_logits", "router_aux_loss_coef")


def write_card(folder: Path, text: str) -> None:
    """Write the card into `folder`, unless a README.md of somebody else is there.

    Raises:
        OSError: the folder cannot be written.
    """
    path = folder / FILE
    if not path.exists() or MARK in path.read_text(encoding="utf-8", errors="replace"):
        write_text(path, text)


def model_card(model: PreTrainedModel, *, has_code: bool, checks: Sequence[Mapping[str, Any]] | None = None) -> str:
    """The card of a model of ours, in Markdown with a YAML header.

    has_code: whether the model's code lies beside the weights. checks: rows of the model's agreement table, each with
    check, error, tolerance, passed and detail; None where nobody ran it.
    """
    config, specs = model.config, model.config.layer_specs()
    provenance = config.provenance or {}
    variants = list(dict.fromkeys(spec.variant for spec in specs))
    header = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        *([f"license: {json.dumps(provenance['license'])}"] if "license" in provenance else []),
        "tags:",
        *(f"- {tag}" for tag in ("multimatrix", "kv-cache", *variants)),
        "---",
    ]
    kind = f"{variants[0]} attention" if len(variants) == 1 else f"hybrid attention ({', '.join(variants)})"
    parameters = model.num_parameters()
    sections = (
        "\n".join([*header, MARK]),
        f"# A language model with {kind}, {parameters:,} parameters",
        "A decoder whose attention saves KV cache, in the `multimatrix` format for Hugging Face transformers.",
        "## Sizes",
        _table(("size", "value"), _sizes(model, parameters)),
        "## KV cache",
        _cache(specs),
        "## Load",
        _loading(has_code),
        "## How it was trained",
        _training(provenance),
        "## How it was checked",
        _checking(checks, f"{_dtype(model)} on {model.device}"),
    )
    return "\n\n".join(sections) + "\n"


def _sizes(model: PreTrainedModel, parameters: int) -> Iterator[tuple[str, Any]]:
    yield "parameters", f"{parameters:,}"
    yield "dtype", _dtype(model)
    for name in type(model.config).__annotations__:
        if name not in (*ELSEWHERE, *SWITCHES) and (value := getattr(model.config, name)) is not None:
            yield name, value


def _dtype(model: PreTrainedModel) -> str:
    return str(model.dtype).removeprefix("torch.")


def _cache(specs: Sequence[AttentionSpec]) -> str:
    """Layers that follow each other and are the same share a row."""
    rows, total, first = [], 0, 0
    for spec, group in itertools.groupby(specs):
        last = first + len(list(group)) - 1
        sizes = ", ".join(f"{name} {value}" for name, value in spec.to_dict().items() if value not in (None, False))
        elements = spec.cache.elements
        rows.append(
            (str(first) if first == last else f"{first} to {last}", sizes, f"{elements:,}", f"{2 * elements:,}")
        )
        total += 2 * elements * (last - first + 1)
        first = last + 1
    table = _table(("layers", "attention", "elements per token and layer", "bytes per token and layer"), rows)
    return f"Each token adds {total:,} bytes to the cache of all {len(specs)} layers at 16 bit.\n\n{table}"


def _loading(has_code: bool) -> str:
    installed = """With the `multimatrix` package installed:

```python
import multimatrix
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("FOLDER")
```"""
    if not has_code:
        return f"{installed}\n\n`multimatrix export FOLDER OUT` writes a folder that loads without the package as well."
    return f"""{installed}

Without it, running the code in this folder, which needs torch and transformers 5:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)
```"""


def _training(provenance: Mapping[str, Any]) -> str:
    facts = {name: provenance.get(name, "not recorded") for name in EXPECTED} | dict(provenance)
    return _table(("fact", "value"), _flat(facts)) if provenance else "Not recorded."


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """A table of tables as rows: ("corpus.name", ...)."""
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", "not recorded" if value is None else value


def _checking(checks: Sequence[Mapping[str, Any]] | None, where: str) -> str:
    if checks is None:
        return "Not checked. `multimatrix check FOLDER` runs the model in every way and prints how far they disagree."
    passed = sum(row["passed"] for row in checks)
    table = _table(
        ("check", "largest error", "tolerance", "verdict", "what was run"),
        (
            (
                row["check"],
                "none" if row["error"] == 0 else "not finite" if row["error"] is None else f"{row['error']:.1e}",
                f"{row['tolerance']:.0e}",
                "agrees" if row["passed"] else "DISAGREES",
                row["detail"],
            )
            for row in checks
        ),
    )
    return f"`multimatrix check` in {where}: {passed} of {len(checks)} agree.\n\n{table}"


def _table(headers: Sequence[str], rows: Any) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return " ".join(text.split()).replace("|", r"\|")
