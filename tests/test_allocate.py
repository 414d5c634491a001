"""Ranks from spectra: against brute force where that can be afforded, and as laws elsewhere."""

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from eckart.allocate import (
    POLICIES,
    AutoRank,
    Budget,
    Choice,
    Energy,
    FixedRank,
    Item,
    Keep,
    Loss,
    RankPolicy,
    RelativeError,
    Size,
    Terms,
    cost,
    paying_rank,
)
from eckart.allocate.budget import Menu, bisect, fill, spend
from eckart.errors import UsageError
from eckart.linalg.spectrum import Spectrum

FORMS = ("ba", "pivoted", "auto")
ALIGNS = (1, 4)
SHAPES = [(1, 1), (1, 9), (9, 1), (2, 2), (2, 3), (6, 6), (12, 5), (64, 48), (48, 64), (512, 512)]
EXAMPLES: dict[str, list[RankPolicy]] = {
    "rank": [FixedRank(1), FixedRank(4), FixedRank(1000)],
    "energy": [Energy(0.5), Energy(0.99), Energy(1.0)],
    "error": [RelativeError(0.5), RelativeError(0.01), RelativeError(0.0)],
    "keep": [Keep(0.9), Keep(0.5), Keep(1.0)],
    "size": [Size(20_000), Size(15_000), Size(10**9)],
    "loss": [Loss(0.5), Loss(20.0), Loss(1e6)],
}
OUT_OF_RANGE: dict[str, list[float]] = {
    "rank": [0, -1, 1.5, 2.0, math.nan],
    "energy": [0.0, -0.1, 1.0000001, math.nan, math.inf],
    "error": [-1e-9, 1.0, 2.0, math.nan],
    "keep": [0.0, -0.1, 1.0000001, math.nan, math.inf],
    "size": [0, -1, 1.5, 1e9, math.nan, math.inf],
    "loss": [0.0, -0.1, math.nan, math.inf],
}
ALL = [policy for policies in EXAMPLES.values() for policy in policies]
ITEMS = {f"m{i}": Item(shape, count=1 + i % 2) for i, shape in enumerate(SHAPES[:8])}


def spectrum(shape: tuple[int, int], seed: int = 0, values: list[float] | None = None) -> Spectrum:
    """A random falling spectrum, or the given one."""
    if values is None:
        random = np.random.default_rng([seed, *shape])
        values = sorted(random.gamma(0.5, size=min(shape)) + 1e-3, reverse=True)
    s = torch.tensor(values, dtype=torch.float64)
    return Spectrum(shape, s, float(s.square().sum()))


def terms_for(policy: RankPolicy, form: str, align: int = 1) -> Terms:
    """A loss is told in nats alone; the others are asked without."""
    return Terms(form, align, in_nats=policy.name == "loss")  # type: ignore[arg-type]


def items_of(spectra: Mapping[str, Spectrum]) -> dict[str, Item]:
    return {name: Item(known.shape) for name, known in spectra.items()}


# What things cost and are worth, in closed form: the oracles.


def parameters(item: Item, rank: int | None, form: str) -> int:
    (m, n), r = item.shape, rank
    if r is None:
        return item.count * m * n
    return item.count * (r * (m + n) if form == "ba" else r * (m + n - r))


def stored_bytes(item: Item, rank: int | None, form: str) -> int:
    if rank is None:
        return parameters(item, None, form) * item.dense_itemsize
    if form == "auto":
        return item.bytes(rank, "auto")
    perm = 0 if form == "ba" else 8 * item.count * item.shape[0]
    return parameters(item, rank, form) * item.itemsize + perm


UNITS = {"keep": parameters, "size": stored_bytes}
"""The unit of every global budget."""


def worth(item: Item, known: Spectrum, rank: int | None, in_nats: bool = False) -> float:
    size = known.energy / 2 if in_nats else item.count * math.prod(item.shape)
    if rank is None or known.energy == 0:
        return size
    return size * (1 - float(known.values[rank:].square().sum()) / known.energy)


