"""Where the sizes of a model come from: a recipe, a config.json, or the Hugging Face hub. No torch."""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from multimatrix.attention import make_specs
from multimatrix.errors import InputError, one_line
from multimatrix.files import CONFIG, read_config, read_object
from multimatrix.model.experts import make_experts
from multimatrix.plan.config_fields import Fields, shown
from multimatrix.plan.families import FAMILIES, WRAPPERS
from multimatrix.plan.model import DecoderSizes
from multimatrix.recipes import read_recipe

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
DOWNLOAD = f"download its {CONFIG} and give the file"


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


def from_place(place: str) -> DecoderSizes:
    """The model of a config.json: the file, its folder, or a repository owner/name of the Hugging Face hub.

    What is there on this machine is read from there.

    Raises:
        InputError: as `from_config` and `hub_config` have it.
    """
    if os.path.exists(place) or not HUB_NAME.fullmatch(place):
        try:
            return from_config(Path(place))
        except OSError as error:  # a name that no file can have
            raise InputError(f"{shown(place)} cannot be read: {error.strerror}; name a file or folder") from error
    return from_fields(read_object(hub_config(place)), name=place.partition("/")[2], source=place)


def from_places(places: Iterable[str], taken: Iterable[str]) -> list[DecoderSizes]:
    """The models of `from_place`; one whose name another has, or is `taken`, is called by its place."""
    models = {place: from_place(place) for place in places}
    often = Counter([*taken, *(model.name for model in models.values())])
    return [replace(model, name=place) if often[model.name] > 1 else model for place, model in models.items()]


def from_config(place: Path) -> DecoderSizes:
    """The model of a config.json, given as the file or its folder.

    Raises:
        InputError: there is none, it is no JSON object, or as `from_fields` has it.
    """
    if place.is_file():
        whole = place.resolve()
        name = whole.parent.name if place.name == CONFIG else whole.stem
        return from_fields(read_object(place), name=name, source=str(place))
    return from_fields(read_config(place), name=place.resolve().name, source=str(place))


def from_fields(fields: Mapping[str, Any], *, name: str, source: str) -> DecoderSizes:
    """The model of the fields of a config.json; source: what an error calls their file.

    Raises:
        InputError: its model_type is none of FAMILIES and WRAPPERS, or a field is missing, contradicts another or says
            what cannot be planned.
    """
    kind = fields.get("model_type")
    notes: tuple[str, ...] = ()
    if isinstance(kind, str) and kind in WRAPPERS:
        fields, notes = _language_model(source, fields)
        kind = fields["model_type"]
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise InputError(
            f"{source} has model_type {shown(kind)}, which cannot be planned; those that can are "
            f"{', '.join([*FAMILIES, *WRAPPERS])}"
        )
    try:
        return DecoderSizes(name=name, source=source, notes=notes, **FAMILIES[kind](Fields(source, fields)))
    except InputError as error:
        if str(error).startswith(source):
            raise
        raise InputError(f"{source} cannot be planned: {error}") from error


def _language_model(source: str, fields: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The fields of the language model inside a model that also sees, and what is to be said of the rest."""
    inner, kind = fields.get("text_config"), fields["model_type"]
    if not isinstance(inner, dict):
        has = f"text_config = {shown(inner)}" if "text_config" in fields else "no text_config"
        raise InputError(f"{source} has {has}, where a {kind} model states its language model")
    notes = ["its language model alone is planned, not what makes tokens of images"]
    inner = {"model_type": WRAPPERS[kind]} | inner
    tied, outer = inner.get("tie_word_embeddings"), fields.get("tie_word_embeddings")
    if tied is None and outer is not None:
        inner["tie_word_embeddings"] = outer
    elif tied is not None and outer is not None and tied != outer:
        notes.append(f"it states tie_word_embeddings twice; that of its text_config, {shown(tied)}, is taken")
    return inner, tuple(notes)


def hub_config(repository: str) -> Path:
    """config.json of a repository owner/name of the Hugging Face hub, fetched or, out of reach of it, from its cache.

    Raises:
        InputError: there is no such repository or file, access to it is restricted, or the hub cannot be reached.
    """
    # Half a second, spent by those who ask for it.
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
    )

    try:
        # Asked first, as a download that cannot reach the hub tries again for half a minute.
        get_hf_file_metadata(hf_hub_url(repository, CONFIG))
        with _no_bars():
            return Path(hf_hub_download(repository, CONFIG))
    except HFValidationError as error:
        raise InputError(f"{repository} is no file or folder here, and no name that the hub allows") from error
    except GatedRepoError as error:
        raise InputError(
            f"access to {repository} on the Hugging Face hub is restricted; accept its terms there and run "
            f"`hf auth login`, or {DOWNLOAD}"
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"there is no {repository}, neither as a file or folder here nor on the Hugging Face hub, or it is "
            "private; check the name"
        ) from error
    except EntryNotFoundError as error:
        raise InputError(f"{repository} on the Hugging Face hub has no {CONFIG}; name another repository") from error
    except Exception as error:  # of the library that the hub's client uses, which differs by version
        cached = try_to_load_from_cache(repository, CONFIG)
        if isinstance(cached, str):
            return Path(cached)
        raise InputError(
            f"{repository} is no file or folder here, and the Hugging Face hub cannot be asked for it: "
            f"{one_line(error)}; {DOWNLOAD}"
        ) from error


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
