"""Factors fitted to what the compressed part of a model feeds them: the last stage of a choice.

Matrix by matrix, in the order of the forward pass: the errors of all that comes before are in the
inputs, so that a part of them can be undone.
"""

import hashlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from eckart.allocate import Loss, RankPolicy
from eckart.assemble.checkpoints import entry_of
from eckart.assemble.filling import Factor
from eckart.assemble.job import Job
from eckart.assemble.multiplying import multiplied
from eckart.certificate import Drift
from eckart.checkpoint.documents import canonical_json
from eckart.checkpoint.paths import printable, storage_errors
from eckart.decompose.fit import About, Fit, read_fit, write_fit
from eckart.decompose.request import on_threads
from eckart.decompose.work import Work
from eckart.drift.order import Group, Order, Stretch, order_of, stretches
from eckart.drift.relay import Relay
from eckart.errors import FactorizationError
from eckart.execute import Progress
from eckart.linalg.arrays import working_dtype
from eckart.linalg.drift import DAMPING, SHARE, fit_to_drift
from eckart.linalg.matrices import named_generator
from eckart.linalg.moments import CrossMoment, SecondMoment
from eckart.linalg.threads import computing_on
from eckart.planning import Targets
from eckart.selection import Selection
from eckart.texts import Text
from eckart.trial import Outcome, Trial

FITS = "fits"


@dataclass(frozen=True, slots=True)
class Moments:
    """Of a group's inputs: x in the model as it was, x' in the changed one."""

    cross: Tensor  # E[x x'ᵀ]
    C: Tensor  # E[x' x'ᵀ]


def follow(  # noqa: PLR0917 what was decomposed, chosen and asked, and what it is tried on
    work: Work,
    selection: Selection,
    targets: Targets,
    job: Job,
    trial: Trial,
    text: Text,
    watch: Progress,
) -> Selection:
    """Returns the same choices, their factors fitted to the drift where that serves the model.

    Fitted on `text`, and taken only where KL(dense ‖ changed) on the trial's own tokens says so.
    Where a policy promises an error of each matrix nothing is fitted: a fit is no nearer to W.
    Cost: two forward passes over the text for each group of matrices that share their input, no
    further than to that group, and only through its own block where the model is a chain of
    blocks; and an SVD for each matrix.
    """
    orders = {
        name: Factor(name, entry, work.done[name], targets.dtypes[name])
        for name, choice in selection.choices.items()
        if choice.rank
        for entry in [entry_of(targets.matrices[name], choice.rank, choice.form)]
    }
    if not orders or targets.policy.allowed is not None:
        return selection
    follower = _Follower(work, job, targets, trial, Relay(trial, text, trial.device), orders, watch)
    fits = follower.fit(text)
    before = selection.outcome or trial.outcome(follower.products(orders, {}))
    after = trial.outcome(follower.products(orders, fits))
    written = after.divergence < before.divergence and _allowed(targets.policy, after, trial)
    drift = Drift(
        written=written,
        tokens=follower.relay.tokens,
        share=SHARE,
        divergence=after.divergence,
        unfitted=before.divergence,
        left_out=follower.left_out,
    )
    taken, outcome = (fits, after) if written else ({}, before)
    return replace(selection, fits=taken, drift=drift, outcome=outcome)


def forget_others(work: Work, selection: Selection) -> None:
    """Removes the fits of every other choice than this one."""
    kept = {fit.part.parent for fit in selection.fits.values()}
    folder = work.folder / FITS
    for path in folder.iterdir() if folder.exists() else ():
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


def _allowed(policy: RankPolicy, outcome: Outcome, trial: Trial) -> bool:
    """Whether a loss that was promised is kept."""
    if not isinstance(policy, Loss):
        return True
    rise = trial.rise(outcome)
    return rise is not None and rise <= policy.value


