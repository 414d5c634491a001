"""Adapters and who loads them, a few lines each: convert, lint."""

from pathlib import Path

from eckart import verification
from eckart.assemble.job import Job
from eckart.certificate import Certificate, Options
from eckart.checkpoint.writer import CERTIFICATE, check_output, new_output
from eckart.execute import Progress, Silent, Workers, workers_for
from eckart.formats.pipelines import holds_adapter
from eckart.merging import choose_ranks, conversion_of, write_merged
from eckart.verification import Fit

PathLike = str | Path


def convert(
    adapter: PathLike,
    out: PathLike,
    *,
    consumer: str,
    component: str | None = None,
    base: PathLike | None = None,
    dtype: str | None = None,
    workers: int | None = None,
    threads: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Certificate:
    """Writes a LoRA adapter in the form that a consumer loads, and returns its certificate.

    Reads PEFT's folders, and files of diffusers and kohya. Exact, without an SVD: factors are
    copied, their scale multiplied into B (a power of two changes no digit; any other is rounded
    once, and the certificate has the error of what was written) and, where the consumer takes one
    rank for all modules, zeros added. `component` says which model of a diffusion pipeline it is
    for, where names do not tell; `base` is a checkpoint whose tensors name the layers that kohya's
    names stand for. Cost: reads and writes the adapter. Raises CheckpointError for an adapter that
    is not understood, UsageError for what the consumer cannot hold.
    """
    target, folder = Path(out), Path(adapter)
    check_output(target, inputs=[folder], force=force)
    brief = conversion_of(folder, consumer=consumer, component=component, base=base, dtype=dtype)
    count = workers_for([one.shape for one in brief.sums.values()], workers, threads)
    options: Options = {
        "for": consumer,
        "component": component,
        "weights": ["1.0"],
        "dtype": dtype,
        "seed": 0,
        "threads": threads,
    }
    with (
        new_output(target, inputs=[folder], force=force) as run,
        Workers(count, progress or Silent()) as crew,
    ):
        source = brief.adapters[0].source
        job = Job(source, run.staged, 0, options, threads=threads, workers=count)
        return write_merged(brief, choose_ranks(brief, crew), job, crew)


def lint(adapter: PathLike) -> list[Fit]:
    """Returns who loads an adapter as it stands; see `eckart.verification.lint`."""
    return verification.lint(Path(adapter))


def is_adapter(path: PathLike) -> bool:
    """Returns whether a path looks like an adapter, in any form that is read."""
    return holds_adapter(Path(path))


def is_uncertified(path: PathLike) -> bool:
    """Returns whether it looks like an adapter of which nothing is certified."""
    return is_adapter(path) and not (Path(path) / CERTIFICATE).exists()
