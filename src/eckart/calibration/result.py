"""From sums to statistics: means, experts that saw too little, and what a reader should know."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
import torch
from torch import Tensor

from eckart.calibration.schedule import InputSum, OutputSum, Pass, Schedule, records
from eckart.calibration.summing import Sums, expert_place
from eckart.calibration.survey import Site
from eckart.checkpoint.paths import printable
from eckart.checkpoint.statistics import Document
from eckart.linalg.moments import DiagonalMoment, Moment, SecondMoment

SHOWN = 3
"""Names in a remark."""


class Result:
    """What a finished pass gives: the tensors of the files, and facts for the document.

    An expert that saw fewer inputs than it has entries takes the mean of its layer: of C over
    all the inputs, of G over the experts.
    """

    def __init__(self, one: Pass, sums: Sums) -> None:
        self._pass, self._sums, self._pooled = one, sums, dict[str, set[int]]()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yields each tensor by its name, one at a time."""
        for one in self._pass.inputs:
            yield f"{one.group}.C", self._mean_inputs(one)
        stacks: dict[str, list[OutputSum]] = {}
        for output in self._pass.outputs:
            stacks.setdefault(output.site.name, []).append(output)
        for name, few in stacks.items():
            values = [self._mean_outputs(output) for output in few]
            yield f"{name}.G", torch.stack(values) if len(values) > 1 else values[0]

    def facts(self) -> dict[str, Any]:
        """What the document says of it; complete when the tensors have been taken."""
        counts = self._sums.counts
        return {
            "tokens": counts.tokens,
            "predictions": counts.predictions,
            "loss": counts.loss,
            "rows": {one.group: counts.groups.get(one.group, 0) for one in self._pass.inputs},
            "pooled": {name: sorted(few) for name, few in self._pooled.items()},
            "padded": sorted(counts.padded),
        }

    def _mean_inputs(self, one: InputSum) -> Tensor:
        rows, C = self._sums.counts.groups, self._sums.C
        site = one.sites[0]
        if not (site.narrows and self._saw_little(site)):
            return C[one.group].value(max(rows.get(one.group, 0), 1))
        layer = [other for other in self._pass.inputs if other.unit == one.unit]
        total = sum(rows.get(other.group, 0) for other in layer)
        self._pool(site)
        return _added([C[other.group] for other in layer], one.width).value(max(total, 1))

    def _mean_outputs(self, one: OutputSum) -> Tensor:
        G, tokens, site = self._sums.G, self._sums.counts.tokens, one.site
        if not (site.is_expert and self._saw_little(site)):
            return G[site.label].value(tokens)
        layer = [
            other.site
            for other in self._pass.outputs
            if (other.site.key[0], other.site.row) == (site.key[0], site.row)
        ]
        self._pool(site)
        parts = [G[other.label] for other in layer]
        return _added(parts, site.shape[0], diagonal=True).value(tokens * len(layer))

    def _saw_little(self, site: Site) -> bool:
        return self._sums.counts.experts.get(expert_place(site.key), 0) < site.shape[1]

    def _pool(self, site: Site) -> None:
        self._pooled.setdefault(site.name, set()).add(site.index)


def finished(document: Document, plan: Schedule, facts: Sequence[Mapping[str, Any]]) -> Document:
    """Returns the document with what the passes found."""
    rows: dict[str, int] = {}
    pooled: dict[str, set[int]] = {}
    for fact in facts:
        rows |= fact["rows"]
        for name, experts in fact["pooled"].items():
            pooled.setdefault(name, set()).update(experts)
    groups, matrices = records(plan, rows, {name: sorted(few) for name, few in pooled.items()})
    first = facts[0]
    return msgspec.structs.replace(
        document,
        tokens=first["tokens"],
        loss=first["loss"] / first["predictions"] if first["predictions"] else None,
        groups=groups,
        matrices=matrices,
        remarks=[*_remarks(plan, rows, pooled, {n for fact in facts for n in fact["padded"]})],
    )


def _remarks(
    plan: Schedule, rows: Mapping[str, int], pooled: Mapping[str, set[int]], padded: set[str]
) -> Iterator[str]:
    scarce = [one for one in plan.inputs if rows[one.group] < one.width and _is_own(one, pooled)]
    if scarce:
        worst = min(scarce, key=lambda one: rows[one.group] / one.width)
        yield (
            f"{len(scarce)} of {len(plan.inputs)} groups saw fewer inputs than these have entries "
            f"({rows[worst.group]} of {worst.width} for {printable(worst.group)}): their C is "
            f"singular; give at least {max(one.width for one in scarce)} tokens, better ten times "
            "as many."
        )
    if count := sum(map(len, pooled.values())):
        yield f"{count} experts' matrices saw too few tokens and have the mean of their layer"
    wide = [one.site.name for one in plan.outputs if one.diagonal and not one.site.is_expert]
    if plan.asked == "full" and wide:
        yield f"only the diagonal of G is kept where outputs are wide: {_some(wide)}"
    kept = {one.site.name for one in plan.outputs}
    if plan.asked != "none" and (blind := sorted({site.name for site in plan.sites} - kept)):
        yield f"the loss does not depend on the output of {_some(blind)}: there is no G of it"
    if padded:
        yield f"padding could not be told apart among the inputs of {_some(sorted(padded))}"


def _is_own(one: InputSum, pooled: Mapping[str, set[int]]) -> bool:
    """Whether C is the group's own, and not its layer's mean."""
    site = one.sites[0]
    return not (site.narrows and site.index in pooled.get(site.name, ()))


def _added(moments: Sequence[Moment], n: int, *, diagonal: bool = False) -> Moment:
    device = moments[0].sums[0].device
    total = DiagonalMoment(n, device) if diagonal else SecondMoment(n, device)
    for moment in moments:
        for part, other in zip(total.sums, moment.sums, strict=True):
            part.add_(other)
    return total


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(printable, names[:SHOWN])) + more
