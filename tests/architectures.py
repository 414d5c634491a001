"""Tiny models of many families, always the same ones, as transformers makes and saves them."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

DECODER = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
ENCODER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
IDS = torch.arange(24).reshape(2, 12) % 96


def _llama(**options: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER, **options))


def _qwen3() -> Any:
    config = transformers.Qwen3Config(**DECODER, tie_word_embeddings=True, head_dim=8)
    return transformers.Qwen3ForCausalLM(config)


def _phi3() -> Any:
    return transformers.Phi3ForCausalLM(transformers.Phi3Config(**DECODER, pad_token_id=0))


def _qwen3_moe() -> Any:
    config = transformers.Qwen3MoeConfig(
        **DECODER, head_dim=8, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2
    )
    return transformers.Qwen3MoeForCausalLM(config)


def _mixtral() -> Any:
    config = transformers.MixtralConfig(**DECODER, num_local_experts=4, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config)


def _gpt_oss() -> Any:
    config = transformers.GptOssConfig(
        **DECODER, head_dim=8, num_local_experts=4, num_experts_per_tok=2
    )
    return transformers.GptOssForCausalLM(config)


def _llava() -> Any:
    config = transformers.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "image_size": 16, "patch_size": 4}
        | ENCODER,
        text_config={"model_type": "llama", **DECODER},
        image_token_index=95,
    )
    return transformers.LlavaForConditionalGeneration(config)


def _gpt2() -> Any:
    config = transformers.GPT2Config(vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    return transformers.GPT2LMHeadModel(config)


def _bert() -> Any:
    config = transformers.BertConfig(vocab_size=96, max_position_embeddings=64, **ENCODER)
    return transformers.BertForSequenceClassification(config)


def _vit() -> Any:
    config = transformers.ViTConfig(image_size=16, patch_size=4, **ENCODER)
    return transformers.ViTForImageClassification(config)


def _t5() -> Any:
    config = transformers.T5Config(
        vocab_size=96,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=1,
        num_heads=4,
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


def _whisper() -> Any:
    config = transformers.WhisperConfig(
        vocab_size=96,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        begin_suppress_tokens=None,
        suppress_tokens=None,
    )
    return transformers.WhisperForConditionalGeneration(config)


def _resnet() -> Any:
    config = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic"
    )
    return transformers.ResNetForImageClassification(config)


ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "llama": lambda: _llama(tie_word_embeddings=False, mlp_bias=True, attention_bias=True),
    "llama, tied": lambda: _llama(tie_word_embeddings=True),
    "qwen3": _qwen3,
    "phi3": _phi3,
    "qwen3-moe": _qwen3_moe,
    "mixtral": _mixtral,
    "gpt-oss": _gpt_oss,
    "llava": _llava,
    "gpt2": _gpt2,
    "bert": _bert,
    "vit": _vit,
    "t5": _t5,
    "whisper": _whisper,
    "resnet": _resnet,
}


def _phimoe() -> Any:
    config = transformers.PhimoeConfig(
        **DECODER, num_local_experts=4, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    return transformers.PhimoeForCausalLM(config)


def _granite_moe() -> Any:
    config = transformers.GraniteMoeConfig(**DECODER, num_local_experts=4)
    return transformers.GraniteMoeForCausalLM(config)


def _deepseek() -> Any:
    config = transformers.DeepseekV3Config(
        **{**DECODER, "num_key_value_heads": 4},
        moe_intermediate_size=24,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
    )
    return transformers.DeepseekV3ForCausalLM(config)


def _neox() -> Any:
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(vocab_size=96, **ENCODER))


ADAPTED: dict[str, Callable[[], Any]] = {
    **ARCHITECTURES,
    "phimoe": _phimoe,
    "granite-moe": _granite_moe,
    "deepseek": _deepseek,
    "neox": _neox,
}
"""Those, and more whose files are held otherwise in memory: an adapter is for what is there."""


def model_of(kind: str) -> Any:
    """A model of a family, in evaluation mode: every parameter random, biases and norms too."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ARCHITECTURES[kind]()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@cache
def _inputs() -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 32, 32, generator=generator)
    sound = torch.randn(2, 8, 32, generator=generator)
    return {
        "ViTForImageClassification": {"pixel_values": images[..., :16, :16]},
        "ResNetForImageClassification": {"pixel_values": images},
        "WhisperForConditionalGeneration": {"input_features": sound, "decoder_input_ids": IDS},
        "T5ForConditionalGeneration": {"input_ids": IDS, "decoder_input_ids": IDS},
    }


def write_llama(folder: Path, vocabulary: int) -> Path:
    """A Llama of two layers whose weights decide what it says."""
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    """What a model says of the same inputs, in float64."""
    inputs = _inputs().get(type(model).__name__, {"input_ids": IDS})
    with torch.no_grad():
        return model.eval()(**inputs).logits.double()
