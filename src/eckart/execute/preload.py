"""What the fork server loads, once for all workers; imported nowhere else.

It ends as the command itself does: at once, without taking torch apart. Whoever reads the
command's output through a pipe would wait for it, since it holds the other end too.
"""

import atexit
import os
from importlib import import_module

from eckart.execute.machine import collect_rarely, keep_freed_memory

collect_rarely()
for name in ("torch", "eckart.assemble.filling", "eckart.execute.worker"):
    import_module(name)
keep_freed_memory()
atexit.register(os._exit, 0)
