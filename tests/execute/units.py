"""Units of work for the tests of execution: worker processes import them by name."""

import os
import signal
import time
from pathlib import Path

import torch

from eckart.errors import UsageError


def process(number: int) -> tuple[int, int]:
    """Says which process did it."""
    return number, os.getpid()


def refuse(number: int) -> int:
    """An error of ours, at 3."""
    if number == 3:
        raise UsageError("3 is refused.")
    return number


def divide(number: int) -> float:
    """A bug."""
    return 1 / number


def die_once(marker: str, number: int) -> int:
    """Killed the first time, as by a lack of memory."""
    if not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def die(number: int) -> int:
    """Killed every time."""
    os.kill(os.getpid(), signal.SIGKILL)
    return number


def sleep(folder: str) -> None:
    """A long call; says that it began, and who it is."""
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(60)


def tensor(number: int) -> torch.Tensor:
    """A result that is a tensor."""
    return torch.full((3,), float(number))
