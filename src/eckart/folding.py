"""The use case of folding an adapter into its base: apply.

By itself, so that the command imports no more than it needs.
"""

from pathlib import Path

from eckart.application import application_of, check_base, write_applied
from eckart.assemble.job import Job
from eckart.certificate import Certificate, Options
from eckart.checkpoint.writer import check_output, check_space, new_output
from eckart.execute import Progress, Silent, Workers, workers_for

PathLike = str | Path


def apply(
    adapter: PathLike,
    base: PathLike,
    out: PathLike,
    *,
    subtract: bool = False,
    other_base: bool = False,
    workers: int | None = None,
    threads: int | None = None,
    shard_bytes: int | None = None,
    allow_pickle: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Certificate:
    """Folds a LoRA adapter into a base, W + s·B·A, or takes one out with `subtract`.

    A LoRA adapter in PEFT's format whose every field is understood: lora_alpha, rank_pattern,
    alpha_pattern, rsLoRA, biases, modules_to_save. Computed in float32 and rounded once to the
    base's dtype, in the base's own files unless `shard_bytes` cuts anew; the certificate says what
    share of the addition that rounding took. An adapter that eckart extracted from another base is
    refused, unless `other_base`. Cost: the base read and written once, and both hashed. Peak
    memory: 20 MiB and the factors of one tensor, times the workers. Raises CheckpointError where
    the adapter is for another model.
    """
    folder, target = Path(adapter), Path(out)
    inputs = [Path(base), folder]
    check_output(target, inputs=inputs, force=force)
    brief = application_of(folder, base, subtract=subtract, allow_pickle=allow_pickle)
    check_space(target, brief.output_bytes, "the output")
    count = workers_for([], workers, threads)
    options: Options = {
        "subtract": subtract,
        "other_base": other_base,
        "seed": 0,
        "threads": threads,
    }
    with (
        new_output(target, inputs=inputs, force=force) as run,
        Workers(count, progress or Silent()) as crew,
    ):
        job = Job(brief.base, run.staged, 0, options, threads=threads, workers=count)
        certificate = write_applied(brief, job, crew, shard_bytes)
        if not subtract and not other_base:
            check_base(folder, certificate.source.fingerprint, brief.base)
    return certificate
