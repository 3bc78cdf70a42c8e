"""The processes that train one model together; alone, each of these functions has nothing to do."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from multimatrix.errors import InputError


def started() -> int:
    """How many processes torchrun or accelerate started for this run, known before they meet."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process speaks and writes for all of them."""
    return int(os.environ.get("RANK", "0")) == 0


def speaks() -> bool:
    """Whether this process says what went wrong: one on every machine."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def together() -> bool:
    return dist.is_available() and dist.is_initialized()


def number() -> int:
    """This process's, from 0."""
    return dist.get_rank() if together() else 0


def count() -> int:
    return dist.get_world_size() if together() else 1


def wait() -> None:
    """Until all processes are here."""
    if together():
        dist.barrier()


def gathered(value: Any) -> list[Any]:
    """What every process gave, in their order."""
    if not together():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def of_first(value: Any) -> Any:
    """What the first process gave."""
    if not together():
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def first_does(action: Callable[[], None]) -> None:
    """Let the first process do it, and all of them fail where it fails for a reason that the user can mend."""
    problem: Exception | None = None
    if number() == 0:
        try:
            action()
        except (OSError, InputError) as error:
            problem = error
    problem = of_first(problem)
    if problem is not None:
        raise problem
