"""`multimatrix compare`, from settings to exit status."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from rich.console import Console, JustifyMethod
from rich.table import Table

from multimatrix.compare import report
from multimatrix.compare.configuration import make_comparison
from multimatrix.compare.launch import Launcher, make_launcher
from multimatrix.compare.matching import Candidate
from multimatrix.compare.prepare import Prepared, prepare
from multimatrix.compare.progress import Progress
from multimatrix.compare.run import run_comparison
from multimatrix.environment import command_line
from multimatrix.errors import InputError
from multimatrix.train.protocol import STOPPED, RunStopped
from multimatrix.train.stopping import stop_on_sigterm

INTERRUPTED = 130


def run_command(
    preset: str | None,
    settings: dict[str, Any],
    out: str,
    *,
    launcher: str | None = None,
    workers: int | None = None,
    dry_run: bool = False,
) -> int:
    """Run a comparison and print its table.

    Returns 0 if every run is done, 1 if any failed, 130 after Ctrl-C and 75 after SIGTERM.

    Raises:
        InputError: something the user can mend.
    """
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    comparison = make_comparison(preset, settings)
    chosen = make_launcher(launcher, workers)
    console = Console()
    progress = Progress(comparison.steps)
    prepared = prepare(comparison, device_type=chosen.device_type, say=progress.say)
    _describe(prepared, chosen, console)
    if dry_run:
        return 0
    directory = Path(out)
    try:
        with stop_on_sigterm():
            results = run_comparison(prepared, directory, chosen, command=command_line(), progress=progress)
    except KeyboardInterrupt as interrupt:
        progress.close()
        stopped = isinstance(interrupt, RunStopped)
        what = interrupt if stopped else "interrupted"
        progress.say(f"{what}; what was finished is in {directory}, and the same command goes on from there")
        return STOPPED if stopped else INTERRUPTED
    except OSError as error:
        where = error.filename or directory
        raise InputError(
            f"cannot write {where}: {error.strerror or error}; finished runs are kept, and once this is mended "
            "the same command goes on from there"
        ) from error
    finally:
        progress.close()
    console.print(report.console_table(results))
    console.print(f"Report: {directory / 'report.html'}", soft_wrap=True)
    return 0 if results["complete"] else 1


def _describe(prepared: Prepared, launcher: Launcher, console: Console) -> None:
    """What will be trained, before it is."""
    facts, protocol = prepared.corpus, prepared.protocol
    console.print(
        f"{facts['name']} (sha256 {facts['sha256'][:12]}): {facts['documents']:,} documents, "
        f"{facts['train_tokens']:,} training and {facts['validation_tokens']:,} validation tokens "
        f"({facts['tokenizer']})"
    )
    console.print(
        f"{protocol.steps} steps of {protocol.batch_size} x {protocol.context} tokens, seeds "
        f"{', '.join(map(str, prepared.comparison.seeds))}, {protocol.precision} on {prepared.device.type}"
        + (f", {launcher.workers} runs at once" if launcher.workers > 1 else "")
    )
    console.print(matched_table(prepared.candidates))


def matched_table(candidates: list[Candidate]) -> Table:
    """The matched sizes of every variant."""
    table = Table(box=None, header_style="bold", pad_edge=False, collapse_padding=True)
    experts = any(candidate.experts is not None for candidate in candidates)
    for header in (
        "variant",
        "heads x dim",
        "FFN width",
        "params",
        *(["active"] if experts else []),
        "mismatch",
        "KV bytes\n/token",
        "of MHA",
    ):
        justify: JustifyMethod = "left" if header == "variant" else "right"
        table.add_column(header, justify=justify, overflow="fold", no_wrap=header == "FFN width")
    for candidate in candidates:
        row = candidate.row()
        table.add_row(
            candidate.label,
            row["shape"],
            row.get("feed_forward") or f"{row['intermediate_size']:,}",
            f"{row['parameters']:,}",
            *([f"{row['active_parameters']:,}"] if experts else []),
            f"{100 * row['parameter_mismatch']:+.2f} %",
            f"{row['kv_bytes_per_token']:,}",
            f"{100 * (1 - row['kv_reduction']):.1f} %",
        )
    return table
