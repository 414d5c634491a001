"""The divergence of two predictions, against torch's own and its laws."""

import torch

from eckart.linalg.divergence import divergence_between


def draw(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 5, 7, generator=generator, dtype=torch.float64).log_softmax(-1)


def test_it_is_the_sum_that_torch_computes():
    """Over all rows, whatever their dimensions."""
    p, q = draw(1), draw(2)
    expected = torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True)

    assert abs(divergence_between(p, q) - float(expected)) < 1e-12


def test_it_is_zero_between_equals_and_above_it_between_others():
    """Gibbs' inequality, in either direction."""
    p, q = draw(1), draw(2)

    assert divergence_between(p, p) == 0.0
    assert divergence_between(p, q) > 0
    assert divergence_between(q, p) > 0
