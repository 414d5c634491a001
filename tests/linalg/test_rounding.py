"""The signal rank: what a fine-tuning added, seen through the rounding of the stored format."""

import numpy as np
import pytest
import torch

from eckart.errors import NonFiniteError, ShapeError
from eckart.linalg.matrices import named_generator
from eckart.linalg.rank import matrix_rank
from eckart.linalg.rounding import signal_rank, ulp

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
@pytest.mark.parametrize("strength", [5.0, 50.0])
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
