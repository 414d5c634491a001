"""What must hold of statistics, however the text was cut, padded, or the run interrupted."""

from pathlib import Path
from typing import Any

import pytest
import torch
from builders import in_a_process_killed_at, snapshot
from safetensors.torch import save_file
from torch import Tensor

pytest.importorskip("transformers")
import transformers as tf
from models import HIDDEN, MODELS, SIZES, WIDE, build, saved

from eckart import statistics
from eckart.calibration import schedule, work
from eckart.checkpoint.statistics import Statistics, open_statistics
from eckart.errors import ResourceError, StaleError
from eckart.statistics import calibrate

PAD = 7
"""A token like any other: padding must be told by the mask alone."""


def values(found: Statistics) -> dict[str, Tensor]:
    """Every C and G by a name of its own."""
    kept: dict[str, Tensor] = {}
    for name in found.names:
        for i in range(found.document.matrices[name].count):
            kept[f"{name}[{i}].C"] = found.inputs(name, i)
            G = found.curvature(name, i)
            if G is not None:
                kept[f"{name}[{i}].G"] = G
    return kept


def assert_alike(one: Statistics, other: Statistics) -> None:
    first, second = values(one), values(other)

    assert first.keys() == second.keys()
    for name, tensor in first.items():
        scale = float(tensor.abs().max())
        assert float((tensor - second[name]).abs().max()) <= 1e-5 * scale, name
    assert one.tokens == other.tokens
    assert one.document.loss == pytest.approx(other.document.loss, rel=1e-5)
    assert one.document.groups == other.document.groups


def write(path: Path, batch: dict[str, Tensor]) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in batch.items()}, path)
    return path


def padded(batch: dict[str, Tensor], side: str, count: int = 3) -> dict[str, Tensor]:
    """The same sequences with `count` tokens of padding on one side, and a mask that says so."""
    ids = batch["input_ids"]
    pad, ones = torch.full((len(ids), count), PAD), torch.ones_like(ids)
    parts, masks = [ids, pad], [ones, torch.zeros_like(pad)]
    if side == "left":
        parts, masks = parts[::-1], masks[::-1]
    found = batch | {"input_ids": torch.cat(parts, 1), "attention_mask": torch.cat(masks, 1)}
    if "labels" in batch and batch["labels"].ndim == 2:
        found["labels"] = torch.cat([batch["labels"], torch.full((len(ids), 2), -100)], 1)
    return found


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("llama", "right"),
        ("llama", "left"),
        ("gpt2", "right"),
        ("bert", "right"),
        ("t5", "right"),
        ("mixtral", "right"),
        ("mixtral", "left"),
        ("gpt_oss", "right"),
        ("llama4", "right"),
    ],
)
def test_padding_counts_for_nothing(name, side, tmp_path):
    """Neither in C, nor in G, nor among the tokens and rows; experts' rows included."""
    folder, batch, _, inputs = saved(name, tmp_path)
    plain = calibrate(folder, tmp_path / "plain", batch=batch)
    file = write(tmp_path / "padded.safetensors", padded(inputs, side))

    assert_alike(plain, calibrate(folder, tmp_path / "padded", batch=file))


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "vit", "t5"])
def test_how_the_text_is_cut_into_batches_does_not_matter(name, tmp_path, monkeypatch):
    """One sequence at a time, or all of them: the same sums."""
    folder, batch, _, _ = saved(name, tmp_path)
    monkeypatch.setattr(statistics, "MOST_TOKENS", 10**6)
    whole = calibrate(folder, tmp_path / "whole", batch=batch)
    monkeypatch.setattr(statistics, "MOST_TOKENS", 1)
    single = calibrate(folder, tmp_path / "single", batch=batch)

    assert (whole.document.options["sequences"], single.document.options["sequences"]) != (1, 1)
    assert_alike(whole, single)


def test_labels_that_are_drawn_depend_on_the_seed_and_the_sequence_alone(tmp_path, monkeypatch):
    """Not on how the sequences are batched."""
    folder, _, _, inputs = saved("bert", tmp_path)
    batch = write(tmp_path / "ids.safetensors", {"input_ids": inputs["input_ids"]})
    whole = calibrate(folder, tmp_path / "whole", batch=batch)
    other = calibrate(folder, tmp_path / "other", batch=batch, seed=1)
    monkeypatch.setattr(statistics, "MOST_TOKENS", 1)

    assert_alike(whole, calibrate(folder, tmp_path / "single", batch=batch))
    assert other.document.loss != whole.document.loss


