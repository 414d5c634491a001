"""A checkpoint as loaders hold it: names, stacks of experts, and what only one of a pair fuses."""

import pytest
import torch
from architectures import ADAPTED
from builders import write_checkpoint

from eckart.arrangement import as_loaded, as_the_base, is_dequantized
from eckart.checkpoint.opening import open_source
from eckart.checkpoint.view import unseen


@pytest.mark.parametrize("kind", ADAPTED)
def test_a_checkpoint_is_held_as_transformers_holds_it(kind, tmp_path):
    """Every tensor by the name it has in memory, and equal; the fingerprint is the file's."""
    torch.manual_seed(0)
    model = ADAPTED[kind]()
    model.save_pretrained(tmp_path / "model")
    source = open_source(tmp_path / "model")
    view, held = as_loaded(source), model.state_dict()

    assert view.tensors.keys() <= held.keys()
    for name in view.tensors:
        assert torch.equal(view.load(name), held[name]), name
    assert view.fingerprint() == source.fingerprint()
    told = {name: view.digest(name) for name in view.tensors}
    assert view.fingerprint(told) == source.fingerprint()


@pytest.mark.parametrize(
    ("rows", "index"), [((0, 1), 0), ((1, 3), 1), ((2, 3), 2), ((0, 3), 0), ((1, 1), 0)]
)
def test_any_rows_of_a_stack_are_read_from_the_experts_that_they_lie_in(rows, index, tmp_path):
    """Whole experts, some of them, none: what is read is a slice of the stack."""
    tensors = {
        f"mlp.experts.{e}.{layer}.weight": torch.randn(4, 5)
        for e in range(3)
        for layer in ("gate_proj", "up_proj")
    }
    tensors |= {f"mlp.experts.{e}.down_proj.weight": torch.randn(5, 4) for e in range(3)}
    view = as_loaded(open_source(write_checkpoint(tmp_path / "model", tensors)))
    stack = torch.stack(
        [
            torch.cat(
                [tensors[f"mlp.experts.{e}.{layer}.weight"] for layer in ("gate_proj", "up_proj")]
            )
            for e in range(3)
        ]
    )

    assert view.tensors["mlp.experts.gate_up_proj"].shape == (3, 8, 5)
    assert torch.equal(view.load("mlp.experts.gate_up_proj", *rows), stack[slice(*rows)])
    flat = stack.reshape(-1)
    assert torch.equal(view.entries("mlp.experts.gate_up_proj", 17, 91), flat[17:91])
    assert unseen(view) == sorted(tensors)


@pytest.mark.parametrize("spoil", ["missing", "shape", "dtype", "layer"])
def test_experts_that_do_not_fit_each_other_stay_as_they_are(spoil, tmp_path):
    """One missing, of another shape or dtype, or an unknown layer: nothing is put together."""
    tensors = {
        f"mlp.experts.{e}.{layer}.weight": torch.randn(4, 4)
        for e in range(3)
        for layer in ("gate_proj", "up_proj", "down_proj")
    }
    name = "mlp.experts.1.up_proj.weight"
    W = tensors.pop(name)
    if spoil == "shape":
        tensors[name] = W[:3].clone()
    elif spoil == "dtype":
        tensors[name] = W.half()
    elif spoil == "layer":
        tensors[name], tensors["mlp.experts.1.extra.weight"] = W, W.clone()
    source = open_source(write_checkpoint(tmp_path / "model", tensors))

    assert as_loaded(source) is source


def test_names_of_before_transformers_4_52_are_those_of_now(tmp_path):
    """A Llava checkpoint as it was stored then: the language model under `model.`, its head out."""
    torch.manual_seed(0)
    model = ADAPTED["llava"]()
    held = model.state_dict()
    old = {}
    for name, tensor in held.items():
        stored = name.removeprefix("model.")
        if name.startswith("model.language_model."):
            stored = name.replace("model.language_model.", "language_model.model.")
        elif name.startswith("model.vision_tower."):
            stored = name.replace("model.vision_tower.", "vision_tower.vision_model.")
        elif name.startswith("lm_head."):
            stored = f"language_model.{name}"
        old[stored] = tensor.clone()
    view = as_loaded(open_source(write_checkpoint(tmp_path / "old", old)))

    assert view.tensors.keys() == held.keys()
    assert all(torch.equal(view.load(name), held[name]) for name in held)


