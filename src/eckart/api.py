"""The use cases, a few lines each: the stages of the house in order, and nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from eckart.allocate import POLICIES, Choice, Form, RankPolicy, cost
from eckart.assemble.certification import versions
from eckart.assemble.checkpoints import assemble_dense, assemble_factored, check_names
from eckart.assemble.job import Job
from eckart.assemble.promises import keep_promises
from eckart.assemble.sidecars import check_config
from eckart.certificate import (
    Certificate,
    Inspection,
    InspectionReport,
    Row,
    SourceRecord,
    read_certificate,
)
from eckart.checkpoint.header import DTYPES
from eckart.checkpoint.paths import printable
from eckart.checkpoint.source import Checkpoint, open_checkpoint
from eckart.checkpoint.tensor_file import SHARD_BYTES
from eckart.checkpoint.writer import CERTIFICATE, check_output, new_output
from eckart.decompose import Request, decompose
from eckart.errors import CheckpointError, InputError, UsageError
from eckart.families import FLOATING, matrices
from eckart.linalg.exact import energy, singular_values
from eckart.linalg.matrices import named_generator
from eckart.linalg.rank import numerical_rank
from eckart.linalg.rounding import signal_rank
from eckart.linalg.spectrum import Spectrum
from eckart.verification import Check, check_files, verify_output

PathLike = str | Path


@dataclass(frozen=True, slots=True)
class PlannedMatrix:
    """What `compress` would do with one matrix, from headers alone."""

    name: str
    shape: tuple[int, int]
    ranks: tuple[int, int]  # the smallest and the largest possible; (0, 0) if copied
    parameters: tuple[int, int]  # before, and after at the largest rank
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What `compress` would do: every matrix with its range of ranks, every other with why."""

    matrices: list[PlannedMatrix]
    copied: dict[str, str]


def policy_of(
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    keep: float | None = None,
) -> RankPolicy:
    """Returns the one policy that was asked for; UsageError unless it is exactly one."""
    given = {
        name: value
        for name, value in (("rank", rank), ("energy", energy), ("error", error), ("keep", keep))
        if value is not None
    }
    if len(given) != 1:
        asked = " and ".join(f"--{name}" for name in given) or "none"
        raise UsageError(
            f"exactly one of --rank, --energy, --error and --keep chooses the ranks; got {asked}."
        )
    ((name, value),) = given.items()
    return POLICIES[name](value)


def plan(
    path: PathLike,
    policy: RankPolicy,
    *,
    out: PathLike | None = None,
    form: Form = "ba",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    dtype: str | None = None,
    device: str = "cpu",
    force: bool = False,
) -> Plan:
    """Returns what `compress` would do, from headers alone; writes nothing.

    Refuses whatever `compress` would refuse before it reads a weight.
    """
    stored_dtype(dtype)
    check_device(device)
    source = _open_dense(Path(path))
    if out is not None:
        check_output(Path(out), inputs=[source.folder], force=force)
    shapes, copied = _targets(source, policy, form, include, exclude)
    planned = [_planned(name, shape, policy, form) for name, shape in shapes.items()]
    return Plan(planned, copied)


def compress(
    path: PathLike,
    out: PathLike,
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    keep: float | None = None,
    form: Form = "ba",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    dtype: str | None = None,
    seed: int = 0,
    device: str = "cpu",
    shard_bytes: int = SHARD_BYTES,
    force: bool = False,
) -> Certificate:
    """Factors the matrices of a checkpoint, writes it in format 1, and returns its certificate.

    Exactly one of `rank`, `energy`, `error` and `keep` chooses the ranks. A matrix that does not
    pay in this form is copied, and the certificate says so. `out` appears whole or not at all.
    Cost: one SVD per matrix (a randomized one for small `rank`); peak: one matrix and its SVD.

    Raises UsageError (options, output exists), InputError (the checkpoint), StorageError.
    """
    policy = policy_of(rank=rank, energy=energy, error=error, keep=keep)
    stored = stored_dtype(dtype)
    check_device(device)
    source, target = _open_dense(Path(path)), Path(out)
    check_output(target, inputs=[source.folder], force=force)
    shapes, copied = _targets(source, policy, form, include, exclude)
    requests = {
        name: Request(limit, all_values=policy.name != "rank")
        for name, shape in shapes.items()
        if (limit := policy.limit(shape, form)) > 0
    }
    choices = {
        name: Choice(None, policy.refusal(shape, form))
        for name, shape in shapes.items()
        if name not in requests
    }
    options = {
        policy.name: policy.value,
        "form": form,
        "include": [*include],
        "exclude": [*exclude],
        "dtype": dtype,
        "seed": seed,
        "device": device,
        "threads": torch.get_num_threads(),
    }
    with new_output(target, inputs=[source.folder], force=force) as work:
        job = Job(source, work / "output", seed, options, shard_bytes)
        done, failed = decompose(source, requests, work, seed=seed, device=device)
        choices |= {name: Choice(None, f"dense: {reason}") for name, reason in failed.items()}
        dense = {name: shapes[name] for name in choices}
        spectra = {name: found.spectrum for name, found in done.items()}
        chosen = policy.choose(spectra, dense, form)
        choices |= keep_promises(source, chosen, done, policy.allowed, form=form, dtype=stored)
        return assemble_factored(job, choices, copied, done, form=form, dtype=stored)


