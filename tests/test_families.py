"""Which names are matrices, over names as they stand in published checkpoints."""

import pytest

from eckart.checkpoint.header import TensorInfo
from eckart.errors import UsageError
from eckart.families import matrices

MATRICES = """
model.layers.0.self_attn.q_proj model.layers.31.self_attn.o_proj model.layers.0.mlp.gate_proj
model.layers.0.mlp.up_proj model.layers.0.mlp.down_proj
model.layers.0.self_attn.qkv_proj model.layers.0.mlp.gate_up_proj
model.layers.0.block_sparse_moe.gate model.layers.0.block_sparse_moe.experts.7.w1
model.layers.3.mlp.experts.12.down_proj model.layers.3.mlp.shared_expert.up_proj
model.layers.3.mlp.shared_experts.up_proj model.layers.3.mlp.shared_expert_gate
model.layers.0.self_attn.kv_a_proj_with_mqa model.layers.0.self_attn.kv_b_proj
bert.encoder.layer.0.attention.self.query bert.encoder.layer.0.attention.output.dense
bert.encoder.layer.0.intermediate.dense bert.pooler.dense encoder.layer.11.output.dense
distilbert.transformer.layer.0.attention.q_lin distilbert.transformer.layer.0.ffn.lin1
roberta.encoder.layer.0.attention.self.key deberta.encoder.layer.0.attention.self.query_proj
encoder.block.0.layer.0.SelfAttention.q encoder.block.0.layer.1.DenseReluDense.wi_0
decoder.block.5.layer.1.EncDecAttention.o
transformer.h.0.attn.c_attn transformer.h.0.mlp.c_fc h.11.mlp.c_proj
transformer.h.0.attn.attention.k_proj gpt_neox.layers.0.attention.query_key_value
transformer.h.0.self_attention.dense transformer.h.0.mlp.dense_h_to_4h
model.decoder.layers.0.fc1 model.decoder.layers.0.encoder_attn.v_proj
vit.encoder.layer.0.attention.attention.value vision_model.encoder.layers.0.mlp.fc2
text_model.encoder.layers.0.self_attn.out_proj visual_projection text_projection
model.encoder.layers.3.self_attn.k_proj model.visual.blocks.0.attn.qkv
multi_modal_projector.linear_1 backbone.layers.0.mixer.in_proj model.layers.0.mamba.x_proj
blocks.0.attn.qkv blocks.0.mlp.fc1 swin.layers.0.blocks.0.attn.proj
transformer_blocks.0.attn1.to_q single_transformer_blocks.0.proj_out
model.layers.0.linear_attn.in_proj_qkvz transformer.blocks.0.ffn.up_proj
layers.0.feed_forward.w2 layers.0.attention.wq text_encoder.layers.0.shared_mlp.up
"""

EMBEDDINGS = """
model.embed_tokens bert.embeddings.word_embeddings bert.embeddings.position_embeddings
bert.embeddings.token_type_embeddings embeddings.word_embeddings shared
encoder.embed_tokens transformer.wte transformer.wpe wte wpe gpt_neox.embed_in
model.decoder.embed_positions model.encoder.embed_positions
vision_model.embeddings.position_embedding text_model.embeddings.token_embedding
encoder.block.0.layer.0.SelfAttention.relative_attention_bias
distilbert.embeddings.position_embeddings deberta.encoder.rel_embeddings
decoder.embed_tokens transformer.word_embeddings
"""

HEADS = """
lm_head embed_out score classifier qa_outputs_head.head head cls.predictions.decoder
transformer.output_projection cls.seq_relationship heads.head
"""

NORMS = """
model.norm layernorm encoder.LayerNorm ln_f transformer.h.0.ln_1 model.layers.0.input_layernorm
"""


def info(shape: tuple[int, ...] = (8, 6), dtype: str = "BF16") -> TensorInfo:
    return TensorInfo(shape, dtype, "model.safetensors", 0, 1)


def reason(name: str, **kind: object) -> str | None:
    return matrices({name: info(**kind)})[name]  # type: ignore[arg-type]


@pytest.mark.parametrize("name", MATRICES.split())
def test_projections_and_layers_are_matrices(name):
    """Attention, feed-forward, experts and projections, as models name them."""
    assert reason(f"{name}.weight") is None


@pytest.mark.parametrize("name", EMBEDDINGS.split())
def test_embeddings_are_left_alone(name):
    """A lookup table is no product with an input."""
    assert reason(f"{name}.weight") == "embedding"


@pytest.mark.parametrize("name", HEADS.split())
def test_output_heads_are_left_alone(name):
    """By default; --include names them."""
    assert reason(f"{name}.weight") in ("output head", "embedding")