def test_matrices_that_share_their_input_share_c(tmp_path):
    """q, k and v; gate and up; of experts the layer's, and a router's own."""
    folder, batch, _, _ = saved("qwen3_moe", tmp_path)
    found = calibrate(folder, tmp_path / "S", batch=batch)
    first = "model.layers.0."
    experts = {
        found.group(f"{first}mlp.experts.{e}.{part}_proj.weight")
        for e in range(3)
        for part in ("gate", "up")
    }
    down = [found.group(f"{first}mlp.experts.{e}.down_proj.weight") for e in range(3)]
    attention = {found.group(f"{first}self_attn.{part}_proj.weight") for part in "qkv"}

    assert [len(experts), len(attention), len({*down})] == [1, 1, 3]
    assert found.group(f"{first}self_attn.o_proj.weight") not in attention
    assert len(found.document.groups) == 2 * (1 + 1 + 1 + 1 + 3)


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt_oss"])
def test_a_memory_that_holds_few_sums_changes_no_byte(name, tmp_path):
    """Matrices are summed in several passes, to the very same files."""
    folder, batch, _, _ = saved(name, tmp_path)
    whole = calibrate(folder, tmp_path / "whole", batch=batch)
    plan = statistics.plan(folder, tmp_path / "plan", batch=batch, memory=14000)
    calibrate(folder, tmp_path / "few", batch=batch, memory=14000)

    assert len(plan.passes) >= 3
    assert all(one.nbytes <= 14000 for one in plan.passes)
    assert not plan.passes[-1].outputs
    assert whole.digest == open_statistics(tmp_path / "few").digest
    assert snapshot(tmp_path / "whole") == snapshot(tmp_path / "few")


def test_a_memory_too_small_for_one_sum_is_told_the_number(tmp_path):
    """Before anything is summed."""
    folder, batch, _, _ = saved("llama", tmp_path)

    with pytest.raises(ResourceError, match=r"--memory 1000 is .* 4608 bytes that [CG] of"):
        calibrate(folder, tmp_path / "S", batch=batch, memory=1000)
    assert not (tmp_path / "S").exists()


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    """Killed at every so many storage calls, with sums written down after every batch."""
    folder, batch, _, _ = saved("qwen3_moe", tmp_path)
    monkeypatch.setattr(statistics, "MOST_TOKENS", 36)
    monkeypatch.setattr(work, "PAUSE", 0.0)
    monkeypatch.setattr(work, "PATIENCE", 0)
    options = {"batch": batch, "memory": 20000}
    plain = calibrate(folder, tmp_path / "plain", **options)
    out, died = tmp_path / "killed", 0
    for number in (5, 60, 150, 300, 430, 10**6):
        died += in_a_process_killed_at(number, lambda: calibrate(folder, out, **options))

    assert died >= 4
    assert open_statistics(out).digest == plain.digest
    assert snapshot(out) == snapshot(tmp_path / "plain")
    assert not (tmp_path / "killed.eckart-work").exists()


def test_a_run_that_stopped_goes_on_where_it_was(tmp_path, monkeypatch):
    """Batches that are in the sums are not run again."""
    folder, batch, _, _ = saved("llama", tmp_path)
    monkeypatch.setattr(statistics, "MOST_TOKENS", 12)
    monkeypatch.setattr(work, "PAUSE", 0.0)
    monkeypatch.setattr(work, "PATIENCE", 0)
    plain = calibrate(folder, tmp_path / "plain", batch=batch)

    class Stop:
        advanced = 0

        def stage(self, title: str, seconds: float) -> None:
            assert (title, seconds) == ("pass 1 of 1", 72)

        def advance(self, seconds: float) -> None:
            self.advanced += seconds
            if self.advanced == 36:
                raise KeyboardInterrupt

        def note(self, text: str) -> None: ...

    with pytest.raises(KeyboardInterrupt) as stopped:
        calibrate(folder, tmp_path / "S", batch=batch, progress=Stop())
    again = Stop()
    again.advanced = 1000
    found = calibrate(folder, tmp_path / "S", batch=batch, progress=again)

    assert "run the same command again" in stopped.value.__notes__[0]
    assert again.advanced == 1000 + 72
    assert found.digest == plain.digest


