"""Factored layers take the place of dense ones where they compute the same, and only there."""

import pytest
import torch
from torch import nn

from eckart.certificate import FactoredEntry
from eckart.errors import CheckpointError, UsageError
from eckart.nn import LowRankConv2d, LowRankLinear, PivotedConv2d, PivotedLinear
from eckart.surgery import factored_layer, fill_dense, peft_targets, submodule

every_form = pytest.mark.parametrize("form", ["ba", "pivoted"])


def entry(shape, form="ba", orientation="out_in", rank=3) -> FactoredEntry:
    return FactoredEntry(rank=rank, form=form, shape=shape, orientation=orientation)


class Conv1D(nn.Module):
    """As transformers has it: the weight is (in, out)."""

    def __init__(self, m: int, n: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(n, m)), nn.Parameter(torch.randn(m))


class Router(nn.Linear):
    """A linear layer that does something else."""


@every_form
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_that_are_simply_called_have_a_factored_one(dtype, bias, form):
    """Of the same sizes, dtype, device and bias."""
    linear = factored_layer(nn.Linear(6, 8, bias=bias, dtype=dtype), entry((8, 6), form))
    turned = factored_layer(Conv1D(8, 6).to(dtype), entry((6, 8), form, "in_out"))
    conv = factored_layer(nn.Conv2d(3, 8, 2, bias=bias, dtype=dtype), entry((8, 3, 2, 2), form))

    assert isinstance(linear, LowRankLinear if form == "ba" else PivotedLinear)
    assert isinstance(turned, type(linear))
    assert isinstance(conv, LowRankConv2d if form == "ba" else PivotedConv2d)
    for layer in (linear, turned, conv):
        assert layer.rank == 3
        assert layer.A.weight[0].numel() in (6, 12)
        assert {p.dtype for p in layer.parameters()} == {dtype}
    assert (linear.bias is not None) == (conv.bias is not None) == bias
    assert turned.bias is not None


KEPT = {
    "embedding": (nn.Embedding(8, 6), entry((8, 6))),
    "other sides": (nn.Linear(6, 8), entry((6, 8))),
    "other orientation": (nn.Linear(6, 6), entry((6, 6), orientation="in_out")),
    "a subclass": (Router(6, 8), entry((8, 6))),
    "attention's own": (nn.MultiheadAttention(8, 2).out_proj, entry((8, 8))),
    "groups": (nn.Conv2d(4, 8, 2, groups=2), entry((8, 2, 2, 2))),
    "no weight": (nn.ReLU(), entry((8, 6))),
}


@pytest.mark.parametrize("case", KEPT)
def test_other_layers_have_none(case):
    """They are multiplied out instead."""
    assert factored_layer(*KEPT[case]) is None


@every_form
@pytest.mark.parametrize("orientation", ["out_in", "in_out"])
def test_a_dense_layer_takes_the_product_and_the_bias_back(orientation, form):
    """Under the original's class: rounded once to the factors' dtype."""
    dense = nn.Linear(6, 8) if orientation == "out_in" else Conv1D(8, 6)
    one = entry(tuple(dense.weight.shape), form, orientation)
    layer = factored_layer(dense, one)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape))
        if form == "pivoted":
            layer.perm.copy_(torch.randperm(8))
    back = fill_dense(dense.to("meta"), layer, one)
    W = back.weight if orientation == "out_in" else back.weight.mT
    x = torch.randn(5, 6)

    assert back is dense
    assert back.weight.is_contiguous()
    assert torch.allclose(layer(x), x @ W.mT + back.bias, atol=1e-5)


def test_a_layer_that_is_not_there_is_named():
    """By the name that the checkpoint gives it."""
    with pytest.raises(CheckpointError, match=r"Sequential has no layer layers.3"):
        submodule(nn.Sequential(nn.Linear(2, 2)), "layers.3")


def test_targets_of_a_lora_are_the_thin_layers_of_a_factored_one(tmp_path):
    """PEFT adapts them, and merges them; the whole layer it refuses."""
    peft = pytest.importorskip("peft")
    model = nn.ModuleDict(
        {"q_proj": LowRankLinear(8, 8, 2), "v_proj": PivotedLinear(8, 8, 2), "up": nn.Linear(8, 8)}
    )
    targets = peft_targets(model, ["q_proj", "v_proj", "up"])

    assert targets == ["q_proj.A", "q_proj.B", "v_proj.A", "v_proj.K", "up"]
    with pytest.raises(UsageError, match="no layer k_proj"):
        peft_targets(model, ["k_proj"])
    with pytest.raises(ValueError, match=r"(?s)LowRankLinear.*not supported"):
        peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj"]), model)
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    adapted, x = peft.inject_adapter_in_model(config, model), torch.randn(3, 8)
    before = {name: layer(x) for name, layer in model.items()}
    for layer in adapted.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            layer.merge()

    assert all(torch.allclose(layer(x), before[n], atol=1e-5) for n, layer in adapted.items())
