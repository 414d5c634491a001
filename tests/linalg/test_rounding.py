"""The signal rank: what a fine-tuning added, seen through the rounding of the stored format."""

import numpy as np
import pytest
import torch

from eckart.errors import NonFiniteError, ShapeError
from eckart.linalg import rounding
from eckart.linalg.matrices import matrix_with_spectrum, named_generator
from eckart.linalg.rank import matrix_rank
from eckart.linalg.rounding import signal_rank, ulp
from eckart.linalg.truncated import truncated_svd

FORMATS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@pytest.fixture(params=FORMATS)
def stored(request):
    """The formats in which checkpoints are stored."""
    return FORMATS[request.param]


def _tuned(m, n, rank, stored, strength):
    """A Gaussian base of size 0.02, and the same plus a LoRA whose weakest σ is strength·τ."""
    generator = named_generator(0, f"{m} {n} {rank}")
    base = (0.02 * torch.randn(m, n, generator=generator)).to(stored)
    B, A = torch.randn(m, rank, generator=generator), torch.randn(rank, n, generator=generator)
    delta = (B @ A).double()
    weakest = float(np.linalg.svd(delta.numpy(), compute_uv=False)[rank - 1])
    tau = signal_rank(base, base).threshold
    return base, (base.double() + delta * (strength * tau / weakest)).to(stored)


@pytest.mark.parametrize("rank", [1, 2, 8])
@pytest.mark.parametrize(("m", "n"), [(192, 160), (160, 192)])
@pytest.mark.parametrize("strength", [2.0, 5.0, 50.0])
def test_rank_of_a_rounded_lora_is_found_exactly(m, n, rank, strength, stored):
    """Above the rounding floor the true rank comes back, in every stored format."""
    base, tuned = _tuned(m, n, rank, stored, strength)
    found = signal_rank(tuned, base)

    assert found.rank == rank
    assert found.rank <= found.bound
    assert not found.below_floor
    assert 0.75 < found.share <= 1.0


def test_rank_is_found_on_a_larger_matrix():
    """Where the leading 64 values suffice, no full SVD is needed for the same answer."""
    base, tuned = _tuned(512, 384, 8, torch.bfloat16, 4.0)
    found = signal_rank(tuned, base)

    assert found.rank == 8
    assert not found.below_floor


def _bases(m, n, generator):
    """Weights with one scale, with heavy tails (3 degrees of freedom), and with heavy rows."""
    gaussian, (rows, columns) = (
        torch.randn(m, n, generator=generator),
        torch.randn(2, m + n, generator=generator).split([m, n], 1),
    )
    chi = torch.randn(3, m, n, generator=generator).square().mean(0)
    return {
        "gaussian": 0.02 * gaussian,
        "student": 0.02 * gaussian / chi.sqrt(),
        "scaled": 0.02 * gaussian * (0.7 * rows[0, :, None]).exp() * (0.7 * columns[1]).exp(),
    }


def _merged(kind, shape, rank, stored, strength):
    """A base of the kind, and the same plus a Gaussian LoRA whose weakest σ is strength·τ."""
    m, n = shape
    generator = named_generator(0, f"{shape} {rank}")
    base = _bases(m, n, generator)[kind].to(stored)
    B, A = (
        torch.randn(size, dtype=torch.float64, generator=generator)
        for size in ((m, rank), (rank, n))
    )
    core = torch.linalg.qr(B).R @ torch.linalg.qr(A.mT).R.mT
    weakest = float(torch.linalg.svdvals(core)[-1])
    sigma = strength * signal_rank(base, base).threshold
    return base, (base.double() + (B * (sigma / weakest)) @ A).to(stored), sigma


