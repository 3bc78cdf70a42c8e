"""A safetensors checkpoint as a table of byte ranges, read and written without loading a tensor.

A file is eight bytes of header length, a JSON header that states dtype, shape and byte range of every tensor, and the
bytes (https://huggingface.co/docs/safetensors). What only renames tensors need not decode them: their bytes are copied
in pieces of a few megabytes, so that memory does not grow with the checkpoint and every bit stays what it was.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from multimatrix.errors import InputError, one_line
from multimatrix.files import write_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# What transformers and the engines want beside the weights; a format's config.json is written, never copied.
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
PIECE = 2**20


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its dtype in safetensors' word, its shape, and its bytes from `start` to `end`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.start


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; InputError where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {one_line(error)}; give the folder of a saved model") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a saved model.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder} has no config.json; give the folder of a saved model")
    return read_json(path)


def read_checkpoint(folder: Path) -> dict[str, Stored]:
    """Tensor name -> where it is stored, of `model.safetensors` or of the shards that its index names.

    Raises:
        InputError: there is neither, a file is damaged, or the index and the shards disagree.
    """
    single, index = folder / WEIGHTS, folder / INDEX
    if single.exists() and index.exists():
        raise InputError(f"{folder} has both {WEIGHTS} and {INDEX}; keep the one that is current")
    if single.exists():
        return _read_header(single)
    if not index.exists():
        raise InputError(f"{folder} has neither {WEIGHTS} nor {INDEX}; save the model as safetensors first")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(_is_file_name(name) for name in weight_map.values()):
        raise InputError(f"{index} has no weight_map from tensor names to file names; write the index again")
    tensors: dict[str, Stored] = {}
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).is_file():
            raise InputError(f"{index} names {shard}, which is not there; copy the shard beside it")
        for name, stored in _read_header(folder / shard).items():
            if weight_map.get(name) != shard:
                raise InputError(f"{folder / shard} holds {name}, which {INDEX} does not place there; write it again")
            tensors[name] = stored
    for name, shard in weight_map.items():
        if name not in tensors:
            raise InputError(f"{folder / shard} does not hold {name}, which {INDEX} places there; copy it again")
    return tensors


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and name != "" and Path(name).name == name


def _read_header(path: Path) -> dict[str, Stored]:
    """Tensor name -> where in this file; safetensors itself says whether the file is whole."""
    try:
        with safe_open(path, framework="np"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} is damaged or was not copied whole: {one_line(error)}; copy it again") from error
    begin = 8 + length
    return {
        name: Stored(path, entry["dtype"], tuple(entry["shape"]), *(begin + at for at in entry["data_offsets"]))
        for name, entry in header.items()
        if name != "__metadata__"
    }


def write_checkpoint(folder: Path, tensors: Mapping[str, Stored], max_shard_size: int) -> list[str]:
    """Copy tensors into new files of at most `max_shard_size` bytes each, in the order given, and write the index.

    A tensor larger than that gets a file of its own. One file is called `model.safetensors` and has no index.

    Returns: the names of the files.
    """
    shards = _shards(tensors, max_shard_size)
    names = (
        [WEIGHTS]
        if len(shards) == 1
        else [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    )
    with tqdm(total=sum(t.size for t in tensors.values()), unit="B", unit_scale=True, disable=None) as progress:
        for name, shard in zip(names, shards, strict=True):
            _write_file(folder / name, shard, progress)
    if len(shards) > 1:
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        write_json(
            folder / INDEX,
            {"metadata": {"total_size": sum(t.size for t in tensors.values())}, "weight_map": weight_map},
        )
    return names


def _shards(tensors: Mapping[str, Stored], max_shard_size: int) -> list[dict[str, Stored]]:
    shards: list[dict[str, Stored]] = [{}]
    filled = 0
    for name, stored in tensors.items():
        if shards[-1] and filled + stored.size > max_shard_size:
            shards.append({})
            filled = 0
        shards[-1][name] = stored
        filled += stored.size
    return shards


def _write_file(path: Path, tensors: Mapping[str, Stored], progress: tqdm) -> None:
    # Wide elements first keep every tensor on a multiple of its element size.
    ordered = sorted(tensors.items(), key=lambda item: -DTYPE_BYTES[item[1].dtype])
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, stored in ordered:
        header[name] = {
            "dtype": stored.dtype,
            "shape": list(stored.shape),
            "data_offsets": [at, at := at + stored.size],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, stored in ordered:
            _copy(stored, file, progress)


def _copy(stored: Stored, target: BinaryIO, progress: tqdm) -> None:
    with stored.file.open("rb") as source:
        source.seek(stored.start)
        left = stored.size
        while left:
            piece = source.read(min(PIECE, left))
            if not piece:
                raise InputError(f"{stored.file} became shorter while it was read; copy it again")
            target.write(piece)
            left -= len(piece)
            progress.update(len(piece))


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copy generation settings and tokenizer files that are there.

    Returns: their names.
    """
    found = [name for name in COMPANIONS if (source / name).is_file()]
    for name in found:
        shutil.copyfile(source / name, target / name)
    return found


def check_tensors(folder: Path, tensors: Mapping[str, Stored], expected: Mapping[str, tuple[int, ...]]) -> None:
    """InputError with the first tensor that is missing, surplus, of another shape, or no float of 16 to 64 bits."""
    _refuse_names(folder, "lacks", [name for name in expected if name not in tensors], expected)
    _refuse_names(
        folder, "holds", [name for name in tensors if name not in expected], {n: t.shape for n, t in tensors.items()}
    )
    for name, shape in expected.items():
        stored = tensors[name]
        if stored.shape != shape:
            raise InputError(
                f"{stored.file}: {name} has shape {stored.shape}, but by config.json it is {shape}; "
                "one of them is of another model"
            )
        if stored.dtype not in DTYPE_BYTES:
            raise InputError(
                f"{stored.file}: {name} is stored as {stored.dtype}, not as one of {', '.join(DTYPE_BYTES)}; "
                "undo the quantization first"
            )


def _refuse_names(folder: Path, verb: str, names: Iterable[str], shapes: Mapping[str, tuple[int, ...]]) -> None:
    if names := list(names):
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        belongs = "which its config.json asks for" if verb == "lacks" else "which its config.json has no place for"
        raise InputError(
            f"{folder} {verb} {names[0]} of shape {shapes[names[0]]}{more}, {belongs}; "
            "it is incomplete or of another model"
        )
