"""What a worker process does: call the unit on what it is sent, until there is no more."""

import os
import pickle
import signal
from collections.abc import Callable
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from threading import Thread
from traceback import format_exc
from typing import Any, cast

from eckart.errors import EckartError


def serve(pipe: Connection) -> None:
    """Answers arguments with (result, None) or (None, exception), until the pipe is closed.

    What is sent and is no tuple is the unit to call on the arguments that follow. An interrupt at
    the terminal is the parent's business: it ends its workers itself. If the parent dies, so does
    the worker, even in the middle of a long LAPACK call.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    Thread(target=_follow_parent, daemon=True).start()
    unit: Callable[..., Any] | None = None
    while True:
        try:
            message: object = receive(pipe)
        except EOFError:
            return
        if unit is not None and isinstance(message, tuple):
            send(pipe, _answer(unit, cast("tuple[Any, ...]", message)))
        else:
            unit = cast("Callable[..., Any]", message)


def _answer(
    unit: Callable[..., Any], arguments: tuple[Any, ...]
) -> tuple[Any, BaseException | None]:
    try:
        return unit(*arguments), None
    except Exception as error:  # noqa: BLE001 it is raised again, in the parent
        if not isinstance(error, EckartError):
            error.add_note(f"In a worker process:\n{format_exc()}")
        return None, error


def send(pipe: Connection, value: object) -> None:
    """Sends a value by plain pickle.

    multiprocessing's own way would hand tensors over in shared memory, a file descriptor each.
    """
    pipe.send_bytes(pickle.dumps(value))


def receive(pipe: Connection) -> Any:
    """Returns what `send` sent."""
    return pickle.loads(pipe.recv_bytes())  # noqa: S301 from our own process, through our own pipe


def _follow_parent() -> None:
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
