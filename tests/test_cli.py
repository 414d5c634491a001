"""The command line: what goes where, and with which exit code."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from builders import WEIGHTS, eckart, read_document, small_tensors, snapshot, write_checkpoint

from eckart import __version__, api, cli

COMMAND = Path(sys.executable).with_name("eckart")
COMMANDS = [
    "demo",
    "inspect",
    "compress",
    "calibrate",
    "extract",
    "resize",
    "merge",
    "apply",
    "convert",
    "densify",
    "verify",
]


def subcommands() -> dict[str, typer.core.TyperCommand]:
    return typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]


@pytest.fixture
def src(tmp_path):
    return write_checkpoint(tmp_path / "src")


@pytest.fixture
def out(src, tmp_path):
    api.compress(src, tmp_path / "out", rank=3)
    return tmp_path / "out"


def test_the_commands_are_those_of_the_manual():
    """No command without a test here."""
    assert sorted(subcommands()) == sorted(COMMANDS)


def test_help_and_version_of_every_command_do_not_import_torch():
    """In a process of its own, with torch made impossible to import."""
    code = (
        "import io, sys, contextlib\n"
        "sys.modules['torch'] = sys.modules['numpy'] = None\n"
        "from eckart.cli import main\n"
        f"for line in [['--help'], ['--version'], *([c, '--help'] for c in {COMMANDS!r})]:\n"
        "    sys.argv = ['eckart', *line]\n"
        "    try:\n"
        "        main()\n"
        "    except SystemExit as stop:\n"
        "        assert not stop.code, (line, stop.code)\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage:") == 1 + len(COMMANDS)
    assert __version__ in done.stdout.splitlines()


@pytest.mark.parametrize(
    ("line", "code"), [(["--version"], 0), (["verify", "/nowhere"], 3), (["compress", "x"], 2)]
)
def test_the_process_ends_with_its_code_and_all_it_printed(line, code):
    """It leaves without taking torch apart, but not before what it has to say is out."""
    run = f"import sys; sys.argv[1:] = {line!r}; from eckart.cli import run; run()"

    done = subprocess.run(
        [sys.executable, "-c", run], capture_output=True, text=True, check=False, timeout=60
    )

    assert done.returncode == code
    assert (done.stdout if code == 0 else done.stderr).endswith("\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_and_option_has_a_help_text(command):
    """One line each, in the table of --help."""
    found = subcommands()[command]

    assert found.help
    for parameter in found.params:
        assert getattr(parameter, "help", None) or parameter.name == "help", parameter.name


def test_version_is_that_of_the_package():
    """One line on stdout."""
    done = eckart("--version")

    assert (done.code, done.out, done.err) == (0, f"{__version__}\n", "")


def test_without_arguments_the_help_is_shown():
    """A usage error, as other tools have it."""
    done = eckart()

    assert done.code == 2
    assert "Usage:" in done.out + done.err


def test_inspect_shows_a_line_per_matrix_with_its_verdict(src):
    """On stdout; nothing on stderr."""
    done = eckart("inspect", src)

    assert done.code == 0
    assert done.err == ""
    assert re.search(r"q_proj +24×16 +F32", done.out)
    assert "break-even is" in done.out
    assert "8 other tensors" in done.out


def test_compress_says_what_it_wrote_and_how_to_prove_it(src, tmp_path):
    """The table on stdout, the next command on stderr, on one line that can be copied."""
    out = tmp_path / "a folder[bold] with a long name that goes on and on and on" / "out"

    done = eckart("compress", src, "-o", out, "--rank", "3")

    assert done.code == 0
    assert "q_proj" in done.out
    assert "targeted matrices" in done.out
    assert f"eckart verify {out} --against {src}" in done.err.splitlines()[-1]


def test_verify_shows_a_line_per_check(src, out):
    """All held; without a source it says what more could be done."""
    alone = eckart("verify", out)
    against = eckart("verify", out, "--against", src)

    assert alone.code == against.code == 0
    assert "add what it was made from" in alone.err
    assert against.err == ""
    assert against.out.count("✓") >= 6
    assert "✗" not in against.out


LINES = {
    "inspect": ("inspect", "{src}"),
    "compress": ("compress", "{src}", "-o", "{new}", "--rank", "3"),
    "compress dry": ("compress", "{src}", "-o", "{new}", "--keep", "0.5", "--dry-run"),
    "densify": ("densify", "{out}", "-o", "{new}"),
    "verify": ("verify", "{out}", "--against", "{src}"),
}


def line(name, src, out):
    return [part.format(src=src, out=out, new=out.with_name("new")) for part in LINES[name]]


@pytest.mark.parametrize("name", LINES)
def test_json_is_one_document_on_stdout_and_nothing_else(name, src, out):
    """Parsed strictly; stderr is silent."""
    done = eckart(*line(name, src, out), "--json")
    document = json.loads(done.out)

    assert done.code == 0
    assert done.err == ""
    assert isinstance(document, dict)
    assert done.out.isascii()
    if name in ("compress", "densify"):
        assert document == read_document(out.with_name("new"))
    if name == "verify":
        assert document["held"] is True
        assert all(check["held"] for check in document["checks"])
    if name == "compress dry":
        assert {row["name"] for row in document["matrices"]} == {
            "layers.0.q_proj.weight",
            "layers.0.up_proj.weight",
        }
    if name == "inspect":
        assert document["kind"] == "inspection"


@pytest.mark.parametrize("name", LINES)
def test_quiet_prints_nothing_at_all(name, src, out):
    """Neither stdout nor stderr; the work is done all the same."""
    done = eckart(*line(name, src, out), "-q")

    assert (done.code, done.out, done.err) == (0, "", "")
    assert out.with_name("new").exists() == (name in ("compress", "densify"))


def test_quiet_still_tells_errors(src, out):
    """One line on stderr, with the exit code."""
    (out / WEIGHTS).write_bytes(b"")

    done = eckart("verify", out, "-q")

    assert done.code == 6
    assert done.out == ""
    assert done.err.startswith("error: ")
    assert len(done.err.splitlines()) == 1


def test_a_failed_verification_in_json_is_a_document_and_exit_6(src, out):
    """Both: the document on stdout, the sentence on stderr."""
    (out / "tokenizer.json").write_text("changed")

    done = eckart("verify", out, "--json")

    assert done.code == 6
    assert json.loads(done.out)["held"] is False
    assert "tokenizer.json" in done.err


def test_dry_run_writes_nothing_and_reads_headers_only(tmp_path):
    """NaN weights pass; ranks that need spectra are shown as ranges."""
    tensors = small_tensors()
    tensors["layers.0.q_proj.weight"].fill_(float("nan"))
    src = write_checkpoint(tmp_path / "src", tensors)
    before = snapshot(tmp_path)
    base = ("compress", src, "-o", tmp_path / "out", "--dry-run")

    ranged, fixed = eckart(*base, "--energy", "0.9"), eckart(*base, "--rank", "3")

    assert (ranged.code, fixed.code) == (0, 0)
    assert re.search(r"q_proj +24×16 +1–9 +384 → ≤ 360", ranged.out)
    assert re.search(r"q_proj +24×16 +3 +384 → 120", fixed.out)
    assert snapshot(tmp_path) == before


def test_matrices_left_dense_are_shown_with_the_reason(src, tmp_path):
    """Nothing is left out in silence."""
    done = eckart("compress", src, "-o", tmp_path / "out", "--rank", "10")

    assert "rank 10 does not pay, break-even is 9 of 16" in done.out


def test_threads_are_those_asked_for_and_put_back(src, tmp_path, monkeypatch):
    """--threads holds for each matrix, and for the command alone."""
    import torch

    from eckart.decompose import unit

    seen, real = [], unit.truncated_svd

    def recorded(*args, **options):
        seen.append(torch.get_num_threads())
        return real(*args, **options)

    monkeypatch.setattr(unit, "truncated_svd", recorded)
    before = torch.get_num_threads()

    done = eckart("compress", src, "-o", tmp_path / "out", "--rank", "2", "--threads", "2")

    assert done.code == 0
    assert set(seen) == {2}
    assert torch.get_num_threads() == before
    assert read_document(tmp_path / "out")["options"]["threads"] == 2


@pytest.mark.parametrize("width", [40, 79, 120, 250])
def test_tables_fit_every_terminal(width, src, out, monkeypatch):
    """On a terminal of any width no line is longer than it, but for the command to copy."""
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("FORCE_COLOR", "1")
    for name in LINES:
        force = ("--force",) if "-o" in line(name, src, out) else ()
        done = eckart(*line(name, src, out), *force)
        plain = re.sub("\x1b\\[[0-9;]*m", "", done.out)

        assert done.code == 0
        assert max(map(len, plain.splitlines())) <= width


def test_ctrl_c_is_130_and_leaves_nothing(src, tmp_path, monkeypatch):
    """Raised in the middle of the work: the work folder is gone, OUT is absent."""
    from eckart.decompose import unit

    before = snapshot(tmp_path)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(unit, "truncated_svd", interrupted)

    done = eckart("compress", src, "-o", tmp_path / "out", "--rank", "2")

    assert done.code == 130
    assert done.out == ""
    assert snapshot(tmp_path) == before


def test_our_own_bug_is_not_hidden(src, monkeypatch):
    """An unexpected exception keeps its traceback (exit 1 in a process)."""

    def broken(*_, **__):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(api, "inspect", broken)

    with pytest.raises(ZeroDivisionError, match="ours"):
        eckart("inspect", src)


def test_windows_is_refused_in_one_sentence(src, monkeypatch):
    """Exit 2, and what to do instead."""
    monkeypatch.setattr(sys, "platform", "win32")

    done = eckart("inspect", src)

    assert done.code == 2
    assert "WSL" in done.err
    assert len(done.err.splitlines()) == 1


def test_the_installed_command_writes_the_same_bytes(src, tmp_path):
    """A process of its own, with the same threads per matrix: law 3, and a real exit code."""
    done = subprocess.run(
        [COMMAND, "compress", src, "-o", tmp_path / "there", "--rank", "3", "--threads", "1"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    here = eckart("compress", src, "-o", tmp_path / "here", "--rank", "3", "--threads", "1")

    assert (done.returncode, here.code) == (0, 0), done.stderr
    assert "targeted matrices" in done.stdout
    for file in (WEIGHTS, "config.json"):
        assert (tmp_path / "here" / file).read_bytes() == (tmp_path / "there" / file).read_bytes()


def test_a_broken_promise_is_exit_6_in_a_process_too(out):
    """One red line, no traceback."""
    (out / "config.json").write_text("{}")

    done = subprocess.run(
        [COMMAND, "verify", out], capture_output=True, text=True, check=False, timeout=120
    )

    assert done.returncode == 6
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_closed_pipe_is_no_error(options, src):
    """`eckart inspect … | head -0`."""
    with subprocess.Popen(
        [COMMAND, "inspect", src, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        errors = process.stderr.read()

    assert "Traceback" not in errors
    assert process.returncode == 0


def test_errors_that_nobody_reads_keep_their_exit_code(tmp_path):
    """`eckart verify … 2>&1 | head -0`."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([COMMAND, "verify", tmp_path / "no"], check=False, stderr=writer)
    os.close(writer)

    assert done.returncode == 3


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_nothing_half_made(number, code, tmp_path):
    """SIGINT and SIGTERM while matrices are factored: the exit code, no work folder, no OUT."""
    src = write_checkpoint(tmp_path / "src", small_tensors(layers=3))
    before = snapshot(tmp_path)
    slow = (
        "import sys, time, eckart.decompose.unit as d; from eckart.cli import main\n"
        "real = d.truncated_svd\n"
        "def slowly(*a, **k):\n"
        "    print('begun', flush=True); time.sleep(600)\n"
        "d.truncated_svd = slowly\n"
        "main()\n"
    )
    line = [sys.executable, "-c", slow, "compress", src, "-o", tmp_path / "out", "--rank", "2"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "begun\n"
        os.kill(run.pid, number)
        said = run.communicate(timeout=300)[1]  # and not when the sleep is over

    assert run.returncode == code
    assert "stopped" in said
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "wrong",
    [("--dtype", "int3"), ("--device", "tpu"), ()],
    ids=["dtype", "device", "output exists"],
)
def test_a_dry_run_refuses_what_the_run_would(wrong, src, out):
    """Whatever headers and options show is said before anything is read."""
    target = out if wrong == () else out.with_name("new")

    asked = ("compress", src, "-o", target, "--rank", "2", *wrong)
    assert eckart(*asked, "--dry-run").code == eckart(*asked).code == 2


