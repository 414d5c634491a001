"""Mixtures of experts: one stack in memory, one tensor for each on disk, and PEFT's parameters."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_peft import dense, logits, small_model, with_adapter, write_pair

from eckart import apply, convert, extract, lint, merge, resize, verify
from eckart.errors import CheckpointError, UsageError

pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    # of parameters PEFT says so whether they matched or not
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"),
]

PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]


def adapter_of_peft(base: Path, out: Path, seed: int, **settings) -> Path:
    """A random adapter, made and saved by PEFT."""
    from peft import LoraConfig, get_peft_model

    settings = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj"], **settings}
    model = get_peft_model(dense(base), LoraConfig(**settings, lora_dropout=0.0))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(out)
    return out


@pytest.fixture
def mixture(tmp_path):
    """A tiny Qwen3-MoE on disk."""
    small_model("qwen3-moe").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize(
    "parameters", [PARAMETERS, PARAMETERS[:1], PARAMETERS[1:2], ["layers.1.mlp.experts.down_proj"]]
)
def test_an_adapter_of_parameters_is_applied_as_peft_merges_it(parameters, mixture, tmp_path):
    """Both parameters of the experts, one of them, one layer: into the experts' own tensors."""
    adapter = adapter_of_peft(mixture, tmp_path / "adapter", 1, target_parameters=parameters)
    expected = logits(with_adapter(mixture, adapter).merge_and_unload())
    apply(adapter, mixture, tmp_path / "out")
    apply(adapter, tmp_path / "out", tmp_path / "back", subtract=True, other_base=True)
    back, first = (load_file(f / "model.safetensors") for f in (tmp_path / "back", mixture))

    assert (logits(dense(tmp_path / "out")) - expected).norm() < 1e-5 * expected.norm()
    assert all(check.held for check in verify(tmp_path / "out", adapter, base=mixture))
    assert back.keys() == first.keys()
    assert all(torch.allclose(back[name], first[name], atol=1e-6) for name in first)


def test_a_sum_of_mixtures_adapters_is_the_exact_sum(mixture, tmp_path):
    """Two adapters, of unequal ranks and scales: merged at error 0 and applied, or one by one."""
    one = adapter_of_peft(mixture, tmp_path / "one", 1, target_parameters=PARAMETERS)
    other = adapter_of_peft(
        mixture, tmp_path / "two", 2, target_parameters=PARAMETERS, r=2, use_rslora=True
    )
    certificate = merge([one, other], tmp_path / "sum", weights=[1.0, -0.5], error=0)
    apply(tmp_path / "sum", mixture, tmp_path / "at-once")
    with_both = with_adapter(mixture, tmp_path / "sum")
    ranks = {row.rank for row in certificate.matrices if "experts" in row.name}
    expected = dense(mixture)
    with torch.no_grad():
        for folder, weight in ((one, 1.0), (other, -0.5)):
            added, base = (
                model.state_dict()
                for model in (with_adapter(mixture, folder).merge_and_unload(), dense(mixture))
            )
            for name, parameter in expected.named_parameters():
                parameter.add_(weight * (added[name] - base[name]))
    size = (logits(expected) - logits(dense(mixture))).norm()

    assert ranks == {5}
    assert (logits(dense(tmp_path / "at-once")) - logits(expected)).norm() < 1e-4 * size
    assert (logits(with_both) - logits(expected)).norm() < 1e-4 * size
    assert all(check.held for check in verify(tmp_path / "sum", [one, other]))


def test_a_resized_mixtures_adapter_has_the_best_products_of_its_rank(mixture, tmp_path):
    """Each expert's, as one rank holds for all; and PEFT loads it."""
    adapter = adapter_of_peft(mixture, tmp_path / "adapter", 1, target_parameters=PARAMETERS)
    certificate = resize(adapter, tmp_path / "out", rank=2)
    model = with_adapter(mixture, tmp_path / "out")
    given = with_adapter(mixture, adapter)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    row = next(row for row in certificate.matrices if row.name == name)
    module = "base_model.model.model.layers.0.mlp.experts.base_layer"
    found, exact = (
        one.get_submodule(module).get_delta_weight("default").double() for one in (model, given)
    )
    best = torch.linalg.svdvals(exact)[:, 2:].square().sum().sqrt() / exact.norm()

    assert abs((found - exact).norm() / exact.norm() - best) < 1e-6
    assert abs(row.relative_error - best) < 1e-6
    assert (row.rank, row.shape) == (2, (4, 48, 32))


