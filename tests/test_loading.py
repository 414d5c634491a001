"""`eckart.load`: through transformers, or into a module of the user's own."""

import json

import pytest
import torch
from builders import WEIGHTS, decaying, read_tensors, vector, write_checkpoint
from safetensors.torch import save_file
from torch import nn

from eckart import compress, densify, load
from eckart.errors import CheckpointError, UsageError
from eckart.nn import FactoredLayer

every_form = pytest.mark.parametrize("form", ["ba", "pivoted"])


class Net(nn.Module):
    """One layer of each kind that torch calls, an embedding tied to a head, and a buffer."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16, **options)
        self.conv = nn.Conv2d(1, 16, 4, **options)
        self.up = nn.Linear(16, 40, **options)
        self.down = nn.Linear(40, 16, bias=False, **options)
        self.head = nn.Linear(16, 20, bias=False, **options)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.tensor(3, device=options.get("device")))

    def forward(self, ids, image):
        """Looks up, adds what the image says, and widens."""
        x = self.embed(ids) + self.conv(image).mean(dim=(2, 3))[:, None]
        return self.head(x + self.down(torch.relu(self.up(x))))


IDS = torch.arange(12).reshape(2, 6)
IMAGE = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def source(tmp_path):
    """Its checkpoint: no config.json, so that no class is known."""
    tensors = {
        "embed.weight": decaying("embed", 20, 16),
        "conv.weight": decaying("conv", 16, 16).reshape(16, 1, 4, 4),
        "conv.bias": vector("conv", 16),
        "up.weight": decaying("up", 40, 16),
        "up.bias": vector("up", 40),
        "down.weight": decaying("down", 16, 40),
        "steps": torch.tensor(5),
    }
    return write_checkpoint(tmp_path / "src", tensors, config=None)


def outputs(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, IMAGE)


def written(source, tmp_path, form="ba", **options):
    compress(source, tmp_path / "out", rank=5, form=form, workers=1, **options)
    densify(tmp_path / "out", tmp_path / "dense", workers=1)
    plain = Net()
    plain.load_state_dict(read_tensors(tmp_path / "dense"), strict=False)
    return tmp_path / "out", outputs(plain)


@every_form
def test_a_checkpoint_loads_into_a_module(form, source, tmp_path):
    """Layers become factored, ties stay, buffers and dtypes are the module's."""
    out, expected = written(source, tmp_path, form, include=["up", "down"])
    net = Net()
    again = load(out, into=net)
    layers = {n for n, layer in net.named_modules() if isinstance(layer, FactoredLayer)}

    assert again is net
    assert not net.training
    assert layers == {"up", "down"}
    assert net.head.weight is net.embed.weight
    assert int(net.steps) == 5
    assert torch.allclose(outputs(net), expected, atol=1e-5)
    assert load(out, into=Net().double()).up.A.weight.dtype == torch.float64


@every_form
def test_embeddings_are_multiplied_out_and_convolutions_are_not(form, tmp_path):
    """What no factored layer can stand for, and what one can."""
    tensors = {
        "embed.weight": decaying("embed", 20, 16),
        "conv.weight": decaying("conv", 16, 32).reshape(16, 2, 4, 4),
        "conv.bias": vector("conv", 16),
    }
    source = write_checkpoint(tmp_path / "src", tensors, config=None)
    compress(source, tmp_path / "out", rank=5, form=form, include=["*"], workers=1)
    densify(tmp_path / "out", tmp_path / "dense", workers=1)
    dense = read_tensors(tmp_path / "dense")
    net = nn.ModuleDict({"embed": nn.Embedding(20, 16), "conv": nn.Conv2d(2, 16, 4)})
    load(tmp_path / "out", into=net)
    x = torch.randn(2, 2, 8, 8)

    assert isinstance(net["conv"], FactoredLayer)
    assert torch.equal(net["embed"].weight, dense["embed.weight"])
    expected = nn.functional.conv2d(x, dense["conv.weight"], dense["conv.bias"])
    assert torch.allclose(net["conv"](x), expected, atol=1e-5)


def test_a_module_on_meta_takes_the_tensors_as_they_are(source, tmp_path):
    """Without ties: those need memory to be shared."""
    out, expected = written(source, tmp_path)
    net = Net(device="meta")
    with pytest.raises(CheckpointError, match=r"has no head.weight"):
        load(out, into=net)
    net.head = nn.Identity()
    load(out, into=net)
    plain = Net()
    plain.head = nn.Identity()
    load(out, into=plain)

    assert not any(t.is_meta for t in net.state_dict().values())
    assert torch.equal(outputs(net), outputs(plain))
    assert expected.shape == (2, 6, 20)


def spoilt(source, tmp_path, change):
    out, _ = written(source, tmp_path)
    tensors = read_tensors(out)
    change(tensors)
    save_file(tensors, out / WEIGHTS)
    return out


MODULES = {
    "a layer more": (lambda net: setattr(net, "extra", nn.Linear(2, 2)), r"has no extra.weight"),
    "a layer less": (lambda net: delattr(net, "steps"), "holds steps, which the module has no"),
    "other sides": (
        lambda net: setattr(net, "down", nn.Linear(41, 16, bias=False)),
        r"down.weight is \[16, 40\] .* and \[16, 41\] in the module",
    ),
    "no such layer": (lambda net: delattr(net, "down"), "Net has no layer down"),
}


@pytest.mark.parametrize("case", MODULES)
def test_a_module_that_does_not_fit_is_left_as_it_was(case, source, tmp_path):
    """One sentence with the name and both shapes; nothing was replaced or loaded."""
    change, message = MODULES[case]
    out, _ = written(source, tmp_path)
    net = Net()
    change(net)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}

    with pytest.raises(CheckpointError, match=message):
        load(out, into=net)
    assert not any(isinstance(layer, FactoredLayer) for layer in net.modules())
    assert before.keys() == net.state_dict().keys()
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())


def test_what_cannot_be_loaded_says_what_to_give(source, tmp_path):
    """No class without a config, no dtype beside a module, no checkpoint that is not factored."""
    with pytest.raises(UsageError, match=r"has no config.json .*into="):
        load(source)
    with pytest.raises(UsageError, match="dtype is the module's own"):
        load(source, into=Net(), dtype=torch.float16)
    with pytest.raises(CheckpointError, match=r"eckart.json"):
        load(source, into=Net())
    (source / "config.json").write_text(json.dumps({"model_type": "net"}))
    with pytest.raises(CheckpointError, match="names no factored matrices"):
        load(source, into=Net())


def test_a_folder_is_loaded_by_the_class_that_it_names(tmp_path):
    """Through transformers; dtype as asked, else the checkpoint's own."""
    pytest.importorskip("transformers")
    from architectures import logits, model_of

    model_of("llama").bfloat16().save_pretrained(tmp_path / "src")
    compress(tmp_path / "src", tmp_path / "out", rank=6, workers=1)
    model, dense = load(tmp_path / "out"), load(tmp_path / "src", dtype=torch.float32)

    assert type(model).__name__ == type(dense).__name__ == "LlamaForCausalLM"
    assert (model.dtype, dense.dtype) == (torch.bfloat16, torch.float32)
    assert any(isinstance(layer, FactoredLayer) for layer in model.modules())
    assert logits(model).shape == logits(dense).shape
    config = json.loads((tmp_path / "out/config.json").read_text())
    (tmp_path / "out/config.json").write_text(json.dumps(config | {"architectures": ["NoSuch"]}))
    with pytest.raises(CheckpointError, match="NoSuch, which the installed transformers"):
        load(tmp_path / "out")
