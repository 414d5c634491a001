"""Tiny models of transformers, one of each kind, and a batch for each."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from safetensors.torch import save_file
from torch import Tensor

HIDDEN, WIDE, HEADS, VOCABULARY = 16, 24, 2, 40

SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": WIDE,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 32,
}


def ids(sequences: int, length: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (sequences, length))


def llama() -> tuple[Any, dict[str, Tensor]]:
    config = tf.LlamaConfig(**SIZES, num_key_value_heads=1)
    return tf.LlamaForCausalLM(config), {"input_ids": ids(6, 12)}


def gpt2() -> tuple[Any, dict[str, Tensor]]:
    config = tf.GPT2Config(
        n_embd=HIDDEN, n_layer=2, n_head=HEADS, vocab_size=VOCABULARY, n_positions=32
    )
    return tf.GPT2LMHeadModel(config), {"input_ids": ids(5, 12)}


def bert() -> tuple[Any, dict[str, Tensor]]:
    batch = {"input_ids": ids(6, 12), "labels": torch.tensor([0, 2, 1, 1, 0, 2])}
    config = tf.BertConfig(**SIZES, num_labels=3)
    return tf.BertForSequenceClassification(config), batch


def t5() -> tuple[Any, dict[str, Tensor]]:
    config = tf.T5Config(
        d_model=HIDDEN,
        d_kv=8,
        d_ff=WIDE,
        num_layers=2,
        num_heads=HEADS,
        vocab_size=VOCABULARY,
        decoder_start_token_id=0,
    )
    batch = {"input_ids": ids(5, 12), "labels": ids(5, 7)}
    return tf.T5ForConditionalGeneration(config), batch


def vit() -> tuple[Any, dict[str, Tensor]]:
    config = tf.ViTConfig(**SIZES, image_size=12, patch_size=4, num_labels=5)
    batch = {"pixel_values": torch.randn(6, 3, 12, 12), "labels": torch.randint(0, 5, (6,))}
    return tf.ViTForImageClassification(config), batch


def qwen3_moe() -> tuple[Any, dict[str, Tensor]]:
    config = tf.Qwen3MoeConfig(
        **SIZES,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=3,
        num_experts_per_tok=2,
        moe_intermediate_size=12,
    )
    return tf.Qwen3MoeForCausalLM(config), {"input_ids": ids(9, 12)}


def mixtral() -> tuple[Any, dict[str, Tensor]]:
    config = tf.MixtralConfig(
        **SIZES, num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2
    )
    return tf.MixtralForCausalLM(config), {"input_ids": ids(9, 12)}


def gpt_oss() -> tuple[Any, dict[str, Tensor]]:
    config = tf.GptOssConfig(
        **SIZES, num_key_value_heads=1, head_dim=8, num_local_experts=3, num_experts_per_tok=2
    )
    return tf.GptOssForCausalLM(config), {"input_ids": ids(9, 12)}


def llama4() -> tuple[Any, dict[str, Tensor]]:
    config = tf.Llama4TextConfig(
        **SIZES,
        intermediate_size_mlp=WIDE,
        num_key_value_heads=1,
        head_dim=8,
        num_local_experts=3,
        num_experts_per_tok=1,
        interleave_moe_layer_step=1,
        attention_chunk_size=32,
        pad_token_id=0,
    )
    return tf.Llama4ForCausalLM(config), {"input_ids": ids(9, 12)}


MODELS: dict[str, Callable[[], tuple[Any, dict[str, Tensor]]]] = {
    "llama": llama,
    "gpt2": gpt2,
    "bert": bert,
    "t5": t5,
    "vit": vit,
    "qwen3_moe": qwen3_moe,
    "mixtral": mixtral,
    "gpt_oss": gpt_oss,
    "llama4": llama4,
}


def build(name: str) -> tuple[Any, dict[str, Tensor]]:
    """The model in float32 with weights large enough to matter, and its batch."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model, batch = MODELS[name]()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(0, 0.3 / max(parameter.shape[-1], 1) ** 0.25)
    return model.eval(), batch


def saved(name: str, folder: Path) -> tuple[Path, Path, Any, dict[str, Tensor]]:
    """The model's folder, its batch as a file, and both in memory."""
    model, batch = build(name)
    model.save_pretrained(folder / name)
    path = folder / f"{name}-batch.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in batch.items()}, path)
    return folder / name, path, model, batch
