"""Tasks here or in worker processes: every result once, errors raised, deaths survived once."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
import units

from eckart.errors import ResourceError, UsageError
from eckart.execute import Task, run_local

LONG = 100.0
"""Predicted seconds that no task of a test takes: they force worker processes."""


def tasks(count, seconds=LONG, *before):
    return [Task(str(i), (*before, i), seconds) for i in range(count)]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_every_task_gives_its_result_once(workers):
    """In as many processes as asked for, none of them this one."""
    found = {
        task.name: result for task, result in run_local(units.process, tasks(7), workers=workers)
    }
    processes = {process for _, process in found.values()}

    assert {name: number for name, (number, _) in found.items()} == {str(i): i for i in range(7)}
    assert 1 <= len(processes) <= workers
    assert os.getpid() not in processes


@pytest.mark.parametrize(("workers", "seconds"), [(1, 1.9), (4, 0.5)])
def test_short_tasks_are_done_here(workers, seconds):
    """One worker and no long task, or little to do in all: no process is worth it."""
    found = [r for _, r in run_local(units.process, tasks(3, seconds), workers=workers)]

    assert {process for _, process in found} == {os.getpid()}


def test_the_longest_task_is_begun_first():
    """So that no worker is left alone with it at the end."""
    some = [Task("short", (1,), 0.1), Task("long", (2,), 0.9), Task("middle", (3,), 0.5)]

    assert [task.name for task, _ in run_local(units.process, some, workers=1)] == [
        "long",
        "middle",
        "short",
    ]


def test_nothing_to_do_is_nothing_done():
    """No task, no process, no result."""
    assert list(run_local(units.process, [], workers=2)) == []


@pytest.mark.parametrize("seconds", [0.0, LONG])
def test_an_error_of_ours_is_raised_as_it_is(seconds):
    """From here or from a worker: the same class and sentence."""
    with pytest.raises(UsageError, match=r"^3 is refused\.$"):
        list(run_local(units.refuse, tasks(5, seconds), workers=2))


def test_a_bug_keeps_its_traceback():
    """What happened in the worker stands in a note."""
    with pytest.raises(ZeroDivisionError) as caught:
        list(run_local(units.divide, tasks(2), workers=1))

    assert "in divide" in caught.value.__notes__[0]


def test_a_worker_that_dies_is_replaced_once(tmp_path):
    """Killed in the middle of a task: the task is done by another."""
    marker = str(tmp_path / "marker")

    found = [r for _, r in run_local(units.die_once, tasks(4, LONG, marker), workers=2)]

    assert sorted(found) == [0, 1, 2, 3]


def test_a_task_that_kills_twice_is_named(tmp_path):
    """With the signal, and what to do."""
    with pytest.raises(ResourceError, match=r"worker process on 0 was killed by SIGKILL, 2 times"):
        list(run_local(units.die, tasks(1), workers=1))


def test_results_may_hold_tensors():
    """By value: no shared memory, no open files."""
    found = [result for _, result in run_local(units.tensor, tasks(40), workers=2)]

    assert torch.equal(sum(found), torch.full((3,), float(sum(range(40)))))


def test_leaving_the_loop_ends_the_workers(tmp_path):
    """Even in the middle of a long call."""
    running = run_local(
        units.sleep, [Task(str(i), (str(tmp_path),), LONG) for i in range(2)], workers=2
    )
    with contextlib.suppress(TimeoutError):
        _next(running, until=lambda: len([*tmp_path.iterdir()]) == 2)
    begun = _processes(tmp_path, 2)
    running.close()

    assert not any(_alive(pid) for pid in begun)


def _next(running, until):
    """Lets the generator give out its tasks, and comes back from its waiting when they began."""

    def look(*_):
        if until():
            raise TimeoutError

    before = signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
    try:
        next(running)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


SCRIPT = """
    import sys
    sys.path.insert(0, {units!r})
    import units
    from eckart.execute import Task, run_local
    list(run_local(units.sleep, [Task("x", ({folder!r},), 100.0)], workers=1))
"""


def test_workers_do_not_outlive_a_parent_that_is_killed(tmp_path):
    """A script without a main guard, killed outright: it is not run again, its worker ends."""
    script = tmp_path / "script.py"
    folder = tmp_path / "begun"
    folder.mkdir()
    text = SCRIPT.format(units=str(Path(units.__file__).parent), folder=str(folder))
    script.write_text(textwrap.dedent(text))
    with subprocess.Popen([sys.executable, script]) as parent:
        (worker,) = _processes(folder, 1)
        parent.kill()
    deadline = time.monotonic() + 10
    while _alive(worker) and time.monotonic() < deadline:
        time.sleep(0.02)

    assert not _alive(worker)


def _processes(folder, count):
    """The processes that began, once so many did."""
    deadline = time.monotonic() + 30
    while len(found := [*folder.iterdir()]) < count and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(found) == count
    return [int(path.name) for path in found]


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()[0] != "Z"
    except OSError:
        return False
