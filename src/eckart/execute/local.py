"""Tasks in this process or in worker processes, so that a signal never waits for a long one."""

import multiprocessing
import signal
import sys
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from threading import Lock, Thread
from types import ModuleType
from typing import Any, Self, cast

from eckart.errors import ResourceError
from eckart.execute.machine import cores
from eckart.execute.progress import Progress, Silent
from eckart.execute.worker import receive, send, serve

SHORT_SECONDS = 2.0
"""A task of less may run in this process: Python sees a signal when it ends."""

WORTH_SECONDS = 2.0
"""Work of less in all is not worth starting workers."""

SHARED_SECONDS = 0.1
"""Work of less in all is not worth sharing out to workers that are there already."""

PRELOADED = ["eckart.execute.preload"]
"""What workers need, loaded once for all of them."""

MOST_AHEAD = 8

ATTEMPTS = 2
"""A task whose worker dies is given to another one, once."""


@dataclass(frozen=True, slots=True)
class Task:
    """One call of the unit: its arguments, and about how long it takes."""

    name: str
    arguments: tuple[Any, ...]
    seconds: float = 0.0


@dataclass
class _Worker:
    process: ForkServerProcess
    pipe: Connection
    unit: object = None  # the one it was sent last
    task: Task | None = None


_AHEAD: deque[Future[_Worker]] = deque()
_MAIN_MODULE = Lock()


def warm_up(workers: int | None) -> None:
    """Starts workers, which load torch while this process does; unless one is enough.

    A second and a half that two processes spend side by side, and not one after the other.
    """
    count = min(workers or cores(), cores(), MOST_AHEAD)
    if count > 1 and not _AHEAD:
        multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
        with _no_main_module():
            forkserver.ensure_running()
        ahead = [Future[_Worker]() for _ in range(count)]
        _AHEAD.extend(ahead)
        Thread(target=_start_ahead, args=(ahead,), daemon=True).start()


def _start_ahead(ahead: Sequence[Future[_Worker]]) -> None:
    for future in ahead:
        try:
            future.set_result(_start())
        except OSError as error:
            future.set_exception(error)


def _start() -> _Worker:
    """Starts a worker: it is there when the fork server has loaded torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs,), daemon=True)
    with _no_main_module():
        process.start()
    theirs.close()
    return _Worker(process, ours)


@dataclass
class Workers:
    """Up to `count` worker processes, started when they are needed and killed at the end.

    A context: leaving it, by a signal too, ends every worker at once, whatever it is doing.
    """

    count: int
    watch: Progress = field(default_factory=Silent)
    alive: list[_Worker] = field(default_factory=list)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.alive:
            worker.process.kill()
        for worker in self.alive:
            worker.process.join()
            worker.pipe.close()
        self.alive.clear()

    def map(
        self,
        unit: Callable[..., Any],
        tasks: Sequence[Task],
        title: str = "",
    ) -> Iterator[tuple[str, Any]]:
        """Calls the unit on every task; yields its name and result, as they are done.

        Who watches is told of the stage `title`, and of each task that is done. The longest are
        begun first. With one worker, and none of them longer than two seconds, or little to do in
        all, it happens in this process, one after the other; else in processes from a fork server
        that has torch loaded. `unit`, arguments and results must be picklable.
        An exception of the unit ends the run and is raised here; a worker that dies is replaced
        once.
        """
        queue = sorted(tasks, key=lambda task: -task.seconds)
        total = sum(task.seconds for task in queue)
        longest = max((task.seconds for task in queue), default=0.0)
        little = total < (SHARED_SECONDS if self.alive or _AHEAD else WORTH_SECONDS)
        here = longest < SHORT_SECONDS and (self.count == 1 or little)
        self.watch.stage(title, total)
        for task, result in _do(unit, queue) if here else self._share_out(unit, queue[::-1]):
            self.watch.advance(task.seconds)
            yield task.name, result

    def _share_out(self, unit: Callable[..., Any], left: list[Task]) -> Generator[tuple[Task, Any]]:
        """Gives tasks to workers, from the end of the list, until every one has its result."""
        failures = Counter[str]()
        while len(self.alive) < min(self.count, len(left)):
            self._add()
        for worker in self.alive[: len(left)]:
            _give(worker, unit, left.pop())
        while busy := [worker for worker in self.alive if worker.task]:
            for worker in _ready(busy):
                task, answer = cast("Task", worker.task), _receive(worker)
                worker.task = None
                if answer is None:
                    self.alive.remove(worker)
                    failures[task.name] += 1
                    if failures[task.name] == ATTEMPTS:
                        raise _died(task, worker)
                    _give(self._add(), unit, task)
                    continue
                if left:
                    _give(worker, unit, left.pop())
                result, error = answer
                if error is not None:
                    raise error
                yield task, result

    def _add(self) -> _Worker:
        """One more worker: one that was started ahead, where there is one."""
        worker = _AHEAD.popleft().result() if _AHEAD else _start()
        self.alive.append(worker)
        return worker


def _do(unit: Callable[..., Any], queue: Sequence[Task]) -> Iterator[tuple[Task, Any]]:
    return ((task, unit(*task.arguments)) for task in queue)


def _ready(workers: list[_Worker]) -> list[_Worker]:
    """Waits until at least one has answered, or died."""
    found = wait([*(w.pipe for w in workers), *(w.process.sentinel for w in workers)])
    return [w for w in workers if w.pipe in found or w.process.sentinel in found]


def _give(worker: _Worker, unit: Callable[..., Any], task: Task) -> None:
    """Sends a task, and before it the unit, where the worker has another one yet."""
    if worker.unit is not unit:
        send(worker.pipe, unit)
        worker.unit = unit
    send(worker.pipe, task.arguments)
    worker.task = task


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
    with _MAIN_MODULE:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main
