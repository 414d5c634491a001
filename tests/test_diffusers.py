"""What we write for diffusers loads there, and kohya's names are those that diffusers knows."""

from pathlib import Path

import pytest
import torch
from builders import eckart
from safetensors.torch import load_file, save_file

from eckart import convert, extract, lint, merge, resize, verify
from eckart.checkpoint.header import read_metadata
from eckart.formats import kohya

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")

WEIGHTS = "diffusion_pytorch_model.safetensors"

UNET = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
}

FLUX = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 20,
    "pooled_projection_dim": 12,
    "axes_dims_rope": (4, 4, 8),
}

CHANGED = {
    "unet": ("attn1.to_", "attn2.to_out.0", "ff.net.0.proj", "proj_in", "conv1", "time_emb_proj"),
    "transformer": ("attn.to_", "add_q_proj", "ff.net.2", "norm1.linear", "proj_mlp"),
}


def model(kind: str) -> torch.nn.Module:
    """A tiny model of a pipeline, always the same one."""
    torch.manual_seed(0)
    if kind == "unet":
        return diffusers.UNet2DConditionModel(**UNET).eval()
    return diffusers.FluxTransformer2DModel(**FLUX).eval()


def output(one: torch.nn.Module) -> torch.Tensor:
    """What it computes of inputs that are always the same."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    with torch.no_grad():
        if isinstance(one, diffusers.UNet2DConditionModel):
            return one(random(2, 4, 8, 8), 7, random(2, 3, 12)).sample.double()
        return one(
            hidden_states=random(1, 6, 4),
            encoder_hidden_states=random(1, 5, 20),
            pooled_projections=random(1, 12),
            timestep=torch.tensor([0.5]),
            img_ids=torch.zeros(6, 3),
            txt_ids=torch.zeros(5, 3),
        ).sample.double()


def write_pair(
    kind: str, folder: Path, ranks: tuple[int, ...] = (2, 3)
) -> tuple[Path, Path, torch.Tensor, torch.Tensor]:
    """A base, the same with changes of these ranks, and what both compute."""
    one = model(kind)
    one.save_pretrained(folder / "base")
    before, generator = output(one), torch.Generator().manual_seed(2)
    weights = {X: p for X, p in one.named_parameters() if X.endswith(".weight")}
    changed = [p for X, p in weights.items() if any(part in X for part in CHANGED[kind])]
    with torch.no_grad():
        for number, parameter in enumerate(changed):
            m, n, rank = len(parameter), parameter[0].numel(), ranks[number % len(ranks)]
            B, A = (torch.randn(*s, generator=generator) for s in ((m, rank), (rank, n)))
            parameter.add_(0.1 * (B @ A).reshape(parameter.shape))
    one.save_pretrained(folder / "tuned")
    return folder / "tuned" / WEIGHTS, folder / "base" / WEIGHTS, before, output(one)


def with_lora(kind: str, tensors, **options) -> torch.Tensor:
    """What the base computes with an adapter that diffusers loaded."""
    one = model(kind)
    one.load_lora_adapter(tensors, prefix=kind, **options)
    return output(one)


def written(out: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter, by safetensors."""
    (file,) = out.glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize("kind", CHANGED)
def test_an_adapter_for_diffusers_is_the_tuned_model_there(kind, tmp_path):
    """Linear layers and convolutions, two ranks padded to one: the same outputs, and merged."""
    tuned, base, before, expected = write_pair(kind, tmp_path)
    out = tmp_path / "adapter"
    certificate = extract(tuned, base, out, error=1e-3, consumer="diffusers")
    one = model(kind)
    one.load_lora_adapter(out, prefix=kind, weight_name="pytorch_lora_weights.safetensors")
    beside = output(one)
    one.fuse_lora()

    change = (expected - before).norm()
    assert change > 0.01 * expected.norm()
    for found in (beside, output(one)):
        assert (found - expected).norm() < 1e-3 * change
    assert {entry.rank for entry in certificate.factored.values()} == {2, 3}
    assert {len(t) for name, t in written(out).items() if "lora_A" in name} == {3}
    assert "padded with zeros to rank 3" in " ".join(certificate.remarks)
    assert read_metadata(out / "pytorch_lora_weights.safetensors") == {"format": "pt"}
    assert all(check.held for check in verify(out, tuned, base=base))


