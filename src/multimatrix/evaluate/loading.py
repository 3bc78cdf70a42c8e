"""A saved causal language model and its tokenizer: ours, or whatever AutoModelForCausalLM loads from a folder."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from multimatrix.errors import InputError, one_line
from multimatrix.files import read_config
from multimatrix.model.configuration import MultimatrixConfig
from multimatrix.model.loading import load_config, load_model


def load(folder: str, dtype: torch.dtype | None, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The model of `folder` on this device, in this dtype or that of the file, and its tokenizer.

    Raises:
        InputError: the folder does not hold both, they do not load, or the tokenizer has more ids than the model.
    """
    ours = read_config(Path(folder))["model_type"] == MultimatrixConfig.model_type
    if ours:
        load_config(Path(folder))  # before the tokenizer, which reads the config as well and would be blamed
    tokenizer = _load_tokenizer(folder)
    try:
        if ours:
            model = load_model(folder, dtype=dtype, device=device)
        else:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto", local_files_only=True)
            model = model.to(device).eval()
    except InputError:
        raise
    except Exception as error:  # a damaged or foreign folder is met by transformers and safetensors, each in its way
        raise InputError(
            f"{folder} cannot be loaded: {one_line(error)}; give the folder of a saved causal language model"
        ) from error
    largest, embedded = max(tokenizer.get_vocab().values(), default=-1), model.get_input_embeddings().weight.shape[0]
    if largest >= embedded:
        raise InputError(
            f"the tokenizer in {folder} has ids up to {largest} and the model embeds {embedded}; "
            "save the tokenizer it was trained with beside it"
        )
    return model, tokenizer


def positions(model: PreTrainedModel) -> int | None:
    """How many tokens the model's config says that it sees; None where it does not say."""
    number = getattr(model.config, "max_position_embeddings", None)
    return number if isinstance(number, int) else None


def context_of(model: PreTrainedModel, asked: int | None) -> int:
    """Tokens the model may see at once: what was asked for, else its positions.

    Raises:
        InputError: nothing was asked for and the model's config does not say, or less than 2 were asked for.
    """
    context = asked if asked is not None else positions(model)
    if context is None:
        raise InputError(f"the config of this {model.config.model_type} names no number of positions; give --context")
    if context < 2:
        raise InputError(f"the context must be at least 2 tokens, got {context}")
    return context


def _load_tokenizer(folder: str) -> PreTrainedTokenizerFast:
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # what it raises depends on what it finds
        raise InputError(
            f"{folder} holds no tokenizer that can be loaded: {one_line(error)}; "
            "save one into it with tokenizer.save_pretrained"
        ) from error
