"""What a compression is tried on: a batch of forward's arguments, for models that read no text."""

from pathlib import Path

import pytest
import torch
from architectures import model_of
from builders import eckart, read_document
from safetensors.torch import save_file

from eckart import calibrate, compress, densify, verify
from eckart.checkpoint.opening import open_source
from eckart.drift.order import order_of, stretches
from eckart.drift.relay import Relay
from eckart.errors import InputError, UsageError
from eckart.families import matrices
from eckart.hf import load_dense
from eckart.texts import Text, open_text
from eckart.trial import Trial, fitted_to, held_out

COUNT = 20


def batch_of(kind: str) -> dict[str, torch.Tensor]:
    """Twenty examples: tokens with padding, images, or tokens and what follows from them."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 96, (COUNT, 12), generator=generator)
    mask = (torch.arange(12) < torch.randint(4, 13, (COUNT, 1), generator=generator)).long()
    return {
        "bert": {"input_ids": ids, "attention_mask": mask},
        "vit": {"pixel_values": torch.randn(COUNT, 3, 16, 16, generator=generator)},
        "t5": {"input_ids": ids, "attention_mask": mask, "labels": ids[:, :5].contiguous()},
        "llama": {"input_ids": ids, "attention_mask": mask},
    }[kind]


def written(kind: str, folder: Path) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """A model, a batch for it, and the batch's own tensors."""
    model, path, batch = folder / "model", folder / "batch.safetensors", batch_of(kind)
    made = model_of(kind)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1 and kind in ("bert", "llama"):
                parameter.mul_(10)  # as they are drawn, they hardly decide what is said
    made.save_pretrained(model)
    save_file(batch, path)
    return model, path, batch


@pytest.mark.parametrize("kind", ["bert", "vit", "t5", "llama"])
def test_any_model_is_tried_on_a_batch(kind, tmp_path):
    """What is certified of the held-out tenth is what transformers says of what was written."""
    model, path, batch = written(kind, tmp_path)
    S = calibrate(model, tmp_path / "S", batch=path, curvature="full").folder
    out = tmp_path / "out"
    compress(model, out, keep=0.5, statistics=S, batch=path)
    loss, tenth = read_document(out)["loss"], {k: t[-2:] for k, t in batch.items()}
    densify(out, tmp_path / "plain")
    p, q = (
        load_dense(folder)(**tenth).logits.detach().log_softmax(-1)
        for folder in (model, tmp_path / "plain")
    )
    rows = (p.exp() * (p - q)).sum(-1)
    if kind == "llama":  # the next token of every place that is no padding
        rows = rows[:, :-1][tenth["attention_mask"][:, 1:].bool()]

    assert loss["divergence"] == pytest.approx(float(rows.mean()), rel=1e-3)
    assert loss["tokens"] == rows.numel()
    assert (loss["measured"] is None) == (kind in ("bert", "vit"))
    assert loss["drift"]["divergence"] > 0
    assert loss["allocation"] in loss["candidates"]
    assert all(check.held for check in verify(out, model, statistics=S))


def test_the_rise_at_labels_is_that_of_the_models_own_loss(tmp_path):
    """Of an encoder–decoder: cross-entropy at the labels that were given."""
    model, path, batch = written("t5", tmp_path)
    trial = Trial(open_source(model), held_out(opened(path)), names=[])

    with torch.no_grad():
        own = load_dense(model)(**{k: t[-2:] for k, t in batch.items()}).loss
    assert trial.dense.loss == pytest.approx(float(own), rel=1e-5)


@pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
def test_padding_is_not_fitted_to(kind, tmp_path):
    """Rows of a matrix's inputs are those of the tokens that the mask leaves in."""
    model, path, batch = written(kind, tmp_path)
    source, text = open_source(model), opened(path)
    targets = matrices(source)[0]
    relay = Relay(Trial(source, held_out(text), names=targets), fitted_to(text), "cpu")
    groups = [
        g
        for one in stretches(order_of(relay.trial, targets, relay.first).groups)
        for g in one.groups
    ]
    query = next(g for g in groups if any(("q" in n.split(".")[-2]) for n in g.names))
    rows = torch.cat([*relay.inputs(query, "dense")])

    assert len(rows) == int(batch["attention_mask"][:18].sum())


def test_a_loss_needs_labels_and_a_tenth_needs_examples(tmp_path):
    """One sentence for each, and nothing is written."""
    model, path, batch = written("bert", tmp_path)
    S = calibrate(model, tmp_path / "S", batch=path).folder
    few = tmp_path / "few.safetensors"
    save_file({k: t[:9].contiguous() for k, t in batch.items()}, few)
    line = ("compress", model, "-o", tmp_path / "out", "--statistics", S)

    with pytest.raises(InputError, match="add `labels` to --batch"):
        compress(model, tmp_path / "out", loss=0.1, statistics=S, batch=path)
    with pytest.raises(InputError, match="the batch has 9 examples"):
        compress(model, tmp_path / "out", keep=0.5, statistics=S, batch=few)
    with pytest.raises(UsageError, match="name two texts"):
        compress(model, tmp_path / "out", keep=0.5, statistics=S, batch=path, tokens=path)
    assert eckart(*line, "--loss", 0.1, "--dry-run").code == 2
    assert eckart(*line, "--keep", 0.5, "--batch", path, "--dry-run").code == 0
    assert not (tmp_path / "out").exists()


def opened(path: Path) -> Text:
    found = open_text(path, batch=path)
    assert found is not None
    return found
