"""Ranks from spectra: against brute force where that can be afforded, and as laws elsewhere."""

import itertools
import math

import numpy as np
import pytest
import torch

from eckart.allocate import (
    POLICIES,
    Choice,
    Energy,
    FixedRank,
    Keep,
    RankPolicy,
    RelativeError,
    cost,
    paying_rank,
)
from eckart.errors import UsageError
from eckart.linalg.spectrum import Spectrum

FORMS = ("ba", "pivoted")
SHAPES = [(1, 1), (1, 9), (9, 1), (2, 2), (2, 3), (6, 6), (12, 5), (64, 48), (48, 64), (512, 512)]
EXAMPLES: dict[str, list[RankPolicy]] = {
    "rank": [FixedRank(1), FixedRank(3), FixedRank(1000)],
    "energy": [Energy(0.5), Energy(0.99), Energy(1.0)],
    "error": [RelativeError(0.5), RelativeError(0.01), RelativeError(0.0)],
    "keep": [Keep(0.9), Keep(0.5), Keep(1.0)],
}
ALL = [policy for policies in EXAMPLES.values() for policy in policies]


def spectrum(shape: tuple[int, int], seed: int = 0, values: list[float] | None = None) -> Spectrum:
    """A random falling spectrum, or the given one."""
    if values is None:
        random = np.random.default_rng([seed, *shape])
        values = sorted(random.gamma(0.5, size=min(shape)) + 1e-3, reverse=True)
    s = torch.tensor(values, dtype=torch.float64)
    return Spectrum(shape, s, float(s.square().sum()))


def chosen_cost(shape: tuple[int, int], choice: Choice, form: str) -> int:
    return math.prod(shape) if choice.rank is None else cost(shape, choice.rank, form)


def chosen_worth(known: Spectrum, choice: Choice) -> float:
    size = math.prod(known.shape)
    if choice.rank is None or known.energy == 0:
        return size
    return size * (1 - known.tail_energy(choice.rank) / known.energy)


def test_every_policy_has_examples_here():
    """A new policy is tested by existing."""
    assert EXAMPLES.keys() == POLICIES.keys()
    assert all(policy.name == name for name in EXAMPLES for policy in EXAMPLES[name])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_paying_rank_is_the_last_that_pays(shape, form):
    """Fewer parameters than the matrix; one rank more is not."""
    m, n = shape
    last = paying_rank(shape, form)

    assert last == 0 or cost(shape, last, form) < m * n
    assert last + 1 > min(shape) or cost(shape, last + 1, form) >= m * n
    assert all(cost(shape, r, form) < m * n for r in range(1, last + 1))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("policy", ALL, ids=repr)
def test_every_choice_is_a_rank_that_pays_or_dense_with_a_reason(policy, form):
    """Over every policy, every form and shapes with and without a paying rank."""
    shapes = {f"m{i}": shape for i, shape in enumerate(SHAPES[:8])}
    spectra = {
        name: spectrum(shape) for name, shape in shapes.items() if policy.limit(shape, form) > 0
    }
    dense = {name: shape for name, shape in shapes.items() if name not in spectra}
    choices = policy.choose(spectra, dense, form)

    assert choices.keys() == spectra.keys()
    for name, choice in choices.items():
        if choice.rank is None:
            assert choice.reason.startswith("dense: ")
        else:
            assert 1 <= choice.rank <= min(paying_rank(shapes[name], form), *shapes[name])
            assert choice.rank <= policy.limit(shapes[name], form)
    for shape in dense.values():
        assert policy.refusal(shape, form).startswith("dense: ")
        assert str(min(shape)) in policy.refusal(shape, form)


@pytest.mark.parametrize("policy", ALL, ids=repr)
def test_a_choice_is_a_function_of_its_arguments(policy):
    """Same again, whatever the order of the names; the arguments are not changed."""
    spectra = {f"m{i}": spectrum((24, 16), i) for i in range(5)}
    before = {name: s.values.clone() for name, s in spectra.items()}
    if policy.limit((24, 16), "ba") == 0:
        return
    first = policy.choose(spectra, {}, "ba")
    second = policy.choose(dict(reversed(spectra.items())), {}, "ba")

    assert first == second
    assert all(torch.equal(before[name], spectra[name].values) for name in spectra)


