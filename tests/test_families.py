"""Which names are matrices, over names as they stand in published checkpoints."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from eckart.checkpoint.header import TensorInfo
from eckart.errors import UsageError
from eckart.families import is_routed_expert, matrices
from eckart.matrix import Matrix

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


def source(tensors: Mapping[str, TensorInfo], tied: Mapping[str, str] | None = None) -> Any:
    """What `matrices` sees of a source: its headers, sorted, and its tied names."""
    return SimpleNamespace(tensors=dict(sorted(tensors.items())), tied=tied or {})


def headers(prefix: str, **shapes: tuple[int, ...]) -> dict[str, TensorInfo]:
    """Tensors by the ends of their names: `c_proj__weight` is c_proj.weight."""
    return {f"{prefix}{name.replace('__', '.')}": info(shape) for name, shape in shapes.items()}


def orders(tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """The order of the sides of every matrix, by the name of its module in the layer."""
    found, _ = matrices(source(tensors))
    return {
        name.removesuffix(".weight").split(".", 3)[-1]: m.orientation for name, m in found.items()
    }


def reason(name: str, **kind: Any) -> str | None:
    found, reasons = matrices(source({name: info(**kind)}))
    assert found.keys() ^ reasons.keys() == {name}
    return reasons.get(name)


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
        ("q.bias", {"shape": (8,)}, "1-D"),
        ("conv1d.weight", {"shape": (8, 4, 3)}, "3-D"),
        ("conv3d.weight", {"shape": (8, 4, 3, 3, 3)}, "5-D"),
        ("scale.weight", {"shape": ()}, "0-D"),
        ("q.weight", {"shape": (0, 6)}, "empty"),
        ("q.weight", {"shape": (6, 0)}, "empty"),
        ("conv.weight", {"shape": (8, 0, 3, 3)}, "empty"),
        ("experts.down_proj", {"shape": (0, 8, 6)}, "empty"),
        ("q.weight", {"dtype": "I8"}, "dtype I8"),
        ("q.weight", {"dtype": "U8"}, "dtype U8"),
        ("q.weight", {"dtype": "F8_E4M3"}, "dtype F8_E4M3"),
        ("q.weight", {"dtype": "F8_E8M0"}, "dtype F8_E8M0"),
        ("q.weight", {"dtype": "BOOL"}, "dtype BOOL"),
        ("q.weight", {"dtype": "I8", "shape": (0,)}, "dtype I8"),
        ("rotary_emb.inv_freq", {"shape": (32,)}, "1-D"),
        ("class_embedding", {"shape": (1, 8)}, "embedding"),
        ("visual.class_embedding", {"shape": (1, 8)}, "not a module's weight"),
        ("q.weight_scale_inv", {}, "not a module's weight"),
        ("mixer.A_log", {}, "not a module's weight"),
        ("experts.gate_up_proj_blocks", {"shape": (4, 8, 6), "dtype": "U8"}, "dtype U8"),
        ("experts.gate_up_proj", {}, "not a module's weight"),
        ("mlp.experts.gate_up_proj_bias", {}, "not a module's weight"),
        ("experts.3.w1.weight_scale_inv", {}, "not a module's weight"),
        ("experts.3.w1.scales", {}, "not a module's weight"),
    ],
)
def test_what_is_not_a_matrix_says_why(name, kind, expected):
    """Dtype, dimensions, emptiness and name, in that order."""
    assert reason(name, **kind) == expected


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_every_floating_dtype_is_factored(dtype):
    """The four that LAPACK's input can be made of."""
    assert reason("q.weight", dtype=dtype) is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("W", None),
        ("weight", None),
        ("arr_0", None),
        ("delta_q", None),
        ("W.T", "not a module's weight"),
        ("final_norm", "norm"),
        ("lm_head", "output head"),
        ("wte", "embedding"),
    ],
)
def test_a_name_without_a_dot_is_a_matrix_of_its_own(name, expected):
    """An array of an .npz has no module; what its name says of its role still holds."""
    assert reason(name) == expected
    assert reason(name, shape=(8,)) == "1-D"


# How a tensor is read.


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (1, 7), (14, 14)])
def test_a_4d_weight_is_a_convolution(kernel):
    """Out × (in/groups · kh · kw), under any name that a 2-D matrix might have."""
    found, _ = matrices(source({"layer1.0.conv2.weight": info((16, 4, *kernel))}))
    (matrix,) = found.values()

    assert matrix == Matrix((16, 4, *kernel))
    assert matrix.shape == (16, 4 * kernel[0] * kernel[1])
    assert reason("patch_embed.proj.weight", shape=(16, 4, *kernel)) == "embedding"


