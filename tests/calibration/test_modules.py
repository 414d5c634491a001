"""Any module, with batches and a loss of the caller's."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 as everybody calls it
from torch import Tensor, nn

from eckart.checkpoint.statistics import Statistics
from eckart.errors import InputError, UsageError
from eckart.linalg.matrices import named_generator
from eckart.statistics import calibrate_module


def gaussian(name: str, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=named_generator(5, name))


def squares(module: nn.Module, batch: Tensor) -> Tensor:
    """Half the squared norm of each output row: g is y itself."""
    return module(batch).square().flatten(1).sum(1) / 2


def close(found: Tensor | None, exact: Tensor) -> bool:
    assert found is not None
    return torch.allclose(found.double(), exact.double(), rtol=1e-4, atol=1e-5)


def second(rows: Tensor, count: int | None = None) -> Tensor:
    wide = rows.double()
    return wide.mT @ wide / (count or len(rows))


def test_a_linear_layer_is_as_the_formulas_say(tmp_path):
    """C is the mean of x xᵀ, and G of y yᵀ where the loss is ‖y‖²/2."""
    layer, x = nn.Linear(5, 3), gaussian("x", 40, 5)
    found = calibrate_module(layer, [*x.split(16)], tmp_path / "S", loss=squares)
    y = layer(x).detach()

    assert found.names == ["weight"]
    assert (found.tokens, found.document.groups["weight"].rows) == (40, 40)
    assert close(found.inputs("weight"), second(x))
    assert close(found.curvature("weight"), second(y))
    assert found.document.loss == pytest.approx(float(squares(layer, x).detach().mean()), rel=1e-5)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3},
        {"kernel_size": (3, 2), "stride": 2, "padding": 1},
        {"kernel_size": 3, "dilation": 2, "padding": "same"},
        {"kernel_size": (2, 3), "padding": "same", "groups": 2},
        {"kernel_size": 2, "groups": 2, "padding": "valid"},
        {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    ],
)
def test_a_convolution_is_a_matrix_over_patches(options, tmp_path):
    """Patches as a layer with indicator kernels picks them; in groups, each with its channels."""
    layer, x = nn.Conv2d(4, 6, bias=False, **options), gaussian("image", 3, 4, 7, 6)
    found = calibrate_module(layer, [x[:1], x[1:]], tmp_path / "S", loss=squares)
    y, groups, n = layer(x).detach(), layer.groups, layer.weight[0].numel()
    probe = nn.Conv2d(4, n * groups, bias=False, **options)
    with torch.no_grad():
        probe.weight.copy_(torch.eye(n).reshape(n, *layer.weight.shape[1:]).repeat(groups, 1, 1, 1))
        patches = probe(x).permute(0, 2, 3, 1).reshape(-1, n)

    assert found.document.matrices["weight"].shape == (6, n)
    assert close(found.inputs("weight"), second(patches))
    assert close(found.curvature("weight"), second(y.permute(0, 2, 3, 1).reshape(-1, 6), 3))


class Hand(nn.Module):
    """Products written in every way but through a layer."""

    def __init__(self, product: Any) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.weight = nn.Parameter(gaussian("W", 3, 5))
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.inner.weight)


@pytest.mark.parametrize(
    "product",
    [
        lambda x, W: x @ W.T,
        lambda x, W: x.matmul(W.mT),
        lambda x, W: torch.mm(x, W.t()),
        lambda x, W: torch.addmm(torch.ones(3), x, W.T),
        lambda x, W: F.linear(x, weight=W),
        lambda x, W: F.linear(x.reshape(2, -1, 5), W).reshape(-1, 3),
        lambda x, W: torch.matmul(input=x, other=W.transpose(0, 1)),
    ],
)
def test_a_product_counts_however_it_is_written(product, tmp_path):
    """What matters is that its second factor is the parameter."""
    module, x = Hand(product), gaussian("x", 40, 5)
    found = calibrate_module(module, [x], tmp_path / "S", loss=squares)

    assert close(found.inputs("inner.weight"), second(x))
    assert close(found.curvature("inner.weight"), second(module(x).detach()))


@pytest.mark.parametrize(
    ("product", "reason"),
    [
        (lambda x, W: torch.einsum("tn,mn->tm", x, W), "the model does not multiply by it"),
        (lambda x, W: F.linear(x, W[:2]), "the model does not multiply by it"),
        (lambda x, W: F.linear(x[:, :3], W.view(5, 3)), "the model uses it as 5×3"),
    ],
)
def test_what_takes_part_in_no_plain_product_is_left_out_and_told(product, reason, tmp_path):
    """Beside another matrix, which is calibrated."""
    module = nn.ModuleDict({"hand": Hand(product), "plain": nn.Linear(5, 3)})

    def loss(module: Any, x: Tensor) -> Tensor:
        return squares(module["plain"], x) + squares(module["hand"], x)

    found = calibrate_module(module, [gaussian("x", 40, 5)], tmp_path / "S", loss=loss)

    assert found.names == ["plain.weight"]
    assert [(r.name, r.reason) for r in found.document.left_out] == [("hand.inner.weight", reason)]


def test_a_module_that_nothing_multiplies_is_refused(tmp_path):
    """With nothing written."""
    module = Hand(lambda x, W: torch.einsum("tn,mn->tm", x, W))

    with pytest.raises(InputError, match="no matrix that this text goes through"):
        calibrate_module(module, [gaussian("x", 40, 5)], tmp_path / "S", loss=squares)
    assert [*tmp_path.iterdir()] == []


class Switch(nn.Module):
    """Two layers that share their input until a batch is small."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x if len(x) > 4 else x + 1)


