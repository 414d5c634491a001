"""Files of diffusers and kohya, read strictly: what is not understood is refused by name."""

import json
from pathlib import Path

import pytest
import torch
from builders import eckart
from safetensors.torch import save_file

from eckart.formats.pipelines import open_lora

X = "unet.mid_block.attentions.0.proj_in"
K = "lora_unet_mid_block_attentions_0_proj_in"
A, B = torch.ones(2, 8), torch.ones(6, 2)


def diffusers_file(path: Path, more=None, metadata=None, **settings) -> Path:
    """A file of diffusers with one module, and what else is asked."""
    document = {f"unet.{key}": value for key, value in settings.items()}
    found = {
        "format": "pt",
        **({"lora_adapter_metadata": json.dumps(document)} if settings else {}),
    }
    tensors = {f"{X}.lora_A.weight": A, f"{X}.lora_B.weight": B, **(more or {})}
    save_file(tensors, path, {**found, **(metadata or {})})
    return path


def kohya_file(path: Path, more=None, alpha: object = 1.0) -> Path:
    """A file of kohya's with one module."""
    tensors = {f"{K}.lora_down.weight": A, f"{K}.lora_up.weight": B, **(more or {})}
    if alpha is not None:
        tensors[f"{K}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path, {"format": "pt"})
    return path


SCALES = {
    "no settings": (diffusers_file, 1.0),
    "an alpha in diffusers' file": (
        lambda path: diffusers_file(path, {f"{X}.alpha": torch.tensor(3.0)}),
        1.5,
    ),
    "settings": (lambda path: diffusers_file(path, r=2, lora_alpha=5), 2.5),
    "settings with rsLoRA": (
        lambda path: diffusers_file(path, r=2, lora_alpha=5, use_rslora=True),
        5 / 2**0.5,
    ),
    "settings with a pattern": (
        lambda path: diffusers_file(path, r=4, lora_alpha=4, rank_pattern={"proj_in": 2}),
        2.0,
    ),
    "kohya": (kohya_file, 0.5),
    "kohya, an integer": (lambda path: kohya_file(path, alpha=4), 2.0),
    "kohya, one number in a list": (lambda path: kohya_file(path, alpha=[4.0]), 2.0),
    "kohya without an alpha": (lambda path: kohya_file(path, alpha=None), 1.0),
}


@pytest.mark.parametrize("case", SCALES)
def test_the_scale_is_as_the_file_says(case, tmp_path):
    """From the header's settings, an alpha, or neither."""
    write, scale = SCALES[case]
    adapter = open_lora(write(tmp_path / "a.safetensors"))
    (part,) = adapter.parts.values()

    assert part.name == f"{X}.weight"
    assert part.scale == pytest.approx(scale, rel=1e-15)
    assert (part.rank, part.shape) == (2, (6, 8))
    assert adapter.keys == ("kohya" if "kohya" in case else "diffusers")


ODD = {
    "half a LoRA": (lambda path: save_file({f"{X}.lora_A.weight": A}, path), "belong together"),
    "another kind in kohya's": (
        lambda path: kohya_file(path, {f"{K}.dora_scale": torch.ones(6)}),
        "dora_scale",
    ),
    "another kind in diffusers'": (
        lambda path: diffusers_file(path, {f"{X}.lora_magnitude_vector": torch.ones(6)}),
        "lora_magnitude_vector",
    ),
    "LoHa alone": (
        lambda path: save_file({f"{K}.hada_w1_a": A, f"{K}.alpha": torch.tensor(1.0)}, path),
        "hada_w1_a",
    ),
    "alpha 0": (lambda path: kohya_file(path, alpha=0.0), "loaders read 0 in different ways"),
    "alpha NaN": (lambda path: kohya_file(path, alpha=float("nan")), "nan"),
    "alpha of many": (lambda path: kohya_file(path, alpha=[1.0, 2.0]), "alpha"),
    "an alpha of nothing": (
        lambda path: kohya_file(path, {"lora_unet_conv_in.alpha": torch.tensor(1.0)}),
        "belongs to no LoRA",
    ),
    "one module twice": (
        lambda path: save_file(
            {
                f"{prefix}_text_projection.lora_{part}.weight": torch.ones(2, 2)
                for prefix in ("lora_te", "lora_te1")
                for part in ("down", "up")
            },
            path,
        ),
        "names a module twice",
    ),
    "another model's names": (
        lambda path: save_file({"model.q.lora_A.weight": A, "model.q.lora_B.weight": B}, path),
        "they begin with unet",
    ),
    "ranks that disagree": (
        lambda path: diffusers_file(path, {f"{X}.lora_B.weight": torch.ones(6, 3)}),
        "must agree",
    ),
    "settings of DoRA": (
        lambda path: diffusers_file(path, r=2, lora_alpha=2, use_dora=True),
        "use_dora = True",
    ),
    "settings that are no JSON": (
        lambda path: diffusers_file(path, metadata={"lora_adapter_metadata": "{"}),
        "is no JSON object",
    ),
    "settings of another rank": (
        lambda path: diffusers_file(path, r=3, lora_alpha=3),
        "must agree",
    ),
    "no LoRA at all": (lambda path: save_file({}, path), "holds no LoRA at all"),
    "a model": (lambda path: save_file({"q.weight": A}, path), "holds no LoRA at all"),
}


@pytest.mark.parametrize("case", ODD)
def test_what_is_not_understood_is_refused_by_name(case, tmp_path):
    """Exit 3, one sentence, nothing written."""
    write, words = ODD[case]
    write(tmp_path / "a.safetensors")
    done = eckart("convert", tmp_path / "a.safetensors", "-o", tmp_path / "o", "--for", "diffusers")

    assert done.code == 3, done.err
    assert words in done.message
    assert not (tmp_path / "o").exists()


def test_a_base_tells_what_kohyas_names_stand_for(tmp_path):
    """Unknown words are refused with the remedy, which then works; verify needs no base."""
    tensors = {
        "lora_unet_blocks_0_cross_attn_k.lora_down.weight": A,
        "lora_unet_blocks_0_cross_attn_k.lora_up.weight": B,
    }
    save_file(tensors, tmp_path / "a.safetensors")
    save_file({"blocks.0.cross_attn.k.weight": torch.ones(6, 8)}, tmp_path / "base.safetensors")
    line = ("convert", tmp_path / "a.safetensors", "-o", tmp_path / "o", "--for", "peft")
    refused = eckart(*line)
    done = eckart(*line, "--base", tmp_path / "base.safetensors")
    proved = eckart("verify", tmp_path / "o", "--against", tmp_path / "a.safetensors")

    assert refused.code == 3
    assert "--base" in refused.err
    assert (done.code, proved.code) == (0, 0), proved.err
    (name,) = open_lora(tmp_path / "o").parts
    assert name == "blocks.0.cross_attn.k.weight"
