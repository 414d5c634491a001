"""The choices for every matrix: the policy's own, or, with a text, those that serve the model best.

Knows parts, policies and trials; must not know how an output is written.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from eckart.allocate import Budget, Choice, Loss
from eckart.allocate.budget import Menu
from eckart.allocate.candidates import candidates, losing, measured
from eckart.allocate.loss import Picks, most_saving
from eckart.assemble.job import Job
from eckart.assemble.settling import Settler, Unsettled
from eckart.certificate import Drift
from eckart.decompose.fit import Fit
from eckart.decompose.work import Work
from eckart.execute import Task, Workers
from eckart.linalg.spectrum import Spectrum
from eckart.planning import Targets
from eckart.probing import Tried
from eckart.trial import Outcome, Trial


@dataclass(frozen=True, slots=True)
class Selection:
    """What was chosen, and how the candidates served the model: KL(dense ‖ changed), by name."""

    choices: dict[str, Choice]
    name: str | None = None
    divergences: dict[str, float] = field(default_factory=dict[str, float])
    outcome: Outcome | None = None  # of the choices, where it was measured
    fits: dict[str, Fit] = field(default_factory=dict[str, Fit])  # in the parts' place
    drift: Drift | None = None  # how the fits served it, whether they were taken or not


def select(
    work: Work, targets: Targets, job: Job, workers: Workers, trial: Trial | None = None
) -> Selection:
    """Returns the policy's ranks, and what measurement makes of them where it has a say.

    With a trial, and a budget, several ways to spend it are tried on the tokens held out
    (`eckart.allocate.candidates`), one of them from losses that are measured matrix by matrix; the
    one nearest to the dense model is chosen. Cost: eight forward passes a matrix, and four more.
    """
    fixed, spectra = _known(work, targets)
    policy = targets.policy
    if trial is None or not isinstance(policy, Budget):
        chosen = policy.choose(targets.items, spectra, targets.terms)
        return Selection({**fixed, **_settled(chosen, work, targets, job, workers)})
    tried = Tried(work, targets, job, workers, trial)
    menus, left = policy.menus(targets.items, spectra, targets.terms)
    found = candidates(menus, left, targets.terms)
    probes = tried.all_probes(menus, spectra)
    found["measured"] = measured(menus, spectra, probes, left, targets.terms)
    settled = {
        name: _settled(chosen, work, targets, job, workers) for name, chosen in found.items()
    }
    outcomes = {name: tried.outcome(chosen) for name, chosen in settled.items()}
    divergences = {name: outcome.divergence for name, outcome in outcomes.items()}
    best = min(divergences, key=divergences.__getitem__)
    return Selection({**fixed, **settled[best]}, best, divergences, outcomes[best])


def savings(  # noqa: PLR0917 what was decomposed and asked, who does it, and what it is tried on
    work: Work, targets: Targets, job: Job, workers: Workers, trial: Trial, policy: Loss
) -> "Savings":
    """Returns what can be saved for which loss. Cost: eight forward passes a matrix."""
    fixed, spectra = _known(work, targets)
    tried = Tried(work, targets, job, workers, trial)
    menus = policy.menus(targets.items, spectra, targets.terms)
    curves = losing(menus, spectra, tried.all_probes(menus, spectra))
    return Savings(tried, fixed, curves)


@dataclass
class Savings:
    """Curves of what every matrix loses, measured once, and the choices measured since."""

    tried: Tried
    fixed: Mapping[str, Choice]
    curves: Mapping[str, Menu]
    measured: list[Selection] = field(default_factory=list[Selection])

    def within(self, allowed: float) -> Selection | None:
        """Returns the choices that save the most for a loss, as measured; None: nothing does.

        In nats per token, on the tokens held out. Cost: a forward pass over them for each try.
        """
        made = dict[tuple[int, ...], Selection]()

        def measure(picks: Picks) -> float:
            made[tuple(picks.values())] = found = self._selection(picks)
            self.measured.append(found)
            return self.loss(found)

        picks = most_saving(self.curves, allowed, measure)
        return made.get(tuple(picks.values()))

    def loss(self, selection: Selection) -> float:
        """Returns the measured rise of the loss."""
        assert selection.outcome is not None
        rise = self.tried.trial.rise(selection.outcome)
        assert rise is not None  # `check_labels`
        return rise

    @property
    def least(self) -> float:
        """Returns the smallest loss of any choice that was measured."""
        return min(map(self.loss, self.measured))

    def _selection(self, picks: Picks) -> Selection:
        of = self.tried
        chosen = {n: self.curves[n].choice(pick, of.targets.terms) for n, pick in picks.items()}
        settled = _settled(chosen, of.work, of.targets, of.job, of.workers)
        return Selection({**self.fixed, **settled}, outcome=of.outcome(settled))


def _known(work: Work, targets: Targets) -> tuple[dict[str, Choice], dict[str, Spectrum]]:
    """The choices that no policy has a say in, and the spectra of all others."""
    failed = {
        name: Choice(None, f"dense: {work.failed[name].reason}")
        for name in targets.requests
        if name in work.failed
    }
    spectra = {name: work.done[name].spectrum for name in targets.requests if name not in failed}
    return {**targets.refused, **failed}, spectra


def _settled(
    chosen: Mapping[str, Choice], work: Work, targets: Targets, job: Job, workers: Workers
) -> dict[str, Choice]:
    """Ranks that keep a promise as rounded, and forms, by measurement where they are open."""
    policy, terms = targets.policy, targets.terms
    promised = policy.allowed is not None and not (terms.additive and policy.allowed == 0)
    if not promised and terms.form != "auto":  # of an addition, all that can be had is no promise
        return dict(chosen)
    cases = {
        name: Unsettled(
            name,
            targets.matrices[name],
            targets.items[name],
            work.done[name],
            targets.dtypes[name],
            choice.rank,
        )
        for name, choice in chosen.items()
        if choice.rank
    }
    settler = Settler(job.source, policy, terms, job.threads, job.statistics)
    tasks = [Task(name, (case,), case.seconds) for name, case in cases.items()]
    return {**chosen, **dict(workers.map(settler, tasks, "measuring"))}
