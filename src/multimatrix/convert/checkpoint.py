"""A safetensors checkpoint written from the byte ranges of others, without loading a tensor.

What only renames tensors need not decode them: their bytes are copied in pieces of a megabyte, so that memory does not
grow with the checkpoint and every bit stays what it was.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from multimatrix.errors import InputError
from multimatrix.files import read_object, write_json
from multimatrix.model.saved_files import DTYPES, INDEX, WEIGHTS, StoredTensor

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
PIECE = 2**20


def write_checkpoint(folder: Path, tensors: Mapping[str, StoredTensor], max_shard_size: int) -> list[str]:
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


def _shards(tensors: Mapping[str, StoredTensor], max_shard_size: int) -> list[dict[str, StoredTensor]]:
    shards: list[dict[str, StoredTensor]] = [{}]
    filled = 0
    for name, stored in tensors.items():
        if shards[-1] and filled + stored.size > max_shard_size:
            shards.append({})
            filled = 0
        shards[-1][name] = stored
        filled += stored.size
    return shards


def _write_file(path: Path, tensors: Mapping[str, StoredTensor], progress: tqdm) -> None:
    # Wide elements first keep every tensor on a multiple of its element size.
    ordered = sorted(tensors.items(), key=lambda item: -DTYPES[item[1].dtype].itemsize)
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


def _copy(stored: StoredTensor, target: BinaryIO, progress: tqdm) -> None:
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

    Raises:
        InputError: one whose name ends in .json is damaged.
    """
    found = [name for name in COMPANIONS if (source / name).is_file()]
    for name in found:
        if name.endswith(".json"):
            read_object(source / name)
        shutil.copyfile(source / name, target / name)
    return found
