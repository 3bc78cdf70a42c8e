"""A table of a benchmark, on the terminal and in Markdown."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Lines:
    """One table: a title, the header and what stands below it. Cells may be bold, as in Markdown."""

    title: str
    header: list[str]
    body: list[list[str]]

    def show(self, console: Console) -> None:
        """An empty line and the table; what is bold in Markdown is plain here."""
        table = Table(title=self.title, title_justify="left", box=None, pad_edge=False, header_style="bold")
        for index, name in enumerate(self.header):
            table.add_column(name, justify="right" if index else "left", no_wrap=True)
        for cells in self.body:
            table.add_row(*(cell.replace("**", "") for cell in cells))
        console.print()
        console.print(table)

    def markdown(self) -> str:
        """The table without its title."""
        rows = [self.header, ["---", *["---:"] * (len(self.header) - 1)], *self.body]
        return "\n".join("| " + " | ".join(row) + " |" for row in rows)
