"""The commands of statistics: each parses, calls one use case, and prints what it returns."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from eckart.cli.commands import app
from eckart.cli.options import (
    AllowPickle,
    BatchFile,
    Device,
    Exclude,
    Force,
    Include,
    Json,
    Quiet,
    Seed,
    TextFile,
    TokensFile,
    byte_count,
)
from eckart.cli.output import print_json, print_table, say, say_all, watching


class CurvatureOption(StrEnum):
    """How much of the loss's curvature is kept."""

    full = "full"
    diagonal = "diagonal"
    none = "none"


@app.command()
def calibrate(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A dense checkpoint's folder.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="S", help="Folder to write.")],
    text: TextFile = None,
    tokens: TokensFile = None,
    batch: BatchFile = None,
    curvature: Annotated[
        CurvatureOption,
        typer.Option(help="Of the loss by each output: whole, its diagonal, or no."),
    ] = CurvatureOption.full,
    memory: Annotated[
        str | None,
        typer.Option(metavar="BYTES", help="What sums may take; default: half of what is free."),
    ] = None,
    include: Include = None,
    exclude: Exclude = None,
    seed: Seed = 0,
    device: Device = "cpu",
    allow_pickle: AllowPickle = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Run one sequence, show passes and bytes.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    force: Force = False,
) -> None:
    """Learn from a text what each matrix is given, and how much its output matters: C and G."""
    settings: dict[str, Any] = {
        "text": text,
        "tokens": tokens,
        "batch": batch,
        "curvature": curvature.value,
        "memory": None if memory is None else byte_count(memory, "--memory"),
        "include": include or (),
        "exclude": exclude or (),
        "seed": seed,
        "device": device,
        "allow_pickle": allow_pickle,
        "force": force,
    }
    from eckart import statistics
    from eckart.screen import passes_table, statistics_table

    if dry_run:
        plan = statistics.plan(model, output, **settings)
        if json:
            print_json(plan.summary())
        elif not quiet:
            print_table(passes_table(plan))
        return
    with watching(quiet=quiet or json) as progress:
        found = statistics.calibrate(model, output, **settings, progress=progress)
    if json:
        print_json(found.document)
    elif not quiet:
        print_table(statistics_table(found))
        say_all(found.document.remarks)
        say(f"wrote {output}")