@dataclass
class _Follower:
    """Goes through a model from its first group to its last."""

    work: Work
    job: Job
    targets: Targets
    trial: Trial
    relay: Relay
    orders: Mapping[str, Factor]
    watch: Progress
    identity: str = ""
    fits: dict[str, Fit] = field(default_factory=dict[str, Fit])
    left_out: dict[str, str] = field(default_factory=dict[str, str])

    def fit(self, text: Text) -> dict[str, Fit]:
        """Returns the fit of every matrix that can be fitted; the model is as it was before.

        Why the others are not is in `left_out`.
        """
        self.identity = self._identity(text)
        with storage_errors(self.work.folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        matrices = {name: self.targets.matrices[name] for name in self.orders}
        order = order_of(self.trial, matrices, self.relay.first)
        self.left_out = {name: why for name, why in order.left_out.items() if name in self.orders}
        try:
            for stretch in self._course(order):
                self._follow(stretch, order)
        finally:
            self.relay.put(self._dense(self.orders))
        return self.fits

    def products(
        self, names: Iterable[str], fits: Mapping[str, Fit]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yields tensors as they would be written, multiplied out."""
        for name in names:
            order = replace(self.orders[name], fit=fits.get(name))
            yield name, multiplied(order, self.job.source, self.job.statistics, self.job.threads)

    def _course(self, order: Order) -> list[Stretch]:
        """Block by block where that is possible, else the whole model as one."""
        course = stretches(order.groups)
        blocks = {stretch.block for stretch in course}
        if all(self._block(name) in blocks for name in order.left_out) and self.relay.replays(
            course
        ):
            return course
        self.watch.note("the model is no chain of blocks: each pass begins at its beginning")
        return [Stretch("", order.groups)]

    def _block(self, name: str) -> str:
        return Group((name,), (self.trial.places[name].parameter, None), 1, 1).block

    def _follow(self, stretch: Stretch, order: Order) -> None:
        """Fits the matrices of a block, one group after the other."""
        own = [name for group in stretch.groups for name in group.names]
        loose = [n for n in order.left_out if stretch.block in ("", self._block(n))]
        own += loose
        changed = dict(self.products(loose, {}))
        for group in stretch.groups:
            paths = self._paths(group.names)
            known = {n: read_fit(path, n, self.identity) for n, path in paths.items()}
            if not all(known.values()):
                moments = self._moments(group, own, changed)
                known = {n: known[n] or self._fit(n, path, moments) for n, path in paths.items()}
            self.fits |= {name: fit for name, fit in known.items() if fit is not None}
            changed |= dict(self.products(group.names, self.fits))
        if stretch.block:
            self._leave(stretch, own, changed)

    def _leave(self, stretch: Stretch, own: list[str], changed: Mapping[str, Tensor]) -> None:
        self.relay.put(self._dense(own))
        dense = self.relay.pass_block(stretch.block, "dense")
        self.relay.put(iter(changed.items()))
        after = self.relay.pass_block(stretch.block, "changed")
        self.relay.behind(stretch.block, {"dense": dense, "changed": after})

    def _moments(self, group: Group, own: list[str], changed: Mapping[str, Tensor]) -> Moments:
        """Sums over the text. Memory: the group's input on all of it, and two n×n in float64."""
        self.watch.note(f"fitting {', '.join(map(printable, group.names))}")
        device = self.trial.device
        C, cross, count = SecondMoment(group.width, device), CrossMoment(group.width, device), 0
        self.relay.put(self._dense(own))
        before = [*self.relay.inputs(group, "dense")]
        self.relay.put(iter(changed.items()))
        for X, Y in zip(before, self.relay.inputs(group, "changed"), strict=True):
            with computing_on(self.trial.threads):
                C.add(Y)
                cross.add(X, Y)
            count += len(Y)
        return Moments(cross.value(count), C.value(count))

    def _fit(self, name: str, path: Path, moments: Moments) -> Fit | None:
        """None where there is none, as where nothing but zeros comes in."""
        try:
            return self._fitted(name, path, moments)
        except FactorizationError as error:
            self.left_out[name] = str(error)
            return None

    def _fitted(self, name: str, path: Path, moments: Moments) -> Fit:
        matrix, statistics = self.targets.matrices[name], self.job.statistics
        G = None if statistics is None else statistics.curvature(name)
        rank, device = self.orders[name].entry.rank, self.trial.device
        W = matrix.load(self.job.source, name).to(device)
        with on_threads(matrix.shape, self.job.threads):
            found = fit_to_drift(
                W,
                moments.cross.to(device),
                moments.C.to(device),
                None if G is None else G.to(device),
                rank,
                generator=named_generator(self.job.seed, f"drift of {name}", W.device),
                name=name,
            )
        about = About(
            name=name,
            identity=self.identity,
            rank=rank,
            method=f"{found.method}, drift",
            excess_estimate=found.excess_estimate,
        )
        stored = found.factors.to(working_dtype(W.dtype))
        return write_fit(path, about, replace(stored, B=stored.B.cpu(), A=stored.A.cpu()))

    def _dense(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        return ((name, self.job.source.load(name)) for name in names)

    def _paths(self, names: Iterable[str]) -> dict[str, Path]:
        parts = self.work.parts(names)
        return {name: self._folder / part.name for name, part in parts.items()}

    @property
    def _folder(self) -> Path:
        """Of the fits that belong to these very choices."""
        return self.work.folder / FITS / self.identity[:16]

    def _identity(self, text: Text) -> str:
        """What every fit depends on: all the choices too, for it follows on those before it."""
        choices = [
            [name, order.entry.rank, order.entry.form, order.dtype]
            for name, order in sorted(self.orders.items())
        ]
        return hashlib.sha256(
            canonical_json(
                {
                    "work": self.work.digest,
                    "text": text.digest,
                    "threads": self.trial.threads,
                    "drift": [SHARE, DAMPING],
                    "choices": choices,
                }
            )
        ).hexdigest()
