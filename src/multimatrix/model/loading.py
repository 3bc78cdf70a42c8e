"""Load a saved model, or say in one sentence why the folder cannot be one. Nothing is loaded before all is checked."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from pathlib import Path

import torch
from transformers import GenerationConfig

from multimatrix.errors import InputError, one_line
from multimatrix.model.configuration import MultimatrixConfig
from multimatrix.model.modeling import MultimatrixForCausalLM
from multimatrix.model.weight_files import StoredTensor, read_object, stored_tensors

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
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
    config = load_config(folder)
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(
            f"{folder} is quantized, and its tensors cannot be checked; give the model before quantization"
        )
    stored = stored_tensors(folder)
    _compare(folder, stored, config)
    dtype = dtype or functools.reduce(torch.promote_types, (DTYPES[tensor.dtype] for tensor in stored.values()))
    return MultimatrixForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).to(device).eval()


def load_config(folder: Path) -> MultimatrixConfig:
    """The config of a saved model of ours.

    Raises:
        InputError: there is none, or it is another model's, or it has fields that no config of ours has.
    """
    way_out = "give the folder of a saved multimatrix model"
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}; {way_out}")
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder} has no config.json; {way_out}")
    fields = read_object(path)
    kind = fields.get("model_type")
    if kind != MultimatrixConfig.model_type:
        what = f"it holds a {kind!r} model" if kind else "its config.json names no model_type"
        raise InputError(f"{folder} is no multimatrix model: {what}; {way_out}")
    ours = {field.name for field in dataclasses.fields(MultimatrixConfig)}
    known = ours | TRANSFORMERS_FIELDS | set(GenerationConfig().to_dict())
    for name in fields:
        if name not in known:
            near = difflib.get_close_matches(name, ours, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "remove it, or update multimatrix if a newer one wrote it"
            raise InputError(f"{path} has a field {name!r} that no multimatrix model has; {hint}")
    try:
        return MultimatrixConfig.from_dict(fields)
    except Exception as error:  # our config, huggingface_hub's types and transformers refuse each in their way
        raise InputError(f"{path} describes no model that works: {one_line(error)}") from error


def _compare(folder: Path, stored: dict[str, StoredTensor], config: MultimatrixConfig) -> None:
    """InputError where the stored tensors are not those of the model that the config describes."""
    with torch.device("meta"):
        model = MultimatrixForCausalLM(config)
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    differences = [
        f"{name} is {list(stored[name].shape)} in {stored[name].file} and {shape} by config.json"
        for name, shape in wanted.items()
        if name in stored and list(stored[name].shape) != shape
    ]
    differences += [
        f"{name} is in no file and {shape} by config.json"
        for name, shape in wanted.items()
        if name not in stored and name not in model.all_tied_weights_keys
    ]
    differences += [
        f"{name} is {list(tensor.shape)} in {tensor.file} and not in the model of config.json"
        for name, tensor in stored.items()
        if name not in wanted
    ]
    differences += [
        f"{name} is stored as {tensor.dtype} in {tensor.file} and weights are {', '.join(DTYPES)}"
        for name, tensor in stored.items()
        if tensor.dtype not in DTYPES
    ]
    if differences:
        first, *others = differences
        more = f" ({len(others)} more {'tensor differs' if len(others) == 1 else 'tensors differ'})" if others else ""
        raise InputError(
            f"{folder} cannot be loaded: {first}{more}; give the config.json and weights of one saved model"
        )