def test_a_signal_does_not_wait_for_a_long_svd(tmp_path):
    """The matrix is factored in a worker process: the command ends at once, and its worker too."""
    import torch

    src, out = tmp_path / "src", tmp_path / "out"
    write_checkpoint(src, {"a.weight": torch.randn(2800, 2800)})
    line = [COMMAND, "compress", src, "-o", out, "--error", "0.1"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        deadline = time.monotonic() + 30
        while not (workers := _descendants(run.pid)) and time.monotonic() < deadline:
            time.sleep(0.05)
        begun = time.monotonic()
        os.kill(run.pid, signal.SIGTERM)
        run.wait(timeout=20)

    assert workers
    assert run.returncode == 143
    assert time.monotonic() - begun < 5
    assert snapshot(tmp_path).keys() == {"src", *(f"src/{name}" for name in snapshot(src))}
    while any(_lives(worker) for worker in workers) and time.monotonic() - begun < 10:
        time.sleep(0.05)  # killed is not yet gone
    assert not any(_lives(worker) for worker in workers)


def _lives(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def _descendants(pid: int) -> list[int]:
    """The processes that the fork server of a process has made."""
    return [grandchild for child in _children(pid) for grandchild in _children(child)]


def _children(pid: int) -> list[int]:
    try:
        return [
            int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        ]
    except OSError:
        return []
