"""What is summed for which matrix, and in how many passes over the text.

From shapes and the survey alone: nothing is summed here.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from eckart.calibration.survey import Inputs, Site, Survey
from eckart.checkpoint.statistics import Curvature, Group, Moments
from eckart.errors import ResourceError
from eckart.linalg.moments import moment_bytes

WIDEST = 2**15
"""Outputs beyond which only G's diagonal is taken: the whole would be 4 GiB and more."""


@dataclass(frozen=True, slots=True)
class InputSum:
    """Σ x xᵀ of one group, C when divided by its rows."""

    group: str
    width: int
    sites: tuple[Site, ...]

    @property
    def nbytes(self) -> int:
        """Memory while it grows."""
        return moment_bytes(self.width, diagonal=False)

    @property
    def unit(self) -> str:
        """What must be summed in the same pass: experts take their layer's mean."""
        site = self.sites[0]
        return f"C of {site.key[0] if site.narrows else self.group}"


@dataclass(frozen=True, slots=True)
class OutputSum:
    """Σ g gᵀ of one matrix, or its diagonal; G when divided by the tokens."""

    site: Site
    diagonal: bool

    @property
    def nbytes(self) -> int:
        """Memory while it grows."""
        return moment_bytes(self.site.shape[0], diagonal=self.diagonal)

    @property
    def unit(self) -> str:
        """What must be summed in the same pass: a stack, which also is one tensor of a file."""
        return f"G of {self.site.key[0] if self.site.is_expert else self.site.label}"


@dataclass(frozen=True, slots=True)
class Pass:
    """What one run over the text sums."""

    inputs: tuple[InputSum, ...]
    outputs: tuple[OutputSum, ...]

    @property
    def nbytes(self) -> int:
        """Memory of all the sums."""
        return sum(one.nbytes for one in (*self.inputs, *self.outputs))


@dataclass(frozen=True, slots=True)
class Schedule:
    """All sums, and the matrices they are for."""

    sites: tuple[Site, ...]
    inputs: tuple[InputSum, ...]
    outputs: tuple[OutputSum, ...]
    asked: Curvature

    @property
    def groups(self) -> dict[str, str]:
        """The group of each matrix, by its label."""
        return {site.label: one.group for one in self.inputs for site in one.sites}

    def curvature(self, name: str) -> Curvature:
        """Returns how much of G there will be of a tensor's matrices."""
        found = [one.diagonal for one in self.outputs if one.site.name == name]
        return "none" if not found else "diagonal" if found[0] else "full"

    def passes(self, memory: int, done: Iterable[str] = ()) -> list[Pass]:
        """Returns what is left to sum, in as many passes as `memory` makes necessary.

        `done` names tensors of the file. What needs a backward pass comes first, so that the last
        passes may do without. ResourceError where one sum alone is larger than the memory.
        """
        have, units = {*done}, dict[str, list[InputSum | OutputSum]]()
        for one in (*self.outputs, *self.inputs):
            tensor = f"{one.group}.C" if isinstance(one, InputSum) else f"{one.site.name}.G"
            if tensor not in have:
                units.setdefault(one.unit, []).append(one)
        needs = {unit: sum(one.nbytes for one in sums) for unit, sums in units.items()}
        worst = max(needs, key=needs.__getitem__, default="")
        if worst and needs[worst] > memory:
            raise ResourceError(
                f"--memory {memory} is less than the {needs[worst]} bytes that {worst} alone needs "
                "while it is summed: allow more, or take less with --curvature or --exclude."
            )
        filled: list[list[InputSum | OutputSum]] = []
        room = 0
        for unit, sums in units.items():
            if not filled or needs[unit] > room:
                filled.append([])
                room = memory
            filled[-1].extend(sums)
            room -= needs[unit]
        return [
            Pass(
                tuple(one for one in sums if isinstance(one, InputSum)),
                tuple(one for one in sums if isinstance(one, OutputSum)),
            )
            for sums in filled
        ]


def schedule_of(sites: Sequence[Site], seen: Survey, curvature: Curvature) -> Schedule:
    """Returns what is to be summed for each matrix that was seen."""
    left_out = seen.left_out(sites)
    kept = [site for site in sites if site.name not in left_out]
    shared: dict[Inputs, list[Site]] = {}
    for site in kept:
        shared.setdefault(seen.input_of(site), []).append(site)
    inputs = [InputSum(few[0].label, few[0].shape[1], tuple(few)) for few in shared.values()]
    outputs = [
        OutputSum(site, curvature == "diagonal" or site.is_expert or site.shape[0] > WIDEST)
        for site in kept
        if curvature != "none" and seen.has_gradient(site)
    ]
    return Schedule(tuple(kept), tuple(inputs), tuple(outputs), curvature)


def records(
    plan: Schedule, rows: Mapping[str, int], pooled: Mapping[str, Sequence[int]]
) -> tuple[dict[str, Group], dict[str, Moments]]:
    """Returns the document's records of the groups and the matrices.

    `rows` by group, the pooled experts by tensor.
    """
    groups = {one.group: Group(width=one.width, rows=rows.get(one.group, 0)) for one in plan.inputs}
    of, found = plan.groups, dict[str, list[Site]]()
    for site in plan.sites:
        found.setdefault(site.name, []).append(site)
    matrices = {
        name: Moments(
            shape=few[0].shape,
            groups=_distinct([of[site.label] for site in few]),
            curvature=plan.curvature(name),
            count=len(few),
            pooled=[*pooled.get(name, ())],
        )
        for name, few in found.items()
    }
    return groups, matrices


def _distinct(groups: list[str]) -> list[str]:
    return groups[:1] if len({*groups}) == 1 else groups
