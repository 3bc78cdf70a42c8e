"""Load a saved model, or say in one sentence why the folder cannot be one. Nothing is loaded before all is checked."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from pathlib import Path

import torch
from transformers import GenerationConfig

from multimatrix.errors import InputError, one_line
from multimatrix.files import CONFIG, read_config, read_object
from multimatrix.model.configuration import MultimatrixConfig
from multimatrix.model.modeling import MultimatrixForCausalLM
from multimatrix.model.saved_files import DTYPES, StoredTensor, check_tensors, stored_tensors

GENERATION = "generation_config.json"
# What transformers reads from a config.json beside the fields of the config class.
TRANSFORMERS_FIELDS = {
    *("model_type", "auto_map", "quantization_config", "torch_dtype", "name_or_path", "_name_or_path", "_commit_hash"),
    *("attn_implementation", "_attn_implementation", "output_attentions", "num_labels", "rope_theta", "rope_scaling"),
}


def load_model(
    folder: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> MultimatrixForCausalLM:
    """A saved model of ours, in evaluation mode.

    dtype: of its weights, None for the one they are stored in (the wider one where there are several).

    Raises:
        InputError: the folder holds no multimatrix model, or a config.json and weights that do not belong together.
    """
    folder = Path(folder)
    _, stored = read_model(folder)
    if (folder / GENERATION).is_file():
        read_object(folder / GENERATION)  # transformers ignores one that is cut and trips over a list
    dtype = dtype or functools.reduce(torch.promote_types, (DTYPES[tensor.dtype] for tensor in stored.values()))
    return MultimatrixForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).to(device).eval()


def read_model(folder: Path) -> tuple[MultimatrixConfig, dict[str, StoredTensor]]:
    """The config of a saved model of ours and where its tensors are stored; no weight is read.

    Raises:
        InputError: as `load_model`.
    """
    config = load_config(folder)
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(
            f"{folder} is quantized, and its tensors cannot be checked; give the model before quantization"
        )
    stored = stored_tensors(folder)
    with torch.device("meta"):
        model = MultimatrixForCausalLM(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    check_tensors(folder, stored, shapes, optional=model.all_tied_weights_keys)
    return config, stored


def load_config(folder: Path) -> MultimatrixConfig:
    """The config of a saved model of ours.

    Raises:
        InputError: there is none, or it is another model's, or it has fields that no config of ours has.
    """
    fields = read_config(folder)
    if (kind := fields["model_type"]) != MultimatrixConfig.model_type:
        raise InputError(
            f"{folder} is no multimatrix model: it holds a {kind!r} model; give the folder of a saved multimatrix model"
        )
    ours = {field.name for field in dataclasses.fields(MultimatrixConfig)}
    known = ours | TRANSFORMERS_FIELDS | set(GenerationConfig().to_dict())
    for name in fields:
        if name not in known:
            near = difflib.get_close_matches(name, ours, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "remove it, or update multimatrix if a newer one wrote it"
            raise InputError(f"{folder / CONFIG} has a field {name!r} that no multimatrix model has; {hint}")
    try:
        return MultimatrixConfig.from_dict(fields)
    except Exception as error:  # our config, huggingface_hub's types and transformers refuse each in their way
        raise InputError(f"{folder / CONFIG} describes no model that works: {one_line(error)}") from error