def densify(
    path: PathLike, out: PathLike, *, shard_bytes: int = SHARD_BYTES, force: bool = False
) -> Certificate:
    """Multiplies a factored checkpoint out into a dense one that any loader reads."""
    folder, target = Path(path), Path(out)
    certificate = read_certificate(folder)
    if certificate.kind != "factored":
        raise CheckpointError(f"{printable(folder)} is not factored: there is nothing to do.")
    if not (files := check_files(folder, certificate)).held:
        raise CheckpointError(f"{printable(folder)} is damaged: {files.detail}.")
    source = open_checkpoint(folder)
    with new_output(target, inputs=[folder], force=force) as work:
        return assemble_dense(
            Job(source, work / "output", 0, {"seed": 0}, shard_bytes), certificate
        )


def verify(out: PathLike, against: PathLike | None = None) -> list[Check]:
    """Returns what was checked of an output folder; see `eckart.verification.verify_output`."""
    return verify_output(Path(out), None if against is None else Path(against))


def inspect(
    path: PathLike,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    seed: int = 0,
) -> InspectionReport:
    """Returns the rank, spectrum and "is it worth it" verdict of every matrix of a checkpoint."""
    source = _open_dense(Path(path))
    reasons = matrices(source.tensors, include=include, exclude=exclude)
    return InspectionReport(
        source=SourceRecord(name=source.folder.resolve().name, fingerprint=source.fingerprint()),
        versions=versions(),
        matrices=[
            _inspect(source, name, seed) for name, reason in reasons.items() if reason is None
        ],
        copied=[Row(name=name, reason=why) for name, why in reasons.items() if why is not None],
    )


def _inspect(source: Checkpoint, name: str, seed: int) -> Inspection:
    W = source.load(name)
    values = singular_values(W, name)
    spectrum = Spectrum(_shape(source, name), values, energy(W))
    numerical = numerical_rank(values, spectrum.shape)
    half = source.tensors[name].dtype in ("BF16", "F16")
    signal = signal_rank(W, generator=named_generator(seed, name), name=name).rank if half else None
    return Inspection(
        name=name,
        shape=spectrum.shape,
        dtype=source.tensors[name].dtype,
        numerical_rank=numerical,
        signal_rank=signal,
        effective_rank=round(spectrum.effective_rank, 3),
        rank_90=spectrum.rank_at_energy(0.90),
        rank_99=spectrum.rank_at_energy(0.99),
        break_even=spectrum.break_even,
        verdict=verdict(spectrum, numerical if signal is None else signal),
    )


def verdict(spectrum: Spectrum, rank: int) -> str:
    """Returns in words whether factoring pays, and to which rank.

    Tried in this order, the first that pays wins: the rank itself (nothing is lost), then the
    ranks of 1 %, 3 % and 10 % relative error.
    """
    least, pays = max(rank, 1), spectrum.break_even
    if least <= pays:
        return (
            f"factor to {least}: {_share(spectrum, least)} of the parameters, error below rounding"
        )
    for error in (0.01, 0.03, 0.10):
        needed = spectrum.rank_at_error(error)
        if 1 <= needed <= pays:
            found = 100 * spectrum.relative_error(needed)
            return (
                f"factor to {needed}: {_share(spectrum, needed)} of the parameters "
                f"at {found:.1f} % error"
            )
    return (
        f"not worth it: 99 % of the energy needs rank {spectrum.rank_at_energy(0.99)} of "
        f"{min(spectrum.shape)}, break-even is {pays}"
    )


def _share(spectrum: Spectrum, rank: int) -> str:
    m, n = spectrum.shape
    return f"{100 * cost((m, n), rank, 'ba') / (m * n):.0f} %"


def _open_dense(folder: Path) -> Checkpoint:
    if (folder / CERTIFICATE).exists() and read_certificate(folder).kind == "factored":
        raise CheckpointError(
            f"{printable(folder)} is factored already: give its source, or densify it first."
        )
    source = open_checkpoint(folder)
    if not source.tensors:
        raise CheckpointError(f"{printable(folder)} holds no tensors at all.")
    return source


def _targets(
    source: Checkpoint,
    policy: RankPolicy,
    form: Form,
    include: Sequence[str],
    exclude: Sequence[str],
) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
    """The matrices' shapes, and why the other tensors are copied; all that headers can refuse."""
    check_config(source.folder)
    reasons = matrices(source.tensors, include=include, exclude=exclude)
    copied = {name: why for name, why in reasons.items() if why is not None}
    shapes = {name: _shape(source, name) for name, why in reasons.items() if why is None}
    if not shapes:
        some = "; ".join(f"{name}: {why}" for name, why in list(copied.items())[:3])
        raise InputError(f"there is no matrix to factor in {printable(source.folder)} ({some}).")
    check_names(source, shapes, form)
    policy.check(shapes, form)
    return shapes, copied


def _shape(source: Checkpoint, name: str) -> tuple[int, int]:
    m, n = source.tensors[name].shape
    return m, n


def stored_dtype(dtype: str | None) -> str | None:
    """Returns safetensors' name of the dtype that the user named."""
    if dtype is None:
        return None
    names = {str(DTYPES[name]).removeprefix("torch."): name for name in FLOATING}
    if dtype not in names:
        raise UsageError(f"--dtype {dtype} is unknown: choose {', '.join(names)}.")
    return names[dtype]


def check_device(device: str) -> None:
    """Raises UsageError unless torch can compute on the device here."""
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise UsageError(f"--device {device} is not supported: choose cpu or cuda.")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UsageError(f"--device {device} is not to be had here: {reason}.") from None


def _planned(name: str, shape: tuple[int, int], policy: RankPolicy, form: Form) -> PlannedMatrix:
    (m, n), limit = shape, policy.limit(shape, form)
    if limit == 0:
        return PlannedMatrix(name, shape, (0, 0), (m * n, m * n), policy.refusal(shape, form))
    smallest = limit if policy.name == "rank" else 1
    return PlannedMatrix(name, shape, (smallest, limit), (m * n, cost(shape, limit, form)), "")
