"""Model + text → C and G of every matrix: the stages of a calibration, one after the other."""

import hashlib
import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from eckart.assemble.certification import versions
from eckart.calibration.observation import observed
from eckart.calibration.prediction import Custom as Custom
from eckart.calibration.prediction import Model
from eckart.calibration.prediction import Pretrained as Pretrained
from eckart.calibration.result import Result, finished
from eckart.calibration.schedule import Pass, Schedule, records, schedule_of
from eckart.calibration.summing import Sums, run_pass
from eckart.calibration.survey import look_at, sites_of
from eckart.calibration.work import WORK, Work, open_work
from eckart.checkpoint.documents import canonical_json
from eckart.checkpoint.paths import printable
from eckart.checkpoint.statistics import (
    Curvature,
    Document,
    LeftOut,
    Origin,
    Statistics,
    Text,
    open_statistics,
    write_document,
)
from eckart.checkpoint.writer import OutputRun, check_space, new_output
from eckart.errors import InputError, StaleError
from eckart.execute import Progress, free_memory
from eckart.matrix import Matrix
from eckart.renaming import Place

SHARE = 0.5
"""Of the memory that is free when the model is loaded: what sums may take, unless said."""


@dataclass(frozen=True)
class Request:
    """What is to be calibrated, on what, and how far."""

    model: Model
    origin: Origin
    text: Text
    batches: Callable[[], Iterable[Any]]  # afresh for every pass
    matrices: Mapping[str, Matrix]
    places: Mapping[str, Place]
    reasons: Mapping[str, str]  # why a matrix has no place
    curvature: Curvature
    device: str = "cpu"
    memory: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    first: Any = None  # the sequence that the survey looks at
    tokens: int = 1  # in all, about: how long a pass is


@dataclass(frozen=True)
class Plan:
    """What a calibration will do: every sum, in passes, and what is left out."""

    request: Request
    parameters: Mapping[str, Tensor]
    schedule: Schedule
    left_out: Mapping[str, str]
    memory: int

    @property
    def passes(self) -> list[Pass]:
        """All of them, as if nothing was done yet."""
        return self.schedule.passes(self.memory)

    def summary(self) -> dict[str, Any]:
        """Returns what will be done, as a JSON object."""
        layout, groups = self.document().layout(), self.schedule.groups
        return {
            "tokens": self.request.tokens,
            "memory": self.memory,
            "passes": [
                {"bytes": one.nbytes, "C": len(one.inputs), "G": len(one.outputs)}
                for one in self.passes
            ],
            "output_bytes": 4 * sum(math.prod(shape) for shape in layout.values()),
            "matrices": [
                {
                    "name": site.label,
                    "shape": [*site.shape],
                    "group": groups[site.label],
                    "curvature": self.schedule.curvature(site.name),
                }
                for site in self.schedule.sites
            ],
            "left_out": dict(self.left_out),
        }

    def document(self) -> Document:
        """Returns the document with everything in it but what only sums can tell."""
        groups, matrices = records(self.schedule, {}, {})
        request = self.request
        return Document(
            model=request.origin,
            text=request.text,
            tokens=1,
            loss=None,
            curvature=request.curvature,
            options=dict(request.options),
            versions=versions(),
            groups=groups,
            matrices=matrices,
            left_out=[LeftOut(name=k, reason=v) for k, v in sorted(self.left_out.items())],
        )


def plan_calibration(request: Request) -> Plan:
    """Returns what a calibration will do. Cost: one sequence, forward and backward.

    Raises InputError where there is nothing to calibrate, or no loss to differentiate;
    ResourceError where one sum alone is larger than the memory.
    """
    sites = sites_of(request.matrices, request.places)
    parameters = observed(request.model.module, [site.key[0] for site in sites])
    wanted = request.curvature != "none"
    seen = look_at(request.model, parameters, request.first, backward=wanted)
    if wanted and not seen.predicts:
        raise InputError(
            f"{type(request.model.module).__name__} gives no logits, so there is no loss whose "
            "curvature could be taken: calibrate a model with a head, or take --curvature none."
        )
    plan = schedule_of(sites, seen, request.curvature)
    if not plan.sites:
        raise InputError(
            f"{printable(request.origin.name)} has no matrix that this text goes through: there "
            "is nothing to calibrate."
        )
    memory = request.memory or math.floor(SHARE * free_memory())
    whole = Plan(request, parameters, plan, {**request.reasons, **seen.left_out(sites)}, memory)
    assert whole.passes
    return whole


def calibrate_into(
    out: Path, plan: Plan, *, inputs: Sequence[Path], force: bool, watch: Progress
) -> Statistics:
    """Sums in as many passes as it takes, and publishes the statistics as one folder."""
    document = plan.document()
    check_space(out, plan.summary()["output_bytes"], "the output")
    with new_output(out, inputs=inputs, force=force) as run, _kept(run):
        work = open_work(run.folder, document, _identity(document))
        left = plan.schedule.passes(plan.memory, work.done)
        for number, one in enumerate(left, 1):
            watch.stage(f"pass {number} of {len(left)}", plan.request.tokens)
            _one_pass(work, plan, one, watch)
        work.publish(run.staged)
        write_document(run.staged, finished(document, plan.schedule, work.facts), work.done)
        run.keep = False
    return open_statistics(out)


def _one_pass(work: Work, plan: Plan, one: Pass, watch: Progress) -> None:
    request, sums = plan.request, Sums(one, plan.request.device)
    if work.restore(sums):
        watch.advance(sums.counts.tokens)

    def after(tokens: int) -> None:
        watch.advance(tokens)
        work.save(sums)

    run_pass(request.model, plan.parameters, request.batches(), sums, after)
    if sums.counts.tokens == 0 or (sums.G and sums.counts.predictions == 0):
        raise InputError(
            f"{printable(request.text.name)} has nothing to predict, or nothing but padding: "
            "there is nothing to calibrate on."
        )
    result = Result(one, sums)
    work.write(result.tensors(), result.facts)


@contextmanager
def _kept(run: OutputRun) -> Generator[None]:
    """What was summed stays, unless the input itself is at fault: then it would fail again."""
    run.keep = True
    try:
        yield
    except BaseException as error:
        run.keep = not isinstance(error, InputError)
        if run.keep and (run.folder / WORK).exists() and not isinstance(error, StaleError):
            error.add_note(
                f"what was summed is kept in {printable(run.folder)}: run the same command again "
                "to go on, or delete it."
            )
        raise


def _identity(document: Document) -> dict[str, Any]:
    """All that the numbers depend on, and the files' layout."""
    layout = {name: [*shape] for name, shape in document.layout().items()}
    return {
        "model": document.model.fingerprint,
        "text": document.text.digest,
        "curvature": document.curvature,
        "set of matrices": hashlib.sha256(canonical_json(layout)).hexdigest(),
        **document.options,
        **{f"version of {key}": value for key, value in document.versions.items()},
    }
