"""A lock that no dead process holds."""

import os
import subprocess
import sys

import pytest

from eckart.checkpoint.lock import locked
from eckart.errors import BusyError, StorageError

HOLD = """
import sys, time
from pathlib import Path
from eckart.checkpoint.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_holder_is_refused_and_told_who_the_first_is(tmp_path):
    """At once, with the process and the machine."""
    folder = tmp_path / "work"
    with (
        locked(folder),
        pytest.raises(BusyError, match=rf"another run \(process {os.getpid()} on .+\) is working"),
        locked(folder),
    ):
        pass


def test_it_can_be_taken_again_after_it_was_given_back(tmp_path):
    """And a folder in which nothing was made does not stay."""
    for _ in range(2):
        with locked(tmp_path / "work"):
            assert (tmp_path / "work" / "lock").exists()

    assert not (tmp_path / "work").exists()


def test_a_folder_that_was_there_or_is_in_use_stays(tmp_path):
    """Only an empty one that this run made is taken away."""
    (tmp_path / "old").mkdir()
    with locked(tmp_path / "old"):
        pass
    with locked(tmp_path / "new"):
        (tmp_path / "new" / "part").write_text("x")

    assert (tmp_path / "old").exists()
    assert (tmp_path / "new" / "part").exists()


def test_a_killed_process_holds_nothing(tmp_path):
    """Held by another process: refused. Killed: free."""
    command = [sys.executable, "-c", HOLD, tmp_path / "work"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(BusyError, match=f"process {holder.pid} on"),
            locked(tmp_path / "work"),
        ):
            pass
        holder.kill()
        holder.wait()

        with locked(tmp_path / "work"):
            pass


def test_a_folder_that_was_removed_meanwhile_is_made_again(tmp_path, monkeypatch):
    """Between opening and locking, its last holder took it away: the new one is locked."""
    import fcntl

    folder, real = tmp_path / "work", fcntl.flock
    calls = []

    def flock(descriptor, how):
        real(descriptor, how)
        calls.append(how)
        if len(calls) == 1:
            (folder / "lock").unlink()
            folder.rmdir()

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(folder):
        assert (folder / "lock").exists()
    assert len(calls) == 2


def test_a_place_that_cannot_be_written_is_a_storage_error(tmp_path):
    """Exit 5; the file in the way is as it was."""
    (tmp_path / "file").write_text("x")

    with (
        pytest.raises(StorageError, match=r"Not a directory|File exists"),
        locked(tmp_path / "file"),
    ):
        pass
    assert (tmp_path / "file").read_text() == "x"


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path):
    """It could lead anywhere."""
    (tmp_path / "work").mkdir()
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "work" / "lock").symlink_to(tmp_path / "victim")

    with pytest.raises(StorageError), locked(tmp_path / "work"):
        pass
    assert (tmp_path / "victim").read_text() == "precious"