KINDS = ["gaussian", "student", "scaled"]
SHAPES = [(192, 192), (96, 288)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strength", [2.0, 2.5, 3.0, 4.0, 6.0, 10.0, 50.0])
def test_rank_is_exact_wherever_the_weakest_value_is_twice_the_threshold(
    kind, shape, half, strength
):
    """From σ_r = 2τ on the rank is named exactly and trusted, and σ_r is known to a tenth."""
    for rank in (1, 2, 8):
        base, tuned, sigma = _merged(kind, shape, rank, half, strength)
        found = signal_rank(tuned, base)

        assert (found.rank, found.below_floor) == (rank, False)
        assert found.weakest == pytest.approx(sigma, rel=0.1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("strength", [0.05, 0.2, 0.5])
def test_no_rank_is_claimed_far_below_the_threshold(kind, shape, strength):
    """Up to σ_r = τ/2 something has changed, but no rank is to be trusted."""
    for rank in (1, 2, 8):
        base, tuned, _ = _merged(kind, shape, rank, torch.bfloat16, strength)

        assert signal_rank(tuned, base).below_floor


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("strength", [0.7, 1.0, 1.2, 1.4, 1.6, 1.8])
def test_a_rank_near_the_threshold_is_exact_or_not_trusted(kind, shape, strength):
    """Between τ/2 and 2τ no wrong rank goes without its warning."""
    for rank in (1, 2, 8):
        base, tuned, _ = _merged(kind, shape, rank, torch.bfloat16, strength)
        found = signal_rank(tuned, base)

        assert found.below_floor or found.rank == rank


@pytest.mark.parametrize(("shape", "rank"), [((1024, 640), 1), ((640, 1024), 8), ((384, 768), 64)])
def test_rank_of_a_large_matrix_is_exact_where_rounding_swallows_most_of_it(shape, rank):
    """A change of 2τ, of which a quarter is left at this width, has its rank and its σ."""
    base, tuned, sigma = _merged("gaussian", shape, rank, torch.bfloat16, 2.0)
    delta = tuned.float() - base.float()
    found = signal_rank(tuned, base)

    assert (found.rank, found.below_floor) == (rank, False)
    assert found.weakest == pytest.approx(sigma, rel=0.15)
    assert rank > 8 or float(truncated_svd(delta, rank=rank).s[-1]) < 0.6 * sigma


def test_harmonics_of_a_strong_change_do_not_count():
    """Rounding repeats a rank-1 change in further singular values, which are none of its rank."""
    base, tuned, _ = _merged("gaussian", (768, 768), 1, torch.bfloat16, 50.0)
    found = signal_rank(tuned, base)
    delta = truncated_svd(tuned.float() - base.float(), rank=2)

    assert float(delta.s[1]) > 1.5 * found.threshold
    assert (found.rank, found.below_floor) == (1, False)


def test_error_of_a_single_large_entry_does_not_count():
    """The rounding of one outlier, from a base in a finer format, may be above τ: no component."""
    generator = named_generator(0, "outlier")
    base = 0.02 * torch.randn(256, 256, generator=generator)
    base[3, 5] = 40.12  # between 40 and 40.25 in bfloat16
    L, R = torch.randn(256, 2, generator=generator), torch.randn(2, 256, generator=generator)
    tuned = (base + 3e-3 * L @ R).bfloat16()
    found = signal_rank(tuned, base)

    assert abs(float(tuned[3, 5] - base[3, 5])) > found.threshold
    assert (found.rank, found.below_floor) == (2, False)


def test_transposes_have_the_same_rank():
    """Tall or wide makes no difference."""
    base, tuned, sigma = _merged("scaled", (96, 288), 2, torch.bfloat16, 3.0)
    found = signal_rank(tuned.mT, base.mT)

    assert (found.rank, found.below_floor) == (2, False)
    assert found.weakest == pytest.approx(sigma, rel=0.1)


def test_spectrum_that_runs_on_through_the_floor_is_not_trusted():
    """Where no gap follows the last component above the floor, its number means little."""
    base, _, _ = _merged("gaussian", (300, 260), 1, torch.bfloat16, 4.0)
    tau = signal_rank(base, base).threshold
    for ratio in (0.9, 0.97):
        delta = matrix_with_spectrum(30 * tau * ratio ** torch.arange(200), 300, 260)
        found = signal_rank((base.double() + delta).bfloat16(), base)

        assert found.below_floor
        assert found.rank > 20


def test_many_components_are_counted_as_measured():
    """Beyond 128 components there is no un-rounding, and the rank is exact all the same."""
    base, tuned, _ = _merged("gaussian", (448, 400), 150, torch.bfloat16, 6.0)
    found = signal_rank(tuned, base)

    assert (found.rank, found.bound, found.below_floor) == (150, 150, False)


def test_rank_beyond_the_first_try_is_found_by_the_next(monkeypatch):
    """Where all triplets of a truncated SVD stand out, more are computed."""
    base, tuned, _ = _merged("gaussian", (320, 300), 8, torch.bfloat16, 3.0)
    expected = signal_rank(tuned, base)
    ranks, truncated = [], rounding.truncated_svd

    def watched(delta, *, rank, name):
        ranks.append(rank)
        return truncated(delta, rank=rank, name=name)

    monkeypatch.setattr(rounding, "truncated_svd", watched)
    monkeypatch.setattr(rounding, "FIRST_RANK", 4)
    found = signal_rank(tuned, base)

    assert ranks == [4, 16]
    assert (found.rank, found.below_floor) == (expected.rank, False) == (8, False)
    assert found.weakest == pytest.approx(expected.weakest, rel=1e-2)


@pytest.mark.parametrize("power", [-100, -60, 60, 100])
def test_answer_does_not_depend_on_the_scale(power):
    """Powers of two change no bit of the mantissas, and no rank, at any size of the entries."""
    base, tuned, _ = _merged("gaussian", (160, 128), 2, torch.bfloat16, 3.0)
    plain = signal_rank(tuned, base)
    scaled = signal_rank(torch.ldexp(tuned, torch.tensor(power)), base * 2.0**power)

    assert (scaled.rank, scaled.bound, scaled.share) == (plain.rank, plain.bound, plain.share)
    assert scaled.threshold == pytest.approx(plain.threshold * 2.0**power, rel=1e-6)
    assert scaled.weakest == pytest.approx(plain.weakest * 2.0**power, rel=1e-4)


def test_matrices_themselves_are_not_changed(stored):
    """Neither the tuned matrix nor its base is written to."""
    base, tuned = _tuned(192, 160, 2, stored, 4.0)
    before = base.clone(), tuned.clone()
    signal_rank(tuned, base)
    signal_rank(tuned)

    assert torch.equal(base, before[0])
    assert torch.equal(tuned, before[1])


def test_numpys_rule_would_count_rounding_noise(stored):
    """The reason for all this: the numerical rank of the same delta is that of the noise."""
    base, tuned = _tuned(192, 160, 2, stored, 4.0)
    delta = tuned.double() - base.double()

    assert matrix_rank(delta) > 100
    assert signal_rank(tuned, base).rank == 2


def test_full_rank_change_is_found_in_full():
    """A delta of full rank, far above the floor, keeps its full rank."""
    base, tuned = _tuned(24, 20, 20, torch.float32, 100.0)

    assert signal_rank(tuned, base).rank == 20


def test_change_below_the_floor_says_so(stored):
    """A change that rounding hides is reported as hidden, never as a rank one can trust."""
    base, tuned = _tuned(192, 160, 8, stored, 0.05)

    assert bool((tuned != base).any())
    assert signal_rank(tuned, base).below_floor


def test_identical_matrices_have_rank_zero(stored):
    """No change is rank 0 with every entry explained, and nothing is hidden."""
    base, _ = _tuned(192, 160, 2, stored, 4.0)
    found = signal_rank(base.clone(), base)

    assert (found.rank, found.bound, found.share) == (0, 0, 1.0)
    assert not found.below_floor


def test_zero_matrices_have_rank_zero(dtype):
    """Zero minus zero is zero."""
    found = signal_rank(torch.zeros(6, 5, dtype=dtype))

    assert (found.rank, found.share, found.below_floor) == (0, 1.0, False)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_without_a_base_the_matrix_itself_is_judged(rank, stored):
    """A rank-r matrix rounded to a stored format has signal rank r, where numpy sees noise."""
    generator = named_generator(1, str(rank))
    L = torch.randn(96, rank, dtype=torch.float64, generator=generator)
    R = torch.randn(rank, 80, dtype=torch.float64, generator=generator)
    W = (L @ R).to(stored)  # one rounding: a float32 product would carry more
    found = signal_rank(W)

    assert found.rank == rank
    assert not found.below_floor
    if stored != torch.float32:
        assert matrix_rank(W) > 4 * rank


@pytest.mark.parametrize("shape", [(1, 1), (1, 30), (30, 1), (2, 2)])
def test_smallest_shapes_have_an_answer(shape, stored):
    """One entry, one row and one column are matrices too."""
    found = signal_rank(torch.ones(shape, dtype=stored))

    assert found.rank == 1
    assert found.share == 1.0


def test_one_changed_row_is_rank_one(stored):
    """A change of a single row far above the rounding is found as rank 1."""
    base, _ = _tuned(192, 160, 2, stored, 4.0)
    tuned = base.clone()
    tuned[7] = -tuned[7]

    assert signal_rank(tuned, base).rank == 1


def test_answer_repeats_and_does_not_depend_on_a_global_seed():
    """Without a generator the answer is the same every time."""
    base, tuned = _tuned(192, 160, 2, torch.bfloat16, 4.0)
    torch.manual_seed(3)
    first = signal_rank(tuned, base)
    torch.manual_seed(4)

    assert signal_rank(tuned, base) == first


def test_other_seeds_find_the_same_rank():
    """The seed moves the threshold by little and the rank not at all."""
    base, tuned = _tuned(192, 160, 8, torch.bfloat16, 3.0)
    found = [signal_rank(tuned, base, generator=named_generator(s, "")) for s in range(8)]
    thresholds = [each.threshold for each in found]

    assert {each.rank for each in found} == {8}
    assert max(thresholds) < 1.15 * min(thresholds)


def test_threshold_bounds_the_rounding_it_stands_for(stored):
    """τ is above the 2-norm of what rounding a matrix of this format really leaves behind."""
    generator = named_generator(2, "")
    W = 0.02 * torch.randn(192, 160, dtype=torch.float64, generator=generator)
    noise = W.to(stored).double() - W
    tau = signal_rank(W.to(stored)).threshold
    true = float(torch.linalg.matrix_norm(noise, 2))

    assert true < tau < 1.3 * true


def test_different_shapes_are_refused_with_both():
    """A delta needs equal shapes; the error names the matrix and shows them."""
    with pytest.raises(ShapeError, match=r"layer is \(4, 3\), its base \(3, 4\)"):
        signal_rank(torch.ones(4, 3), torch.ones(3, 4), name="layer")


def test_non_finite_base_is_named_as_the_base():
    """The error tells which of the two is damaged."""
    bad = torch.ones(3, 3)
    bad[1, 1] = float("inf")

    with pytest.raises(NonFiniteError, match="the base of layer holds 1"):
        signal_rank(torch.ones(3, 3), bad, name="layer")
    with pytest.raises(NonFiniteError, match=r"^layer holds 1"):
        signal_rank(bad, torch.ones(3, 3), name="layer")


@pytest.mark.parametrize(
    "value", [1.0, 1.5, 1.9921875, 2.0, -2.0, 3.0, 0.02, 1000.0, 6e-5, 2.0**-14, 2.0**-30]
)
def test_ulp_is_the_distance_to_the_next_number(value, dtype):
    """The spacing above |w| is what nextafter gives, on both sides of every power of two."""
    w = torch.tensor([[value]], dtype=dtype)
    step = torch.nextafter(w.abs(), torch.full_like(w, torch.inf)).double() - w.abs().double()

    assert torch.equal(ulp(w), step)


def test_ulp_of_all_half_precision_numbers():
    """Every finite positive float16 and bfloat16 below the largest, subnormals and 0 included."""
    for half in (torch.float16, torch.bfloat16):
        bits = torch.arange(2**15, dtype=torch.int32).to(torch.int16)
        numbers = bits.view(half).double()
        finite = numbers[torch.isfinite(numbers)]

        assert torch.equal(ulp(finite[:-1].to(half)[None])[0], finite.diff())


def test_ulp_in_the_subnormal_range():
    """Below the smallest normal number the step is one and the same, also at zero."""
    tiny = torch.tensor([[0.0, 2.0**-24, 2.0**-20, 2.0**-15]], dtype=torch.float16)

    assert ulp(tiny).tolist() == [[2.0**-24] * 4]
    assert ulp(torch.tensor([[1e-40]])).tolist() == [[2.0**-149]]


def test_ulp_is_symmetric_and_float64():
    """Sign does not matter, and the result is float64 whatever the format."""
    w = torch.tensor([[-3.0, 3.0]], dtype=torch.float16)

    assert ulp(w).dtype == torch.float64
    assert float(ulp(w)[0, 0]) == float(ulp(w)[0, 1]) == 2.0**-9
