"""What this machine offers: cores and memory."""

import ctypes
import gc
import os
import resource
from collections.abc import Sequence
from pathlib import Path

from eckart.errors import UsageError

CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)
"""Limit and use of the container, in version 2 and 1 of cgroups."""


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""glibc's own numbers, from malloc.h."""


NEW_CONTAINERS = 50_000


def keep_freed_memory() -> None:
    """Has malloc keep what is freed, instead of giving every large block back to the system.

    Every page of the next block would be mapped and zeroed anew: up to a fifth of a run (measured).
    For our own processes; where there is no mallopt (macOS, musl) nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def collect_rarely() -> None:
    """Has Python look for cyclic garbage after 50 000 new containers, and not after each 700.

    Importing torch makes half a million that all stay: a tenth of its time goes into looking
    through them (measured). For our own processes.
    """
    gc.set_threshold(NEW_CONTAINERS, *gc.get_threshold()[1:])


def cores() -> int:
    """Returns how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux: less than all of them in a container
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def workers_for(shapes: Sequence[tuple[int, ...]], workers: int | None, threads: int | None) -> int:
    """Returns the workers asked for, or as many as have their threads on this machine."""
    for option, number in (("--workers", workers), ("--threads", threads)):
        if number is not None and number < 1:
            raise UsageError(f"{option} {number} is out of range: choose a whole number from 1.")
    # torch, which `warm_up` must not wait for
    from eckart.decompose.request import threads_for
    from eckart.matrix import Matrix

    most = max((threads_for(Matrix(shape).shape) for shape in shapes), default=1)
    return workers or max(cores() // (threads or most), 1)


def free_memory() -> int:
    """Returns the bytes that all processes of a run may take together, about."""
    return min([_available(), *(_left(limit, used) for limit, used in CGROUPS)])


def free_in_process() -> int:
    """Returns the bytes that one process may take: RLIMIT_DATA and RLIMIT_AS, less what it has."""
    soft = {
        kind: resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_DATA, resource.RLIMIT_AS)
    }
    taken = {
        resource.RLIMIT_DATA: _status("VmData"),
        resource.RLIMIT_AS: _status("VmSize"),
    }
    limits = [soft[kind] - taken[kind] for kind in soft if soft[kind] != resource.RLIM_INFINITY]
    return max(min(limits, default=2**62), 0)


def _available() -> int:
    """Linux: what the kernel could give without swapping; elsewhere all of the memory."""
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _left(limit: str, used: str) -> int:
    try:
        return int(Path(limit).read_text()) - int(Path(used).read_text())
    except (OSError, ValueError):  # none, or "max"
        return 2**62


def _status(key: str) -> int:
    for line in _lines(Path("/proc/self/status")):
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return 0


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