def test_what_another_request_left_is_not_gone_on_with(tmp_path, monkeypatch):
    """It is named, and nothing is deleted."""
    folder, batch, _, _ = saved("llama", tmp_path)
    monkeypatch.setattr(work.Work, "publish", lambda self, staged: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        calibrate(folder, tmp_path / "S", batch=batch)
    monkeypatch.undo()

    with pytest.raises(StaleError, match="with another seed has summed"):
        calibrate(folder, tmp_path / "S", batch=batch, seed=1)
    assert calibrate(folder, tmp_path / "S", batch=batch).tokens == 72


def test_the_diagonal_is_that_of_the_whole_and_none_is_none(tmp_path):
    """Recorded for each matrix; C does not depend on it."""
    folder, batch, _, _ = saved("llama", tmp_path)
    full, diagonal, none = (
        calibrate(folder, tmp_path / kind, batch=batch, curvature=kind)
        for kind in ("full", "diagonal", "none")
    )

    for name in full.names:
        G = full.curvature(name)
        assert G is not None
        assert torch.allclose(diagonal.curvature(name), G.diagonal(), rtol=1e-5, atol=0)
        assert none.curvature(name) is None
        assert torch.equal(full.inputs(name), none.inputs(name))
        assert torch.equal(full.inputs(name), diagonal.inputs(name))
    kinds = [{m.curvature for m in s.document.matrices.values()} for s in (full, diagonal, none)]
    assert kinds == [{"full"}, {"diagonal"}, {"none"}]


def test_wide_outputs_take_the_diagonal(tmp_path, monkeypatch):
    """And a remark says which."""
    folder, batch, _, _ = saved("llama", tmp_path)
    monkeypatch.setattr(schedule, "WIDEST", 20)
    found = calibrate(folder, tmp_path / "S", batch=batch)
    wide = "model.layers.0.mlp.gate_proj.weight"

    assert found.document.matrices[wide].curvature == "diagonal"
    assert found.document.matrices["model.layers.0.mlp.down_proj.weight"].curvature == "full"
    assert any("only the diagonal" in one and wide in one for one in found.document.remarks)


def test_a_tied_head_is_the_matrix_that_its_embedding_is(tmp_path):
    """Stored once, as the embedding; multiplied by as the head."""
    config = tf.LlamaConfig(**SIZES, num_key_value_heads=1, tie_word_embeddings=True)
    model = tf.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "model")
    ids = torch.randint(0, 40, (6, 12))
    tokens = write(tmp_path / "ids.safetensors", {"any": ids})
    name = "model.embed_tokens.weight"
    found = calibrate(tmp_path / "model", tmp_path / "S", tokens=tokens, include=[name])
    with torch.no_grad():
        x = model.model(ids).last_hidden_state.reshape(-1, HIDDEN).double()

    assert found.names == [name]
    assert torch.allclose(found.inputs(name).double(), x.mT @ x / len(x), rtol=1e-4, atol=1e-5)
    assert found.curvature(name).shape == (40, 40)


def test_layers_that_a_model_calls_many_times_add_up(tmp_path):
    """ALBERT's one layer: C is the mean over all its inputs, G the sum over calls per token."""
    config = tf.AlbertConfig(
        vocab_size=40, embedding_size=8, hidden_size=16, num_hidden_layers=3,
        num_attention_heads=2, intermediate_size=24, num_labels=3,
    )  # fmt: skip
    tf.AlbertForSequenceClassification(config).save_pretrained(tmp_path / "model")
    batch = {"input_ids": torch.randint(0, 40, (4, 10)), "labels": torch.tensor([0, 1, 2, 0])}
    file = write(tmp_path / "batch.safetensors", batch)
    found = calibrate(tmp_path / "model", tmp_path / "S", batch=file)
    layer = next(name for name in found.names if name.endswith("ffn.weight"))

    assert found.document.groups[found.group(layer)].rows == 3 * 40
    assert found.tokens == 40


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_an_expert_that_saw_too_little_has_the_mean_of_its_layer(name, tmp_path):
    """Recorded by its number, with a remark."""
    folder, _, _, inputs = saved(name, tmp_path)
    few = write(tmp_path / "few.safetensors", {"input_ids": inputs["input_ids"][:1, :6]})
    found = calibrate(folder, tmp_path / "S", batch=few)
    matrices = found.document.matrices
    pooled = [(k, i) for k, m in matrices.items() for i in m.pooled if "down" in k]
    first = [pair for pair in pooled if ".layers.0." in pair[0]]

    assert len(first) >= 2
    assert torch.equal(found.inputs(*first[0]), found.inputs(*first[1]))
    assert torch.equal(found.curvature(*first[0]), found.curvature(*first[1]))
    assert any("have the mean of their layer" in remark for remark in found.document.remarks)


