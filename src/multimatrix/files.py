"""Files that are written whole or not at all, and JSON that is read with care."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from multimatrix.errors import InputError, one_line

CONFIG = "config.json"
CHUNK = 1 << 24


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` through a temporary file beside it, so that no reader ever sees half of it.

    Raises:
        OSError: the disk is full or the folder cannot be written; `path` is then as it was before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """`write_text` of `value` as indented JSON, keys in the order given."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def sync(path: Path) -> None:
    """Have the system put a file, or the names in a folder, on the disk before anything goes on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def checksum(path: Path) -> dict[str, int]:
    """Length and checksum of a file."""
    found = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            found = zlib.crc32(chunk, found)
        return {"bytes": file.tell(), "crc32": found}


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that becomes `path` when the block ends, and is gone where it fails.

    Raises:
        InputError: `path` is there already and is more than an empty folder, or no folder can be made beside it.
    """
    made: list[Path] = []
    try:
        if path.exists() and not path.is_dir():
            raise InputError(f"{path} is a file; name a folder that is not there yet")
        if path.is_dir() and any(path.iterdir()):
            raise InputError(f"{path} is not empty; name a folder that is not there yet")
        path = path.resolve()  # "." has no folder beside it
        made = _missing_parents(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    except OSError as error:
        _remove_empty(made)
        raise InputError(f"no folder can be made at {path}: {error.strerror}; name another") from error
    try:
        yield temporary
        temporary.chmod(0o755)
        if path.is_dir():
            path.rmdir()
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        _remove_empty(made)
        raise


def check_writable(path: Path) -> None:
    """InputError where no file can be written at `path`: to be asked before the work whose results shall go there."""
    made: list[Path] = []
    try:
        if path.is_dir():
            raise InputError(f"{path} is a folder; name a file, for example {path / 'results.json'}")
        made = _missing_parents(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, trial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        os.unlink(trial)
    except OSError as error:
        raise InputError(f"no file can be written at {path}: {error.strerror}; name another") from error
    finally:
        _remove_empty(made)


def _missing_parents(path: Path) -> list[Path]:
    """The folders above `path` that are not there, the innermost first."""
    return [parent for parent in path.parents if not parent.exists()]


def _remove_empty(folders: list[Path]) -> None:
    """Remove those of the folders, the innermost first, that are there and that nobody has put anything into."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


@contextlib.contextmanager
def writing(place: Path | str) -> Iterator[None]:
    """Name `place` in the OSError of whatever cannot be written below it.

    safetensors and tokenizers write in Rust: their errors are no OSError and end in "(os error 28)".
    """
    try:
        yield
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        code = error.errno if isinstance(error, OSError) else int(number[1]) if number else None
        if code is None:
            raise
        raise OSError(code, os.strerror(code), str(place)) from error


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; InputError where it is anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON: {one_line(error)}; save or copy the model again") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} holds a JSON {type(found).__name__}, not an object; save or copy the model again")
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a saved model, whatever its kind, with a `model_type`.

    Raises:
        InputError: there is no such folder or file, or it is no JSON object that names the kind of the model.
    """
    way_out = "give the folder of a saved model"
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}; {way_out}")
    if not (folder / CONFIG).is_file():
        raise InputError(f"{folder} has no {CONFIG}; {way_out}")
    fields = read_object(folder / CONFIG)
    if not isinstance(fields.get("model_type"), str):
        raise InputError(f"{folder / CONFIG} names no model_type; {way_out}")
    return fields
