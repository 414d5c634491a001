"""The command line: parse, call `api`, print. torch is imported inside commands only."""

import os
import re
import signal
import sys
from collections.abc import Generator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console, RenderableType

from eckart import __version__
from eckart.errors import EckartError, PromiseError, UsageError

app = typer.Typer(
    name="eckart",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Turns weight matrices into B·A and proves that the result does what it claims.",
)
log = Console(stderr=True, highlight=False)


class FormOption(StrEnum):
    """How a factored matrix is stored."""

    ba = "ba"
    pivoted = "pivoted"


Source = Annotated[Path, typer.Argument(metavar="SRC", help="Folder of a safetensors checkpoint.")]
Out = Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="Folder to write.")]
Include = Annotated[
    list[str] | None, typer.Option("--include", metavar="GLOB", help="Only these matrices.")
]
Exclude = Annotated[
    list[str] | None, typer.Option("--exclude", metavar="GLOB", help="Not these matrices.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the document instead of a table.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Print nothing but errors.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an output that eckart wrote.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything random.")]
Device = Annotated[str, typer.Option("--device", help="Where to factor: cpu, cuda, cuda:1.")]
ShardSize = Annotated[
    str, typer.Option("--shard-size", metavar="BYTES", help="Largest weight file: 5GB, 500MB, …")
]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Threads per matrix.")]


@app.callback(invoke_without_command=True)
def options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Turns weight matrices into B·A and proves that the result does what it claims."""
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")] = Path(
        "eckart-demo"
    ),
    force: Force = False,
) -> None:
    """The whole story on the embedded model, in under a minute."""
    from eckart.demonstration.story import tell

    tell(output, Console(highlight=False), force=force)


@app.command()
def inspect(
    source: Source,
    include: Include = None,
    exclude: Exclude = None,
    seed: Seed = 0,
    threads: Threads = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Rank, spectrum and verdict of every matrix."""
    from eckart import api
    from eckart.screen import inspection_table

    with _threads(threads):
        report = api.inspect(source, include=include or (), exclude=exclude or (), seed=seed)
    if json:
        _print_json(report)
    elif not quiet:
        _print(inspection_table(report, _console().width))


@app.command()
def compress(
    source: Source,
    output: Out,
    rank: Annotated[int | None, typer.Option(help="The same rank for every matrix.")] = None,
    energy: Annotated[float | None, typer.Option(help="Fraction of ‖W‖² to keep, each.")] = None,
    error: Annotated[float | None, typer.Option(help="Largest relative error, each.")] = None,
    keep: Annotated[float | None, typer.Option(help="Parameters after / before, in all.")] = None,
    form: Annotated[FormOption, typer.Option(help="How factors are stored.")] = FormOption.ba,
    include: Include = None,
    exclude: Exclude = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of the factors; default: the matrix's.")
    ] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    shard_size: ShardSize = "5GB",
    threads: Threads = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read headers only.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    force: Force = False,
) -> None:
    """Factor every matrix that pays: W → B, A. One of --rank, --energy, --error, --keep."""
    from eckart import api
    from eckart.screen import certificate_table, plan_table

    shard_bytes = _bytes(shard_size)
    policy = api.policy_of(rank=rank, energy=energy, error=error, keep=keep)
    chosen = {"include": include or (), "exclude": exclude or ()}
    if dry_run:
        plan = api.plan(
            source,
            policy,
            out=output,
            form=form.value,
            dtype=dtype,
            device=device,
            force=force,
            **chosen,
        )
        if json:
            _print_json(plan)
        elif not quiet:
            _print(plan_table(plan))
        return
    with _threads(threads):
        certificate = api.compress(
            source,
            output,
            rank=rank,
            energy=energy,
            error=error,
            keep=keep,
            form=form.value,
            dtype=dtype,
            seed=seed,
            device=device,
            shard_bytes=shard_bytes,
            force=force,
            **chosen,
        )
    if json:
        _print_json(certificate.document())
    elif not quiet:
        _print(certificate_table(certificate, _console().width))
        _say(f"wrote {output}; prove it: eckart verify {output} --against {source}")


@app.command()
def densify(
    factored: Annotated[Path, typer.Argument(metavar="FACTORED", help="A factored checkpoint.")],
    output: Out,
    shard_size: ShardSize = "5GB",
    threads: Threads = None,
    json: Json = False,
    quiet: Quiet = False,
    force: Force = False,
) -> None:
    """Multiply factors out again, into a checkpoint that any loader reads."""
    from eckart import api
    from eckart.screen import certificate_table

    shard_bytes = _bytes(shard_size)
    with _threads(threads):
        certificate = api.densify(factored, output, shard_bytes=shard_bytes, force=force)
    if json:
        _print_json(certificate.document())
    elif not quiet:
        _print(certificate_table(certificate, _console().width))
        _say(f"wrote {output}")


@app.command()
def verify(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that eckart wrote.")],
    against: Annotated[
        Path | None, typer.Option("--against", metavar="SRC", help="What it was made from.")
    ] = None,
    threads: Threads = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Recompute what the certificate claims, from the files; exit 6 if it does not hold."""
    from eckart import api
    from eckart.screen import check_table

    with _threads(threads):
        checks = api.verify(output, against)
    failed = [check for check in checks if not check.held]
    if json:
        _print_json({"held": not failed, "checks": checks})
    elif not quiet:
        _print(check_table(checks))
        if against is None and not failed:
            _say("the files are as written; add --against SRC to recompute every error too")
    if failed:
        raise PromiseError(
            f"{output} does not hold its promise: {failed[0].name}: {failed[0].detail}."
        )


def main() -> None:
    """Runs the command line; every expected failure is one red line and its exit code."""
    if sys.platform == "win32":
        print("eckart runs on Linux and macOS; on Windows use WSL.", file=sys.stderr)
        sys.exit(2)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        app()
    except EckartError as error:
        log.print("[bold red]error:[/] ", end="")
        _say(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def _terminate(number: int, frame: object) -> NoReturn:
    """Leaves through every `finally`, so that nothing half-made stays behind."""
    sys.exit(128 + number)


def _bytes(text: str) -> int:
    """The bytes that "5GB", "500MB", "1GiB" or "4096" say."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(k|m|g|t)?(i)?b?", text.strip(), re.IGNORECASE)
    if not found:
        raise UsageError(f"--shard-size {text} is no size: write 5GB, 500MB, 1GiB or a number.")
    number, unit, binary = found.groups()
    power = " kmgt".index(unit.lower()) if unit else 0
    size = int(float(number) * (1024 if binary else 1000) ** power)
    if size < 1:
        raise UsageError(f"--shard-size {text} is out of range: choose 1 byte or more.")
    return size


@contextmanager
def _threads(count: int | None) -> Generator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _console() -> Console:
    """Where data goes: as wide as the terminal, or wide enough where there is none."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200
    return console


def _print(table: RenderableType) -> None:
    _console().print(table)


def _print_json(document: object) -> None:
    import json

    import msgspec

    print(json.dumps(msgspec.to_builtins(document)))  # ASCII: no name can move the cursor


def _say(text: object) -> None:
    from eckart.checkpoint.paths import printable

    log.print(printable(text), markup=False, soft_wrap=True)