def test_energy_and_error_take_the_smallest_sufficient_rank():
    """Exactly at the threshold and one hair beyond: σ² = 9, 4, 2, 1 of 16."""
    known = {"m": spectrum((40, 4), values=[3.0, 2.0, math.sqrt(2.0), 1.0])}

    def rank(policy: RankPolicy) -> int | None:
        return policy.choose(known, {}, "ba")["m"].rank

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

    reason = Energy(0.9).choose(known, {}, "ba")["m"].reason

    assert reason == "dense: needs rank 4, break-even is 1 of 4"


@pytest.mark.parametrize("value", [0, -1, 1.5, 2.0])
def test_a_rank_is_a_whole_number_from_1(value):
    """0, negative and fractional ranks are refused."""
    with pytest.raises(UsageError, match="out of range"):
        FixedRank(value)


@pytest.mark.parametrize(
    ("policy", "values"),
    [
        (Energy, [0.0, -0.1, 1.0000001, math.nan, math.inf]),
        (RelativeError, [-1e-9, 1.0, 2.0, math.nan]),
        (Keep, [0.0, -0.1, 1.0000001, math.nan, math.inf]),
    ],
)
def test_values_out_of_range_are_refused(policy, values):
    """With the option's name and the value."""
    for value in values:
        with pytest.raises(UsageError, match=f"--{policy.name} {value} is out of range"):
            policy(value)


# The global budget.


