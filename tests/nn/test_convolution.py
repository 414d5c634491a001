"""Factored convolutions: they compute the product, at every stride and padding."""

import pytest
import torch
from torch import nn

from eckart.errors import InputError, RankError
from eckart.linalg.factors import factorize, pivot
from eckart.nn import LowRankConv2d, PivotedConv2d

KINDS = [LowRankConv2d, PivotedConv2d]
SETTINGS = {
    "plain": {},
    "strided": {"stride": 2, "padding": 1},
    "uneven": {"stride": (1, 2), "padding": (0, 1), "dilation": (1, 2)},
    "reflecting": {"padding": "same", "padding_mode": "reflect"},
}

every_kind = pytest.mark.parametrize("kind", KINDS)


def convolution(bias: bool = True, **settings) -> nn.Conv2d:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Conv2d(3, 8, 3, bias=bias, **settings)


def factored(kind, layer: nn.Conv2d, rank: int):
    """The layer with the best factors of its rank, and their product."""
    factors = factorize(layer.weight.detach().flatten(1), rank=rank)
    new = kind(layer, rank)
    parts = {"A.weight": factors.A, "B.weight": factors.B, "B.bias": layer.bias}
    if kind is PivotedConv2d:
        turned = pivot(factors)
        parts = {
            "A.weight": turned.A,
            "K.weight": turned.K,
            "perm": turned.perm,
            "bias": layer.bias,
        }
    empty = new.state_dict()
    state = {n: p.detach().reshape(empty[n].shape) for n, p in parts.items() if p is not None}
    new.load_state_dict({**state, "weight": torch.empty(0)})
    return new, factors.product()


@every_kind
@pytest.mark.parametrize("rank", [1, 5, 8])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("bias", [True, False])
def test_layer_computes_the_convolution_with_the_product(bias, setting, rank, kind):
    """Whatever the original does in space; at full rank, where K has no rows, too."""
    layer = convolution(bias, **SETTINGS[setting])
    short, product = factored(kind, layer, rank)
    x = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        layer.weight.copy_(product.reshape(layer.weight.shape))

        assert torch.allclose(short(x), layer(x), atol=1e-5)
        assert torch.allclose(short(x[0]), layer(x[0]), atol=1e-5)
    assert short.rank == rank
    assert torch.allclose(short.factors().product(), product, atol=1e-5)


@every_kind
def test_layer_is_made_empty_of_the_original_and_draws_no_random_number(kind):
    """Dtype and device are the original's; the guard stands beside the factors."""
    state = torch.get_rng_state()
    layer = kind(nn.utils.skip_init(nn.Conv2d, 3, 8, 3, device="meta", dtype=torch.float64), 2)

    assert torch.equal(torch.get_rng_state(), state)
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    assert layer.weight.shape == (0,)


@every_kind
def test_what_has_no_factored_form_is_refused(kind):
    """Groups see different inputs; a rank above both sides is none."""
    with pytest.raises(InputError, match="2 groups"):
        kind(nn.Conv2d(4, 8, 3, groups=2), 2)
    with pytest.raises(RankError, match="choose 1 to 8"):
        kind(convolution(), 9)
