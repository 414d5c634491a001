"""Tasks here or in worker processes: every result once, errors raised, deaths survived once."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import deque
from pathlib import Path

import pytest
import torch
import units

from eckart.errors import ResourceError, UsageError
from eckart.execute import Silent, Task, Workers, local, warm_up

LONG = 100.0
"""Predicted seconds that no task of a test takes: they force worker processes."""


def tasks(count, seconds=LONG, *before):
    return [Task(str(i), (*before, i), seconds) for i in range(count)]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_every_task_gives_its_result_once(workers):
    """In as many processes as asked for, none of them this one."""
    with Workers(workers) as crew:
        found = dict(crew.map(units.process, tasks(7)))
    processes = {process for _, process in found.values()}

    assert {name: number for name, (number, _) in found.items()} == {str(i): i for i in range(7)}
    assert 1 <= len(processes) <= workers
    assert os.getpid() not in processes


def test_workers_that_were_started_ahead_are_taken_first(monkeypatch):
    """As many as were asked for, if there are cores for them; a further one is started then."""
    monkeypatch.setattr(local, "cores", lambda: 2)
    monkeypatch.setattr(local, "_AHEAD", deque())
    warm_up(3)
    ahead = {future.result().process.pid for future in local._AHEAD}

    with Workers(3) as crew:
        found = dict(crew.map(units.process, tasks(9)))
        used = {worker.process.pid for worker in crew.alive}

    assert len(ahead) == 2
    assert ahead < used
    assert {process for _, process in found.values()} <= used
    assert not local._AHEAD


def test_a_command_that_ends_while_it_starts_a_worker_prints_no_traceback():
    """The fork server's child finds the pipe closed: nobody is there to be told."""
    script = """
        import os
        from multiprocessing import forkserver
        from eckart.execute.local import PRELOADED

        forkserver.set_forkserver_preload(PRELOADED)
        forkserver.ensure_running()
        status, pipe = forkserver.connect_to_new_process([])
        os.close(pipe)
        print(forkserver.read_signed(status) > 0, forkserver.read_signed(status))
    """
    run = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(run, check=False, capture_output=True, text=True, timeout=120)

    assert done.stdout == "True 1\n"
    assert done.stderr == ""


def test_one_worker_needs_no_start(monkeypatch):
    """Nothing is started ahead for what is done in this process."""
    monkeypatch.setattr(local, "cores", lambda: 8)
    monkeypatch.setattr(local, "_AHEAD", deque())
    warm_up(1)

    assert not local._AHEAD


@pytest.mark.parametrize(("workers", "seconds"), [(1, 1.9), (4, 0.5)])
def test_short_tasks_are_done_here(workers, seconds):
    """One worker and no long task, or little to do in all: no process is worth it."""
    found = [r for _, r in Workers(workers).map(units.process, tasks(3, seconds))]

    assert {process for _, process in found} == {os.getpid()}


def test_the_longest_task_is_begun_first():
    """So that no worker is left alone with it at the end."""
    some = [Task("short", (1,), 0.1), Task("long", (2,), 0.9), Task("middle", (3,), 0.5)]

    assert [name for name, _ in Workers(1).map(units.process, some)] == [
        "long",
        "middle",
        "short",
    ]


def test_workers_that_are_there_share_short_tasks():
    """What would not be worth starting them is worth giving them; next to nothing is not."""
    with Workers(2) as crew:
        dict(crew.map(units.process, tasks(2)))
        shared = dict(crew.map(units.process, tasks(3, 0.1)))
        kept = dict(crew.map(units.process, tasks(3, 0.01)))

    assert os.getpid() not in {process for _, process in shared.values()}
    assert {process for _, process in kept.values()} == {os.getpid()}


def test_nothing_to_do_is_nothing_done():
    """No task, no process, no result."""
    with Workers(2) as crew:
        assert list(crew.map(units.process, [])) == []
        assert crew.alive == []


@pytest.mark.parametrize("seconds", [0.0, LONG])
def test_an_error_of_ours_is_raised_as_it_is(seconds):
    """From here or from a worker: the same class and sentence."""
    with pytest.raises(UsageError, match=r"^3 is refused\.$"), Workers(2) as crew:
        list(crew.map(units.refuse, tasks(5, seconds)))


def test_a_bug_keeps_its_traceback():
    """What happened in the worker stands in a note."""
    with pytest.raises(ZeroDivisionError) as caught, Workers(1) as crew:
        list(crew.map(units.divide, tasks(2)))

    assert "in divide" in caught.value.__notes__[0]


def test_a_worker_that_dies_is_replaced_once(tmp_path):
    """Killed in the middle of a task: the task is done by another."""
    marker = str(tmp_path / "marker")

    with Workers(2) as crew:
        found = [r for _, r in crew.map(units.die_once, tasks(4, LONG, marker))]

    assert sorted(found) == [0, 1, 2, 3]


def test_a_task_that_kills_twice_is_named(tmp_path):
    """With the signal, and what to do."""
    with (
        pytest.raises(ResourceError, match=r"worker process on 0 was killed by SIGKILL, 2 times"),
        Workers(1) as crew,
    ):
        list(crew.map(units.die, tasks(1)))


def test_results_may_hold_tensors():
    """By value: no shared memory, no open files."""
    with Workers(2) as crew:
        found = [result for _, result in crew.map(units.tensor, tasks(40))]

    assert torch.equal(sum(found), torch.full((3,), float(sum(range(40)))))


def test_the_same_processes_do_one_map_after_another():
    """Each worker is sent the next unit; what was started stays."""
    with Workers(2) as crew:
        first = {process for _, (_, process) in crew.map(units.process, tasks(6))}
        tensors = [result for _, result in crew.map(units.tensor, tasks(3))]
        second = {process for _, (_, process) in crew.map(units.process, tasks(6))}

    assert len(tensors) == 3
    assert first == second


def test_who_watches_is_told_of_stages_and_of_work_done():
    """The title with the seconds of all tasks, then those of each."""
    seen = []

    class Watch(Silent):
        def stage(self, title, seconds):
            seen.append((title, seconds))

        def advance(self, seconds):
            seen.append(seconds)

    list(Workers(1, Watch()).map(units.process, tasks(2, 0.5), "testing"))

    assert seen == [("testing", 1.0), 0.5, 0.5]


def test_leaving_the_context_ends_the_workers(tmp_path):
    """Even in the middle of a long call."""
    long = [Task(str(i), (str(tmp_path),), LONG) for i in range(2)]
    with contextlib.suppress(TimeoutError), Workers(2) as crew:
        _next(crew.map(units.sleep, long), until=lambda: len([*tmp_path.iterdir()]) == 2)
    begun = _processes(tmp_path, 2)

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
    from eckart.execute import Task, Workers
    with Workers(1) as crew:
        list(crew.map(units.sleep, [Task("x", ({folder!r},), 100.0)]))
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
