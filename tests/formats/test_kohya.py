"""kohya's names: written in one way, and read back only where that is certain."""

import pytest

from eckart.errors import CheckpointError
from eckart.formats import kohya

KNOWN = {
    "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_out_0": (
        "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0"
    ),
    "lora_unet_up_blocks_1_resnets_2_conv_shortcut": "unet.up_blocks.1.resnets.2.conv_shortcut",
    "lora_unet_time_embedding_linear_1": "unet.time_embedding.linear_1",
    "lora_unet_conv_out": "unet.conv_out",
    "lora_unet_out_2": "unet.out.2",
    "lora_unet_input_blocks_4_1_proj_in": "unet.input_blocks.4.1.proj_in",
    "lora_unet_middle_block_1_transformer_blocks_9_ff_net_0_proj": (
        "unet.middle_block.1.transformer_blocks.9.ff.net.0.proj"
    ),
    "lora_unet_double_blocks_18_img_attn_qkv": "transformer.double_blocks.18.img_attn.qkv",
    "lora_unet_single_blocks_3_modulation_lin": "transformer.single_blocks.3.modulation.lin",
    "lora_te_text_model_encoder_layers_11_mlp_fc1": (
        "text_encoder.text_model.encoder.layers.11.mlp.fc1"
    ),
    "lora_te1_text_model_encoder_layers_0_self_attn_out_proj": (
        "text_encoder.text_model.encoder.layers.0.self_attn.out_proj"
    ),
    "lora_te2_text_projection": "text_encoder_2.text_projection",
}


@pytest.mark.parametrize("key", KNOWN)
def test_names_of_known_words_are_cut_in_one_way(key):
    """U-Nets in both namings, Flux, CLIP: no list is needed, and the way back is the same."""
    module = KNOWN[key]

    assert kohya.modules_of([key], [], "a file") == {key: module}
    assert kohya.key_of(module, numbered=key.startswith("lora_te1")) == key


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("lora_unet_blocks_0_cross_attn_k", "is none that is known"),
        ("lora_unet_mid_block_attentions_0_", "is none that is known"),
        ("lycoris_mid_block_attentions_0_proj_in", "is no name of kohya's"),
        ("lora_unet", "is no name of kohya's"),
        ("lora_unet_mid_block_attentions_²_proj_in", "is none that is known"),
    ],
)
def test_what_is_not_known_is_refused(key, words):
    """By name, with the remedy: never a guess."""
    with pytest.raises(CheckpointError, match=words):
        kohya.modules_of([key], [], "a file")


def test_a_list_of_modules_tells_what_words_do_not():
    """Bare names as in a checkpoint, or with their component; and what is ambiguous in it."""
    key = "lora_unet_blocks_0_cross_attn_k"

    for listed in (["blocks.0.cross_attn.k", "head"], ["unet.blocks.0.cross_attn.k"]):
        assert kohya.modules_of([key], listed, "a file") == {key: "unet.blocks.0.cross_attn.k"}
    transformer = ["transformer.blocks.0.cross_attn.k"]
    assert kohya.modules_of([key], transformer, "a file") == {key: transformer[0]}
    with pytest.raises(CheckpointError, match=r"cross.attn\.k or unet.blocks.0.cross_attn\.k"):
        kohya.modules_of([key], ["blocks.0.cross.attn.k", "blocks.0.cross_attn.k"], "a file")


def test_newer_names_of_clip_are_written_as_kohya_has_them():
    """`text_model.` is put back, which newer transformers left out; a list finds them again."""
    module = "text_encoder.encoder.layers.3.mlp.fc2"
    key = kohya.key_of(module)

    assert key == "lora_te_text_model_encoder_layers_3_mlp_fc2"
    assert kohya.modules_of([key], [module], "a file") == {key: module}


def test_a_long_name_is_cut_quickly():
    """A thousand words: the cuts of every rest are found once."""
    key = "lora_unet_" + "_".join(["proj_in", "conv", "0"] * 60)

    assert kohya.modules_of([key], [], "a file")[key].count(".") == 180