@dataclass(frozen=True)
class Problem:
    """Matrices, some of which may be factored, and a budget over all of them in some unit."""

    unit: str
    terms: Terms
    items: dict[str, Item]
    spectra: dict[str, Spectrum]

    def price(self, name: str, rank: int | None) -> int:
        return UNITS[self.unit](self.items[name], rank, self.terms.form)

    def options(self, name: str) -> list[int | None]:
        """Every rank that pays, in multiples of `align`, and dense."""
        align, m_n = self.terms.align, self.items[name].shape
        return [*range(align, paying_rank(m_n, self.terms.form) + 1, align), None]

    def points(self, name: str) -> list[tuple[int, float]]:
        """What each option costs and is worth."""
        item, known = self.items[name], self.spectra[name]
        nats = self.terms.in_nats
        return [(self.price(name, r), worth(item, known, r, nats)) for r in self.options(name)]

    @property
    def fixed(self) -> int:
        """What is spent whatever is chosen."""
        dense = sum(self.price(name, None) for name in self.items.keys() - self.spectra.keys())
        return dense + (self.terms.rest_bytes if self.unit == "size" else 0)

    @property
    def least(self) -> int:
        return self.fixed + sum(min(self.points(name))[0] for name in self.spectra)

    @property
    def most(self) -> int:
        return self.fixed + sum(self.price(name, None) for name in self.spectra)

    def policy(self, budget: int) -> RankPolicy:
        """The policy that may spend just so much."""
        if self.unit == "size":
            return Size(budget)
        return Keep(min((budget + 0.5) / self.most, 1.0))

    def budgets(self, *shares: float) -> list[int]:
        """Budgets between the least and everything dense."""
        return [math.floor(self.least + share * (self.most - self.least)) for share in shares]

    def solve(self, budget: int) -> dict[str, Choice]:
        policy = self.policy(budget)
        policy.check(self.items, self.terms)
        return policy.choose(self.items, self.spectra, self.terms)

    def spent(self, choices: Mapping[str, Choice]) -> int:
        return self.fixed + sum(self.price(name, choices[name].rank) for name in self.spectra)

    def worth(self, choices: Mapping[str, Choice]) -> float:
        return sum(
            worth(self.items[name], known, choices[name].rank, self.terms.in_nats)
            for name, known in self.spectra.items()
        )

    def brute_force(self, budget: int) -> float:
        """The most worth of any choice within the budget, by trying all."""
        costs, worths = np.array([float(self.fixed)]), np.array([0.0])
        for name in self.spectra:
            prices, gains = np.array(self.points(name)).T
            costs = np.add.outer(costs, prices).ravel()
            worths = np.add.outer(worths, gains).ravel()
        return float(worths[costs <= budget].max())

    @property
    def largest_step(self) -> float:
        """The largest gain along the edge of one matrix's concave hull: what greed may miss."""
        return max(
            b[1] - a[1]
            for name in self.spectra
            for a, b in itertools.pairwise(hull(self.points(name)))
        )