def test_a_renaming_that_would_lose_a_tensor_is_not_done(tmp_path):
    """Two tensors that would get one name keep their own."""
    tensors = {
        "language_model.model.norm.weight": torch.ones(4),
        "model.language_model.norm.weight": torch.zeros(4),
    }
    source = open_source(write_checkpoint(tmp_path / "both", tensors))

    assert as_loaded(source) is source


@pytest.mark.parametrize("fused_first", [True, False])
def test_what_one_of_a_pair_fuses_is_cut_or_joined_as_its_base_has_it(fused_first, tmp_path):
    """qkv_proj and gate_up_proj against their layers, weights and biases, of unequal heights."""
    layers = {"q_proj": 8, "k_proj": 4, "v_proj": 4}
    split = {f"l.{X}.weight": torch.randn(m, 6) for X, m in layers.items()}
    split |= {f"l.{X}.bias": torch.randn(m) for X, m in layers.items()}
    split |= {f"l.{X}.weight": torch.randn(5, 6) for X in ("gate_proj", "up_proj")}
    fused = {
        "l.qkv_proj.weight": torch.cat([split[f"l.{X}.weight"] for X in layers]),
        "l.qkv_proj.bias": torch.cat([split[f"l.{X}.bias"] for X in layers]),
        "l.gate_up_proj.weight": torch.cat(
            [split["l.gate_proj.weight"], split["l.up_proj.weight"]]
        ),
    }
    ours, theirs = (fused, split) if fused_first else (split, fused)
    tuned, base = (
        open_source(write_checkpoint(tmp_path / name, tensors))
        for name, tensors in (("tuned", ours), ("base", theirs))
    )
    view = as_the_base(tuned, base)

    assert view.tensors.keys() == theirs.keys()
    assert all(torch.equal(view.load(name), theirs[name]) for name in theirs)
    assert view.fingerprint() == tuned.fingerprint()


def test_fused_layers_of_another_height_stay_as_they_are(tmp_path):
    """Rows that do not add up: nothing is cut, and the pair has little in common."""
    tuned = open_source(write_checkpoint(tmp_path / "a", {"l.qkv_proj.weight": torch.ones(9, 4)}))
    split = {f"l.{X}_proj.weight": torch.ones(4, 4) for X in "qkv"}
    base = open_source(write_checkpoint(tmp_path / "b", split))

    assert as_the_base(tuned, base) is tuned


def test_the_language_model_in_a_larger_one_is_matched_to_its_base_by_prefix(tmp_path):
    """The commonest prefix wins; what has no counterpart keeps its name."""
    base = {f"model.layers.{i}.q_proj.weight": torch.randn(6, 6) for i in range(3)}
    base["lm_head.weight"] = torch.randn(9, 6)
    tuned = {f"model.language_{name}": W + 1 for name, W in base.items() if "layers" in name}
    tuned |= {"lm_head.weight": base["lm_head.weight"]}
    tuned |= {"model.vision_tower.layers.0.q_proj.weight": torch.randn(6, 6)}
    sources = [
        open_source(write_checkpoint(tmp_path / name, tensors))
        for name, tensors in (("tuned", tuned), ("base", base))
    ]
    view = as_the_base(*sources)

    assert view.tensors.keys() == {*base, "model.vision_tower.layers.0.q_proj.weight"}
    for name, W in base.items():
        expected = W + (1 if "layers" in name else 0)
        assert torch.equal(view.load(name), expected), name


def test_a_pair_with_the_same_names_is_left_alone(tmp_path):
    """No view where none is needed."""
    folders = [write_checkpoint(tmp_path / x, {"q.weight": torch.ones(3, 3)}) for x in "ab"]
    tuned, base = map(open_source, folders)

    assert as_the_base(as_loaded(tuned), as_loaded(base)) is tuned


def test_experts_in_8_bits_are_dequantized_and_then_stacked(tmp_path):
    """As DeepSeek stores them: the stack has float32 values, and says where they are from."""
    tensors = {}
    for e in range(2):
        for layer in ("gate_proj", "up_proj", "down_proj"):
            name = f"mlp.experts.{e}.{layer}.weight"
            tensors[name] = torch.randn(4, 4).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.full((1, 1), 1.0 + e)
    source = open_source(write_checkpoint(tmp_path / "model", tensors))
    view = as_loaded(source)
    down = [tensors[f"mlp.experts.{e}.down_proj.weight"].float() * (1 + e) for e in range(2)]

    assert view.tensors.keys() == {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    assert torch.equal(view.load("mlp.experts.down_proj"), torch.stack(down))
    assert is_dequantized("mlp.experts.down_proj", view)
    assert unseen(view) == sorted(tensors)
    assert view.fingerprint() == source.fingerprint()
