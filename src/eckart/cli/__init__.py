"""The command line: parse, call `api`, print. torch is imported inside commands only."""

import atexit
import os
import signal
import sys
from contextlib import suppress
from typing import NoReturn

from eckart.cli import adapter_commands as adapter_commands
from eckart.cli import statistics_commands as statistics_commands
from eckart.cli.commands import app
from eckart.cli.output import log, say
from eckart.errors import EckartError
from eckart.execute import collect_rarely, keep_freed_memory


def run() -> NoReturn:
    """Runs `main` as a process of its own, and ends it at once.

    Taking torch apart again, as the interpreter does, would take a third of a second.
    """
    code: object = 0
    keep_freed_memory()
    collect_rarely()
    try:
        main()
    except SystemExit as stop:
        code = stop.code
    atexit._run_exitfuncs()  # pyright: ignore[reportPrivateUsage] there is no public way
    with suppress(BrokenPipeError):  # the reader of our output has gone
        sys.stdout.flush()
    with suppress(BrokenPipeError):
        sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0)


def main() -> None:
    """Runs the command line; every expected failure is one red line and its exit code."""
    if sys.platform == "win32":
        print("eckart runs on Linux and macOS; on Windows use WSL.", file=sys.stderr)
        sys.exit(2)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # as a shell starts what runs in the background
            signal.signal(number, _stop)
    try:
        app()
    except EckartError as error:
        log.print("[bold red]error:[/] ", end="")
        say(error)
        _say_notes(error)
        sys.exit(error.exit_code)
    except _Stopped as stop:
        say("stopped")
        _say_notes(stop)
        sys.exit(128 + stop.number)
    except BrokenPipeError:  # the reader of our output has gone, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Stopped(BaseException):
    """SIGINT or SIGTERM. (A KeyboardInterrupt would be swallowed by typer, and its notes too.)"""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _stop(number: int, frame: object) -> NoReturn:
    """Leaves through every `finally`, so that nothing half-made stays behind."""
    raise _Stopped(number)


def _say_notes(error: BaseException) -> None:
    """What the stages have to add: what is kept, and how to go on."""
    for note in getattr(error, "__notes__", []):
        say(note)
