"""The commands: each parses, calls one use case, and prints what it returns."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from eckart import __version__
from eckart.cli.options import (
    Align,
    AllowPickle,
    BatchFile,
    ConsumerOption,
    Device,
    DryRun,
    Exclude,
    FactorDtype,
    Force,
    FormOption,
    Include,
    Json,
    Out,
    Quiet,
    Seed,
    ShardSize,
    Source,
    StatisticsFolder,
    TextFile,
    Threads,
    TokensFile,
    Workers,
    byte_count,
)
from eckart.cli.output import console, print_json, print_table, say, say_all, watching
from eckart.errors import PromiseError
from eckart.execute import warm_up

app = typer.Typer(
    name="eckart",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Turns weight matrices into B·A and proves that the result does what it claims.",
)


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
    """The whole story on the embedded models, in about a minute."""
    from eckart.demonstration.story import tell

    tell(output, Console(highlight=False), force=force)


@app.command()
def inspect(
    source: Source,
    base: Annotated[
        Path | None, typer.Option("--base", metavar="BASE", help="Look at what was added to it.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Every singular value.")] = False,
    include: Include = None,
    exclude: Exclude = None,
    seed: Seed = 0,
    workers: Workers = None,
    threads: Threads = None,
    allow_pickle: AllowPickle = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Rank, spectrum and verdict of every matrix."""
    warm_up(workers)
    from eckart import api
    from eckart.screen import inspection_table

    with watching(quiet=quiet or json) as progress:
        report = api.inspect(
            source,
            base=base,
            full=full,
            include=include or (),
            exclude=exclude or (),
            seed=seed,
            workers=workers,
            threads=threads,
            allow_pickle=allow_pickle,
            progress=progress,
        )
    if json:
        print_json(report)
    elif not quiet:
        print_table(inspection_table(report, console().width))
        say_all(report.remarks)


@app.command()
def compress(
    source: Source,
    output: Out,
    rank: Annotated[int | None, typer.Option(help="The same rank for every matrix.")] = None,
    energy: Annotated[float | None, typer.Option(help="Fraction of ‖W‖² to keep, each.")] = None,
    error: Annotated[float | None, typer.Option(help="Largest relative error, each.")] = None,
    keep: Annotated[float | None, typer.Option(help="Parameters after / before, in all.")] = None,
    size: Annotated[
        str | None, typer.Option(metavar="BYTES", help="Bytes of the output's tensors: 5GB, …")
    ] = None,
    loss: Annotated[
        float | None,
        typer.Option(metavar="NATS", help="Per token, as measured; needs --statistics and a text."),
    ] = None,
    form: Annotated[
        FormOption, typer.Option(help="How factors are stored; auto: less error, by budget.")
    ] = FormOption.ba,
    align: Align = 1,
    statistics: StatisticsFolder = None,
    text: TextFile = None,
    tokens: TokensFile = None,
    batch: BatchFile = None,
    include: Include = None,
    exclude: Exclude = None,
    dtype: FactorDtype = None,
    seed: Seed = 0,
    device: Device = "cpu",
    workers: Workers = None,
    threads: Threads = None,
    work: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where decompositions are kept.")
    ] = None,
    keep_work: Annotated[
        bool, typer.Option("--keep-work", help="Keep OUT.eckart-work for another budget.")
    ] = False,
    shard_size: ShardSize = "5GB",
    allow_pickle: AllowPickle = False,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
    force: Force = False,
) -> None:
    """Factor every matrix that pays: by --rank, --energy, --error, --keep, --size or --loss."""
    warm_up(1 if dry_run else workers)
    from eckart import api

    shard_bytes = byte_count(shard_size, "--shard-size")
    size_bytes = None if size is None else byte_count(size, "--size")
    policy: dict[str, Any] = {
        "rank": rank,
        "energy": energy,
        "error": error,
        "keep": keep,
        "size": size_bytes,
        "loss": loss,
    }
    settings: dict[str, Any] = {
        "form": form.value,
        "align": align,
        "statistics": statistics,
        "text": text,
        "tokens": tokens,
        "batch": batch,
        "include": include or (),
        "exclude": exclude or (),
        "dtype": dtype,
        "device": device,
        "workers": workers,
        "threads": threads,
        "allow_pickle": allow_pickle,
        "force": force,
    }
    if dry_run:
        plan = api.plan(source, api.policy_of(**policy), out=output, **settings)
        _show_plan(plan, json=json, quiet=quiet)
        return
    with watching(quiet=quiet or json) as progress:
        certificate = api.compress(
            source,
            output,
            **policy,
            **settings,
            seed=seed,
            shard_bytes=shard_bytes,
            work=work,
            keep_work=keep_work,
            progress=progress,
        )
    _show_certificate(certificate, json=json, quiet=quiet)
    if not quiet and not json:
        given = f" --statistics {statistics}" if statistics else ""
        say(f"wrote {output}; prove it: eckart verify {output} --against {source}{given}")


