"""Tasks in this process or in worker processes, so that a signal never waits for a long one."""

import multiprocessing
import signal
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from types import ModuleType
from typing import Any, cast

from eckart.errors import ResourceError
from eckart.execute.machine import cores
from eckart.execute.worker import receive, send, serve

SHORT_SECONDS = 2.0
"""A task of less may run in this process: Python sees a signal when it ends."""

WORTH_SECONDS = 2.0
"""Work of less in all is done here before workers have been started."""

PRELOADED = ["torch", "eckart.assemble.filling", "eckart.execute.worker"]
"""What workers need, loaded once for all of them."""

ATTEMPTS = 2
"""A task whose worker dies is given to another one, once."""


@dataclass(frozen=True, slots=True)
class Task:
    """One call of the unit: its arguments, and about how long it takes."""

    name: str
    arguments: tuple[Any, ...]
    seconds: float = 0.0


def warm_up(workers: int | None) -> None:
    """Starts the fork server, which loads torch while this process does; unless it is not needed.

    A second and a half that two processes spend side by side, and not one after the other.
    """
    if workers != 1 and cores() > 1:
        multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
        with _no_main_module():
            forkserver.ensure_running()


@dataclass
class _Worker:
    process: ForkServerProcess
    pipe: Connection
    task: Task | None = None


@dataclass
class _Pool:
    """Workers that are started when there is a task for them, and killed at the end."""

    unit: Callable[..., Any]
    workers: list[_Worker] = field(default_factory=list)

    def start(self) -> _Worker:
        """Starts one more worker."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, self.unit), daemon=True)
        with _no_main_module():
            process.start()
        theirs.close()
        self.workers.append(_Worker(process, ours))
        return self.workers[-1]

    def kill(self) -> None:
        """Ends every worker at once, whatever it is doing."""
        for worker in self.workers:
            worker.process.kill()
        for worker in self.workers:
            worker.process.join()
            worker.pipe.close()


def run_local(
    unit: Callable[..., Any], tasks: Sequence[Task], *, workers: int
) -> Iterator[tuple[Task, Any]]:
    """Calls the unit on every task; yields each task with its result, as they are done.

    The longest are begun first. With one worker, and none of them longer than two seconds, or
    little to do in all, it happens in this process, one after the other; else in `workers`
    processes from a fork server that has torch loaded. `unit`, arguments and results must be
    picklable. An exception of the unit ends the run and is raised here; a worker that dies is
    replaced once. Leaving the loop, by a signal too, kills the workers.
    """
    queue = sorted(tasks, key=lambda task: -task.seconds)
    total = sum(task.seconds for task in queue)
    longest = queue[0].seconds if queue else 0.0
    if longest < SHORT_SECONDS and (workers == 1 or total < WORTH_SECONDS):
        for task in queue:
            yield task, unit(*task.arguments)
    else:
        yield from _run_in_workers(unit, queue, min(workers, len(queue)))


def _run_in_workers(
    unit: Callable[..., Any], queue: list[Task], count: int
) -> Generator[tuple[Task, Any]]:
    pool, left = _Pool(unit), queue[::-1]
    failures: dict[str, int] = {}
    try:
        for _ in range(count):
            _give(pool.start(), left.pop())
        while busy := [worker for worker in pool.workers if worker.task]:
            for worker in _ready(busy):
                task = cast("Task", worker.task)
                answer = _receive(worker)
                if answer is None:
                    pool.workers.remove(worker)
                    failures[task.name] = failures.get(task.name, 0) + 1
                    if failures[task.name] == ATTEMPTS:
                        raise _died(task, worker)
                    _give(pool.start(), task)
                    continue
                worker.task = None
                if left:
                    _give(worker, left.pop())
                result, error = answer
                if error is not None:
                    raise error
                yield task, result
    finally:
        pool.kill()


def _ready(workers: list[_Worker]) -> list[_Worker]:
    """Waits until at least one has answered, or died."""
    found = wait([*(w.pipe for w in workers), *(w.process.sentinel for w in workers)])
    return [w for w in workers if w.pipe in found or w.process.sentinel in found]


def _give(worker: _Worker, task: Task) -> None:
    worker.task = task
    send(worker.pipe, task.arguments)


def _receive(worker: _Worker) -> tuple[Any, BaseException | None] | None:
    """The worker's answer, or None if it died first."""
    try:
        return receive(worker.pipe) if worker.pipe.poll() or worker.process.is_alive() else None
    except (EOFError, OSError):
        return None


def _died(task: Task, worker: _Worker) -> ResourceError:
    worker.process.join()
    code = worker.process.exitcode or 0
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return ResourceError(
        f"the worker process on {task.name} was {how}, {ATTEMPTS} times: probably there is not "
        "enough memory. Use fewer --workers, or leave the matrix out with --exclude."
    )


@contextmanager
def _no_main_module() -> Generator[None]:
    """Hides the caller's main module while a process is started.

    multiprocessing would run it again in every worker, and a script without a main guard with it;
    the workers need nothing of it.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