def hull(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """The upper concave hull, from the cheapest point to the one of most worth."""
    corners: list[tuple[int, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if corners and y <= corners[-1][1]:
            continue
        while len(corners) > 1:
            (x0, y0), (x1, y1) = corners[-2:]
            if (y1 - y0) * (x - x0) > (y - y0) * (x1 - x0):
                break
            corners.pop()
        corners.append((x, y))
    return corners


def problem(
    unit: str,
    form: str,
    align: int,
    seed: int = 0,
    shapes: tuple[tuple[int, int], ...] = ((24, 20), (18, 28), (32, 12)),
    counts: tuple[int, ...] = (1, 2, 3),
    in_nats: bool = False,
) -> Problem:
    """Some matrices and stacks of random spectra beside one that never pays, and other tensors."""
    items = {
        f"m{i}": Item(shape, counts[(i + seed) % len(counts)]) for i, shape in enumerate(shapes)
    }
    spectra = {name: spectrum(item.shape, seed + i) for i, (name, item) in enumerate(items.items())}
    terms = Terms(form, align, rest_bytes=1001, in_nats=in_nats)  # type: ignore[arg-type]
    return Problem(unit, terms, items | {"vector": Item((1, 90))}, spectra)


every_unit = pytest.mark.parametrize("unit", UNITS)
every_form = pytest.mark.parametrize("form", FORMS)
every_align = pytest.mark.parametrize("align", ALIGNS)
every_currency = pytest.mark.parametrize("in_nats", [False, True], ids=["shares", "nats"])


def test_every_policy_has_examples_here():
    """A new policy is tested by existing."""
    budgets = {name for name, policies in EXAMPLES.items() if isinstance(policies[0], Budget)}

    assert EXAMPLES.keys() == OUT_OF_RANGE.keys() == POLICIES.keys()
    assert UNITS.keys() == budgets
    assert all(policy.name == name for name in EXAMPLES for policy in EXAMPLES[name])


# Items and terms.


@every_form
@pytest.mark.parametrize("shape", SHAPES)
def test_the_paying_rank_is_the_last_that_pays(shape, form):
    """Fewer parameters than the matrix; one rank more is not."""
    m, n = shape
    last = paying_rank(shape, form)

    assert last == 0 or cost(shape, last, form) < m * n
    assert last + 1 > min(shape) or cost(shape, last + 1, form) >= m * n
    assert all(cost(shape, r, form) < m * n for r in range(1, last + 1))


@every_form
@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_an_item_costs_its_closed_form_once_for_each_matrix_of_a_stack(shape, count, form):
    """r(m + n), r² less where pivoted; 8 bytes for each row of a permutation."""
    item = Item(shape, count, dense_itemsize=2, itemsize=4)

    assert item.dense_parameters == count * math.prod(shape)
    assert item.dense_bytes == 2 * item.dense_parameters
    for rank in range(1, min(shape) + 1):
        assert item.parameters(rank, form) == parameters(item, rank, form)
        assert item.bytes(rank, form) == stored_bytes(item, rank, form)
        assert item.bytes(rank, "auto") in {item.bytes(rank, "ba"), item.bytes(rank, "pivoted")}


@every_form
@pytest.mark.parametrize("align", [1, 2, 4, 7, 64])
@pytest.mark.parametrize("shape", SHAPES)
def test_terms_round_ranks_to_multiples_of_align(shape, align, form):
    """The largest that pays is rounded down, and a rank that is needed is rounded up."""
    terms, last = Terms(form, align), paying_rank(shape, form)

    assert terms.largest(Item(shape)) == max(
        (r for r in range(1, last + 1) if r % align == 0), default=0
    )
    for rank in range(20):
        assert terms.aligned(rank) == next(
            r for r in itertools.count(1) if r % align == 0 and r >= rank
        )


# Every policy.


CASES = [
    (policy, form, align)
    for policy, form, align in itertools.product(ALL, FORMS, ALIGNS)
    if policy.name != "rank" or policy.value % align == 0
]


@pytest.mark.parametrize(("policy", "form", "align"), CASES, ids=repr)
def test_every_choice_is_a_rank_that_pays_or_dense_with_a_reason(policy, form, align):
    """Over every policy and form, aligned or not, matrices and stacks that pay and that do not."""
    terms = terms_for(policy, form, align)
    limits = {name: policy.limit(item, terms) for name, item in ITEMS.items()}
    spectra = {name: spectrum(ITEMS[name].shape) for name in ITEMS if limits[name] > 0}
    policy.check(ITEMS, terms)
    choices = policy.choose(ITEMS, spectra, terms)

    assert choices.keys() == spectra.keys()
    for name, choice in choices.items():
        if choice.rank is None:
            assert choice.reason.startswith("dense: ")
        else:
            assert choice.reason == ""
            assert choice.rank % align == 0
            assert 1 <= choice.rank <= limits[name]
            assert parameters(ITEMS[name], choice.rank, form) < ITEMS[name].dense_parameters
    for name in ITEMS.keys() - spectra.keys():
        assert policy.refusal(ITEMS[name], terms).startswith("dense: ")


@pytest.mark.parametrize(("policy", "form", "align"), CASES, ids=repr)
def test_a_limit_is_a_multiple_of_align_and_the_reason_of_none_is_true(policy, form, align):
    """It says the rank that was asked, if one was, and the break-even of min(m, n)."""
    terms = Terms(form, align)
    refused = 0
    for item in ITEMS.values():
        limit, (m, n) = policy.limit(item, terms), item.shape
        pays = [
            r for r in range(1, min(m, n) + 1) if parameters(item, r, form) < item.count * m * n
        ]
        if limit:
            assert limit % align == 0
            assert limit in pays
            continue
        refused += 1
        reason = policy.refusal(item, terms)
        even = re.search(r", break-even is (\d+) of (\d+)(, ranks are multiples of 4)?$", reason)

        assert even is not None
        assert (int(even[1]), int(even[2])) == (max(pays, default=0), min(m, n))
        assert bool(even[3]) == (align == 4)
        if policy.name == "rank":
            assert policy.value > int(even[1]) // align * align
            assert reason.startswith(f"dense: rank {policy.value} does not pay")
            assert ("clamped to" in reason) == (policy.value > min(m, n))
        else:
            assert int(even[1]) < align
            assert reason.startswith("dense: no rank pays")

    assert refused > 0


@every_form
@pytest.mark.parametrize("policy", ALL, ids=repr)
def test_a_choice_is_a_function_of_its_arguments(policy, form):
    """Same again, whatever the order of the names; the arguments are not changed."""
    terms = terms_for(policy, form)
    items = {f"m{i}": Item((24, 16), 1 + i % 2, 8, 8) for i in range(5)}
    spectra = {name: spectrum((24, 16), i) for i, name in enumerate(items)}
    before = {name: s.values.clone() for name, s in spectra.items()}
    if policy.limit(items["m0"], terms) == 0:
        spectra = {}
    first = policy.choose(items, spectra, terms)
    second = policy.choose(dict(reversed(items.items())), dict(reversed(spectra.items())), terms)

    assert first == second
    assert all(torch.equal(before[name], spectra[name].values) for name in spectra)


@pytest.mark.parametrize("policy", ALL, ids=repr)
def test_only_a_budget_makes_matrices_compete(policy):
    """What another policy chooses for a matrix does not depend on the others."""
    items = {f"m{i}": Item((24, 16)) for i in range(4)}
    spectra = {name: spectrum((24, 16), i) for i, name in enumerate(items)}
    if policy.is_budget or policy.limit(items["m0"], Terms()) == 0:
        assert policy.allowed is None
        return
    together = policy.choose(items, spectra, Terms())
    apart = {
        name: policy.choose({name: items[name]}, {name: known}, Terms())[name]
        for name, known in spectra.items()
    }

    assert together == apart


@every_form
@every_align
@pytest.mark.parametrize("policy", [p for p in ALL if p.allowed is not None], ids=repr)
def test_a_promised_error_takes_the_smallest_aligned_rank_that_keeps_it(policy, align, form):
    """Or says truly that none that pays does, and which rank it would need."""
    terms = Terms(form, align)
    for seed, item in enumerate([Item((40, 24)), Item((24, 40), 3), Item((32, 32), 2)]):
        known = spectrum(item.shape, seed)
        errors = [known.relative_error(r) for r in range(min(item.shape) + 1)]
        enough = next(r for r, error in enumerate(errors) if error <= policy.allowed + 1e-12)
        ranks = range(align, paying_rank(item.shape, form) + 1, align)
        best = next((r for r in ranks if r >= enough), None)
        choice = policy.choose({"m": item}, {"m": known}, terms)["m"]

        assert choice.rank == best
        if best is None:
            assert choice.reason == f"dense: needs rank {enough}, {terms.break_even(item)}"


def test_energy_and_error_take_the_smallest_sufficient_rank():
    """Exactly at the threshold and one hair beyond: σ² = 9, 4, 2, 1 of 16."""
    known = {"m": spectrum((40, 4), values=[3.0, 2.0, math.sqrt(2.0), 1.0])}

    def rank(policy: RankPolicy) -> int | None:
        return policy.choose(items_of(known), known, Terms())["m"].rank

    assert rank(Energy(9 / 16)) == 1
    assert rank(Energy(9 / 16 + 1e-9)) == 2
    assert rank(Energy(13 / 16)) == 2
    assert rank(Energy(1e-9)) == 1
    assert rank(RelativeError(math.sqrt(7 / 16))) == 1
    assert rank(RelativeError(math.sqrt(7 / 16) - 1e-9)) == 2
    assert rank(RelativeError(0.999)) == 1
    assert rank(RelativeError(math.sqrt(1 / 16))) == 3
    assert rank(RelativeError(0.0)) is None  # rank 4 does not pay


def test_the_reason_of_a_rank_too_high_names_it_and_the_break_even():
    """What it needs, and what it may have."""
    known = {"m": spectrum((4, 4), values=[1.0] * 4)}

    reason = Energy(0.9).choose(items_of(known), known, Terms())["m"].reason
    aligned = Energy(0.2).choose(items_of(known), known, Terms("pivoted", align=4))["m"].reason

    assert reason == "dense: needs rank 4, break-even is 1 of 4"
    assert aligned == "dense: needs rank 1, break-even is 3 of 4, ranks are multiples of 4"


@pytest.mark.parametrize("name", POLICIES)
def test_values_out_of_range_are_refused(name):
    """By every policy, with the option's name and the value."""
    for value in OUT_OF_RANGE[name]:
        with pytest.raises(UsageError, match=f"--{name} {re.escape(str(value))} is out of range"):
            POLICIES[name](value)


@pytest.mark.parametrize("rank", [1, 3, 6, 1000])
def test_a_rank_that_is_no_multiple_of_align_is_refused(rank):
    """Before anything is decomposed, by both options' names."""
    for align in (1, 4, 7):
        if rank % align == 0:
            FixedRank(rank).check(ITEMS, Terms("ba", align))
            continue
        with pytest.raises(UsageError, match=f"--rank {rank} is no multiple of --align {align}"):
            FixedRank(rank).check(ITEMS, Terms("ba", align))


def test_what_is_barred_stays_dense_under_every_policy():
    """Its limit is 0 whatever the policy, and a budget pays for it in full."""
    known = {"m": spectrum((24, 16), values=[1.0] + [0.0] * 15)}
    items = {"m": Item((24, 16)), "barred": Item((24, 16), known_rank=3, barred="dense: why")}

    for policy in [*ALL, AutoRank()]:
        for form in FORMS:
            assert policy.limit(items["barred"], Terms(form)) == 0
    with pytest.raises(UsageError, match=r"cannot be reached: rank 1 everywhere keeps 0\.5521"):
        Keep(0.5).check(items, Terms())
    assert Keep(0.56).choose(items, known, Terms())["m"].rank == 1


def test_in_nats_the_scale_of_a_matrix_counts_and_as_a_share_it_does_not():
    """Twice the singular values are four times the loss; of its own energy each loses as much."""
    values = [1.0 / i for i in range(1, 25)]
    known = {
        "loud": spectrum((24, 24), values=[2 * value for value in values]),
        "quiet": spectrum((24, 24), values=values),
    }
    nats, shares = (
        Keep(0.5).choose(items_of(known), known, Terms("pivoted", in_nats=in_nats))
        for in_nats in (True, False)
    )

    assert nats["loud"].rank > nats["quiet"].rank
    assert abs(shares["loud"].rank - shares["quiet"].rank) <= 1


# The global budgets.


@every_unit
@every_form
@every_align
@every_currency
@pytest.mark.parametrize("seed", range(3))
def test_a_budget_is_never_exceeded_and_what_is_left_buys_nothing_more(
    seed, in_nats, align, form, unit
):
    """Every tensor counted: no single matrix could have more for what is left."""
    given = problem(unit, form, align, seed, in_nats=in_nats)
    for budget in given.budgets(0, 0.1, 0.3, 0.5, 0.7, 0.9):
        choices = given.solve(budget)
        left = budget - given.spent(choices)

        assert left >= 0
        for name, choice in choices.items():
            now = (
                given.price(name, choice.rank),
                worth(given.items[name], given.spectra[name], choice.rank, in_nats),
            )
            better = [price for price, value in given.points(name) if value > now[1]]
            assert all(price - now[0] > left for price in better)


@every_unit
@every_form
@every_align
@every_currency
@pytest.mark.parametrize("seed", range(4))
def test_a_budget_is_spent_as_well_as_by_brute_force_but_for_one_step(
    seed, in_nats, align, form, unit
):
    """Never better (it cannot be), never worse than by the largest step of a concave hull."""
    given = problem(unit, form, align, seed, in_nats=in_nats)
    for budget in given.budgets(0, 0.2, 0.5, 0.8, 1):
        choices, best = given.solve(budget), given.brute_force(budget)

        assert given.spent(choices) <= budget
        assert best - given.largest_step <= given.worth(choices) <= best + 1e-9


@every_unit
@every_align
def test_a_budget_equals_brute_force_where_every_step_costs_the_same(align, unit):
    """Equal shapes and falling gains: the greedy choice is the best one."""
    compared = 0
    for seed in range(10):
        given = problem(unit, "ba", align, 10 * seed, shapes=((24, 24),) * 3, counts=(2,))
        for budget in given.budgets(0.1, 0.3, 0.5):
            choices = given.solve(budget)
            if any(choice.rank is None for choice in choices.values()):
                continue
            compared += 1

            assert given.worth(choices) == pytest.approx(given.brute_force(budget))
    assert compared >= 5


@every_unit
@every_form
@every_align
def test_a_budget_is_used_up_to_half_a_per_cent_where_one_rank_is_less_than_that(align, form, unit):
    """Thirty matrices and stacks of 64×48 and 48×64, of very different decay."""
    random = np.random.default_rng(0)
    items, spectra = {}, {}
    for i in range(30):
        decay, shape = random.uniform(0.1, 2.5), [(64, 48), (48, 64)][i % 2]
        values = [float(k) ** -decay for k in range(1, 49)]
        items[f"m{i}"], spectra[f"m{i}"] = Item(shape, 1 + i % 3), spectrum(shape, values=values)
    given = Problem(unit, Terms(form, align, rest_bytes=5000), items, spectra)
    tight = 0
    for budget in given.budgets(0.02, 0.2, 0.4, 0.6, 0.8, 0.9):
        choices = given.solve(budget)
        step = min(
            given.items[name].count * align * (64 + 48) * (4 if unit == "size" else 1)
            for name, choice in choices.items()
            if choice.rank is not None
        )
        tight += step < 0.005 * budget

        assert 0 <= budget - given.spent(choices) < max(0.005 * budget, step)
    assert tight >= 3


@every_unit
@every_form
def test_a_larger_budget_never_loses_worth(form, unit):
    """Monotone in the budget, over a fine grid of it, but for the step that greed may miss."""
    given = problem(unit, form, 1, shapes=((24, 16),) * 4)
    worths = [given.worth(given.solve(b)) for b in given.budgets(*np.linspace(0, 1, 41))]

    assert all(b >= a - given.largest_step for a, b in itertools.pairwise(worths))
    assert worths[-1] == sum(item.dense_parameters for item in given.items.values()) - 90


@every_unit
@every_form
def test_dense_is_among_the_choices(form, unit):
    """A flat matrix beside a rank-1 one: the budget keeps the flat one whole."""
    flat, low = spectrum((40, 40), values=[1.0] * 40), spectrum((40, 40), values=[1.0] + [0.0] * 39)
    known = {"flat": flat, "low": low}
    given = Problem(unit, Terms(form), items_of(known), known)

    choices = given.solve(given.price("flat", None) + given.price("low", 1))

    assert choices["flat"] == Choice(None, "dense: the better use of the budget")
    assert choices["low"].rank == 1


@every_unit
@every_form
@every_align
def test_the_whole_budget_keeps_everything_dense(align, form, unit):
    """There is room for every matrix as it is; a unit less, and one of them is factored."""
    given = problem(unit, form, align)
    whole, less = given.solve(given.most), given.solve(given.most - 1)

    assert all(choice.rank is None for choice in whole.values())
    assert any(choice.rank is not None for choice in less.values())


@every_unit
def test_what_is_not_factored_counts_against_the_budget(unit):
    """No rank that pays, a decomposition that failed, another tensor: spent before the rest."""
    known = {"m": spectrum((30, 30))}
    beside = {"vector": Item((1, 90)), "failed": Item((12, 10), count=2)}
    size = 4 if unit == "size" else 1
    alone = Problem(unit, Terms(), items_of(known), known)
    crowded = Problem(unit, Terms("ba", 1, rest_bytes=24), items_of(known) | beside, known)

    assert alone.solve(450 * size)["m"].rank == 450 // 60
    assert crowded.solve(700 * size)["m"].rank == (700 - 90 - 240 - (6 if size == 4 else 0)) // 60


def test_bytes_count_the_dtype_of_the_factors_and_the_permutation():
    """60 numbers a rank of B·A in 2 bytes; r(60 − r) in 8 and 30 int64 if pivoted."""
    known = {"m": spectrum((30, 30))}
    narrow, wide = {"m": Item((30, 30), 1, 4, 2)}, {"m": Item((30, 30), 1, 4, 8)}

    assert Size(600).choose(narrow, known, Terms())["m"].rank == 5
    assert Size(599).choose(narrow, known, Terms())["m"].rank == 4
    assert Size(5 * 55 * 8 + 240).choose(wide, known, Terms("pivoted"))["m"].rank == 5
    assert Size(5 * 55 * 8 + 239).choose(wide, known, Terms("pivoted"))["m"].rank == 4


@every_unit
def test_a_stack_counts_as_many_times_as_it_has_matrices(unit):
    """Three in one tensor: the rank that each of three alone would have, for three times that."""
    known = {"m": spectrum((30, 30))}
    for form, align in itertools.product(FORMS, ALIGNS):
        one = Problem(unit, Terms(form, align), items_of(known), known)
        three = Problem(unit, Terms(form, align), {"m": Item((30, 30), count=3)}, known)
        for rank in range(align, paying_rank((30, 30), "ba") + 1, align):
            budget = one.price("m", rank)

            assert one.solve(budget)["m"].rank == three.solve(3 * budget)["m"].rank == rank
            if rank > align:
                assert three.solve(3 * budget - 1)["m"].rank == rank - align


def test_ties_are_broken_by_name():
    """Equal matrices, room for one more rank: the first name gets it, whatever the order."""
    known = spectrum((10, 10), values=[float(v) for v in range(10, 0, -1)])
    spectra = dict.fromkeys(["c", "a", "b"], known)

    choices = Keep(0.67).choose(items_of(spectra), spectra, Terms())

    ranks = [choices[name].rank for name in "abc"]
    assert ranks == [4, 3, 3]


def test_a_budget_below_rank_1_everywhere_is_refused_with_the_least_that_works():
    """The message's figure, given back, is accepted."""
    spectra = {"a": spectrum((20, 10)), "b": spectrum((10, 20))}
    items = items_of(spectra)
    with pytest.raises(UsageError, match=r"rank 1 everywhere keeps 0\.1500"):
        Keep(0.1499).choose(items, spectra, Terms())
    with pytest.raises(UsageError, match=r"rank 1 everywhere keeps 0\.1500"):
        Keep(0.1499).check(items, Terms())
    with pytest.raises(UsageError, match=r"takes 247 bytes, 7 of them for tensors that are not"):
        Size(246).check(items, Terms(rest_bytes=7))

    Keep(0.15).check(items, Terms())
    Size(247).check(items, Terms(rest_bytes=7))
    for policy in (Keep(0.15), Size(247)):
        choices = policy.choose(items, spectra, Terms(rest_bytes=7))

        assert [choice.rank for choice in choices.values()] == [1, 1]


@every_unit
@every_form
@every_align
def test_the_least_that_works_is_the_least_of_all_choices(align, form, unit):
    """One unit below it is refused by sizes alone and by spectra; the message names the rank."""
    for seed in range(4):
        given = problem(unit, form, align, seed)
        choices, below = given.solve(given.least), given.policy(given.least - 1)
        words = f"--{unit} .* cannot be reached: rank {align} everywhere"

        assert given.spent(choices) == given.least
        with pytest.raises(UsageError, match=words):
            below.check(given.items, given.terms)
        with pytest.raises(UsageError, match=words) as caught:
            below.choose(given.items, given.spectra, given.terms)
        figure = (
            str(given.least)
            if unit == "size"
            else f"{math.ceil(1e4 * given.least / given.most) / 1e4:.4f}"
        )
        assert f" {figure} " in str(caught.value)


@every_form
def test_a_chosen_rank_takes_fewer_bytes_than_dense_under_a_size(form):
    """Factors of a wider dtype, and permutations, may take more than the matrix itself."""
    items = {"m": Item((40, 12), 1, 2, 8), "zero": Item((50, 50), 1, 2, 8)}
    low = [1.0] * 8 + [0.0] * 4
    spectra = {
        "m": spectrum((40, 12), values=low),
        "zero": spectrum((50, 50), values=[0.0] * 50),
    }
    given = Problem("size", Terms(form), items, spectra)  # type: ignore[arg-type]

    rank = given.solve(given.most)["m"].rank

    assert rank is None or items["m"].bytes(rank, form) < items["m"].dense_bytes


def test_auto_reaches_every_size_that_one_of_its_forms_reaches():
    """At low ranks B·A takes fewer bytes than the permutation alone."""
    items = {"m": Item((512, 512), 1, 2, 2)}
    Size(2048).check(items, Terms("ba"))

    Size(2048).check(items, Terms("auto"))


@every_unit
def test_a_single_matrix_takes_what_the_budget_buys(unit):
    """One matrix, one division."""
    known = {"m": spectrum((40, 40))}
    given = Problem(unit, Terms(), items_of(known), known)
    for share in (0.2, 0.4, 0.6, 0.8):
        budget = math.floor(share * given.most)

        assert given.solve(budget)["m"].rank == budget // given.price("m", 1)


@every_unit
@every_form
@every_align
def test_a_zero_matrix_is_worth_its_whole_size_at_the_first_rank(align, form, unit):
    """Nothing is lost by cutting it, so nothing more is spent on it."""
    known = {"zero": spectrum((40, 40), values=[0.0] * 40), "other": spectrum((40, 40))}
    given = Problem(unit, Terms(form, align), items_of(known), known)

    choices = given.solve(given.price("zero", align) + given.price("other", None))

    assert choices["zero"].rank == align
    assert choices["other"].rank is None


@every_unit
def test_no_matrix_at_all_is_no_choice_at_all(unit):
    """Everything targeted was copied already: nothing to choose, within any budget of all."""
    given = Problem(unit, Terms(), {"v": Item((1, 5))}, {})

    assert given.solve(given.most) == {}


@every_unit
@every_form
@pytest.mark.parametrize("count", [1, 3])
def test_an_exactly_low_rank_matrix_is_factored_whatever_the_budget(count, form, unit):
    """What factoring loses there is rounding, so dense is not worth its price."""
    known = {"a": spectrum((64, 48), values=[3.0, 2.0] + [1e-8] * 46)}
    for align, rank in ((1, 2), (4, 4)):
        given = Problem(unit, Terms(form, align), {"a": Item((64, 48), count)}, known)
        for budget in given.budgets(0.3, 0.5, 1):
            assert given.solve(budget) == {"a": given.terms.choice(rank)}


# The parts of a budget.


def price(item: Item, rank: int | None) -> int:
    return parameters(item, rank, "ba")


@every_align
def test_a_menu_holds_every_aligned_rank_that_pays_and_dense(align):
    """Its costs and worths in closed form, once for each matrix of a stack."""
    item, known = Item((24, 20), count=3), spectrum((24, 20))
    menu = Menu.of(item, known, Terms("ba", align), price)
    ranks = [*range(align, 10 + 1, align), None]

    assert [menu.choice(pick, Terms()).rank for pick in range(len(menu.costs))] == ranks
    assert menu.costs.tolist() == [parameters(item, r, "ba") for r in ranks]
    assert menu.worths.tolist() == pytest.approx([worth(item, known, r) for r in ranks])
    assert menu.least == parameters(item, align, "ba")
    assert menu.choice(len(ranks) - 1, Terms()).reason.startswith("dense: ")


def test_a_menu_of_a_partial_spectrum_has_the_ranks_that_are_known():
    """Their worths are the whole spectrum's: the tail is in the energy."""
    item, known = Item((24, 20)), spectrum((24, 20))
    part = Spectrum(known.shape, known.values[:5], known.energy)
    menu, whole = (Menu.of(item, s, Terms(), price) for s in (part, known))

    assert menu.ranks.tolist() == [1, 2, 3, 4, 5]
    assert menu.worths[:5].tolist() == pytest.approx(whole.worths[:5].tolist())
    assert menu.worths[-1] == whole.worths[-1]


def test_the_best_pick_of_a_menu_trades_worth_for_cost():
    """By trying all, over multipliers from where cost is nothing to where it is everything."""
    item, known = Item((24, 20)), spectrum((24, 20))
    menu = Menu.of(item, known, Terms(), price)
    for multiplier in [0.0, *np.logspace(-3, 3, 25)]:
        values = [w - multiplier * c for w, c in zip(menu.worths, menu.costs, strict=True)]

        assert values[menu.best(multiplier)] == max(values)
    assert menu.choice(menu.best(0.0), Terms()).rank is None
    assert menu.choice(menu.best(1e9), Terms()).rank == 1


def test_bisect_takes_corners_within_the_budget_and_fill_only_adds():
    """One multiplier for all; what it leaves is spent on single ranks, and spend is both."""
    given = problem("keep", "ba", 1)
    menus = {
        name: Menu.of(given.items[name], known, given.terms, price)
        for name, known in given.spectra.items()
    }
    for budget in given.budgets(0, 0.2, 0.4, 0.6, 0.8, 1):
        left = budget - given.fixed
        corners = bisect(menus, left)
        picks = fill(menus, corners, left)
        for name, pick in corners.items():
            corner = menus[name].costs[pick], pytest.approx(menus[name].worths[pick])

            assert corner in hull(given.points(name))
        assert sum(menus[name].costs[pick] for name, pick in picks.items()) <= left
        assert all(picks[name] >= corners[name] for name in menus)
        assert spend(menus, left, Terms()) == {
            name: menus[name].choice(p, Terms()) for name, p in picks.items()
        }


def test_fill_takes_the_best_worth_per_unit_first():
    """Two menus of one step each: the dearer step is worth more, the cheaper one more per unit."""
    ranks = np.array([1])
    cheap = Menu(ranks, np.array([10.0, 14.0]), np.array([1.0, 9.0]))
    dear = Menu(ranks, np.array([10.0, 30.0]), np.array([1.0, 21.0]))
    menus, start = {"cheap": cheap, "dear": dear}, {"cheap": 0, "dear": 0}

    assert fill(menus, start, 43) == {"cheap": 1, "dear": 0}
    assert fill(menus, start, 44) == {"cheap": 1, "dear": 1}
    assert fill(menus, start, 23) == start
    assert start == {"cheap": 0, "dear": 0}
