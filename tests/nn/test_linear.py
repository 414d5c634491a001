"""Factored layers: they compute the product, train, and save under the names of format 1."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

from eckart.errors import InputError, NonFiniteError, RankError, UsageError
from eckart.linalg.factors import factorize, pivot
from eckart.nn import LowRankLinear, PivotedLinear

LAYERS = [LowRankLinear, PivotedLinear]


def _linear(n=7, m=12, *, bias=True, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    layer = nn.utils.skip_init(nn.Linear, n, m, bias=bias, dtype=dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layer


def _input(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def _best(layer, rank):
    """Wx + b with the best rank-r W, in float64 by torch's own SVD."""
    U, s, Vh = torch.linalg.svd(layer.weight.detach().double(), full_matrices=False)
    return (U[:, :rank] * s[:rank]) @ Vh[:rank]


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [1, 3, 7])
def test_layer_computes_the_best_product_of_its_rank(kind, bias, rank):
    """from_linear gives W_r x + b for any leading dimensions."""
    layer = _linear(bias=bias)
    short = kind.from_linear(layer, rank=rank)
    x = _input(2, 5, 7)
    expected = x.double() @ _best(layer, rank).mT
    expected = expected + layer.bias.double() if bias else expected

    assert short.rank == rank
    assert torch.allclose(short(x).double(), expected, atol=1e-4)
    assert short(x[0, 0]).shape == (12,)
    assert short(x[:0]).shape == (0, 5, 12)


@pytest.mark.parametrize("kind", LAYERS)
def test_output_is_that_of_the_layers_own_factors(kind):
    """The factors it gives away are those it computes with, and share its memory."""
    short = kind.from_linear(_linear(bias=False), rank=3)
    factors, x = short.factors(), _input(4, 7)

    assert torch.allclose(short(x), x @ factors.product().mT, atol=1e-5)
    assert torch.allclose(short(x), factors.apply(x), atol=1e-5)
    assert factors.A.data_ptr() == short.A.weight.data_ptr()


@pytest.mark.parametrize("kind", LAYERS)
def test_layer_keeps_the_dtype_of_the_original(kind, dtype):
    """Parameters and output have the dtype of the linear layer."""
    short = kind.from_linear(_linear(dtype=dtype), rank=3)

    assert {p.dtype for p in short.parameters()} == {dtype}
    assert short(_input(2, 7, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(("request_", "rank"), [({"energy": 0.7}, 2), ({"error": 0.5}, 2)])
def test_energy_and_error_choose_the_rank(kind, request_, rank):
    """σ = 4, 3, 2, 1: 70 % of the energy, or half of the norm, takes two."""
    layer = nn.Linear(4, 4)
    with torch.no_grad():
        layer.weight.copy_(torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0])))

    assert kind.from_linear(layer, **request_).rank == rank


def test_state_of_a_low_rank_layer_has_the_names_of_format_1():
    """A.weight is r×n, B.weight m×r, and the bias belongs to B."""
    state = LowRankLinear.from_linear(_linear(), rank=3).state_dict()

    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        "A.weight": (3, 7),
        "B.weight": (12, 3),
        "B.bias": (12,),
        "weight": (0,),
    }
    assert set(LowRankLinear(7, 12, 3, bias=False).state_dict()) == {
        "A.weight",
        "B.weight",
        "weight",
    }


