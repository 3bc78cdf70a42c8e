"""The command line run inside the test process: importing torch anew for every command would take seconds."""

from __future__ import annotations

import contextlib
import io
import sys
from dataclasses import dataclass
from unittest import mock

from multimatrix import cli


@dataclass(frozen=True)
class Done:
    """What a command printed, and its exit status."""

    status: int
    out: str
    err: str

    @property
    def sentence(self) -> str:
        """The one line that says what is wrong; anything before it is progress."""
        assert self.status == 2, (self.status, self.err)
        assert "Traceback" not in self.out + self.err
        *progress, last = self.err.splitlines()
        assert last.startswith("multimatrix: "), self.err
        assert not any(line.startswith("multimatrix: ") for line in progress)
        return last


def multimatrix(*words: object, encoding: str = "utf-8") -> Done:
    """Run `multimatrix WORDS`; an exception that is not meant for the user comes through. encoding: of the output."""
    out, err = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline=""), io.StringIO()
    argv = ["multimatrix", *map(str, words)]
    with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
            status = 0
        except SystemExit as exit_:
            status = exit_.code
    out.flush()
    return Done(status, out.buffer.getvalue().decode(encoding), err.getvalue())
