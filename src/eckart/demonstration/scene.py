"""Where the story is told: a console, the folder of its outputs, and what is unpacked there."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from rich.console import Console
from rich.table import Table

from eckart.checkpoint.paths import write_file
from eckart.checkpoint.writer import copy_file
from eckart.errors import PromiseError
from eckart.verification import Check

LABEL = 34
"""Columns of what a number is called."""

WORDS = ("matrix", "adapter", "model", "shape", "verdict")
"""Columns that are read from the left; all others are numbers."""


def embedded(*parts: str) -> Path:
    """Returns the path of an embedded model or text."""
    return Path(str(files("eckart.demonstration"))).joinpath(*parts)


@dataclass(frozen=True, slots=True)
class Scene:
    """A console and a folder; with `force`, what an earlier telling left there is replaced."""

    console: Console
    folder: Path
    force: bool = False

    def heading(self, text: str) -> None:
        """Begins a part of the story."""
        self.console.print(f"\n{text}", style="bold", markup=False, soft_wrap=True)

    def command(self, start: str, rest: str) -> None:
        """Begins a part with the command that does the same, on two lines."""
        self.heading(f"{start} \\\n      {rest}")

    def say(self, text: str) -> None:
        """Prints lines of prose, indented."""
        for line in text.splitlines():
            self.console.print(f"  {line}", markup=False, soft_wrap=True)

    def row(self, label: str, value: object) -> None:
        """Prints one number, and what it is."""
        self.say(f"{label:{LABEL}} {value}")

    def table(self, *columns: str) -> Table:
        """Returns an empty table; the first column has a margin of its own."""
        table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 1, 0, 1))
        for i, column in enumerate(columns):
            side = "left" if column in WORDS else "right"
            table.add_column(column if i else f" {column}", justify=side)
        return table

    def unpack(self, model: str) -> Path:
        """Returns an embedded model, copied to where the user can look at it."""
        for source in sorted(embedded("models", model).iterdir()):
            copy_file(source, self.folder / model / source.name)
        return self.folder / model

    def text(self, name: str, source: str | None = None, size: int | None = None) -> Path:
        """Returns an embedded text beside the models, or the first bytes of one (`source`)."""
        path = self.folder / f"{name}.txt"
        if not path.exists():
            write_file(path, embedded("texts", f"{source or name}.txt").read_bytes()[:size])
        return path

    def check(self, out: Path, checks: Sequence[Check]) -> int:
        """Returns how many promises were looked at; raises PromiseError if one does not hold."""
        if failed := [check for check in checks if not check.held]:
            raise PromiseError(f"{out} does not hold its promise: {failed[0].detail}")
        return len(checks)


def arrow(pair: tuple[int, int]) -> str:
    """Returns how many there were and are, with the share.

    >>> arrow((1000, 600))
    '1,000 → 600 (60.0 %)'
    """
    before, after = pair
    return f"{before:,} → {after:,} ({100 * after / before:.1f} %)"
