"""What the fork server loads, once for all workers; imported nowhere else.

It ends as the command itself does: at once, without taking torch apart. Whoever reads the
command's output through a pipe would wait for it, since it holds the other end too.
"""

import atexit
import os

import torch  # noqa: F401

import eckart.assemble.filling
import eckart.execute.worker  # noqa: F401
from eckart.execute.machine import keep_freed_memory

keep_freed_memory()
atexit.register(os._exit, 0)