def test_a_depthwise_convolution_is_no_matrix():
    """Each channel has its own input, so there is no A that all of them could share."""
    assert reason("stages.0.blocks.0.conv_dw.weight", shape=(96, 1, 7, 7)) is not None


E, H, I = 4, 8, 6  # experts, hidden and intermediate width  # noqa: E741
FUSED = {
    "Llama 4": headers(
        "language_model.model.layers.0.feed_forward.experts.",
        gate_up_proj=(E, H, 2 * I),
        down_proj=(E, I, H),
    ),
    "gpt-oss": headers(
        "model.layers.0.mlp.experts.", gate_up_proj=(E, H, 2 * H), down_proj=(E, H, H)
    ),
    "Qwen3-VL-MoE": headers(
        "model.language_model.layers.0.mlp.experts.",
        gate_up_proj=(E, H, 2 * I),
        down_proj=(E, I, H),
    ),
    "transformers 5": headers(
        "model.layers.0.mlp.experts.", gate_up_proj=(E, 2 * I, H), down_proj=(E, H, I)
    ),
    "transformers 5, square": headers(
        "model.layers.0.mlp.experts.", gate_up_proj=(E, 2 * H, H), down_proj=(E, H, H)
    ),
    "twice as wide inside": headers(
        "model.layers.0.mlp.experts.", gate_up_proj=(E, 4 * H, H), down_proj=(E, H, 2 * H)
    ),
    "half as wide inside": headers(
        "model.layers.0.mlp.experts.", gate_up_proj=(E, H, H), down_proj=(E, H, H // 2)
    ),
    "half as wide inside, transposed": headers(
        "model.layers.0.mlp.experts.", gate_up_proj=(E, H, H), down_proj=(E, H // 2, H)
    ),
    "Granite": headers(
        "model.layers.0.block_sparse_moe.",
        input_linear__weight=(E, 2 * I, H),
        output_linear__weight=(E, H, I),
    ),
    "JetMoE, attention": headers(
        "model.layers.0.self_attention.experts.",
        input_linear__weight=(E, I, H),
        output_linear__weight=(E, H, I),
    ),
}
TRANSPOSED = {"Llama 4", "gpt-oss", "Qwen3-VL-MoE", "half as wide inside, transposed"}


@pytest.mark.parametrize("family", FUSED)
def test_fused_experts_are_stacks_and_their_shapes_tell_the_order_of_the_sides(family):
    """Gate and up write 2·i numbers and down reads i: only one order of the sides fits both."""
    found, reasons = matrices(source(FUSED[family]))
    wide, narrow = (found[name] for name in FUSED[family])

    assert reasons == {}
    assert {m.orientation for m in found.values()} == {
        "in_out" if family in TRANSPOSED else "out_in"
    }
    assert wide.count == narrow.count == E
    assert wide.shape[1] == narrow.shape[0]
    assert wide.shape[0] in (narrow.shape[1], 2 * narrow.shape[1])


@pytest.mark.parametrize("family", FUSED)
def test_the_order_of_a_stack_does_not_depend_on_what_else_is_factored(family):
    """The sibling decides even where a pattern leaves it out; alone, the order is (out, in)."""
    everything, _ = matrices(source(FUSED[family]))
    for name in FUSED[family]:
        by_include, _ = matrices(source(FUSED[family]), include=[name])
        alone, _ = matrices(source({name: FUSED[family][name]}))

        assert by_include == {name: everything[name]}
        assert alone[name].orientation == "out_in"


@pytest.mark.parametrize(
    ("wide", "narrow"),
    [((E, H, 2 * I), (E, I, H + 1)), ((E, H, 2 * I + 1), (E, I, H)), ((E, H, I), (I, H))],
)
def test_shapes_that_fit_in_neither_order_are_read_as_they_stand(wide, narrow):
    """One side that differs is enough; a sibling that is no stack tells nothing."""
    found, _ = matrices(source(headers("experts.", gate_up_proj=wide, down_proj=narrow)))

    assert found["experts.gate_up_proj"] == Matrix(wide)


def test_jetmoe_has_its_experts_right_in_the_mlp():
    """There is no block_sparse_moe and no experts in their names."""
    prefix = "model.layers.0.mlp."
    names = headers(prefix, input_linear__weight=(E, 2 * I, H), output_linear__weight=(E, H, I))
    found, _ = matrices(source(names))

    assert found.keys() == names.keys()


@pytest.mark.parametrize("name", ["h.0.conv1d", "mlp.shared_experts.up_proj", "q_experts.w"])
def test_only_experts_are_stacks(name):
    """A 3-D tensor under any other name is left alone."""
    assert reason(f"{name}.weight", shape=(4, 8, 6)) == "3-D"


LAYER = {"attn__c_attn__weight": (8, 24), "attn__c_proj__weight": (8, 8)}
LAYER |= {"mlp__c_fc__weight": (8, 32), "mlp__c_proj__weight": (32, 8)}
BIASES = {"attn__c_attn__bias": (24,), "attn__c_proj__bias": (8,)}
BIASES |= {"mlp__c_fc__bias": (32,), "mlp__c_proj__bias": (8,)}
CONV1D = {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
TURNED = {name: shape[::-1] for name, shape in LAYER.items()}


@pytest.mark.parametrize("prefix", ["transformer.h.0.", "decoder.h.0."])
def test_gpt2s_layers_are_transposed_as_their_biases_tell(prefix):
    """(in, out), the bias as long as the second side: the square c_proj follows the others."""
    tensors = headers(prefix, **LAYER, **BIASES)
    found, _ = matrices(source(tensors))

    assert orders(tensors) == dict.fromkeys(CONV1D, "in_out")
    assert found[f"{prefix}mlp.c_fc.weight"].shape == (32, 8)
    assert found[f"{prefix}attn.c_attn.weight"].shape == (24, 8)


def test_cross_attention_of_gpt2_is_transposed_too():
    """q_attn is square and follows; a layer that is no Conv1D does not."""
    cross = {"crossattention__q_attn__weight": (8, 8), "crossattention__q_attn__bias": (8,)}
    other = {"mlp__up_proj__weight": (8, 32), "mlp__up_proj__bias": (32,)}
    tensors = headers("transformer.h.0.", **LAYER, **BIASES, **cross, **other)

    assert orders(tensors) == {
        **dict.fromkeys(CONV1D | {"crossattention.q_attn"}, "in_out"),
        "mlp.up_proj": "out_in",
    }


@pytest.mark.parametrize("missing", BIASES)
def test_one_bias_of_a_layer_that_is_not_square_decides_for_all(missing):
    """Whichever of the biases is not there."""
    biases = {name: shape for name, shape in BIASES.items() if name != missing}

    assert set(orders(headers("transformer.h.0.", **LAYER, **biases)).values()) == {"in_out"}
    assert set(orders(headers("transformer.h.0.", **TURNED, **biases)).values()) == {"out_in"}


@pytest.mark.parametrize(
    "shapes",
    [
        TURNED | BIASES,
        TURNED | BIASES | {"attn__c_attn__weight": (12, 8), "attn__c_attn__bias": (12,)},
        TURNED | {"attn__c_attn__bias": (24,)},
        TURNED,
        {"attn__c_proj__weight": (8, 8), "attn__c_proj__bias": (8,)},
    ],
    ids=["GPT-BigCode", "one key head", "Qwen-1", "no biases", "nothing but squares"],
)
def test_linear_layers_of_the_same_names_are_not_transposed(shapes):
    """(out, in), the bias as long as the first side, or nothing that tells."""
    found = orders(headers("transformer.h.0.", **shapes))

    assert found.keys() <= CONV1D
    assert set(found.values()) == {"out_in"}


@pytest.mark.parametrize(
    ("name", "routed"),
    [
        ("model.layers.0.mlp.experts.3.up_proj.weight", True),
        ("model.layers.0.block_sparse_moe.experts.7.w1.weight", True),
        ("model.layers.0.block_sparse_moe.input_linear.weight", True),
        ("model.layers.0.block_sparse_moe.output_linear.weight", True),
        ("model.layers.0.feed_forward.experts.gate_up_proj", True),
        ("experts.down_proj", True),
        ("model.layers.0.mlp.shared_experts.up_proj.weight", False),
        ("model.layers.0.mlp.shared_expert.up_proj.weight", False),
        ("model.layers.0.shared_mlp.input_linear.weight", False),
        ("model.layers.0.block_sparse_moe.gate.weight", False),
        ("model.layers.0.mlp.gate_up_proj.weight", False),
    ],
)
def test_routed_experts_are_told_from_shared_ones_and_routers(name, routed):
    """Only those that a loader fuses."""
    assert is_routed_expert(name) is routed


# Tied names.


@pytest.mark.parametrize(
    ("tied", "kept"),
    [
        ({"lm_head.weight": "embed_tokens.weight"}, "embed_tokens.weight"),
        ({"model.embed_tokens.weight": "lm_head.weight"}, "model.embed_tokens.weight"),
        ({"wte.weight": "score.weight"}, "wte.weight"),
        (
            dict.fromkeys(("encoder.embed.weight", "lm_head.weight"), "a_head.weight"),
            "encoder.embed.weight",
        ),
    ],
)
def test_of_tied_names_the_embedding_stands_for_all(tied, kept):
    """Whichever the file names first; the others say to what they are tied."""
    names = {*tied, *tied.values()}
    given = source({name: info() for name in [*names, "up.weight"]}, tied)
    found, reasons = matrices(given)
    by_include, _ = matrices(given, include=[kept])

    assert found.keys() == {"up.weight"}
    assert reasons == {kept: "embedding"} | dict.fromkeys(names - {kept}, f"tied to {kept}")
    assert by_include.keys() == {kept}
    for name in names - {kept}:
        with pytest.raises(UsageError, match="matches no matrix"):
            matrices(given, include=[name])


def test_of_tied_matrices_the_first_stands_for_all():
    """Two groups, each its own; the reasons name every second name."""
    tied = {"b.weight": "a.weight", "c.weight": "a.weight", "y.weight": "x.weight"}
    found, reasons = matrices(source({f"{name}.weight": info() for name in "abcxy"}, tied))

    assert found.keys() == {"a.weight", "x.weight"}
    assert reasons == {name: f"tied to {first}" for name, first in tied.items()}


@pytest.mark.parametrize("kind", [{"shape": (8,)}, {"dtype": "I8"}, {"shape": (0, 6)}])
def test_a_tied_name_is_called_tied_whatever_it_is(kind):
    """So that no tensor, matrix or not, is stored a second time."""
    tensors = {name: info(**kind) for name in ("a.weight", "b.weight")}
    _, reasons = matrices(source(tensors, {"b.weight": "a.weight"}))

    assert reasons["b.weight"] == "tied to a.weight"
    assert reasons["a.weight"] == reason("a.weight", **kind)


# Patterns.


MODEL = {
    f"{name}.weight": info()
    for name in ("embed", "layers.0.q_proj", "layers.0.up_proj", "layers.1.q_proj", "lm_head")
} | {"layers.0.q_proj.bias": info((8,))}


def taken(**patterns: list[str]) -> set[str]:
    found, _ = matrices(source(MODEL), **patterns)
    return {name.removesuffix(".weight") for name in found}


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


def test_include_can_name_a_parameter_that_is_no_modules_weight():
    """Any floating tensor of a fitting shape; one of another shape matches nothing."""
    tensors = {"mixer.A_log": info(), "conv1d.weight": info((8, 4, 3)), "q.weight": info()}
    found, _ = matrices(source(tensors), include=["mixer.A_*"])

    assert found.keys() == {"mixer.A_log"}
    with pytest.raises(UsageError, match="matches no matrix; there are 2"):
        matrices(source(tensors), include=["conv1d"])


def test_every_tensor_has_one_answer_in_the_order_of_the_source():
    """A matrix, or the reason why not; those of patterns beside the others."""
    given = source(MODEL)
    found, reasons = matrices(given, include=["*.q_proj"], exclude=["layers.1.*"])

    assert found == {"layers.0.q_proj.weight": Matrix((8, 6))}
    assert list(reasons) == [name for name in given.tensors if name not in found]
    assert reasons["layers.1.q_proj.weight"] == "excluded by --exclude"
    assert reasons["lm_head.weight"] == "not among --include"
    assert reasons["layers.0.q_proj.bias"] == "1-D"


@pytest.mark.parametrize("pattern", ["*.k_proj", "", "layers", "LAYERS.0.*", "*.bias", "(a+)+$"])
def test_a_pattern_that_matches_no_matrix_is_an_error(pattern):
    """It names the pattern and shows what there is; case counts, and regexes are plain text."""
    for option in ("include", "exclude"):
        with pytest.raises(UsageError, match=r"matches no matrix; there are 5, such as embed\."):
            matrices(source(MODEL), **{option: [pattern]})


def test_a_pattern_over_nothing_says_that_there_is_nothing():
    """No 2-D weight at all."""
    with pytest.raises(UsageError, match="no 2-D weight at all"):
        matrices(source({"b": info((3,))}), include=["*"])


def test_a_hostile_name_is_escaped_in_the_message():
    """The names shown come from a file."""
    with pytest.raises(UsageError) as caught:
        matrices(source({"a\x1b[2J.weight": info()}), include=["nothing"])

    assert "\x1b" not in str(caught.value)
