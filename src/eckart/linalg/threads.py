"""How many threads torch computes on, for a while.

Knows nothing else.
"""

from collections.abc import Generator
from contextlib import contextmanager

import torch


@contextmanager
def computing_on(threads: int) -> Generator[None]:
    """Computes on so many threads; afterwards on as many as before.

    The same threads give the same bits. More than there are cores, in several processes, take
    turns spinning: ten times as long (measured).

    >>> with computing_on(1):
    ...     torch.get_num_threads()
    1
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
