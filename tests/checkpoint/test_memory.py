"""A module in memory is the source that its saved state would be."""

import torch
from safetensors.torch import save_file
from torch import nn

from eckart.checkpoint.memory import state_of
from eckart.checkpoint.opening import open_source


def module() -> nn.Module:
    found = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2).bfloat16())
    with torch.no_grad():
        for i, parameter in enumerate(found.parameters()):
            parameter.copy_(torch.arange(parameter.numel()).reshape(parameter.shape) + i)
    return found


def test_it_is_what_the_saved_file_is(tmp_path):
    """Names, shapes, dtypes, bytes, and so the fingerprint."""
    held = module()
    save_file(held.state_dict(), tmp_path / "model.safetensors")
    saved, source = open_source(tmp_path / "model.safetensors"), state_of(held)

    assert source.fingerprint() == saved.fingerprint()
    for name in saved.tensors:
        assert torch.equal(source.load(name), saved.load(name))
    assert torch.equal(source.load("0.weight", 1, 3), held[0].weight[1:3])
    assert (source.folder, source.files, source.name) == (None, [], "Sequential")


def test_what_is_tied_is_told(tmp_path):
    """One memory, two names."""
    held = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    held["b"].weight = held["a"].weight

    assert state_of(held).tied == {"b.weight": "a.weight"}


def test_a_transposed_parameter_is_read_in_its_own_order():
    """Row by row, whatever its strides."""
    held = nn.Linear(3, 4)
    held.weight = nn.Parameter(torch.arange(12.0).reshape(3, 4).T)

    assert torch.equal(state_of(held).load("weight"), held.weight)
