"""A budget under one rank for all: what a loader pads with zeros is paid for, too."""

from collections.abc import Mapping

from eckart.allocate.budgets import Budget
from eckart.allocate.item import Item, Terms
from eckart.allocate.policies import FixedRank, RankPolicy


def one_rank(policy: RankPolicy, items: Mapping[str, Item], terms: Terms) -> RankPolicy:
    """Returns the policy, or for a budget the largest rank that all modules can have within it.

    Zeros are stored like other numbers, so that ranks that differ would cost as much as the
    largest of them everywhere: with equal ranks none of it is zeros. UsageError if not even the
    smallest rank is within the budget.

    >>> from eckart.allocate import Keep
    >>> one_rank(Keep(0.5), {"q": Item((8, 8)), "up": Item((24, 8))}, Terms(additive=True)).value
    2
    """
    if not isinstance(policy, Budget) or not items:
        return policy

    def cost(rank: int) -> int:
        return sum(policy.price(item, rank, terms) for item in items.values())

    budget = policy.budget(items, terms)
    if cost(terms.align) > budget:
        raise policy.unreachable(cost(terms.align), items, terms)
    each = cost(terms.align)  # r(m + n) grows by the same with every step
    steps = budget // each
    largest = max(terms.largest(item) for item in items.values())
    return FixedRank(max(min(steps * terms.align, largest), 1))
