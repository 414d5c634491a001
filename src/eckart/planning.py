"""What a request means for a source: targets, ranks at most, and what the run will take.

Everything that headers and options can refuse is refused here, before a weight is read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from eckart.allocate import POLICIES, AutoRank, Choice, Form, Item, RankPolicy, Terms
from eckart.assemble.checkpoints import check_names
from eckart.assemble.measurement import item_of
from eckart.assemble.sidecars import check_config
from eckart.certificate import read_certificate
from eckart.checkpoint.documents import read_json
from eckart.checkpoint.hashing import file_digest
from eckart.checkpoint.header import DTYPES
from eckart.checkpoint.opening import open_source
from eckart.checkpoint.paths import printable
from eckart.checkpoint.source import Source
from eckart.checkpoint.statistics import Statistics, open_statistics
from eckart.checkpoint.writer import CERTIFICATE
from eckart.decompose import Request
from eckart.decompose.fit import fit_bytes
from eckart.decompose.request import part_bytes, peak_bytes
from eckart.decompose.weighting import check_shape
from eckart.errors import CheckpointError, InputError, ResourceError, UsageError
from eckart.execute import free_in_process, free_memory, workers_for
from eckart.families import FLOATING, GENERATING, is_routed_expert, matrices
from eckart.matrix import Matrix

TIED = "tied to "

WITHOUT_STATISTICS = (
    "Without --statistics every matrix is as near to its weights as its rank allows, whatever the "
    "model does with them, and that costs a language model far more than it must: eckart "
    "calibrate MODEL --text FILE -o S, then compress with --statistics S."
)


@dataclass(frozen=True, slots=True)
class Targets:
    """The matrices of a source, as a policy and its terms see them."""

    source: Source
    policy: RankPolicy
    terms: Terms
    dtype: str | None  # of the factors, as safetensors spells it; None: the tensor's own
    matrices: Mapping[str, Matrix]
    items: Mapping[str, Item]
    copied: Mapping[str, str]  # every other tensor, and why
    tied: Mapping[str, str]
    dtypes: Mapping[str, str]  # of the factors, by tensor
    statistics: Statistics | None = None  # whose metric the matrices are approximated in
    text: str | None = None  # the digest of what choices are tried on

    def is_weighted(self, name: str) -> bool:
        """Returns whether a matrix is approximated in a metric that statistics make."""
        return self.statistics is not None and name in self.statistics.document.matrices

    @property
    def requests(self) -> dict[str, Request]:
        """How far each matrix is to be decomposed; the others are refused."""
        limits = {name: self.policy.limit(item, self.terms) for name, item in self.items.items()}
        return {
            name: Request(limit, all_values=self.policy.name != "rank")
            for name, limit in limits.items()
            if limit > 0
        }

    @property
    def refused(self) -> dict[str, Choice]:
        """The matrices for which no rank is wanted, and why."""
        return {
            name: Choice(None, item.barred or self.policy.refusal(item, self.terms))
            for name, item in self.items.items()
            if self.policy.limit(item, self.terms) == 0
        }

    @property
    def remarks(self) -> list[str]:
        """What a reader of the plan, or of the result, should know."""
        return [*expert_remarks(self.matrices), *statistics_remarks(self), *text_remarks(self)]

    @property
    def output_bytes(self) -> int:
        """The most that the tensors of the output take."""
        if self.terms.additive:
            limits = {name: request.rank for name, request in self.requests.items()}
            factors = (self.items[name].bytes(rank, "ba") for name, rank in limits.items())
            return self.terms.rest_bytes + sum(factors)
        factors = {
            name: item.bytes(limit, "ba" if self.terms.form == "ba" else "pivoted")
            for name, item in self.items.items()
            if (limit := self.policy.limit(item, self.terms))
        }
        return self.terms.rest_bytes + sum(
            max(item.dense_bytes, factors.get(name, 0)) for name, item in self.items.items()
        )

    @property
    def work_bytes(self) -> int:
        """The most that the parts of all matrices take."""
        return sum(
            part_bytes(self.matrices[name], request, self.items[name].dense_itemsize)
            for name, request in self.requests.items()
        )

    @property
    def fits_bytes(self) -> int:
        """The most that fits of all matrices take, where a text is given."""
        return sum(
            fit_bytes(self.matrices[name].shape, request.rank, self.items[name].dense_itemsize)
            for name, request in self.requests.items()
        )


def policy_of(*, rank: int | str | None = None, **given: float | None) -> RankPolicy:
    """Returns the one policy that was asked for; UsageError unless it is exactly one.

    `rank` (a number, or "auto"), `energy`, `error`, `keep`, `size` or `loss`.
    """
    known = {"rank": rank, **given}
    asked = {name: value for name, value in known.items() if value is not None}
    if len(asked) != 1:
        names = [f"--{name}" for name in POLICIES if name in known]
        got = " and ".join(f"--{name}" for name in asked) or "none"
        raise UsageError(
            f"exactly one of {', '.join(names[:-1])} and {names[-1]} chooses the ranks; got {got}."
        )
    ((name, value),) = asked.items()
    if value == "auto":
        return AutoRank()
    counts = ("rank", "size")
    return POLICIES[name](value if name in counts else float(value))


def find_targets(
    path: Path,
    policy: RankPolicy,
    *,
    form: Form,
    align: int,
    include: Sequence[str],
    exclude: Sequence[str],
    dtype: str | None,
    allow_pickle: bool,
    statistics: Path | None = None,
) -> Targets:
    """Returns the targets of a request; raises whatever headers and options can show is wrong."""
    check_align(align)
    known = None if statistics is None else open_statistics(statistics)
    stored, source = stored_dtype(dtype), open_dense(path, allow_pickle=allow_pickle)
    check_config(source)
    found, reasons = matrices(source, include=include, exclude=exclude)
    if not found:
        some = "; ".join(f"{name}: {why}" for name, why in list(reasons.items())[:3])
        raise InputError(f"there is no matrix to factor in {printable(source.path)} ({some}).")
    tied = {name: why.removeprefix(TIED) for name, why in reasons.items() if why.startswith(TIED)}
    copied = {name: why for name, why in reasons.items() if name not in tied}
    check_names(source, found)
    items = {
        name: item_of(source.tensors[name], matrix, stored or source.tensors[name].dtype)
        for name, matrix in found.items()
    }
    if known is not None:
        items |= barred_items(items, found, known)
    settled: Form = "ba" if form == "auto" and not policy.is_budget else form
    rest = sum(source.tensors[name].nbytes for name in copied)
    dtypes = {name: stored or source.tensors[name].dtype for name in found}
    terms = Terms(settled, align, rest, in_nats=known is not None and is_in_nats(items, known))
    targets = Targets(source, policy, terms, stored, found, items, copied, tied, dtypes, known)
    policy.check(items, targets.terms)
    return targets


def inputs_of(targets: Targets) -> list[Path]:
    """Returns the folders that are read, which no output may touch."""
    statistics = targets.statistics
    return [targets.source.path, *([statistics.folder] if statistics else [])]


def resources_for(targets: Targets, *, workers: int | None, threads: int | None) -> int:
    """Returns how many workers decompose, so that each has its threads and its memory."""
    return spread(peaks_of(targets), targets.matrices, workers=workers, threads=threads)


def peaks_of(targets: Targets) -> dict[str, int]:
    """Returns the most memory that decomposing each matrix may take."""
    return {
        name: peak_bytes(
            targets.matrices[name],
            request,
            targets.items[name].dense_itemsize,
            weighted=targets.is_weighted(name),
        )
        for name, request in targets.requests.items()
    }


def spread(
    peaks: Mapping[str, int],
    matrices: Mapping[str, Matrix],
    *,
    workers: int | None,
    threads: int | None,
) -> int:
    """Returns how many workers run, so that each has its threads and, at its worst, its memory.

    `peaks` are the most bytes that each matrix may take. Raises ResourceError, with the numbers,
    where one cannot fit.
    """
    chosen = workers_for([matrices[name].stored for name in peaks], workers, threads)
    if not peaks:
        return chosen
    name = max(peaks, key=lambda name: peaks[name])
    peak, together, alone = peaks[name], free_memory(), free_in_process()
    if peak > min(together, alone):
        raise ResourceError(
            f"{printable(name)} ({'×'.join(map(str, matrices[name].stored))}) may need {peak:,} "
            f"bytes of memory, and {min(together, alone):,} are free: leave it out with --exclude, "
            "or take a machine with more."
        )
    fitting = together // peak
    if workers is not None and workers > fitting:
        raise ResourceError(
            f"{workers} workers may need {workers} × {peak:,} bytes of memory, and {together:,} "
            f"are free: use --workers {fitting}."
        )
    return min(chosen, fitting)


def intact(adapter: Path) -> Path:
    """Returns an adapter's folder or file; CheckpointError where weights that eckart wrote were
    changed since. Cost: hashes them."""
    if not (adapter / CERTIFICATE).exists():
        return adapter
    files = read_certificate(adapter).files
    for path in sorted(adapter.glob("*.safetensors")):
        if path.name in files and file_digest(path) != files[path.name].blake3:
            raise CheckpointError(
                f"{printable(path)} is not as it was written: {CERTIFICATE} beside it has another "
                f"digest. Make or download it again, or remove {CERTIFICATE} to take it as it is."
            )
    return adapter


def open_dense(path: Path, *, allow_pickle: bool = False) -> Source:
    """Returns a source that can be factored: not factored already, and not empty."""
    if (path / CERTIFICATE).exists() and read_certificate(path).kind == "factored":
        raise CheckpointError(
            f"{printable(path)} is factored already: give its source, or densify it first."
        )
    source = open_source(path, allow_pickle=allow_pickle)
    if not source.tensors:
        raise CheckpointError(f"{printable(path)} holds no tensors at all.")
    return source


def with_base(
    found: Mapping[str, Matrix], reasons: Mapping[str, str], source: Source, base: Source
) -> tuple[dict[str, Matrix], dict[str, str]]:
    """Returns the matrices that a base has too, and why the others are not compared.

    InputError where they have none in common: it is not this model's base.
    """
    unlike: dict[str, str] = {}
    for name, matrix in found.items():
        theirs = base.tensors.get(name)
        if theirs is None:
            unlike[name] = "not in the base"
        elif theirs.shape != matrix.stored or theirs.dtype not in FLOATING:
            unlike[name] = f"{theirs.dtype} {list(theirs.shape)} in the base"
    if len(unlike) == len(found):
        raise InputError(
            f"no matrix of {printable(source.path)} stands in {printable(base.path)} with the same "
            "name and shape: it is not its base."
        )
    kept = {name: matrix for name, matrix in found.items() if name not in unlike}
    return kept, {**reasons, **unlike}


def check_align(align: int) -> None:
    """Raises UsageError unless ranks can be multiples of it."""
    if align < 1:
        raise UsageError(f"--align {align} is out of range: choose a whole number from 1.")


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


def expert_remarks(names: Mapping[str, Matrix]) -> list[str]:
    """Returns what should be known of the experts of a mixture, if there are any."""
    count = sum(is_routed_expert(name) for name in names)
    if not count:
        return []
    return [
        f"{count} of the matrices are routed experts: loaders rebuild them dense, so factoring "
        "them makes the files smaller, not the model in memory."
    ]


def barred_items(
    items: Mapping[str, Item], matrices: Mapping[str, Matrix], statistics: Statistics
) -> dict[str, Item]:
    """Returns the items that stay dense because the statistics say nothing of them, and why.

    CheckpointError where they speak of none at all, or of a matrix of another shape.
    """
    known = statistics.document.matrices
    for name in items.keys() & known.keys():
        check_shape(statistics, name, matrices[name])
    reasons = {row.name: f" ({row.reason})" for row in statistics.document.left_out}
    barred = {
        name: replace(item, barred=f"dense: no statistics of it{reasons.get(name, '')}")
        for name, item in items.items()
        if name not in known
    }
    if len(barred) == len(items):
        raise nothing_known(statistics)
    return barred


def nothing_known(statistics: Statistics) -> CheckpointError:
    """Returns the error for statistics of other matrices altogether."""
    return CheckpointError(
        f"{printable(statistics.folder)} holds no statistics of any matrix that is to be "
        "factored: calibrate this model."
    )


def is_in_nats(items: Mapping[str, Item], statistics: Statistics) -> bool:
    """Returns whether every matrix that is not barred has the loss's curvature."""
    known = statistics.document.matrices
    return all(
        item.barred or (name in known and known[name].curvature != "none")
        for name, item in items.items()
    )