def test_fused_experts_are_each_a_matrix_of_the_stack(tmp_path):
    """gpt-oss: two 3-D tensors, stored (in, out); one C for the first, one each for the second."""
    folder, batch, model, inputs = saved("gpt_oss", tmp_path)
    found = calibrate(folder, tmp_path / "S", batch=batch)
    up, down = (f"model.layers.1.mlp.experts.{part}_proj" for part in ("gate_up", "down"))
    taken: list[tuple[Tensor, Tensor]] = []
    experts = model.model.layers[1].mlp.experts

    def forward(hidden, router_indices=None, routing_weights=None):
        out = torch.zeros_like(hidden)
        for e in range(3):
            rows, place = torch.where(router_indices == e)
            y = hidden[rows] @ experts.gate_up_proj[e] + experts.gate_up_proj_bias[e]
            inner = experts._apply_gate(y)
            taken.append((hidden[rows].detach(), inner.detach()))
            y = inner @ experts.down_proj[e] + experts.down_proj_bias[e]
            out = out.index_add(0, rows, y * routing_weights[rows, place, None])
        return out

    experts.forward = forward
    with torch.no_grad():
        model(**inputs)
    x = torch.cat([pair[0] for pair in taken]).double()

    assert found.document.matrices[up].shape == (2 * WIDE, HIDDEN)
    assert found.document.matrices[down].count == 3
    assert torch.allclose(found.inputs(up, 2).double(), x.mT @ x / len(x), rtol=1e-4, atol=1e-6)
    for e in range(3):
        z = taken[e][1].double()
        assert torch.allclose(
            found.inputs(down, e).double(), z.mT @ z / len(z), rtol=1e-4, atol=1e-6
        )
        assert found.curvature(up, e).shape == (2 * WIDE,)


def test_a_patch_projection_is_a_matrix_of_unfolded_patches(tmp_path):
    """A convolution of ViT, named by --include."""
    folder, batch, _, inputs = saved("vit", tmp_path)
    name = "vit.embeddings.patch_embeddings.projection.weight"
    found = calibrate(folder, tmp_path / "S", batch=batch, include=[name])
    x = torch.nn.functional.unfold(inputs["pixel_values"], 4, stride=4).mT.reshape(-1, 48).double()

    assert torch.allclose(found.inputs(name).double(), x.mT @ x / len(x), rtol=1e-5, atol=1e-6)
    assert found.document.groups[name].rows == 6 * 9
    assert found.tokens == 6
    assert found.curvature(name).shape == (HIDDEN, HIDDEN)


def test_what_text_and_tokens_say_is_what_a_batch_says(tmp_path):
    """--tokens FILE is the batch of its input_ids."""
    folder, batch, _, inputs = saved("llama", tmp_path)
    tokens = write(tmp_path / "tokens.safetensors", {"any": inputs["input_ids"].int()})

    assert_alike(
        calibrate(folder, tmp_path / "batch", batch=batch),
        calibrate(folder, tmp_path / "tokens", tokens=tokens),
    )


def test_a_model_in_memory_is_left_as_it_was(tmp_path):
    """Its parameters get gradients again, and its modes come back."""
    from eckart.statistics import calibrate_module

    model, inputs = build("llama")
    model.train()
    model.model.norm.eval()

    def loss(module: Any, batch: dict[str, Tensor]) -> Tensor:
        logits = module(**batch).logits[:, :-1]
        return torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none"
        )

    found = calibrate_module(model, [inputs], tmp_path / "S", loss=loss)
    folder, batch, _, _ = saved("llama", tmp_path)
    assert model.training
    assert not model.model.norm.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    other = calibrate(folder, tmp_path / "T", batch=batch)

    assert found.fingerprint == other.fingerprint
    assert (found.tokens, other.tokens) == (66, 72)  # predictions; tokens, of which six are last
    assert found.document.loss == pytest.approx(other.document.loss, rel=1e-6)
    for name in found.names:
        G, H = found.curvature(name), other.curvature(name)
        assert torch.allclose(found.inputs(name), other.inputs(name), rtol=1e-5, atol=1e-6)
        assert torch.allclose(G * 66, H * 72, rtol=1e-4, atol=1e-5 * float(H.max()))


def test_every_kind_of_model_has_statistics_that_open_again(tmp_path):
    """C symmetric without a negative direction, and finite, for every matrix of every kind."""
    for name in MODELS:
        folder, batch, _, _ = saved(name, tmp_path)
        found = calibrate(folder, tmp_path / f"{name}-S", batch=batch, curvature="diagonal")
        for matrix in found.names:
            C = found.inputs(matrix)
            assert torch.equal(C, C.mT)
            assert float(torch.linalg.eigvalsh(C.double())[0]) >= -1e-5 * float(C.diagonal().max())
