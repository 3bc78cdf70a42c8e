"""Files that are either whole or absent."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from multimatrix.errors import InputError


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


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` to fill; it becomes `out` when the block ends, and is deleted where that fails.

    Raises:
        InputError: `out` is there already and is no empty folder, or nothing can be made beside it.
    """
    out = out.resolve()
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"{out} exists and is not an empty folder; give the name of a new one")
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror}; give another place") from error
    try:
        yield temporary
        temporary.chmod(0o755)
        os.replace(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


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
