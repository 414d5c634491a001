"""The order in which a model multiplies by its matrices, as it is seen to: by inputs they share.

Knows products and names; must not know what is done with the order.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from eckart.calibration.observation import Key, observed
from eckart.calibration.survey import Inputs, Site, look_at, sites_of
from eckart.checkpoint.statistics import block_of
from eckart.matrix import Matrix
from eckart.trial import Trial

EXPERTS = (
    "experts see only the tokens that a router sends them, which another model sends elsewhere"
)


@dataclass(frozen=True, slots=True)
class Group:
    """Matrices that share their input, and where it can be caught: at one of their products."""

    names: tuple[str, ...]
    key: Key
    calls: int  # of that product in one forward pass
    width: int  # n

    @property
    def block(self) -> str:
        """The block of the model that it belongs to, "" if to none."""
        return block_of(self.key[0])


@dataclass(frozen=True, slots=True)
class Order:
    """Groups in forward order, and the matrices that are in none, with why."""

    groups: tuple[Group, ...]
    left_out: Mapping[str, str]


def order_of(trial: Trial, matrices: Mapping[str, Matrix], first: Mapping[str, Tensor]) -> Order:
    """Returns the order in which a model's matrices are multiplied with. Cost: one sequence.

    `first` is a batch of it. No names are looked at: what a forward pass does is what counts.
    """
    sites = sites_of(matrices, {name: trial.places[name] for name in matrices})
    parameters = observed(trial.model, [site.key[0] for site in sites])
    seen = look_at(trial.predictor, parameters, first, backward=False)
    left_out = seen.left_out(sites) | {site.name: EXPERTS for site in sites if site.is_expert}
    when = {key: place for place, key in enumerate(seen.inputs)}
    shared = dict[Inputs, list[Site]]()
    for site in sorted(
        (site for site in sites if site.name not in left_out), key=lambda site: when[site.key]
    ):
        shared.setdefault(seen.input_of(site), []).append(site)
    return Order(
        tuple(_group(few, len(seen.inputs[few[0].key])) for few in shared.values()), left_out
    )


def _group(sites: Sequence[Site], calls: int) -> Group:
    first = sites[0]
    return Group(tuple(site.name for site in sites), first.key, calls, first.shape[1])


@dataclass(frozen=True, slots=True)
class Stretch:
    """Groups that stand together, of one block or of the whole model, in forward order."""

    block: str  # "": of the whole
    groups: tuple[Group, ...]


def stretches(groups: Iterable[Group]) -> list[Stretch]:
    """Returns the groups by the blocks they stand in, one after the other."""
    found = list[tuple[str, list[Group]]]()
    for group in groups:
        if not found or found[-1][0] != group.block:
            found.append((group.block, []))
        found[-1][1].append(group)
    return [Stretch(block, tuple(some)) for block, some in found]