@pytest.mark.parametrize("kind", CHANGED)
def test_the_same_adapter_goes_through_every_form_and_back(kind, tmp_path):
    """PEFT's folder → diffusers' file → PEFT's folder: the same numbers, and in diffusers too."""
    tuned, base, before, expected = write_pair(kind, tmp_path)
    extract(tuned, base, tmp_path / "peft", error=1e-3)
    certificate = convert(tmp_path / "peft", tmp_path / "diffusers", consumer="diffusers")
    convert(tmp_path / "diffusers", tmp_path / "back", consumer="peft")
    resize(tmp_path / "back", tmp_path / "compact", error=0.01)
    found = with_lora(kind, written(tmp_path / "diffusers"))
    given, back = written(tmp_path / "peft"), written(tmp_path / "back")
    compact = written(tmp_path / "compact")

    assert (found - expected).norm() < 1e-3 * (expected - before).norm()
    assert {row.relative_error for row in certificate.matrices} == {0.0}
    assert back.keys() == given.keys() == compact.keys()
    for name, tensor in given.items():
        assert compact[name].shape == tensor.shape
        rows, columns = tensor.shape[:2]
        assert back[name][:rows, :columns].equal(tensor)
        assert not back[name][rows:].any()
        assert not back[name][:, columns:].any()
    for out, source in (("diffusers", "peft"), ("back", "diffusers")):
        assert all(check.held for check in verify(tmp_path / out, tmp_path / source))


def test_an_adapter_for_kohya_is_the_tuned_model_where_diffusers_reads_it(tmp_path):
    """Its names and alphas, translated by diffusers' own table for kohya's files."""
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers

    tuned, base, before, expected = write_pair("unet", tmp_path, (3,))
    certificate = extract(tuned, base, tmp_path / "out", error=1e-3, consumer="kohya")
    tensors = written(tmp_path / "out")
    renamed, alphas = _convert_non_diffusers_lora_to_diffusers(dict(tensors))
    found = with_lora("unet", renamed, network_alphas=alphas)

    assert (found - expected).norm() < 1e-3 * (expected - before).norm()
    for name, tensor in tensors.items():
        if name.endswith(".lora_down.weight"):
            X = name.removesuffix(".lora_down.weight")
            assert tensors[f"{X}.alpha"] == len(tensor) == tensors[f"{X}.lora_up.weight"].shape[1]
    assert len(tensors) == 3 * len(certificate.matrices)
    assert all(check.held for check in verify(tmp_path / "out", tuned, base=base))
    assert [fit.loads for fit in lint(tmp_path / "out")] == [False, False, False, True, True]


def test_alphas_that_differ_are_misread_by_diffusers_and_lint_says_so(tmp_path):
    """It looks for attention layers by other names than it gave their alphas, and finds none."""
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers

    tuned, base, _, _ = write_pair("unet", tmp_path)
    extract(tuned, base, tmp_path / "out", error=1e-3, consumer="kohya")
    renamed, alphas = _convert_non_diffusers_lora_to_diffusers(written(tmp_path / "out"))
    with pytest.raises(RuntimeWarning, match="did not match any targeted module"):
        with_lora("unet", renamed, network_alphas=alphas)
    (found,) = (fit for fit in lint(tmp_path / "out") if fit.consumer == "diffusers")

    assert not found.loads
    assert "alphas differ" in found.detail


def test_the_names_for_kohya_are_those_of_diffusers_own_conversion(tmp_path):
    """`convert_state_dict_to_kohya` gives the same keys, factors and alphas."""
    from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya

    tuned, base, _, _ = write_pair("unet", tmp_path)
    extract(tuned, base, tmp_path / "diffusers", rank=2, consumer="diffusers")
    convert(tmp_path / "diffusers", tmp_path / "kohya", consumer="kohya")
    expected = convert_state_dict_to_kohya(written(tmp_path / "diffusers"))
    found = written(tmp_path / "kohya")

    assert found.keys() == expected.keys()
    assert all(found[name].equal(expected[name].to(found[name].dtype)) for name in found)