def brute_force(spectra: dict[str, Spectrum], budget: int, form: str) -> float:
    """The most worth of any choice within the budget, by trying all."""
    menus = []
    for known in spectra.values():
        ranks = [Choice(r) for r in range(1, paying_rank(known.shape, form) + 1)] + [Choice(None)]
        menus.append([(chosen_cost(known.shape, c, form), chosen_worth(known, c)) for c in ranks])
    return max(
        sum(worth for _, worth in picks)
        for picks in itertools.product(*menus)
        if sum(price for price, _ in picks) <= budget
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("keep", [0.45, 0.6, 0.75, 0.9, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_keep_is_as_good_as_brute_force_but_for_one_step(seed, keep, form):
    """Never better (it cannot be), never worse than by the largest single step of a matrix."""
    shapes = [(12, 10), (9, 14), (16, 6)]
    spectra = {f"m{i}": spectrum(shape, seed) for i, shape in enumerate(shapes)}
    budget = math.floor(keep * sum(math.prod(shape) for shape in shapes))
    choices = Keep(keep).choose(spectra, {}, form)
    spent = sum(chosen_cost(spectra[name].shape, c, form) for name, c in choices.items())
    worth = sum(chosen_worth(spectra[name], c) for name, c in choices.items())
    best = brute_force(spectra, budget, form)
    steps = [
        math.prod(known.shape) * float(known.values[1]) ** 2 / known.energy
        for known in spectra.values()
    ]

    assert spent <= budget
    assert worth <= best + 1e-9
    assert worth >= best - 2 * max(steps)


def test_keep_equals_brute_force_where_every_step_costs_the_same():
    """Equal shapes and falling gains: the greedy choice is the best one."""
    for seed in range(10):
        spectra = {f"m{i}": spectrum((14, 14), 10 * seed + i) for i in range(3)}
        total = 3 * 14 * 14
        for keep in (0.3, 0.5, 0.7):
            choices = Keep(keep).choose(spectra, {}, "ba")
            if any(choice.rank is None for choice in choices.values()):
                continue
            worth = sum(chosen_worth(spectra[name], c) for name, c in choices.items())

            assert worth == pytest.approx(brute_force(spectra, math.floor(keep * total), "ba"))


@pytest.mark.parametrize("form", FORMS)
def test_keep_is_within_half_a_per_cent_where_one_rank_is_less_than_that(form):
    """Thirty matrices of 64×48 and 48×64, of very different decay."""
    random = np.random.default_rng(0)
    spectra = {}
    for i in range(30):
        decay = random.uniform(0.1, 2.5)
        values = [float(k) ** -decay for k in range(1, 49)]
        spectra[f"m{i}"] = spectrum([(64, 48), (48, 64)][i % 2], values=values)
    total = 30 * 64 * 48
    for keep in (0.05, 0.2, 0.4, 0.6, 0.8, 0.9):
        choices = Keep(keep).choose(spectra, {}, form)
        spent = sum(chosen_cost(spectra[name].shape, c, form) for name, c in choices.items())

        assert keep - 0.005 <= spent / total <= keep


@pytest.mark.parametrize("form", FORMS)
def test_a_larger_budget_never_loses_worth(form):
    """Monotone in the budget, over a fine grid of it."""
    spectra = {f"m{i}": spectrum((24, 16), i) for i in range(4)}
    worths = []
    for keep in np.linspace(0.2, 1.0, 81):
        choices = Keep(float(keep)).choose(spectra, {}, form)
        worths.append(sum(chosen_worth(spectra[name], c) for name, c in choices.items()))

    slack = max(24 * 16 * float(known.values[3]) ** 2 / known.energy for known in spectra.values())
    assert all(b >= a - slack for a, b in itertools.pairwise(worths))
    assert worths[-1] == 4 * 24 * 16


def test_dense_is_among_the_choices():
    """A flat matrix beside a rank-1 one: the budget keeps the flat one whole."""
    flat, low = spectrum((20, 20), values=[1.0] * 20), spectrum((20, 20), values=[1.0] + [0.0] * 19)

    choices = Keep(0.56).choose({"flat": flat, "low": low}, {}, "ba")

    assert choices["flat"] == Choice(None, "dense: the better use of the budget")
    assert choices["low"].rank is not None


def test_the_whole_budget_keeps_everything_dense():
    """--keep 1 has room for every matrix as it is."""
    choices = Keep(1.0).choose({"a": spectrum((9, 7)), "b": spectrum((7, 9))}, {}, "ba")

    assert all(choice.rank is None for choice in choices.values())


def test_dense_matrices_count_against_the_budget():
    """What has no paying rank is spent before the rest is shared out."""
    known = {"m": spectrum((30, 30))}
    alone = Keep(0.5).choose(known, {}, "ba")["m"].rank
    beside = Keep(0.5).choose(known, {"vector": (1, 90)}, "ba")["m"].rank
    assert alone is not None
    assert beside is not None

    assert alone == 450 // 60
    assert beside == (495 - 90) // 60


def test_ties_are_broken_by_name():
    """Equal matrices, room for one more rank: the first name gets it, whatever the order."""
    known = spectrum((10, 10), values=[float(v) for v in range(10, 0, -1)])
    spectra = dict.fromkeys(["c", "a", "b"], known)

    choices = Keep(0.67).choose(spectra, {}, "ba")

    ranks = [choices[name].rank for name in "abc"]
    assert ranks == [4, 3, 3]


def test_a_budget_below_rank_1_everywhere_is_refused_with_the_least_that_works():
    """The message's figure, given back, is accepted."""
    shapes = {"a": (20, 10), "b": (10, 20)}
    spectra = {name: spectrum(shape) for name, shape in shapes.items()}
    with pytest.raises(UsageError, match=r"rank 1 everywhere keeps 0\.1500"):
        Keep(0.1499).choose(spectra, {}, "ba")
    with pytest.raises(UsageError, match=r"rank 1 everywhere keeps 0\.1500"):
        Keep(0.1499).check(shapes, "ba")

    Keep(0.15).check(shapes, "ba")
    choices = Keep(0.15).choose(spectra, {}, "ba")

    assert [choice.rank for choice in choices.values()] == [1, 1]


def test_a_single_matrix_takes_what_the_budget_buys():
    """One matrix, one division."""
    for keep in (0.2, 0.4, 0.6, 0.8):
        choice = Keep(keep).choose({"m": spectrum((40, 40))}, {}, "ba")["m"]

        assert choice.rank == math.floor(keep * 1600) // 80


def test_a_zero_matrix_is_worth_its_whole_size_at_rank_1():
    """Nothing is lost by cutting it, so nothing more is spent on it."""
    zero = spectrum((20, 20), values=[0.0] * 20)

    choices = Keep(0.55).choose({"zero": zero, "other": spectrum((20, 20))}, {}, "ba")

    assert choices["zero"].rank == 1
    assert choices["other"].rank is None


def test_no_matrix_at_all_is_no_choice_at_all():
    """Everything targeted was copied already: nothing to choose, within any budget of 1."""
    assert Keep(1.0).choose({}, {"v": (1, 5)}, "ba") == {}


def test_an_exactly_low_rank_matrix_is_factored_whatever_the_budget():
    """What factoring loses there is rounding, so dense is not worth its price."""
    flat = spectrum((64, 48), values=[3.0, 2.0] + [1e-8] * 46)

    assert Keep(1.0).choose({"a": flat}, {}, "ba") == {"a": Choice(2)}
    assert Keep(0.5).choose({"a": flat}, {}, "ba") == {"a": Choice(2)}
