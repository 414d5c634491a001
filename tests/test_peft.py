"""What we write loads in PEFT, and what PEFT writes is applied as PEFT applies it."""

from pathlib import Path

import pytest
import torch
from architectures import ADAPTED
from safetensors.torch import load_file, save_file

from eckart import apply, convert, extract, verify
from eckart.errors import CheckpointError, InputError, LossError

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
        case "tied":
            config = transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True)
            return transformers.LlamaForCausalLM(config)
        case _:
            return ADAPTED[kind]()


def write_pair(kind: str, tmp_path: Path, changed: tuple[str, ...], rank: int = 2):
    """A base, and the same with a change of low rank, or a full one of vectors."""
    model = small_model(kind)
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    model.save_pretrained(base)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not any(part in name for part in changed) or name.endswith("_bias"):
                continue
            if parameter.ndim in (2, 3):
                *stack, m, n = parameter.shape
                sides = (*stack, m, rank), (*stack, rank, n)
                B, A = (torch.randn(*side, generator=generator) for side in sides)
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
    "tied whole": (("proj", "embed_tokens"), {"store_whole": ["embeddings"]}),
    "qwen3-moe": (("proj", "gate.weight"), {}),
    "qwen3-moe one parameter": (("layers.0.mlp.experts.gate_up_proj",), {}),
    "mixtral": (("proj", "gate.weight", "lm_head"), {}),
    "mixtral norms": (("down_proj", "norm"), {"store_whole": ["norms"]}),
    "deepseek": (("proj", "gate.weight"), {}),
    "granite-moe": (("proj", "router"), {}),
    "gpt-oss": (("_proj.weight", "experts.gate_up_proj", "experts.down_proj"), {}),
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
    save_file({"ids": IDS}, tmp_path / "tokens.safetensors")
    for checks in (
        verify(out, tuned, base=base, tokens=tmp_path / "tokens.safetensors"),
        verify(tmp_path / "applied", out, base=base, tokens=tmp_path / "tokens.safetensors"),
    ):
        assert all(check.held for check in checks)
        assert figures_of(checks, "logits")["relative_logit_error"] < 1e-4


def figures_of(checks, name: str) -> dict[str, float]:
    (found,) = (check.figures for check in checks if check.name == name)
    return dict(found)


def test_added_tokens_are_refused_by_name_or_stored_whole(tmp_path):
    """Four rows more than the base: named with the remedy; whole, it loads on a resized base."""
    model = small_model("llama")
    model.save_pretrained(tmp_path / "base")
    model.resize_token_embeddings(54, mean_resizing=False)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.add_(0.1)
    model.save_pretrained(tmp_path / "tuned")
    pair = tmp_path / "tuned", tmp_path / "base"
    with pytest.raises(LossError) as refused:
        extract(*pair, tmp_path / "adapter", rank=2)
    extract(*pair, tmp_path / "adapter", rank=2, store_whole=["embeddings"])
    apply(tmp_path / "adapter", pair[1], tmp_path / "applied")
    base = dense(pair[1])
    base.resize_token_embeddings(54, mean_resizing=False)
    from peft import PeftModel

    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    expected = dense(pair[0])(IDS + 4).logits

    notes = " ".join(refused.value.__notes__)
    assert "model.embed_tokens.weight: has rows that the base has not" in notes
    assert "lm_head.weight: has rows that the base has not" in notes
    assert torch.allclose(loaded(IDS + 4).logits, expected, atol=1e-5)
    assert torch.allclose(dense(tmp_path / "applied")(IDS + 4).logits, expected, atol=1e-5)
    assert dense(tmp_path / "applied").config.vocab_size == 54
    assert all(c.held for c in verify(tmp_path / "adapter", pair[0], base=pair[1]))
    assert all(c.held for c in verify(tmp_path / "applied", tmp_path / "adapter", base=pair[1]))


