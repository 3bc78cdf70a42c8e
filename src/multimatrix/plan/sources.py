"""Where the sizes of a model come from: a recipe, or a config.json. No torch."""

from __future__ import annotations

from pathlib import Path

from multimatrix.attention import make_specs
from multimatrix.errors import InputError
from multimatrix.files import read_config, read_object
from multimatrix.model.experts import make_experts
from multimatrix.plan.families import FAMILIES, Fields
from multimatrix.plan.model import DecoderSizes
from multimatrix.recipes import read_recipe


def from_recipe(name: str) -> DecoderSizes:
    """A shipped model by name; InputError with the known names where there is none."""
    recipe = read_recipe("models", name)
    layers, dense = recipe["num_hidden_layers"], recipe.get("dense_layers", [])
    experts = recipe.get("mixture_of_experts")
    if experts is not None and dense:
        experts |= {"layers": [layer for layer in range(layers) if layer not in dense]}
    return DecoderSizes(
        name=name,
        source=f"{recipe['title']}: {recipe['source']}",
        specs=tuple(make_specs(recipe["hidden_size"], recipe["attention"], layers)),
        vocab_size=recipe["vocab_size"],
        intermediate_size=recipe["intermediate_size"],
        tie_word_embeddings=recipe.get("tie_word_embeddings", False),
        experts=None if experts is None else make_experts(experts),
        other_parameters=recipe.get("other_parameters", 0),
    )


def from_config(place: Path) -> DecoderSizes:
    """The model of a config.json, given as the file or its folder.

    Raises:
        InputError: there is none, it is no JSON object, its model_type is none of FAMILIES, or a field is missing,
            contradicts another or says what cannot be planned.
    """
    fields = read_object(place) if place.is_file() else read_config(place)
    kind = fields.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise InputError(
            f"{place} has model_type {kind!r}, which cannot be planned; those that can are {', '.join(FAMILIES)}"
        )
    found = Fields(place, fields)
    sizes = FAMILIES[kind](found)
    return DecoderSizes(name=place.stem if place.is_file() else place.resolve().name, source=str(place), **sizes)
