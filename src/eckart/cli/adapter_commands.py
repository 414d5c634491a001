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
    DryRun,
    Exclude,
    FactorDtype,
    For,
    Force,
    Include,
    Json,
    Out,
    Quiet,
    Seed,
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
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
    force: Force = False,
) -> None:
    """Tuned − base → a LoRA adapter. One of --rank, --energy, --error, --keep, --size."""
    warm_up(1 if dry_run else workers)
    from eckart import adaptation, adapter_plans
    from eckart.screen import adapter_table

    asked: dict[str, Any] = {
        "rank": rank_of(rank),
        "energy": energy,
        "error": error,
        "keep": keep,
        "size": None if size is None else byte_count(size, "--size"),
        "align": align,
        "consumer": consumer.value,
        "component": component,
        "statistics": statistics,
        "store_whole": [kind.strip() for kind in store_whole.split(",") if kind.strip()],
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
        plan = adapter_plans.plan_extraction(tuned, base, output, **asked)
        _show_plan(plan, json=json, quiet=quiet)
        return
    with watching(quiet=quiet or json) as progress:
        certificate = adaptation.extract(
            tuned,
            base,
            output,
            **asked,
            accept_loss=accept_loss,
            seed=seed,
            work=work,
            keep_work=keep_work,
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
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
    force: Force = False,
) -> None:
    """Another rank for a LoRA adapter. One of --rank, --energy, --error, --keep, --size."""
    warm_up(1 if dry_run else workers)
    policy = {
        "rank": rank_of(rank),
        "energy": energy,
        "error": error,
        "keep": keep,
        "size": size,
    }
    settings: dict[str, Any] = {
        "align": align,
        "consumer": consumer.value,
        "component": component,
        "dtype": dtype,
        "force": force,
    }
    run: dict[str, Any] = {"workers": workers, "threads": threads}
    _merge([adapter], output, policy | settings, run, dry_run=dry_run, json=json, quiet=quiet)


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
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
    force: Force = False,
) -> None:
    """The weighted sum of LoRA adapters as one. --rank auto is exact, up to rounding."""
    warm_up(1 if dry_run else workers)
    policy = {
        "rank": rank_of(rank),
        "energy": energy,
        "error": error,
        "keep": keep,
        "size": size,
    }
    settings: dict[str, Any] = {
        "align": align,
        "consumer": consumer.value,
        "component": component,
        "dtype": dtype,
        "force": force,
    }
    run: dict[str, Any] = {"workers": workers, "threads": threads}
    settings |= {"weights": numbers(weights, "--weights")}
    _merge(adapters, output, policy | settings, run, dry_run=dry_run, json=json, quiet=quiet)


def _merge(
    adapters: Sequence[Path],
    output: Path,
    asked: dict[str, Any],
    run: dict[str, Any],
    *,
    dry_run: bool,
    json: bool,
    quiet: bool,
) -> None:
    from eckart import adaptation, adapter_plans
    from eckart.screen import merged_table

    if (size := asked["size"]) is not None:
        asked["size"] = byte_count(size, "--size")
    if dry_run:
        plan = adapter_plans.plan_merge(adapters, output, **asked, **run)
        _show_plan(plan, json=json, quiet=quiet)
        return
    with watching(quiet=quiet or json) as progress:
        certificate = adaptation.merge(adapters, output, **asked, **run, progress=progress)
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
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
    force: Force = False,
) -> None:
    """A LoRA adapter in the form that another loader takes: exact, without an SVD."""
    warm_up(1 if dry_run else workers)
    from eckart import adapter_plans, conversion
    from eckart.screen import merged_table

    asked: dict[str, Any] = {
        "consumer": consumer.value,
        "component": component,
        "base": base,
        "dtype": dtype,
        "workers": workers,
        "threads": threads,
        "force": force,
    }
    if dry_run:
        plan = adapter_plans.plan_conversion(adapter, output, **asked)
        _show_plan(plan, json=json, quiet=quiet)
        return
    with watching(quiet=quiet or json) as progress:
        certificate = conversion.convert(adapter, output, **asked, progress=progress)
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
    shard_size: Annotated[
        str | None,
        typer.Option("--shard-size", metavar="BYTES", help="Cut anew; default: the base's files."),
    ] = None,
    workers: Workers = None,
    threads: Threads = None,
    allow_pickle: AllowPickle = False,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
    force: Force = False,
) -> None:
    """Fold a LoRA adapter into its base: W + s·B·A, tensor by tensor."""
    warm_up(1 if dry_run else workers)
    from eckart import folding
    from eckart.screen import applied_table

    shard_bytes = None if shard_size is None else byte_count(shard_size, "--shard-size")
    asked: dict[str, Any] = {
        "subtract": subtract,
        "workers": workers,
        "threads": threads,
        "allow_pickle": allow_pickle,
        "force": force,
    }
    if dry_run:
        from eckart import adapter_plans

        plan = adapter_plans.plan_application(adapter, base, output, **asked)
        _show_plan(plan, json=json, quiet=quiet)
        return
    with watching(quiet=quiet or json) as progress:
        certificate = folding.apply(
            adapter,
            base,
            output,
            **asked,
            other_base=other_base,
            shard_bytes=shard_bytes,
            progress=progress,
        )
    if json:
        print_json(certificate.document())
    elif not quiet:
        print_table(applied_table(certificate))
        say_all(certificate.remarks)
        say(f"wrote {output}; prove it: eckart verify {output} --against {adapter} --base {base}")


def _show_plan(plan: Any, *, json: bool, quiet: bool) -> None:
    from eckart.screen import adapter_plan_table

    if json:
        print_json(plan)
    elif not quiet:
        print_table(adapter_plan_table(plan))
        say_all(plan.remarks)
