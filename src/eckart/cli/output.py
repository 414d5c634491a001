"""Data on stdout; progress, remarks and errors on stderr."""

import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class _Data(Console):
    """stdout: when its reader has gone, the command ends. rich would call that exit 1, our bug."""

    def on_broken_pipe(self) -> NoReturn:
        raise BrokenPipeError


class _Log(Console):
    """stderr: when its reader has gone, the command goes on, and its exit code tells the rest."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


log = _Log(stderr=True, highlight=False)


def print_table(table: RenderableType) -> None:
    """Prints data for people."""
    console().print(table)


def print_json(document: object) -> None:
    """Prints data for programs: ASCII, so that no name can move the cursor."""
    import json

    import msgspec

    text = json.dumps(msgspec.to_builtins(document))
    try:
        print(text, flush=True)
    except BrokenPipeError:  # without its number, by which typer would make exit 1 of it
        raise BrokenPipeError from None


def say(text: object) -> None:
    """Prints a sentence to stderr."""
    from eckart.checkpoint.paths import printable

    log.print(printable(text), markup=False, soft_wrap=True)


def say_all(remarks: Sequence[str]) -> None:
    """Prints sentences to stderr."""
    for remark in remarks:
        say(remark)


def console() -> Console:
    """Returns where data goes: as wide as the terminal, or wide enough where there is none."""
    found = _Data(highlight=False)
    if not found.is_terminal:
        found.width = 200
    return found


class Bar:
    """A progress bar on stderr, by weight of work."""

    def __init__(self, bar: Progress, quiet: bool) -> None:
        self._bar, self._quiet = bar, quiet
        self._task: TaskID | None = None

    def stage(self, title: str, seconds: float) -> None:
        """Another bar, from the beginning."""
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(title, total=max(seconds, 1e-9))

    def advance(self, seconds: float) -> None:
        """Moves it on."""
        if self._task is not None:
            self._bar.advance(self._task, seconds)

    def note(self, text: str) -> None:
        """Prints a sentence above it."""
        if not self._quiet:
            say(text)


@contextmanager
def watching(*, quiet: bool) -> Generator[Bar]:
    """Yields what shows a run's progress: silent where stderr is no terminal, or if asked."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(),
        console=log,
        transient=True,
        disable=quiet or not log.is_terminal or os.environ.get("TERM") == "dumb",
    )
    with bar:
        yield Bar(bar, quiet)
