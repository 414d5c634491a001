"""The order in which models multiply by their matrices, seen and not known."""

from pathlib import Path

import pytest
from architectures import IDS, model_of

from eckart.checkpoint.opening import open_source
from eckart.drift.order import Group, order_of, stretches
from eckart.families import matrices
from eckart.texts import Text
from eckart.trial import Trial

LLAMA = [
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
]
GPT2 = [("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)]
PHI3 = [("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)]


def trial_of(kind: str, folder: Path) -> Trial:
    model_of(kind).save_pretrained(folder)
    source = open_source(folder)
    return Trial(source, Text({"input_ids": IDS}), names=matrices(source)[0])


@pytest.mark.parametrize(
    ("kind", "layers", "expected"),
    [
        ("llama", "model.layers", LLAMA),
        ("gpt2", "transformer.h", GPT2),
        ("phi3", "model.layers", PHI3),
    ],
)
def test_groups_come_in_forward_order(kind, layers, expected, tmp_path):
    """Matrices that share their input together, whatever their names; block after block."""
    trial = trial_of(kind, tmp_path / "model")
    order = order_of(trial, matrices(open_source(tmp_path / "model"))[0], {"input_ids": IDS[:1]})
    found = [{*group.names} for group in order.groups if group.block]

    assert found == [
        {f"{layers}.{i}.{name}.weight" for name in names} for i in range(2) for names in expected
    ]
    assert order.left_out == {}
    assert {group.calls for group in order.groups} == {1}
    blocks = [stretch.block for stretch in stretches(order.groups) if stretch.block]
    assert blocks == [f"{layers}.0", f"{layers}.1"]


def test_experts_are_left_out_with_the_reason(tmp_path):
    """Another model routes other tokens to them: their inputs are no pairs."""
    trial = trial_of("mixtral", tmp_path / "model")
    order = order_of(trial, matrices(open_source(tmp_path / "model"))[0], {"input_ids": IDS[:1]})
    names = {name for group in order.groups for name in group.names}

    assert order.left_out
    assert all("experts" in name for name in order.left_out)
    assert not any(".experts." in name for name in names)
    assert "a router sends them" in next(iter(order.left_out.values()))


def test_a_block_that_is_come_back_to_is_a_stretch_of_its_own():
    """Stretches are in forward order, never sorted."""
    groups = [Group((f"{b}.w",), (f"{b}.w", None), 1, 1) for b in ("h.1", "h.0", "h.1")]

    assert [stretch.block for stretch in stretches(groups)] == ["h.1", "h.0", "h.1"]