def test_names_of_kohya_are_read_back_without_a_model(tmp_path):
    """From the bare file, whose folder and certificate are gone; with two text encoders."""
    tuned, base, _, _ = write_pair("unet", tmp_path)
    extract(tuned, base, tmp_path / "unet", rank=2, consumer="diffusers")
    tensors = written(tmp_path / "unet")
    for number, encoder in enumerate(("text_encoder", "text_encoder_2")):
        X = f"{encoder}.text_model.encoder.layers.0.self_attn.q_proj"
        tensors[f"{X}.lora_A.weight"] = torch.full((2, 8), number + 1.0)
        tensors[f"{X}.lora_B.weight"] = torch.full((8, 2), 1.0)
    save_file(tensors, tmp_path / "all.safetensors", {"format": "pt"})
    convert(tmp_path / "all.safetensors", tmp_path / "kohya", consumer="kohya")
    (tmp_path / "kohya" / "lora.safetensors").rename(tmp_path / "style.safetensors")
    convert(tmp_path / "style.safetensors", tmp_path / "back", consumer="diffusers")
    names = {name.split("_text_model")[0] for name in load_file(tmp_path / "style.safetensors")}
    back = written(tmp_path / "back")

    assert back.keys() == tensors.keys()
    assert all(back[name].equal(tensor) for name, tensor in tensors.items())
    assert {"lora_te1", "lora_te2"} <= names
    done = eckart("convert", tmp_path / "all.safetensors", "-o", tmp_path / "p", "--for", "peft")
    assert done.code == 2
    assert "text_encoder and text_encoder_2 and unet" in done.message
    convert(tmp_path / "all.safetensors", tmp_path / "p", consumer="peft", component="unet")
    assert len(written(tmp_path / "p")) == len(tensors) - 4
    assert all(check.held for check in verify(tmp_path / "p", tmp_path / "all.safetensors"))


@pytest.mark.parametrize("kind", CHANGED)
def test_every_layer_of_a_model_has_its_own_name_in_kohyas_files(kind):
    """A U-Net's are cut back into words in one way; Flux's are known by the model's list."""
    modules = [name for name, one in model(kind).named_modules() if hasattr(one, "weight")]
    keys = {kohya.key_of(f"{kind}.{X}"): f"{kind}.{X}" for X in modules}
    norms = [key for key in keys if "norm" in key]
    alone = [key for key in keys if key not in norms] if kind == "unet" else []

    assert len(keys) == len(modules)
    assert kohya.modules_of(keys, keys.values(), "a list") == keys
    assert kohya.modules_of(alone, [], "a file") == {key: keys[key] for key in alone}


def test_adapters_in_different_forms_are_added_up(tmp_path):
    """kohya's file and PEFT's folder, each at half its strength, are the tuned model again."""
    tuned, base, before, expected = write_pair("unet", tmp_path)
    extract(tuned, base, tmp_path / "kohya", error=1e-3, consumer="kohya")
    extract(tuned, base, tmp_path / "peft", error=1e-3)
    two = [tmp_path / "kohya", tmp_path / "peft"]
    merge(two, tmp_path / "sum", weights=[0.5, 0.5], error=1e-3, consumer="diffusers")
    found = with_lora("unet", written(tmp_path / "sum"))

    assert (found - expected).norm() < 1e-2 * (expected - before).norm()
    assert all(check.held for check in verify(tmp_path / "sum", two))


def test_the_settings_in_a_file_of_diffusers_are_read(tmp_path):
    """A LoRA with lora_alpha ≠ r, saved by diffusers, is converted as diffusers computes it."""
    from peft import LoraConfig

    one = model("unet")
    settings = {"r": 4, "lora_alpha": 3, "target_modules": ["to_q", "proj_in"]}
    one.add_adapter(LoraConfig(**settings, rank_pattern={"proj_in": 2}), "default")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in one.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    expected = output(one)
    pipeline = diffusers.StableDiffusionPipeline
    layers = {
        name.replace(".default", ""): tensor
        for name, tensor in one.state_dict().items()
        if "lora_" in name
    }
    metadata = one.peft_config["default"].to_dict()
    pipeline.save_lora_weights(
        tmp_path / "given", unet_lora_layers=layers, unet_lora_adapter_metadata=metadata
    )
    certificate = convert(tmp_path / "given", tmp_path / "out", consumer="diffusers")
    found = with_lora("unet", written(tmp_path / "out"))

    assert (found - expected).norm() < 1e-6 * expected.norm()
    assert 0 < max(row.relative_error for row in certificate.matrices) < 1e-7
    assert "no power of two" in " ".join(certificate.remarks)
    assert all(check.held for check in verify(tmp_path / "out", tmp_path / "given"))
