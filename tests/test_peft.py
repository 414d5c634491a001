"""What we write loads in PEFT, and what PEFT writes is applied as PEFT applies it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from eckart import apply, extract, verify
from eckart.errors import CheckpointError, InputError

pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]

IDS = torch.arange(24).reshape(2, 12) % 50

LLAMA = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def small_model(kind: str):
    """A tiny model of a family, always the same one."""
    torch.manual_seed(0)
    match kind:
        case "llama":
            config = transformers.LlamaConfig(**LLAMA, tie_word_embeddings=False)
            return transformers.LlamaForCausalLM(config)
        case "qwen2":
            config = transformers.Qwen2Config(**LLAMA, tie_word_embeddings=False)
            return transformers.Qwen2ForCausalLM(config)
        case "gpt2":
            config = transformers.GPT2Config(
                vocab_size=50, n_positions=64, n_embd=32, n_layer=2, n_head=4
            )
            return transformers.GPT2LMHeadModel(config)
    raise AssertionError(kind)


def write_pair(kind: str, tmp_path: Path, changed: tuple[str, ...], rank: int = 2):
    """A base, and the same with a change of low rank, or a full one of vectors."""
    model = small_model(kind)
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    model.save_pretrained(base)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not any(part in name for part in changed):
                continue
            if parameter.ndim == 2:
                m, n = parameter.shape
                B, A = (torch.randn(*s, generator=generator) for s in ((m, rank), (rank, n)))
                parameter.add_(0.05 * B @ A)
            else:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(tuned)
    return tuned, base


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits.double()


def dense(folder: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def with_adapter(base: Path, adapter: Path):
    from peft import PeftModel

    return PeftModel.from_pretrained(dense(base), adapter)


CASES = {
    "llama": (("proj",), {}),
    "llama head": (("proj", "lm_head"), {}),
    "llama embedding": (("proj", "embed_tokens"), {}),
    "llama whole embedding": (("proj", "embed_tokens"), {"store_whole": ["embeddings"]}),
    "llama norms": (("proj", "norm"), {"store_whole": ["norms"]}),
    "qwen2 biases": (("proj",), {"store_whole": ["biases"]}),
    "qwen2 one weight": (("layers.0.mlp.up_proj", "bias"), {"store_whole": ["biases"]}),
    "gpt2": (("c_attn", "c_proj", "c_fc"), {"store_whole": ["biases"]}),
    "gpt2 norms": (("c_attn", "ln_"), {"store_whole": ["biases", "norms"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_an_extracted_adapter_is_the_tuned_model_in_peft(case, tmp_path, recwarn):
    """The same logits through base + adapter, merged too, and through our own `apply`."""
    changed, options = CASES[case]
    tuned, base = write_pair(case.split()[0], tmp_path, changed)
    out = tmp_path / "adapter"
    extract(tuned, base, out, rank=2, **options)
    apply(out, base, tmp_path / "applied")
    expected, before = logits(dense(tuned)), logits(dense(base))
    model = with_adapter(base, out)
    beside = logits(model)
    merged = logits(model.merge_and_unload())
    ours = logits(dense(tmp_path / "applied"))

    assert (expected - before).norm() > 0.01 * expected.norm()
    for found in (beside, merged, ours):
        assert (found - expected).norm() < 1e-4 * (expected - before).norm()
    assert not [w for w in recwarn if "missing" in str(w.message).lower()]
    assert all(check.held for check in verify(out, tuned, base=base))
    assert all(check.held for check in verify(tmp_path / "applied", out, base=base))


def test_true_ranks_and_patterns_are_read_by_peft(tmp_path):
    """Modules of different ranks: each has its own in PEFT, and a scale of one."""
    tuned, base = write_pair("llama", tmp_path, ("proj",), rank=6)
    out = tmp_path / "adapter"
    certificate = extract(tuned, base, out, keep=0.35)
    model = with_adapter(base, out)
    ranks = {X: entry.rank for X, entry in certificate.factored.items()}

    assert len(set(ranks.values())) > 1
    for X, rank in ranks.items():
        module = model.get_submodule(f"base_model.model.{X}")
        assert module.r["default"] == rank
        assert module.scaling["default"] == 1.0
    shift = (logits(dense(tuned)) - logits(dense(base))).norm()
    assert (logits(model) - logits(dense(tuned))).norm() < 0.9 * shift


def test_a_module_that_did_not_change_has_no_lora_in_peft(tmp_path):
    """Names are given in full: layer 0 stays a plain layer."""
    tuned, base = write_pair("llama", tmp_path, ("layers.1.self_attn.q_proj",))
    extract(tuned, base, tmp_path / "adapter", rank=2)
    model = with_adapter(base, tmp_path / "adapter")
    names = [name for name, _ in model.named_modules() if name.endswith("lora_A")]

    assert names == ["base_model.model.model.layers.1.self_attn.q_proj.lora_A"]


PEFT_CONFIGS = {
    "alpha": {"lora_alpha": 3},
    "rslora": {"lora_alpha": 3, "use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"layers.1.mlp.up_proj": 7}},
    "embedding": {"target_modules": ["embed_tokens", "v_proj"]},
    "whole": {"modules_to_save": ["norm"]},
}


@pytest.mark.parametrize("case", PEFT_CONFIGS)
def test_an_adapter_of_peft_is_applied_as_peft_merges_it(case, tmp_path):
    """Scales, patterns, rsLoRA, embeddings and whole modules; taken out again it is the base."""
    from peft import LoraConfig, get_peft_model

    model = small_model("llama")
    model.register_buffer("steps", torch.tensor(2.5))  # a scalar, as many models have one
    model.save_pretrained(tmp_path / "base")
    settings = {"r": 4, "target_modules": ["q_proj", "up_proj"], **PEFT_CONFIGS[case]}
    tuned = get_peft_model(model, LoraConfig(**settings))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    tuned.save_pretrained(tmp_path / "adapter")
    expected = logits(tuned)
    apply(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")

    assert (logits(dense(tmp_path / "out")) - expected).norm() < 1e-5 * expected.norm()
    if case == "whole":
        with pytest.raises(CheckpointError, match="cannot be taken out"):
            apply(tmp_path / "adapter", tmp_path / "out", tmp_path / "back", subtract=True)
    else:
        apply(tmp_path / "adapter", tmp_path / "out", tmp_path / "back", subtract=True)
        back, base = (load_file(tmp_path / name / "model.safetensors") for name in ("back", "base"))
        for name, tensor in base.items():
            assert torch.allclose(back[name], tensor, atol=1e-6), name


def test_dora_and_unknown_fields_are_refused_by_name(tmp_path):
    """Exit 3: what is not understood is never passed over."""
    from peft import LoraConfig, get_peft_model

    model = small_model("llama")
    model.save_pretrained(tmp_path / "base")
    get_peft_model(model, LoraConfig(use_dora=True, target_modules=["q_proj"])).save_pretrained(
        tmp_path / "adapter"
    )

    with pytest.raises(CheckpointError, match="use_dora = True"):
        apply(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_for_another_model_is_refused(tmp_path):
    """By the tensor that is not there, or has other sides."""
    tuned, base = write_pair("llama", tmp_path / "a", ("proj",))
    extract(tuned, base, tmp_path / "adapter", rank=2)
    _, other = write_pair("gpt2", tmp_path / "b", ("c_attn",))
    weights = load_file(base / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    crooked = tmp_path / "crooked"
    crooked.mkdir()
    save_file({**weights, name: weights[name][:-1].clone()}, crooked / "model.safetensors")
    nudged = tmp_path / "nudged"
    nudged.mkdir()
    save_file(
        {**weights, "model.norm.weight": weights["model.norm.weight"] + 1},
        nudged / "model.safetensors",
    )

    with pytest.raises(CheckpointError, match="another model"):
        apply(tmp_path / "adapter", other, tmp_path / "out")
    with pytest.raises(CheckpointError, match="31, 32"):
        apply(tmp_path / "adapter", crooked, tmp_path / "out")
    with pytest.raises(InputError, match="extracted from another base"):
        apply(tmp_path / "adapter", nudged, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    apply(tmp_path / "adapter", nudged, tmp_path / "out", other_base=True)


def test_an_addition_that_rounding_swallows_is_remarked_upon(tmp_path):
    """bfloat16 weights, and a thousandth of an ulp: the certificate and stderr say so."""
    import json

    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for folder in (base, adapter):
        folder.mkdir()
    save_file({"q.weight": torch.ones(8, 8).bfloat16()}, base / "model.safetensors")
    parts = {f"base_model.model.q.lora_{p}.weight": torch.full((1, 8), 1e-3) for p in "A"}
    parts["base_model.model.q.lora_B.weight"] = torch.full((8, 1), 1e-3)
    save_file(parts, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    certificate = apply(adapter, base, tmp_path / "out")

    assert certificate.matrices[0].relative_error > 0.9
    assert "took more than a tenth" in certificate.remarks[0]
