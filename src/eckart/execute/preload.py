"""What the fork server loads, once for all workers; imported nowhere else.

It ends as the command itself does: at once, without taking torch apart. Whoever reads the
command's output through a pipe would wait for it, since it holds the other end too.
"""

import atexit
import os
import sys
from importlib import import_module
from types import TracebackType

from eckart.execute.machine import collect_rarely, keep_freed_memory

collect_rarely()
for name in ("torch", "scipy.linalg", "eckart.assemble.filling", "eckart.execute.worker"):
    import_module(name)
keep_freed_memory()
atexit.register(os._exit, 0)


def _unless_the_command_ended(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Prints no traceback of a worker that never heard what for it was started.

    A command that ends with an error, while its thread starts workers ahead, closes the pipe: that
    is no error of its own. What a worker does is reported elsewhere.
    """
    if kind is not EOFError:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _unless_the_command_ended
