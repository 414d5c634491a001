"""The commands of adapters: each parses, calls one use case, and prints what it returns."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from eckart.cli.commands import app
from eckart.cli.options import (
    AdapterEnergy,
    AdapterError,
    AdapterRank,
    AdapterSize,
    Align,
    AllowPickle,
    Component,
    ConsumerOption,
    Device,
    Exclude,
    FactorDtype,
    For,
    Force,
    Include,
    Json,
    Out,
    Quiet,
    Seed,
    ShardSize,
    StatisticsFolder,
    Threads,
    Workers,
    byte_count,
    numbers,
    rank_of,
)
from eckart.cli.output import console, print_json, print_table, say, say_all, watching
from eckart.execute import warm_up


@app.command()
def extract(
    tuned: Annotated[Path, typer.Argument(metavar="TUNED", help="The fine-tuned checkpoint.")],
    base: Annotated[Path, typer.Option("--base", metavar="BASE", help="What it was tuned from.")],
    output: Out,
    rank: AdapterRank = None,
    energy: AdapterEnergy = None,
    error: AdapterError = None,
    keep: Annotated[
        float | None, typer.Option(help="Parameters of the adapter / of what changed.")
    ] = None,
    size: AdapterSize = None,
    align: Align = 1,
    consumer: For = ConsumerOption.peft,
    component: Component = None,
    statistics: StatisticsFolder = None,
    store_whole: Annotated[
        str, typer.Option(metavar="KINDS", help="Of norms,biases,embeddings: stored exactly.")
    ] = "",
    accept_loss: Annotated[
        bool, typer.Option("--accept-loss", help="Go on without what no LoRA holds.")
    ] = False,
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
    allow_pickle: AllowPickle = False,
    json: Json = False,
    quiet: Quiet = False,
    force: Force = False,
) -> None:
    """Tuned − base → a LoRA adapter. One of --rank, --energy, --error, --keep, --size."""
    warm_up(workers)
    from eckart import adaptation
    from eckart.screen import adapter_table

    size_bytes = None if size is None else byte_count(size, "--size")
    with watching(quiet=quiet or json) as progress:
        certificate = adaptation.extract(
            tuned,
            base,
            output,
            rank=rank_of(rank),
            energy=energy,
            error=error,
            keep=keep,
            size=size_bytes,
            align=align,
            consumer=consumer.value,
            component=component,
            statistics=statistics,
            store_whole=[kind.strip() for kind in store_whole.split(",") if kind.strip()],
            accept_loss=accept_loss,
            include=include or (),
            exclude=exclude or (),
            dtype=dtype,
            seed=seed,
            device=device,
            workers=workers,
            threads=threads,
            work=work,
            keep_work=keep_work,
            allow_pickle=allow_pickle,
            force=force,
            progress=progress,
        )
    if json:
        print_json(certificate.document())
    elif not quiet:
        print_table(adapter_table(certificate, console().width))
        say_all(certificate.remarks)
        given = f" --statistics {statistics}" if statistics else ""
        proof = f"eckart verify {output} --against {tuned} --base {base}{given}"
        say(f"wrote {output}; prove it: {proof}")


@app.command()
def resize(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="A LoRA adapter's folder.")],
    output: Out,
    rank: AdapterRank = None,
    energy: AdapterEnergy = None,
    error: AdapterError = None,
    keep: Annotated[
        float | None, typer.Option(help="Parameters after / before, of the adapter.")
    ] = None,
    size: AdapterSize = None,
    align: Align = 1,
    consumer: For = ConsumerOption.peft,
    component: Component = None,
    dtype: FactorDtype = None,
    workers: Workers = None,
    threads: Threads = None,
    json: Json = False,
    quiet: Quiet = False,
    force: Force = False,
) -> None:
    """Another rank for a LoRA adapter. One of --rank, --energy, --error, --keep, --size."""
    warm_up(workers)
    policy = {
        "rank": rank_of(rank),
        "energy": energy,
        "error": error,
        "keep": keep,
        "size": size,
    }
    settings = {
        "align": align,
        "consumer": consumer.value,
        "component": component,
        "dtype": dtype,
        "workers": workers,
        "threads": threads,
        "force": force,
    }
    _merge([adapter], output, None, policy, settings, json=json, quiet=quiet)


@app.command()
def merge(
    adapters: Annotated[list[Path], typer.Argument(metavar="ADAPTER...", help="LoRA adapters.")],
    output: Out,
    weights: Annotated[
        str | None, typer.Option(metavar="W,W,…", help="One for each adapter; default: all 1.")
    ] = None,
    rank: AdapterRank = None,
    energy: AdapterEnergy = None,
    error: AdapterError = None,
    keep: Annotated[
        float | None, typer.Option(help="Parameters after / before, of all adapters.")
    ] = None,
    size: AdapterSize = None,
    align: Align = 1,
    consumer: For = ConsumerOption.peft,
    component: Component = None,
    dtype: FactorDtype = None,
    workers: Workers = None,
    threads: Threads = None,
    json: Json = False,
    quiet: Quiet = False,
    force: Force = False,
) -> None:
    """The weighted sum of LoRA adapters as one. --error 0 is exact, up to rounding."""
    warm_up(workers)
    policy = {
        "rank": rank_of(rank),
        "energy": energy,
        "error": error,
        "keep": keep,
        "size": size,
    }
    settings = {
        "align": align,
        "consumer": consumer.value,
        "component": component,
        "dtype": dtype,
        "workers": workers,
        "threads": threads,
        "force": force,
    }
    _merge(
        adapters, output, numbers(weights, "--weights"), policy, settings, json=json, quiet=quiet
    )


def _merge(
    adapters: Sequence[Path],
    output: Path,
    weights: Sequence[float] | None,
    policy: dict[str, Any],
    settings: dict[str, Any],
    *,
    json: bool,
    quiet: bool,
) -> None:
    from eckart import adaptation
    from eckart.screen import merged_table

    if (size := policy["size"]) is not None:
        policy["size"] = byte_count(size, "--size")
    with watching(quiet=quiet or json) as progress:
        certificate = adaptation.merge(
            adapters, output, weights=weights, **policy, **settings, progress=progress
        )
    if json:
        print_json(certificate.document())
    elif not quiet:
        print_table(merged_table(certificate))
        say_all(certificate.remarks)
        given = " ".join(f"--against {path}" for path in adapters)
        say(f"wrote {output}; prove it: eckart verify {output} {given}")


@app.command()
def convert(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="A LoRA adapter, any form.")],
    output: Out,
    consumer: For,
    component: Component = None,
    base: Annotated[
        Path | None,
        typer.Option("--base", metavar="BASE", help="Of kohya's names: its tensors name layers."),
    ] = None,
    dtype: FactorDtype = None,
    workers: Workers = None,
    threads: Threads = None,
    json: Json = False,
    quiet: Quiet = False,
    force: Force = False,
) -> None:
    """A LoRA adapter in the form that another loader takes: exact, without an SVD."""
    warm_up(workers)
    from eckart import conversion
    from eckart.screen import merged_table

    with watching(quiet=quiet or json) as progress:
        certificate = conversion.convert(
            adapter,
            output,
            consumer=consumer.value,
            component=component,
            base=base,
            dtype=dtype,
            workers=workers,
            threads=threads,
            force=force,
            progress=progress,
        )
    if json:
        print_json(certificate.document())
    elif not quiet:
        print_table(merged_table(certificate))
        say_all(certificate.remarks)
        say(f"wrote {output}; prove it: eckart verify {output} --against {adapter}")


@app.command()
def apply(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="A LoRA adapter's folder.")],
    base: Annotated[Path, typer.Option("--base", metavar="BASE", help="What it is added to.")],
    output: Out,
    subtract: Annotated[
        bool, typer.Option("--subtract", help="Take the adapter out of BASE.")
    ] = False,
    other_base: Annotated[
        bool, typer.Option("--other-base", help="BASE is not what it was extracted from.")
    ] = False,
    shard_size: ShardSize = "5GB",
    workers: Workers = None,
    threads: Threads = None,
    allow_pickle: AllowPickle = False,
    json: Json = False,
    quiet: Quiet = False,
    force: Force = False,
) -> None:
    """Fold a LoRA adapter into its base: W + s·B·A, tensor by tensor."""
    warm_up(workers)
    from eckart import adaptation
    from eckart.screen import applied_table

    shard_bytes = byte_count(shard_size, "--shard-size")
    with watching(quiet=quiet or json) as progress:
        certificate = adaptation.apply(
            adapter,
            base,
            output,
            subtract=subtract,
            other_base=other_base,
            workers=workers,
            threads=threads,
            shard_bytes=shard_bytes,
            allow_pickle=allow_pickle,
            force=force,
            progress=progress,
        )
    if json:
        print_json(certificate.document())
    elif not quiet:
        print_table(applied_table(certificate))
        say_all(certificate.remarks)
        say(f"wrote {output}; prove it: eckart verify {output} --against {adapter} --base {base}")