def test_experts_of_an_unknown_parameter_are_refused(mixture, tmp_path):
    """Which of them a factor is for is never guessed."""
    adapter = adapter_of_peft(mixture, tmp_path / "adapter", 1, target_parameters=PARAMETERS)
    path = adapter / "adapter_config.json"
    document = {**json.loads(path.read_text()), "target_parameters": ["mlp.gate.weight"]}
    path.write_text(json.dumps(document))

    with pytest.raises(CheckpointError, match="its configuration does not tell"):
        apply(adapter, mixture, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_stack_for_another_number_of_experts_is_refused(mixture, tmp_path):
    """Four experts and an adapter for three."""
    adapter = adapter_of_peft(mixture, tmp_path / "adapter", 1, target_parameters=PARAMETERS)
    weights = load_file(mixture / "model.safetensors")
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    from safetensors.torch import save_file

    kept = {name: W.clone() for name, W in weights.items() if ".experts.3." not in name}
    save_file(kept, fewer / "model.safetensors")

    with pytest.raises(CheckpointError, match="adapter for another model"):
        apply(adapter, fewer, tmp_path / "out")


@pytest.mark.parametrize("kind", ["qwen3-moe", "mixtral"])
def test_every_changed_number_of_a_mixture_is_accounted_for(kind, tmp_path):
    """Where other tools drop three quarters of the change without a word, nothing is lost."""
    tuned, base = write_pair(kind, tmp_path, ("proj", "gate.weight"))
    certificate = extract(tuned, base, tmp_path / "out", rank=2)
    names = {row.name for row in certificate.matrices}
    change = certificate.change

    assert certificate.lost == []
    assert {f"model.layers.{i}.{X}" for i in (0, 1) for X in PARAMETERS} <= names
    assert change is not None
    assert change.relative_error < 1e-5
    assert all(check.held for check in verify(tmp_path / "out", tuned, base=base))


def test_an_adapter_of_a_mixture_is_converted_for_peft_and_refused_by_the_others(mixture, tmp_path):
    """Stacked factors with their scale in B, the same logits; elsewhere there is no place."""
    adapter = adapter_of_peft(mixture, tmp_path / "adapter", 1, target_parameters=PARAMETERS)
    certificate = convert(adapter, tmp_path / "out", consumer="peft")
    expected = logits(with_adapter(mixture, adapter))
    fits = {fit.consumer: fit for fit in lint(adapter)}

    assert (logits(with_adapter(mixture, tmp_path / "out")) - expected).norm() < 1e-5
    assert 0 < max(row.relative_error for row in certificate.matrices) < 1e-7
    assert all(check.held for check in verify(tmp_path / "out", adapter))
    assert [name for name, fit in fits.items() if fit.loads] == ["peft"]
    assert "routed experts, and vLLM holds none" in fits["vllm"].detail
    for consumer in ("vllm", "llama.cpp"):
        with pytest.raises(UsageError, match="routed experts"):
            convert(adapter, tmp_path / consumer, consumer=consumer)


def test_experts_and_routers_are_lost_for_who_cannot_hold_them(tmp_path):
    """Extracted for vLLM: attention is there, and what is not stands in the certificate."""
    tuned, base = write_pair("qwen3-moe", tmp_path, ("proj", "gate"))
    options = {"rank": 4, "consumer": "vllm", "accept_loss": True}
    certificate = extract(tuned, base, tmp_path / "out", **options)
    lost = {row.name: row.reason for row in certificate.lost}

    assert all("attn" in row.name for row in certificate.matrices)
    assert {"routed experts, and vLLM holds none: another --for"} == {
        why for name, why in lost.items() if "experts" in name
    }
    assert any("a router of experts, and vLLM holds none" in why for why in lost.values())
    assert all(check.held for check in verify(tmp_path / "out", tuned, base=base))
