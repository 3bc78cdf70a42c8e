"""Checkpoints of a run: written aside, renamed when they are whole, verified before they are used.

A checkpoint is the folder `step-N`. Weights and optimizer state are in the format of torch.distributed.checkpoint,
which any number of processes reads, whatever number wrote it. `manifest.json` lists every file with its length and
checksum.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import CheckpointException

from multimatrix.files import CHUNK, checksum, sync, write_json, writing
from multimatrix.train import processes
from multimatrix.train.folder import refuse_difference

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: what can be continued from."""

    step: int
    path: Path


def check_identity(folder: Path, identity: dict[str, Any]) -> None:
    """InputError where a checkpoint in `folder` is of a run with other settings; no weights are read."""
    for path in sorted(folder.glob(f"step-*/{MANIFEST}")):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))["identity"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # a damaged one is skipped when the run goes on, too
        refuse_difference(folder.parent, found, json.loads(json.dumps(identity)), "run")


class Checkpoints:
    """The checkpoints of one run; every method is called by all processes together.

    identity: what decides the result of the run; a checkpoint of another one is refused. keep: how many are kept.
    say: gets one line for the person who waits.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], *, keep: int, say: Callable[[str], None]) -> None:
        self.folder = folder
        self.identity = json.loads(json.dumps(identity))
        self.keep = keep
        self.say = say

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is not damaged; None where there is none.

        Damaged ones are named and skipped. What a killed process left half-written is deleted.

        Raises:
            InputError: it is of a run with other settings.
        """
        processes.first_does(self._tidy)
        for step in processes.of_first(sorted(self._steps(), reverse=True)):
            path = self._path(step)
            reason = self._damage(path)
            if reason is None:
                found = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
                refuse_difference(self.folder.parent, found["identity"], self.identity, "run")
                return Checkpoint(step, path)
            self.say(f"warning: the checkpoint {path} is damaged and is skipped: {reason}")
        return None

    def write(self, step: int, fill: Callable[[Path], None]) -> None:
        """Make the checkpoint of this step; fill: writes the files of this process into the folder it is given.

        The older ones are deleted once the new one is complete, and not before.

        Raises:
            OSError: it cannot be written, for example because the disk is full; the older ones are as they were.
        """
        temporary = self.folder / f".step-{step}.writing"
        processes.first_does(lambda: _make_empty(temporary))
        problem: OSError | None = None
        files: dict[str, Any] = {}
        try:
            fill(temporary)
            # Each process its own files: reading them again is the slow part.
            files = {name: _described(temporary / name) for name in self._mine(temporary)}
        except (Exception, CheckpointException) as error:
            problem = _as_os_error(error, temporary)
            if problem is None:
                raise
        problem = next((other for other in processes.gathered(problem) if other is not None), None)
        if problem is not None:
            processes.first_does(lambda: shutil.rmtree(temporary, ignore_errors=True))
            raise problem
        every = processes.gathered(files)
        processes.first_does(lambda: self._complete(step, temporary, {k: v for part in every for k, v in part.items()}))

    def _complete(self, step: int, temporary: Path, files: dict[str, Any]) -> None:
        try:
            with writing(temporary):
                write_json(temporary / MANIFEST, {"step": step, "identity": self.identity, "files": files})
                for folder in {temporary / name for name in files}:
                    sync(folder.parent)
                sync(temporary / MANIFEST)
                sync(temporary)
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        final = self._path(step)
        if final.exists():  # a damaged one, or one of a start that was not continued from
            _discard(final)
        temporary.rename(final)
        sync(self.folder)
        kept = [other for other in sorted(self._steps()) if other <= step][-self.keep :]
        for other in self._steps():
            if other not in kept:
                _discard(self._path(other))

    def _mine(self, folder: Path) -> list[str]:
        """The files whose checksums this process makes: by number, so that each is made once."""
        return sorted(name for name in _names(folder) if _writer(name) == processes.number())

    def _damage(self, path: Path) -> str | None:
        """Why the checkpoint cannot be used, as any process sees it; None where it can."""
        reason = None
        try:
            found = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            names = sorted(found["files"])
            for name in names[processes.number() :: processes.count()]:
                if not (path / name).is_file():
                    reason = f"{name} is missing"
                elif checksum(path / name) != found["files"][name]:
                    reason = f"{name} is not as it was written"
        except (OSError, ValueError, KeyError, TypeError):
            reason = f"{MANIFEST} cannot be read"
        return next((other for other in processes.gathered(reason) if other is not None), None)

    def _tidy(self) -> None:
        for path in self.folder.glob(".step-*"):
            shutil.rmtree(path, ignore_errors=True)

    def _steps(self) -> list[int]:
        found = (re.fullmatch(r"step-(\d+)", path.name) for path in self.folder.glob("step-*"))
        return [int(match[1]) for match in found if match]

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step}"


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _discard(path: Path) -> None:
    """Delete a checkpoint; whoever is killed meanwhile leaves none that looks whole."""
    going = path.with_name(f".{path.name}.old")
    shutil.rmtree(going, ignore_errors=True)
    path.rename(going)
    shutil.rmtree(going, ignore_errors=True)


def _names(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]


def _writer(name: str) -> int:
    """The process that wrote a file: torch.distributed.checkpoint and the Trainer put its number into the name."""
    found = re.search(r"__(\d+)_\d+\.distcp$|rng_state_(\d+)\.pth$", name)
    return int(found[1] or found[2]) if found else 0


def _described(path: Path) -> dict[str, int]:
    """Length and checksum, once the file is on the disk."""
    sync(path)
    return checksum(path)


def _as_os_error(error: BaseException, place: Path) -> OSError | None:
    """The reason why something could not be written, however it is wrapped; None where it is another trouble.

    torch writes in C++ and keeps no errno; writing a little more shows whether that was the reason.
    """
    pending, seen = [error], []
    while pending:
        current = pending.pop()
        seen.append(current)
        if isinstance(current, OSError) and current.errno is not None:
            return OSError(current.errno, os.strerror(current.errno), str(place))
        if isinstance(current, CheckpointException):
            pending += [cause for cause, _ in current.failures.values()]
        causes = (current.__cause__, current.__context__)
        pending += [cause for cause in causes if cause is not None and cause not in seen]
    probe = place / ".probe"
    try:
        with probe.open("wb") as file:
            file.write(bytes(CHUNK))
            file.flush()
            os.fsync(file.fileno())
    except OSError as reason:
        return OSError(reason.errno, os.strerror(reason.errno or 0), str(place))
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
    return None
