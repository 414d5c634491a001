"""One pass over the text: products are seen, their inputs and gradients summed.

A pass can be written down between two batches, and goes on from there to the very same sums.
"""

import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from eckart.calibration.observation import Key, Observer, Product, Rows
from eckart.calibration.prediction import Model, examples
from eckart.calibration.schedule import InputSum, OutputSum, Pass
from eckart.checkpoint.paths import printable
from eckart.errors import InputError, NonFiniteError
from eckart.linalg.moments import DiagonalMoment, Moment, SecondMoment


@dataclass
class Counts:
    """What is counted beside the sums."""

    batches: int = 0
    sequences: int = 0
    tokens: int = 0
    predictions: int = 0
    loss: float = 0.0  # summed, in nats
    groups: dict[str, int] = field(default_factory=dict[str, int])  # rows of x
    experts: dict[str, int] = field(default_factory=dict[str, int])  # … by "parameter[number]"
    padded: list[str] = field(default_factory=list[str])  # where padding could not be told


class Sums:
    """The sums of one pass, as the model runs."""

    def __init__(self, one: Pass, device: str) -> None:
        self.counts = Counts()
        self.C: dict[str, Moment] = {s.group: SecondMoment(s.width, device) for s in one.inputs}
        self.G: dict[str, Moment] = {s.site.label: _moment(s, device) for s in one.outputs}
        self._inputs = _by_key(one.inputs)
        self._outputs: dict[Key, list[OutputSum]] = {}
        for output in one.outputs:
            self._outputs.setdefault(output.site.key, []).append(output)
        self._seen: dict[str, list[weakref.ref[Tensor]]] = {}
        self._calls: dict[tuple[str, Key], int] = {}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The state of every sum, by a name of its own."""
        moments = [(f"C {k}", m) for k, m in self.C.items()]
        moments += [(f"G {k}", m) for k, m in self.G.items()]
        return {f"{name} {i}": part for name, m in moments for i, part in enumerate(m.sums)}

    def __call__(self, product: Product) -> Callable[[Tensor], None] | None:
        """Adds a product's inputs; returns what adds its gradient."""
        group, outputs = self._inputs.get(product.key), self._outputs.get(product.key)
        if not product.known and product.key[0] not in self.counts.padded:
            self.counts.padded.append(product.key[0])
        if product.key[1] is not None:
            place = expert_place(product.key)
            self.counts.experts[place] = self.counts.experts.get(place, 0) + product.count
        if group is not None:
            self._add_inputs(group, product)
        if not outputs:
            return None
        keep = product.keep
        return lambda g: self._add_gradient(outputs, g if keep is None else g[keep])

    def check_groups(self) -> None:
        """After a batch: InputError if matrices that shared their inputs no longer do."""
        for (group, key), calls in self._calls.items():
            if calls != len(self._seen[group]):
                sites = self._inputs[key].sites
                raise InputError(
                    f"{printable(sites[0].name)} and {printable(sites[-1].name)} shared their "
                    "input on the first sequence, and no longer do: calibrate them apart, each "
                    "with --include."
                )
        self._seen.clear()
        self._calls.clear()

    def _add_inputs(self, group: InputSum, product: Product) -> None:
        name = group.group
        seen = self._seen.setdefault(name, [])
        if product.key[1] is None:
            place = name, product.key
            self._calls[place] = self._calls.get(place, 0) + 1
        if any(ref() is product.source for ref in seen):
            return
        seen.append(weakref.ref(product.source))
        rows = product.rows()
        try:
            self.C[name].add(rows)
        except NonFiniteError:
            raise NonFiniteError(_not_finite(group.sites[0].name, "inputs")) from None
        self.counts.groups[name] = self.counts.groups.get(name, 0) + len(rows)

    def _add_gradient(self, outputs: list[OutputSum], g: Tensor) -> None:
        for one in outputs:
            first, count = one.site.row, one.site.shape[0]
            try:
                self.G[one.site.label].add(g[:, first : first + count])
            except NonFiniteError:
                raise NonFiniteError(_not_finite(one.site.name, "gradients")) from None


def expert_place(key: Key) -> str:
    """Returns the name under which an expert's rows are counted."""
    return f"{key[0]}[{key[1]}]"


def run_pass(
    model: Model,
    parameters: Mapping[str, Tensor],
    batches: Iterable[Any],
    sums: Sums,
    after: Callable[[int], None],
) -> None:
    """Runs a model over the batches that are not in the sums yet.

    `after` is told how many tokens each batch had. Cost: a forward pass, and a backward one where
    gradients are summed; neither computes the gradient of a parameter.
    """
    counts, backward = sums.counts, bool(sums.G)
    for number, batch in enumerate(batches):
        if number < counts.batches:
            continue
        rows = Rows(model.mask(batch))
        with torch.set_grad_enabled(backward), Observer(parameters, sums, rows):
            losses = model.losses(batch, counts.sequences, rows)
        sums.check_groups()
        tokens = model.tokens(batch, 0 if losses is None else losses.numel())
        if losses is not None:
            _add_loss(losses, counts)
            if backward and losses.requires_grad:
                losses.sum().backward()
        counts.batches, counts.tokens = number + 1, counts.tokens + tokens
        counts.sequences += examples(batch)
        after(tokens)


def _add_loss(losses: Tensor, counts: Counts) -> None:
    total = float(losses.detach().double().sum())
    if not math.isfinite(total):
        raise NonFiniteError("the loss is NaN or Inf: the model cannot be calibrated on this text.")
    counts.loss += total
    counts.predictions += losses.numel()


def _moment(one: OutputSum, device: str) -> Moment:
    m = one.site.shape[0]
    return DiagonalMoment(m, device) if one.diagonal else SecondMoment(m, device)


def _by_key(inputs: Iterable[InputSum]) -> dict[Key, InputSum]:
    return {site.key: one for one in inputs for site in one.sites}


def _not_finite(name: str, what: str) -> str:
    return (
        f"the {what} of {printable(name)} hold NaN or Inf: the layers before it overflow on this "
        "text, and no statistics can be taken."
    )
