"""Inputs of both variants of a model, from the beginning or from the last block on."""

from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, model_of

from eckart.checkpoint.opening import open_source
from eckart.drift.order import order_of, stretches
from eckart.drift.relay import Relay
from eckart.families import matrices
from eckart.texts import Text
from eckart.trial import Trial

TEXT = Text({"input_ids": torch.arange(120).reshape(10, 12) * 7 % 96})
CHAINS = ("llama", "llama, tied", "qwen3", "phi3", "gpt2", "mixtral", "qwen3-moe", "gpt-oss")


def relay_of(kind: str, folder: Path) -> tuple[Relay, list]:
    model_of(kind).save_pretrained(folder)
    source = open_source(folder)
    trial = Trial(source, TEXT, names=matrices(source)[0])
    relay = Relay(trial, TEXT, "cpu")
    return relay, stretches(order_of(trial, matrices(source)[0], relay.first).groups)


@pytest.mark.parametrize("kind", CHAINS)
def test_decoders_are_chains_of_blocks(kind, tmp_path):
    """With a block and those before it replaced by its output, logits are the same."""
    assert kind in ARCHITECTURES
    relay, course = relay_of(kind, tmp_path / "model")

    assert relay.replays(course)
    assert all("forward" not in vars(one) for one in relay.trial.model.modules())


def test_a_model_that_looks_back_further_is_no_chain(tmp_path):
    """Where a later layer takes an earlier block's output, a shortcut would change it."""
    relay, course = relay_of("llama", tmp_path / "model")
    layers, seen = relay.trial.model.model.layers, []
    layers[0].register_forward_hook(lambda _, __, output: seen.append(output))
    layers[1].register_forward_hook(lambda _, __, output: output + 0.1 * seen[-1])

    assert not relay.replays(course)
    assert not relay.replays(course[::-1][:1] + course)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3-moe"])
def test_from_a_block_on_the_inputs_are_those_from_the_beginning(kind, tmp_path):
    """Bit for bit, of the model as it is and as it was changed; the text in its batches."""
    relay, course = relay_of(kind, tmp_path / "model")
    name = course[0].groups[0].names[0]
    dense = relay.trial.own[name].clone()
    changed = dense + 0.1
    group = course[1].groups[-1]
    before = [*relay.inputs(group, "dense")]
    relay.put(iter([(name, changed)]))
    after = [*relay.inputs(group, "changed")]
    outputs = {"changed": relay.pass_block(course[0].block, "changed")}
    relay.put(iter([(name, dense)]))
    outputs["dense"] = relay.pass_block(course[0].block, "dense")
    relay.behind(course[0].block, outputs)
    relay.put(iter([(name, torch.full_like(dense, torch.nan))]))  # never multiplied with again

    assert [len(rows) for rows in before] == [8 * 12, 2 * 12]
    for variant, expected in (("dense", before), ("changed", after)):
        found = [*relay.inputs(group, variant)]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not torch.equal(before[0], after[0])
