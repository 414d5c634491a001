"""C and G of every matrix of every kind of model, against float64 sums over tokens by hand."""

import re
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 as everybody calls it
from torch import Tensor, nn

pytest.importorskip("transformers")
from models import MODELS, saved
from transformers.pytorch_utils import Conv1D

from eckart.checkpoint.statistics import Statistics, open_statistics
from eckart.statistics import calibrate

MODULES = {  # from the names in files to those in memory
    "vit": [
        (
            r"vit\.encoder\.layer\.(\d+)\.attention\.attention\.query",
            r"vit.layers.\1.attention.q_proj",
        ),
        (
            r"vit\.encoder\.layer\.(\d+)\.attention\.attention\.key",
            r"vit.layers.\1.attention.k_proj",
        ),
        (
            r"vit\.encoder\.layer\.(\d+)\.attention\.attention\.value",
            r"vit.layers.\1.attention.v_proj",
        ),
        (
            r"vit\.encoder\.layer\.(\d+)\.attention\.output\.dense",
            r"vit.layers.\1.attention.o_proj",
        ),
        (r"vit\.encoder\.layer\.(\d+)\.intermediate\.dense", r"vit.layers.\1.mlp.fc1"),
        (r"vit\.encoder\.layer\.(\d+)\.output\.dense", r"vit.layers.\1.mlp.fc2"),
    ],
    "mixtral": [
        (r"block_sparse_moe", "mlp"),
        (r"\.w1$", ".gate_proj"),
        (r"\.w3$", ".up_proj"),
        (r"\.w2$", ".down_proj"),
    ],
}


@dataclass
class Tape:
    """Inputs and gradients of one matrix, one row for each token."""

    x: list[Tensor] = field(default_factory=list)
    y: list[Tensor] = field(default_factory=list)

    def moments(self, tokens: int, keep: Tensor | None = None) -> tuple[Tensor, Tensor, int]:
        x = torch.cat([one.detach().reshape(-1, one.shape[-1]) for one in self.x])
        g = torch.cat([one.grad.reshape(-1, one.shape[-1]) for one in self.y])
        if keep is not None and len(x) == keep.numel():
            x, g = x[keep.reshape(-1)], g[keep.reshape(-1)]
        return x.mT @ x / len(x), g.mT @ g / tokens, len(x)


def record(tapes: dict[str, Tape], name: str, x: Tensor, y: Tensor) -> Tensor:
    if not y.requires_grad:
        y.requires_grad_()
    y.retain_grad()
    tape = tapes.setdefault(name, Tape())
    tape.x.append(x)
    tape.y.append(y)
    return y


def experts_by_hand(tapes: dict[str, Tape], name: str, module: Any):
    """The mixture's sum, expert by expert and each of its layers apart."""

    def forward(hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        for e in range(module.num_experts):
            where, which = torch.where(chosen == e)
            if len(where) == 0:
                continue
            x = hidden[where]
            gate_W, up_W = module.gate_up_proj[e].chunk(2)
            gate = record(tapes, f"{name}.{e}.gate_proj", x, F.linear(x, gate_W))
            up = record(tapes, f"{name}.{e}.up_proj", x, F.linear(x, up_W))
            inner = module.act_fn(gate) * up
            y = record(tapes, f"{name}.{e}.down_proj", inner, F.linear(inner, module.down_proj[e]))
            out = out.index_add(0, where, y * weights[where, which, None])
        return out

    return forward


def oracle(model: Any, batch: dict[str, Tensor], losses) -> tuple[dict[str, Tape], Tensor]:
    """Runs the model in float64 with every linear layer taped, and the loss backward."""
    model = model.double()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    tapes: dict[str, Tape] = {}
    for name, module in model.named_modules():
        router = name.endswith(("mlp.gate", "router")) and hasattr(module, "weight")
        if isinstance(module, nn.Linear | Conv1D):
            module.register_forward_hook(lambda m, x, y, name=name: record(tapes, name, x[0], y))
        elif name.endswith("experts"):
            module.forward = experts_by_hand(tapes, name, module)
        elif router:
            module.register_forward_hook(lambda m, x, y, name=name: routed(tapes, name, x, y))
    inputs = {k: t.double() if t.is_floating_point() else t for k, t in batch.items()}
    total = losses(model, inputs)
    total.sum().backward()
    return tapes, total


def routed(tapes, name, x, y):
    logits = record(tapes, name, x[0].reshape(-1, x[0].shape[-1]), y[0])
    return (logits, *y[1:])


def next_token(model, inputs):
    given = {k: t for k, t in inputs.items() if k != "labels"}
    logits, ids = model(**given).logits[:, :-1], inputs["input_ids"][:, 1:].clone()
    mask = inputs.get("attention_mask")
    if mask is not None:
        ids[~(mask[:, 1:].bool() & mask[:, :-1].bool())] = -100
    return F.cross_entropy(logits.transpose(1, 2), ids, reduction="none", ignore_index=-100)


def classes(model, inputs):
    given = {k: t for k, t in inputs.items() if k != "labels"}
    return F.cross_entropy(model(**given).logits, inputs["labels"], reduction="none")


def sequence(model, inputs):
    logits = model(**inputs).logits
    return F.cross_entropy(logits.transpose(1, 2), inputs["labels"], reduction="none")


STACKED = ("gpt_oss", "llama4")
"""Whose files hold stacks: see test_calibration."""

LOSSES = {"bert": classes, "vit": classes, "t5": sequence}


def check(name: str, found: Statistics, tapes: dict[str, Tape], keep: Tensor | None = None):
    for matrix in found.names:
        entry = found.document.matrices[matrix]
        module = matrix.removesuffix(".weight")
        for pattern, replacement in MODULES.get(name, []):
            module = re.sub(pattern, replacement, module)
        C, G, _ = tapes[module].moments(found.tokens, keep)
        if ".experts." in matrix and not module.endswith("down_proj"):
            layer = [
                t
                for k, t in tapes.items()
                if k.rpartition(".experts.")[0] == module.rpartition(".experts.")[0]
                and k.endswith("gate_proj")
            ]
            x = torch.cat([one for tape in layer for one in tape.x]).detach()
            C = x.mT @ x / len(x)
        if entry.curvature == "diagonal":
            G = G.diagonal()
        close(found.inputs(matrix), C, f"C of {matrix}")
        close(found.curvature(matrix), G, f"G of {matrix}")


def close(found: Tensor, exact: Tensor, what: str):
    scale = float(exact.abs().max())

    assert found.shape == exact.shape, what
    assert scale > 0, what
    assert float((found.double() - exact).abs().max()) <= 2e-5 * scale, what


@pytest.mark.parametrize("name", [name for name in MODELS if name not in STACKED])
def test_c_and_g_are_those_of_float64_sums_over_tokens(name, tmp_path):
    """Every matrix that the default rule finds, under its name in the file."""
    folder, batch, model, inputs = saved(name, tmp_path)
    found = calibrate(folder, tmp_path / "S", batch=batch)
    tapes, losses = oracle(model, inputs, LOSSES.get(name, next_token))

    check(name, found, tapes)
    assert found.document.loss == pytest.approx(float(losses.detach().mean()), rel=1e-5)
    assert found.document.left_out == []
    assert found.names == open_statistics(tmp_path / "S").names