@app.command()
def densify(
    factored: Annotated[Path, typer.Argument(metavar="FACTORED", help="A factored checkpoint.")],
    output: Out,
    shard_size: ShardSize = "5GB",
    workers: Workers = None,
    threads: Threads = None,
    json: Json = False,
    quiet: Quiet = False,
    force: Force = False,
) -> None:
    """Multiply factors out again, into a checkpoint that any loader reads."""
    warm_up(workers)
    from eckart import api

    shard_bytes = byte_count(shard_size, "--shard-size")
    with watching(quiet=quiet or json) as progress:
        certificate = api.densify(
            factored,
            output,
            shard_bytes=shard_bytes,
            workers=workers,
            threads=threads,
            force=force,
            progress=progress,
        )
    _show_certificate(certificate, json=json, quiet=quiet)
    if not quiet and not json:
        say(f"wrote {output}")


@app.command()
def verify(
    output: Annotated[
        Path, typer.Argument(metavar="OUT", help="A folder that eckart wrote, or any adapter.")
    ],
    against: Annotated[
        list[Path] | None, typer.Option("--against", metavar="SRC", help="What it was made from.")
    ] = None,
    base: Annotated[
        Path | None, typer.Option("--base", metavar="BASE", help="Of an adapter: its base.")
    ] = None,
    statistics: Annotated[
        Path | None, typer.Option("--statistics", metavar="S", help="What it was made with.")
    ] = None,
    consumers: Annotated[
        list[ConsumerOption] | None,
        typer.Option("--for", help="It must load there; asked of any adapter."),
    ] = None,
    text: TextFile = None,
    tokens: TokensFile = None,
    batch: BatchFile = None,
    dtype: Annotated[
        str, typer.Option("--dtype", help="In which both models are run on the text.")
    ] = "float32",
    device: Device = "cpu",
    workers: Workers = None,
    allow_pickle: AllowPickle = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Recompute what the certificate claims, from the files; exit 6 if it does not hold.

    With a text, run it through OUT and SRC too: perplexity, KL, agreement.
    """
    warm_up(workers if against else 1)
    from eckart import api, conversion

    foreign = conversion.is_uncertified(output)
    fits = conversion.lint(output) if foreign else []
    if foreign and not consumers:  # what can be said, before the error
        _show_checks([], fits, json=json, quiet=quiet)
    with watching(quiet=quiet or json) as progress:
        checks = api.verify(
            output,
            against,
            base=base,
            statistics=statistics,
            consumers=[consumer.value for consumer in consumers or ()],
            text=text,
            tokens=tokens,
            batch=batch,
            dtype=dtype,
            device=device,
            workers=workers,
            allow_pickle=allow_pickle,
            progress=progress,
        )
    failed = [check for check in checks if not check.held]
    if not failed and conversion.is_adapter(output):
        fits = conversion.lint(output)
    _show_checks(checks, fits, json=json, quiet=quiet)
    if failed:
        broken = "does not load there" if foreign else "does not hold its promise"
        raise PromiseError(f"{output} {broken}: {failed[0].name}: {failed[0].detail}.")
    if not against and not foreign and not json and not quiet:
        say("the files are as written; add what it was made from to recompute every error too")


def _show_checks(checks: list[Any], fits: list[Any], *, json: bool, quiet: bool) -> None:
    from eckart.screen import check_table, fit_table

    if json:
        held = bool(checks) and all(check.held for check in checks)
        print_json({"held": held, "checks": checks, "loads": fits})
    elif not quiet:
        print_table(check_table(checks))
        if fits:
            print_table(fit_table(fits))


def _show_plan(plan: Any, *, json: bool, quiet: bool) -> None:
    from eckart.screen import plan_table

    if json:
        print_json(plan)
    elif not quiet:
        print_table(plan_table(plan))
        say_all(plan.remarks)


def _show_certificate(certificate: Any, *, json: bool, quiet: bool) -> None:
    from eckart.screen import certificate_table

    if json:
        print_json(certificate.document())
    elif not quiet:
        print_table(certificate_table(certificate, console().width))
        say_all(certificate.remarks)
