"""Likeness of predictions, against the formulas written out."""

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eckart.demonstration.scene import embedded
from eckart.errors import InputError
from eckart.evaluation import compare, perplexity
from eckart.texts import Text


@dataclass
class _Config:
    is_encoder_decoder: bool = False


@dataclass
class Output(dict):
    """As transformers' outputs are: a mapping."""

    logits: Any = None

    def __post_init__(self) -> None:
        if self.logits is not None:
            self["logits"] = self.logits


class Classifier(nn.Module):
    """Any model: of each token, or example, the logits are a row of a table."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table, self.config = table, _Config()

    def get_input_embeddings(self) -> nn.Module:
        """A module that tells how many tokens there are."""
        return nn.Embedding(*self.table.shape)

    def forward(self, input_ids: Tensor, **_: Tensor) -> Output:
        """Looks the row up."""
        return Output(self.table[input_ids])


class TableForCausalLM(Classifier):
    """… of the next token, by its name."""


def table(seed: int, rows: int = 7, classes: int = 7) -> Tensor:
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed))


IDS = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 0], [1, 1, 2, 6]])


def test_a_causal_model_is_measured_on_every_token_but_the_first():
    """KL, agreement, differences and losses by their definitions, over all sequences."""
    P, Q = table(0), table(1)
    found = compare(TableForCausalLM(P), {"q": TableForCausalLM(Q)}, Text({"input_ids": IDS}))
    before, after = IDS[:, :-1].flatten(), IDS[:, 1:].flatten()
    p, q = P[before].double().log_softmax(-1), Q[before].double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean()
    difference = (P[before] - Q[before]).double()
    ours, theirs = found["q"], found[""]

    assert ours.predictions == 9
    assert ours.divergence == pytest.approx(float(kl))
    assert ours.agreement == float((p.argmax(-1) == q.argmax(-1)).double().mean())
    assert ours.largest == pytest.approx(float(difference.abs().max()))
    assert ours.distance == pytest.approx(float(difference.norm()))
    assert ours.nats == pytest.approx(float(-q.gather(-1, after[:, None]).mean()))
    assert theirs.nats == pytest.approx(float(-p.gather(-1, after[:, None]).mean()))
    assert theirs.perplexity == pytest.approx(math.exp(theirs.nats))
    assert (theirs.divergence, theirs.agreement, theirs.largest, theirs.distance) == (0, 1, 0, 0)


def test_batches_of_any_size_give_the_same_sums(monkeypatch):
    """One sequence at a time, and three rows of logits at a time."""
    models = TableForCausalLM(table(0)), {"q": TableForCausalLM(table(1))}
    whole = compare(*models, Text({"input_ids": IDS}))["q"]
    monkeypatch.setattr("eckart.evaluation.TOKENS", 4)
    monkeypatch.setattr("eckart.evaluation.ENTRIES", 21)
    parts = compare(*models, Text({"input_ids": IDS}))["q"]

    assert parts.predictions == whole.predictions
    assert parts.divergence == pytest.approx(whole.divergence)
    assert parts.nats == pytest.approx(whole.nats)
    assert parts.agreement == whole.agreement


def test_masked_places_and_ignored_labels_do_not_count():
    """Padding is not predicted; labels of −100 have no loss, but their logits are compared."""
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    model, other = TableForCausalLM(table(0)), TableForCausalLM(table(1))
    masked = compare(model, {"q": other}, Text({"input_ids": IDS, "attention_mask": mask}))["q"]
    labels = IDS.masked_fill(mask == 0, -100)
    ignored = compare(model, {"q": other}, Text({"input_ids": IDS, "labels": labels}))["q"]

    assert masked.predictions == 6
    assert ignored.predictions == 9
    assert ignored.nats == pytest.approx(masked.nats)
    with pytest.raises(InputError, match="every place of the batch is masked"):
        compare(model, {}, Text({"input_ids": IDS, "attention_mask": torch.zeros_like(mask)}))


def test_other_models_are_compared_place_by_place():
    """No next token: labels where they fit, and no loss where there are none."""
    model, other, labels = Classifier(table(0)), Classifier(table(1)), torch.tensor([1, 2, 0])
    ids = IDS[:, 0]
    found = compare(model, {"q": other}, Text({"input_ids": ids, "labels": labels}))["q"]
    without = compare(model, {"q": other}, Text({"input_ids": ids}))["q"]
    loss = nn.functional.cross_entropy(table(1)[ids].double(), labels)

    assert found.predictions == without.predictions == 3
    assert found.nats == pytest.approx(float(loss))
    assert without.nats is None
    assert without.perplexity is None


def test_logits_that_are_not_finite_are_told_apart_by_whose_they_are():
    """The model's fail it; the reference's leave nothing to compare with."""
    broken = table(0)
    broken[2, 3] = math.nan
    text = Text({"input_ids": IDS})
    found = compare(TableForCausalLM(table(0)), {"q": TableForCausalLM(broken)}, text)["q"]

    assert not found.finite
    assert math.isnan(found.divergence)
    assert found.perplexity is None
    with pytest.raises(InputError, match="TableForCausalLM, the reference, are not finite"):
        compare(TableForCausalLM(broken), {}, text)


@dataclass
class Headless(Output):
    """An output without logits."""

    hidden: list[int] = field(default_factory=list)


class Encoder(Classifier):
    """A model without a head."""

    def forward(self, input_ids: Tensor) -> Output:
        """Says nothing."""
        return Headless()


def test_what_cannot_be_compared_is_a_sentence():
    """No logits, another vocabulary, unknown tokens, arguments that forward does not take."""
    model, text = TableForCausalLM(table(0)), Text({"input_ids": IDS})
    with pytest.raises(InputError, match="Encoder has no logits that could be compared"):
        compare(Encoder(table(0)), {}, text)
    with pytest.raises(InputError, match=r"different shapes.*3, 4, 7.* and .*3, 4, 8"):
        compare(model, {"q": TableForCausalLM(table(0, classes=8))}, text)
    with pytest.raises(InputError, match="the token 6, but the model's vocabulary has 6"):
        compare(TableForCausalLM(table(0, rows=6)), {}, text)
    with pytest.raises(InputError, match=r"Encoder cannot be run on the text: .*pixels"):
        compare(Encoder(table(0)), {}, Text({"input_ids": IDS, "pixels": IDS}))


def test_a_perplexity_beyond_all_floats_is_infinite():
    """The loss is told all the same."""
    sure = torch.full((7, 7), -1e6)
    sure[:, 3] = 1e6
    found = compare(TableForCausalLM(sure), {}, Text({"input_ids": IDS[:1, :3]}))[""]

    assert found.nats > 1e6
    assert found.perplexity == math.inf


def test_the_perplexity_of_a_folder_is_that_of_transformers_own_loss(tmp_path):
    """The embedded model on its held-out text, window by window."""
    transformers = pytest.importorskip("transformers")
    folder, text = embedded("models", "base"), embedded("texts", "base-heldout.txt")
    found = perplexity(folder, text, windows=3)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt")["input_ids"][0]
    windows = ids[: 3 * 256].reshape(3, 256)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        loss = model(input_ids=windows, labels=windows).loss

    assert found.tokens == 3 * 255
    assert found.nats == pytest.approx(float(loss), rel=1e-5)
    assert found.value == pytest.approx(math.exp(found.nats))
