"""Files that are either whole or absent."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


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
