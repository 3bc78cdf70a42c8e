"""Changes to the folder of a saved model, for tests of what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    """Let `change` edit the weight_map."""
    path = folder / INDEX
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], object], file: str = WEIGHTS) -> None:
    weights = load_file(folder / file)
    change(weights)
    save_file(weights, folder / file, metadata={"format": "pt"})


def cut(path: Path, left: int) -> None:
    """Keep the first `left` bytes, all but the last -left where it is negative."""
    path.write_bytes(path.read_bytes()[:left])