@pytest.mark.parametrize("name", NORMS.split())
def test_norms_are_left_alone(name):
    """1-D as a rule, and by name where one is not."""
    assert reason(f"{name}.weight") == "norm"
    assert reason(f"{name}.weight", shape=(8,)) == "1-D"


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("q.bias", {}, "not a module's weight"),
        ("experts.gate_up_proj", {}, "not a module's weight"),
        ("experts.gate_up_proj", {"shape": (4, 8, 6)}, "3-D"),
        ("conv.weight", {"shape": (8, 4, 3, 3)}, "4-D"),
        ("conv1d.weight", {"shape": (8, 4, 3)}, "3-D"),
        ("scale.weight", {"shape": ()}, "0-D"),
        ("q.weight", {"shape": (0, 6)}, "empty"),
        ("q.weight", {"shape": (6, 0)}, "empty"),
        ("q.weight", {"dtype": "I8"}, "dtype I8"),
        ("q.weight", {"dtype": "U8"}, "dtype U8"),
        ("q.weight", {"dtype": "F8_E4M3"}, "dtype F8_E4M3"),
        ("q.weight", {"dtype": "BOOL"}, "dtype BOOL"),
        ("rotary_emb.inv_freq", {"shape": (32,)}, "1-D"),
        ("class_embedding", {"shape": (1, 8)}, "not a module's weight"),
        ("q.weight_scale_inv", {}, "not a module's weight"),
        ("weight", {}, "not a module's weight"),
    ],
)
def test_what_is_not_a_matrix_says_why(name, kind, expected):
    """Dtype, dimensions, emptiness and name, in that order."""
    assert reason(name, **kind) == expected


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_every_floating_dtype_is_factored(dtype):
    """The four that LAPACK's input can be made of."""
    assert reason("q.weight", dtype=dtype) is None


MODEL = {
    f"{name}.weight": info()
    for name in ("layers.0.q_proj", "layers.0.up_proj", "layers.1.q_proj", "embed", "lm_head")
} | {"layers.0.q_proj.bias": info((8,))}


def taken(**patterns: list[str]) -> set[str]:
    return {
        name.removesuffix(".weight")
        for name, why in matrices(MODEL, **patterns).items()
        if why is None
    }


def test_include_and_exclude_are_globs_over_tensor_or_module_names():
    """`*.q_proj` and `*.q_proj.weight` mean the same."""
    both = {"layers.0.q_proj", "layers.1.q_proj"}

    assert taken() == {*both, "layers.0.up_proj"}
    assert taken(include=["*.q_proj"]) == both
    assert taken(include=["*.q_proj.weight"]) == both
    assert taken(include=["layers.0.*"]) == {"layers.0.q_proj", "layers.0.up_proj"}
    assert taken(include=["layers.[1-9].*"]) == {"layers.1.q_proj"}
    assert taken(exclude=["layers.0.*"]) == {"layers.1.q_proj"}
    assert taken(include=["*.q_proj", "*.up_proj"], exclude=["*.0.up*"]) == both


def test_include_can_name_a_head_or_an_embedding():
    """The rule by names gives way to what the user says; the rule by shapes does not."""
    assert taken(include=["lm_head"]) == {"lm_head"}
    assert taken(include=["embed", "lm_head"]) == {"embed", "lm_head"}


def test_the_reasons_of_patterns_stand_beside_the_others():
    """Every tensor has an answer, in the order given."""
    reasons = matrices(MODEL, include=["*.q_proj"], exclude=["layers.1.*"])

    assert list(reasons) == list(MODEL)
    assert reasons["layers.0.q_proj.weight"] is None
    assert reasons["layers.1.q_proj.weight"] == "excluded by --exclude"
    assert reasons["lm_head.weight"] == "not among --include"
    assert reasons["layers.0.q_proj.bias"] == "1-D"


@pytest.mark.parametrize("pattern", ["*.k_proj", "", "layers", "LAYERS.0.*", "*.bias", "(a+)+$"])
def test_a_pattern_that_matches_no_matrix_is_an_error(pattern):
    """It names the pattern and shows what there is; case counts, and regexes are plain text."""
    for option in ("include", "exclude"):
        with pytest.raises(UsageError, match=r"matches no matrix; there are 5, such as layers\.0"):
            matrices(MODEL, **{option: [pattern]})


def test_a_pattern_over_nothing_says_that_there_is_nothing():
    """No 2-D weight at all."""
    with pytest.raises(UsageError, match="no 2-D weight at all"):
        matrices({"b": info((3,))}, include=["*"])


def test_a_hostile_name_is_escaped_in_the_message():
    """The names shown come from a file."""
    with pytest.raises(UsageError) as caught:
        matrices({"a\x1b[2J.weight": info()}, include=["nothing"])

    assert "\x1b" not in str(caught.value)
