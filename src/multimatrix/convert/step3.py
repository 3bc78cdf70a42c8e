"""Step-3's checkpoints in and out: folder to folder, every bit kept, memory of a few megabytes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multimatrix.convert import step3_format as names
from multimatrix.convert.checkpoint import copy_companions, write_checkpoint
from multimatrix.convert.step3_config import from_step3, to_step3
from multimatrix.errors import InputError, one_line
from multimatrix.files import new_folder, read_config, write_json, writing
from multimatrix.model.saved_files import StoredTensor, check_tensors, stored_tensors

if TYPE_CHECKING:
    from multimatrix.model.configuration import MultimatrixConfig

MAX_SHARD_SIZE = 5 * 10**9


@dataclass(frozen=True)
class Converted:
    """What was written: the folder, the number of tensors, their bytes, the names of all files, and what to know."""

    out: Path
    tensors: int
    size: int
    files: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def lines(self) -> list[str]:
        """For printing."""
        shards = [name for name in self.files if name.endswith(".safetensors")]
        others = ", ".join(name for name in self.files if name not in shards)
        files = "1 file" if len(shards) == 1 else f"{len(shards)} files"
        return [f"{self.out}: {self.tensors} tensors, {self.size:,} bytes in {files}, and {others}", *self.notes]


def export_step3(model: Path | str, out: Path | str, max_shard_size: int = MAX_SHARD_SIZE) -> Converted:
    """Write a saved model of ours, all layers MFA, as a folder that engines load as `Step3TextForCausalLM`.

    max_shard_size: bytes of the largest file. Tied embeddings are written twice, since engines read both matrices.

    Raises:
        InputError: the format cannot state the model, the folder holds no such model, or `out` is not empty.
    """
    from multimatrix.model.loading import read_model

    model, out = Path(model), Path(out)
    config, tensors = read_model(model)
    fields = to_step3(config)
    rows = list(names.tensor_rows(config))
    notes = []
    if config.tie_word_embeddings:
        rows[-1] = rows[-1]._replace(ours=rows[0].ours)
        notes.append("lm_head.weight is a second copy of the tied embedding: engines do not tie the two")
    return _write(model, out, fields, {row.theirs: tensors[row.ours] for row in rows}, max_shard_size, notes)


def import_step3(folder: Path | str, out: Path | str, max_shard_size: int = MAX_SHARD_SIZE) -> Converted:
    """Write a `step3_text` checkpoint as a model that `MultimatrixForCausalLM.from_pretrained` loads.

    Of a `step3_vl` checkpoint the language model is taken, and the vision tower and its projector left out.
    max_shard_size: bytes of the largest file.

    Raises:
        InputError: the folder is no such checkpoint, is damaged, says what our decoder does not do, or `out` is not
            empty.
    """
    from huggingface_hub.errors import StrictDataclassError

    from multimatrix.model.configuration import MultimatrixConfig

    folder, out = Path(folder), Path(out)
    fields = read_config(folder)
    kind = fields.get("model_type")
    if kind not in (names.MODEL_TYPE, names.VISION_MODEL_TYPE):
        raise InputError(f"{folder} holds a {kind!r} model, not {names.MODEL_TYPE} or {names.VISION_MODEL_TYPE}")
    tensors, notes = stored_tensors(folder), []
    if kind == names.VISION_MODEL_TYPE:
        fields = _text_fields(folder, fields)
        text = {name: stored for name, stored in tensors.items() if not name.startswith(names.VISION_TENSORS)}
        notes.append(f"{len(tensors) - len(text)} tensors of the vision part are left out")
        tensors = text
    routers = (re.fullmatch(r"model\.layers\.(\d+)\.moe\.gate\.weight", name) for name in tensors)
    expert_layers = [int(router[1]) for router in routers if router]
    try:
        config = MultimatrixConfig(**from_step3(fields, expert_layers), architectures=["MultimatrixForCausalLM"])
    except (InputError, StrictDataclassError) as error:
        raise InputError(f"{folder} cannot be imported: {one_line(error)}") from error
    rows = list(names.tensor_rows(config))
    check_tensors(folder, tensors, {row.theirs: row.shape for row in rows})
    return _write(folder, out, config, {row.ours: tensors[row.theirs] for row in rows}, max_shard_size, notes)


def _write(
    source: Path,
    out: Path,
    config: MultimatrixConfig | Mapping[str, Any],
    tensors: Mapping[str, StoredTensor],
    max_shard_size: int,
    notes: list[str],
) -> Converted:
    with writing(out), new_folder(out) as folder:
        if isinstance(config, Mapping):
            write_json(folder / "config.json", config)
        else:
            config.save_pretrained(folder)
        files = [*write_checkpoint(folder, tensors, max_shard_size), "config.json", *copy_companions(source, folder)]
    return Converted(out, len(tensors), sum(t.size for t in tensors.values()), tuple(files), tuple(notes))


def _text_fields(folder: Path, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's part of a vision-language config."""
    text = fields.get("text_config")
    if not isinstance(text, dict):
        raise InputError(f"{folder}/config.json has no text_config, where {names.VISION_MODEL_TYPE} states its sizes")
    # What holds for the whole model may be stated once, outside.
    shared = (*names.FIXED_FIELDS, *names.TOKEN_FIELDS, "torch_dtype", "dtype")
    outside = {name: fields[name] for name in shared if name in fields and text.get(name) is None}
    return {**text, **outside}