@pytest.mark.parametrize("old", ["tuned", "base", "both"])
def test_a_vision_language_pair_of_two_generations_of_names_loads_in_peft(old, tmp_path):
    """`language_model.model.…` of once and `model.language_model.…` of now are the same tensors."""
    t = transformers
    vision = {"image_size": 16, "patch_size": 8, "num_hidden_layers": 1, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = t.LlavaForConditionalGeneration(
        t.LlavaConfig(
            vision_config=t.CLIPVisionConfig(hidden_size=32, intermediate_size=48, **vision),
            text_config=t.LlamaConfig(**LLAMA, tie_word_embeddings=False),
            image_token_index=49,
        )
    )
    folders = {}
    for name in ("base", "tuned"):
        if name == "tuned":
            with torch.no_grad():
                for module in (
                    model.model.language_model.layers[0].self_attn.q_proj,
                    model.lm_head,
                ):
                    module.weight.add_(0.1 * torch.randn(len(module.weight), 1))
        model.save_pretrained(tmp_path / name)
        folders[name] = tmp_path / name
        if old in (name, "both"):
            weights = load_file(tmp_path / name / "model.safetensors")
            save_file(
                {_as_once(X): W for X, W in weights.items()}, tmp_path / name / "model.safetensors"
            )
    certificate = extract(folders["tuned"], folders["base"], tmp_path / "out", rank=1)
    apply(tmp_path / "out", folders["base"], tmp_path / "applied")
    from peft import PeftModel

    def load(folder):
        return t.LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()

    ids = IDS % 40
    with torch.no_grad():
        expected = load(folders["tuned"])(ids).logits
        beside = PeftModel.from_pretrained(load(folders["base"]), tmp_path / "out")(ids).logits
        applied = load(tmp_path / "applied")(ids).logits

    assert len(certificate.matrices) == 2
    assert torch.allclose(beside, expected, atol=1e-5)
    assert torch.allclose(applied, expected, atol=1e-5)
    assert all(c.held for c in verify(tmp_path / "out", folders["tuned"], base=folders["base"]))


def _as_once(name: str) -> str:
    name = name.replace("model.language_model.", "language_model.model.", 1)
    name = name.replace("model.vision_tower.", "vision_tower.vision_model.", 1)
    name = name.replace("model.multi_modal_projector.", "multi_modal_projector.", 1)
    return f"language_model.{name}" if name.startswith("lm_head.") else name


def test_a_model_in_8_bit_floats_is_dequantized(tmp_path):
    """Blocks and scales, as DeepSeek stores them: the adapter is that of the dequantized pair."""
    tuned, base = write_pair("llama", tmp_path, ("proj",))
    for folder in (tuned, base):
        weights = load_file(folder / "model.safetensors")
        for name in [name for name in weights if "proj" in name]:
            W = weights[name]
            scale = W.abs().max() / 400
            weights[name] = (W / scale).to(torch.float8_e4m3fn)
            weights[f"{name}_scale_inv"] = scale.reshape(1, 1)
        save_file(weights, folder / "model.safetensors")
    certificate = extract(tuned, base, tmp_path / "out", energy=0.9)
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    with pytest.raises(InputError, match="stored in 8-bit floats, whose rounding"):
        extract(tuned, base, tmp_path / "auto", rank="auto")
    with pytest.raises(CheckpointError, match="8-bit floats"):
        apply(tmp_path / "out", base, tmp_path / "applied")

    assert {W.dtype for W in written.values()} == {torch.bfloat16}
    assert len(certificate.matrices) == 14
    assert all(row.relative_error < 0.32 for row in certificate.matrices)
    assert all(check.held for check in verify(tmp_path / "out", tuned, base=base))


@pytest.mark.parametrize("consumer", ["vllm", "llama.cpp"])
@pytest.mark.parametrize("case", ["llama", "llama head", "llama embedding"])
def test_an_adapter_padded_for_others_is_the_tuned_model_in_peft_too(case, consumer, tmp_path):
    """Ranks that differ become one, with zeros: the logits stay what the compact adapter gives."""
    changed, _ = CASES[case]
    tuned, base = write_pair("llama", tmp_path, changed, rank=6)
    extract(tuned, base, tmp_path / "compact", error=0.3)
    extract(tuned, base, tmp_path / "made", error=0.3, consumer=consumer)
    convert(tmp_path / "compact", tmp_path / "padded", consumer=consumer)
    compact, before = with_adapter(base, tmp_path / "compact"), logits(dense(base))
    expected = logits(compact)
    ranks = {len(p) for name, p in compact.named_parameters() if "lora_A" in name}

    assert len(ranks) > 1
    for out in (tmp_path / "made", tmp_path / "padded"):
        model = with_adapter(base, out)
        found = {len(p) for name, p in model.named_parameters() if "lora_A" in name}
        assert found == {max(ranks)}
        assert (logits(model) - expected).norm() < 1e-5 * (expected - before).norm()


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