def test_state_of_a_pivoted_layer_has_the_names_of_format_1():
    """A.weight is r×n, K.weight (m−r)×r, perm has m integers, and the bias is the layer's own."""
    state = PivotedLinear.from_linear(_linear(), rank=3).state_dict()

    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        "A.weight": (3, 7),
        "K.weight": (9, 3),
        "perm": (12,),
        "bias": (12,),
        "weight": (0,),
    }
    assert state["perm"].dtype == torch.int64
    assert set(PivotedLinear(7, 12, 3, bias=False).state_dict()) == {
        "A.weight",
        "K.weight",
        "perm",
        "weight",
    }


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("bias", [True, False])
def test_state_loads_strictly_into_a_fresh_layer(kind, bias):
    """Saved and loaded into an empty layer, the outputs are equal to the bit."""
    trained = kind.from_linear(_linear(bias=bias), rank=3)
    file = io.BytesIO()
    torch.save(trained.state_dict(), file)
    file.seek(0)
    fresh = kind(7, 12, 3, bias=bias)
    fresh.load_state_dict(torch.load(file, weights_only=True), strict=True)
    x = _input(4, 7)

    assert torch.equal(fresh(x), trained(x))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_layer_can_be_copied_and_pickled(kind, clone):
    """A copy computes the same and shares no memory."""
    layer = kind.from_linear(_linear(), rank=3)
    twin, x = clone(layer), _input(4, 7)
    before = layer(x)
    with torch.no_grad():
        twin.A.weight.zero_()

    assert torch.equal(clone(layer)(x), before)
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("kind", LAYERS)
def test_training_lowers_the_loss_and_moves_every_parameter(kind):
    """Twenty steps towards another layer lower the loss; the original is untouched."""
    layer, target = _linear(), _linear(seed=5)
    short, x = kind.from_linear(layer, rank=3), _input(64, 7)
    goal, before = target(x).detach(), copy.deepcopy(layer.state_dict())
    start = {name: p.detach().clone() for name, p in short.named_parameters()}
    losses = []
    for _ in range(20):
        loss = (short(x) - goal).square().mean()
        gradients = torch.autograd.grad(loss, list(short.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(short.parameters(), gradients, strict=True):
                parameter.sub_(0.05 * gradient)
        losses.append(loss.item())

    assert losses[-1] < 0.7 * losses[0]
    assert all(not torch.equal(p, start[name]) for name, p in short.named_parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())


def test_permutation_is_fixed_and_saved():
    """perm is a buffer: no optimizer sees it, a cast leaves it whole numbers, a move takes it."""
    short = PivotedLinear.from_linear(_linear(), rank=3)
    perm = short.perm.clone()

    assert "perm" not in dict(short.named_parameters())
    assert "perm" in dict(short.named_buffers())
    assert sorted(perm.tolist()) == list(range(12))
    assert torch.equal(short.half().perm, perm)


@pytest.mark.parametrize("kind", LAYERS)
def test_original_and_factors_are_not_shared(kind):
    """Changing the new layer changes neither the old one nor the factors it was made from."""
    layer = _linear()
    factors = factorize(layer.weight, rank=3)
    factors = pivot(factors) if kind is PivotedLinear else factors
    before, bias = factors.product(), layer.bias.detach().clone()
    short = kind.from_factors(factors, layer.bias)
    with torch.no_grad():
        for parameter in short.parameters():
            parameter.zero_()

    assert torch.equal(factors.product(), before)
    assert torch.equal(layer.bias, bias)


@pytest.mark.parametrize("kind", LAYERS)
def test_parameters_are_contiguous_and_trainable(kind):
    """Every parameter can be saved as it lies in memory, and wants a gradient."""
    short = kind.from_linear(_linear(), rank=3)

    assert all(p.is_contiguous() and p.requires_grad for p in short.parameters())
    assert all(isinstance(p, nn.Parameter) and p.device.type == "cpu" for p in short.parameters())


@pytest.mark.parametrize("kind", LAYERS)
def test_bias_of_another_dtype_is_cast(kind):
    """A float32 bias beside half-precision factors becomes half precision."""
    factors = factorize(_linear().weight, rank=3).to(torch.bfloat16)
    factors = pivot(factors) if kind is PivotedLinear else factors
    short = kind.from_factors(factors, torch.ones(12, requires_grad=True))

    assert {p.dtype for p in short.parameters()} == {torch.bfloat16}
    assert short(_input(2, 7, dtype=torch.bfloat16)).shape == (2, 12)


@pytest.mark.parametrize(("n", "m"), [(7, 12), (12, 7), (5, 5), (1, 4), (4, 1)])
def test_pivoted_layer_exists_at_full_rank(n, m):
    """At rank min(m, n), where K may have no rows, the layer still computes Wx + b."""
    layer = _linear(n, m)
    short = PivotedLinear.from_linear(layer, rank=min(m, n))
    x = _input(3, n)

    assert torch.allclose(short(x), layer(x), atol=1e-4)
    assert PivotedLinear(n, m, min(m, n))(x).shape == (3, m)


@pytest.mark.parametrize("kind", LAYERS)
def test_fresh_layer_computes_something_finite(kind):
    """A layer made from sizes is initialized as nn.Linear is, and pivots in order."""
    layer = kind(7, 12, 3)

    assert bool(torch.isfinite(layer(_input(4, 7))).all())


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("rank", [0, -1, 8])
def test_rank_out_of_range_is_refused(kind, rank):
    """A rank below 1 or above min(m, n) is refused on both ways to a layer."""
    with pytest.raises(RankError, match=rf"rank {rank} .*choose 1 to 7"):
        kind(7, 12, rank)
    with pytest.raises(RankError, match=rf"rank {rank} .*the layer.*choose 1 to 7"):
        kind.from_linear(_linear(), rank=rank)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("other", [nn.Conv1d(3, 4, 1), nn.Embedding(3, 4), nn.ReLU()])
def test_only_a_linear_layer_is_taken(kind, other):
    """Anything else is refused with its type and the way out."""
    with pytest.raises(InputError, match=f"nn.Linear, not a {type(other).__name__}.*from_factors"):
        kind.from_linear(other, rank=1)


@pytest.mark.parametrize("kind", LAYERS)
def test_exactly_one_request_is_needed(kind):
    """No rank, energy or error, or two of them, is a usage error."""
    with pytest.raises(UsageError):
        kind.from_linear(_linear())
    with pytest.raises(UsageError):
        kind.from_linear(_linear(), rank=1, energy=0.5)


@pytest.mark.parametrize("kind", LAYERS)
def test_non_finite_weight_is_refused(kind):
    """A NaN weight has no factored layer."""
    layer = _linear()
    with torch.no_grad():
        layer.weight[2, 3] = math.nan

    with pytest.raises(NonFiniteError, match=r"the layer holds 1 .*at \[2, 3\]"):
        kind.from_linear(layer, rank=2)


@pytest.mark.parametrize("kind", LAYERS)
def test_repr_shows_sizes_and_rank(kind):
    """The printed layer tells in, out and rank."""
    assert "7 → 12, rank=3" in repr(kind(7, 12, 3))


@pytest.mark.parametrize("kind", LAYERS)
def test_layer_runs_inside_a_model(kind):
    """In place of a linear layer of a Sequential it saves, loads and runs with the rest."""
    model = nn.Sequential(_linear(7, 12), nn.ReLU(), _linear(12, 5))
    model[0] = kind.from_linear(model[0], rank=3)
    twin = nn.Sequential(kind(7, 12, 3), nn.ReLU(), nn.Linear(12, 5))
    twin.load_state_dict(model.state_dict())
    x = _input(4, 7)

    assert torch.equal(model(x), twin(x))


@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_are_those_of_the_product(kind):
    """By finite differences, of the input, of both factors and of the bias."""
    layer = kind.from_linear(_linear(5, 6, dtype=torch.float64), rank=2)
    x = _input(3, 5, dtype=torch.float64).requires_grad_()
    parameters = dict(layer.named_parameters())

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *parameters.values()))