def test_layers_that_stop_sharing_their_input_are_found_out(tmp_path):
    """A group is checked at every batch; nothing is summed wrongly in silence."""
    batches = [gaussian("x", 8, 5), gaussian("y", 4, 5)]

    with pytest.raises(InputError, match=r"a\.weight and b\.weight shared their input"):
        calibrate_module(Switch(), batches, tmp_path / "S", loss=squares)
    assert [*tmp_path.iterdir()] == []


def test_a_module_without_a_loss_is_only_run(tmp_path):
    """curvature='none': a batch is the module's arguments, in each of three ways."""
    layer, x = nn.Linear(5, 3), gaussian("x", 40, 5)
    found: list[Statistics] = [
        calibrate_module(layer, [batch], tmp_path / f"{i}", loss=None, curvature="none")
        for i, batch in enumerate([x, (x,), {"input": x}])
    ]

    for one in found:
        assert close(one.inputs("weight"), second(x))
        assert one.curvature("weight") is None
        assert (one.document.loss, one.tokens) == (None, 40)


def test_a_layer_that_the_loss_does_not_depend_on_has_no_curvature(tmp_path):
    """It is recorded, and a remark names it."""
    module = nn.ModuleDict({"used": nn.Linear(5, 3), "idle": nn.Linear(5, 3)})

    def loss(module: Any, x: Tensor) -> Tensor:
        module["idle"](x)
        return squares(module["used"], x)

    found = calibrate_module(module, [gaussian("x", 40, 5)], tmp_path / "S", loss=loss)

    assert found.document.matrices["idle.weight"].curvature == "none"
    assert found.document.matrices["used.weight"].curvature == "full"
    assert any("does not depend on the output of idle" in one for one in found.document.remarks)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"batches": []}, InputError, "there are no batches"),
        ({"loss": None}, InputError, "gives no logits"),
        ({"loss": lambda m, x: m(x).sum()}, InputError, "the loss of each prediction"),
        ({"loss": lambda m, x: m(x[:, :2]).flatten()}, InputError, "cannot be run on this text"),
        ({"curvature": "half"}, UsageError, "--curvature half is none of"),
        ({"include": ["nonsense"]}, UsageError, "matches no matrix"),
        ({"batches": [torch.full((4, 5), torch.nan)]}, InputError, "inputs of weight hold NaN"),
        ({"loss": lambda m, x: m(x).sum(1) * 1e30}, InputError, "gradients of weight hold NaN"),
        ({"loss": lambda m, x: m(x).sum(1) / 0}, InputError, "the loss is NaN or Inf"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_in_a_sentence(change, error, message, tmp_path):
    """And the module is as it was."""
    layer = nn.Linear(5, 3)
    given = {"batches": [gaussian("x", 8, 5)], "loss": squares} | change

    with pytest.raises(error, match=message):
        calibrate_module(layer, given.pop("batches"), tmp_path / "S", **given)
    assert [*tmp_path.iterdir()] == []
    assert layer.training
    assert layer.weight.requires_grad