def statistics_remarks(targets: Targets) -> list[str]:
    """Returns what the statistics leave in doubt, or what it costs to have none."""
    if targets.statistics is None:
        return [WITHOUT_STATISTICS] if _is_language_model(targets.source) else []
    return width_remarks(targets.statistics, [*targets.requests])


def width_remarks(statistics: Statistics, names: Sequence[str]) -> list[str]:
    """Returns what the text left in doubt of some matrices that the statistics know."""
    document = statistics.document
    short: dict[str, tuple[int, int]] = {}
    for name in names:
        known = document.matrices[name]
        width = max(known.shape) if known.curvature == "full" else known.shape[1]
        rows = min(document.groups[group].rows for group in known.groups)
        if rows < width:
            short[name] = rows, width
    remarks = [*document.remarks]
    if short:
        name = max(short, key=lambda name: short[name][1] / max(short[name][0], 1))
        rows, width = short[name]
        remarks.append(
            f"{len(short)} of {len(names)} matrices are wider than the tokens that their "
            f"statistics saw, {printable(name)} for one {width} wide, with {rows}: the directions "
            "that they took say little of any other text. Calibrate on more."
        )
    return remarks


def text_remarks(targets: Targets) -> list[str]:
    """Returns what is in doubt of a text that choices are tried on."""
    known = targets.statistics
    if known is None or targets.text != known.document.text.digest:
        return []
    return [
        "The text is the one that the statistics were taken of: the tenth held out of it is "
        "nothing new to the factors, and other text may lose more than is measured on it."
    ]


def _is_language_model(source: Source) -> bool:
    """By the architectures that config.json names."""
    if source.folder is None or not (source.folder / "config.json").exists():
        return False
    architectures = read_json(source.folder / "config.json").get("architectures")
    return isinstance(architectures, list) and any(
        str(one).endswith(GENERATING) for one in architectures
    )
