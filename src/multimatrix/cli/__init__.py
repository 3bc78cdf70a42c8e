"""The command line: one file a command, heavy imports inside its function, and the table of commands here."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from typing import Annotated

import typer

from multimatrix import __version__
from multimatrix.cli.capacity import capacity
from multimatrix.cli.check import check
from multimatrix.cli.compare import compare
from multimatrix.cli.evaluate import evaluate
from multimatrix.cli.export import export
from multimatrix.cli.generate import generate
from multimatrix.cli.import_ import import_
from multimatrix.cli.plan import plan
from multimatrix.cli.report import report
from multimatrix.cli.train import train
from multimatrix.errors import InputError

app = typer.Typer(
    name="multimatrix",
    help="Attention that saves KV cache: MFA, MFA-KR and their peers, compared fairly.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its boxes cut the names of options short
)

COMMANDS = (capacity, plan, check, compare, train, report, evaluate, generate, import_, export)
for command in COMMANDS:
    app.command(command.__name__.strip("_"))(command)  # `import` is no name for a function


def main() -> None:
    """Run the command line; what the user can mend is one sentence and exit status 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that has no × shows ? and the command goes on.
        sys.stdout.reconfigure(errors="replace")
    try:
        try:
            app(prog_name="multimatrix")
        finally:
            sys.stdout.flush()
    except InputError as error:
        print(f"multimatrix: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # `multimatrix ... | head` has read enough
        _drop_output()
        sys.exit(1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        _drop_output()
        place = error.filename or "the output"
        print(f"multimatrix: cannot write {place}: {error.strerror}; make room and run it again", file=sys.stderr)
        sys.exit(2)


def _drop_output() -> None:
    """Send what stdout still buffers nowhere: the interpreter would fail on it once more when it ends."""
    with contextlib.suppress(OSError):  # a stdout that is no file has nothing to fail on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@app.callback(invoke_without_command=True)
def version_option(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        print(f"multimatrix {__version__}")
        raise typer.Exit
