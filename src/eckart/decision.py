"""What is decided of every matrix: ranks and forms, then fits; a loss that is promised is kept.

Knows the order of the stages of a choice; must not know how an output is written.
"""

from collections.abc import Callable

from eckart.allocate import Loss
from eckart.allocate.loss import CLOSE
from eckart.assemble.job import Job
from eckart.decompose.work import Work
from eckart.drift import follow, forget_others
from eckart.errors import UsageError
from eckart.execute import Workers
from eckart.planning import Targets
from eckart.selection import Savings, Selection, savings, select
from eckart.texts import Text
from eckart.trial import Trial

ROUNDS = 3
"""Times that a loss is looked for with fits, which need less of it than the choices without."""

STEP = 2.0
"""At most so much more is allowed of the choices without fits from one round to the next."""


def decide(  # noqa: PLR0917 what was decomposed and asked, who does it, and what it is tried on
    work: Work,
    targets: Targets,
    job: Job,
    workers: Workers,
    trial: Trial | None,
    text: Text | None,
) -> Selection:
    """Returns the choices for every matrix, and the fits that go with them.

    Without a trial they are the policy's own: see `eckart.selection.select`. With one, and a
    `text` to fit to, factors are fitted: see `eckart.drift.follow`.
    """
    if trial is None or text is None:
        return select(work, targets, job, workers)

    def fitted(selection: Selection) -> Selection:
        return follow(work, selection, targets, job, trial, text, workers.watch)

    if isinstance(targets.policy, Loss):
        possible = savings(work, targets, job, workers, trial, targets.policy)
        chosen = within(targets.policy, possible, fitted)
    else:
        chosen = fitted(select(work, targets, job, workers, trial))
    forget_others(work, chosen)
    return chosen


def within(policy: Loss, possible: Savings, fitted: Callable[[Selection], Selection]) -> Selection:
    """Returns the choices that save the most, of those whose measured loss is what was asked.

    Choices are made without fits, and lose less with them: so more is allowed in another round, or
    less where that was too much, `ROUNDS` times at most. UsageError where nothing can be saved for
    so little.
    """
    asked, limit, good = policy.value, policy.value, 0.0
    best: Selection | None = None
    for _ in range(ROUNDS):
        found = possible.within(limit)
        if found is None or (best is not None and found.choices == best.choices):
            break
        made = fitted(found)
        lost = possible.loss(made)
        if lost > asked:
            limit = (limit + good) / 2
            continue
        best, good = made, limit
        if lost >= CLOSE * asked or not made.fits:  # without fits nothing was gained to be spent
            break
        limit *= min(asked / lost, STEP) if lost > 0 else STEP
    if best is None:
        raise UsageError(
            f"--loss {asked} is too little to factor anything for: the least that was tried "
            f"measured {possible.least:.3g} nats per token. Choose more than that."
        )
    return best
