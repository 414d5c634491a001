"""What models predict of a text, measured: perplexity, and how far two of them are apart.

Knows models by what they are called with and what they return; must not know files.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eckart.errors import InputError
from eckart.execute import Progress, Silent
from eckart.linalg.divergence import divergence_between
from eckart.texts import Text, check_vocabulary, tokenize

TOKENS = 4096
"""Of a batch, at most: logits are large, and two models' are held at once."""

ENTRIES = 2**22
"""Of the logits that are compared at a time, in float64."""

IGNORED = -100
"""The label of what is not to be predicted."""

CAUSAL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""How the classes end that predict the next token, where no encoder comes before."""

MISUSE = (IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""What a model raises on inputs that it cannot take."""


@dataclass(frozen=True, slots=True)
class Likeness:
    """How a model's predictions compare to a reference's, over all that was predicted."""

    predictions: int
    divergence: float  # mean KL(reference ‖ model), in nats
    agreement: float  # the share in which the likeliest class is the same
    largest: float  # |difference of two logits|
    distance: float  # ‖logits − the reference's‖_F
    nats: float | None  # mean loss at the true labels; None where there are none
    finite: bool

    @property
    def perplexity(self) -> float | None:
        """exp of the mean loss; infinite beyond what a float holds."""
        if self.nats is None:
            return None
        return math.exp(self.nats) if self.nats < 700 else math.inf


@dataclass(frozen=True, slots=True)
class Perplexity:
    """exp of the mean loss per predicted token."""

    value: float
    nats: float
    tokens: int


@dataclass(slots=True)
class _Sums:
    """Likeness as it is being summed up."""

    predictions: int = 0
    labelled: int = 0
    agreed: int = 0
    divergence: float = 0.0
    squares: float = 0.0
    nats: float = 0.0
    largest: float = 0.0
    finite: bool = True

    def add(self, p: Tensor, logits: Tensor, reference: Tensor, labels: Tensor | None) -> None:
        """Adds some predictions: p = log softmax of the reference."""
        self.predictions += len(logits)
        difference = logits - reference
        if not bool(difference.isfinite().all()):
            self.finite = False
            return
        q = logits.log_softmax(-1)
        self.divergence += divergence_between(p, q)
        self.agreed += int((logits.argmax(-1) == reference.argmax(-1)).sum())
        self.squares += float(difference.square().sum())
        self.largest = max(self.largest, float(difference.abs().max()))
        if labels is not None:
            known = labels != IGNORED
            self.labelled += int(known.sum())
            self.nats -= float(q[known].gather(-1, labels[known, None]).sum())

    def total(self) -> Likeness:
        """Returns the means."""
        count = self.predictions
        unknown = math.nan
        return Likeness(
            predictions=count,
            divergence=max(self.divergence / count, 0.0) if self.finite else unknown,
            agreement=self.agreed / count if self.finite else unknown,
            largest=self.largest if self.finite else unknown,
            distance=math.sqrt(self.squares) if self.finite else unknown,
            nats=self.nats / self.labelled if self.labelled and self.finite else None,
            finite=self.finite,
        )


def compare(
    reference: Any,
    models: Mapping[str, Any],
    text: Text,
    *,
    device: str = "cpu",
    watch: Progress | None = None,
) -> dict[str, Likeness]:
    """Returns how far each model's predictions are from those of the reference, which is "".

    A causal language model predicts every token but the first of a sequence; of any other the
    logits are compared as they are, and the loss is that at `labels` of the batch, where they
    fit. Places that `attention_mask` leaves out do not count. Sums in float64. Memory: the
    models, and one batch's logits of each. Raises InputError for a model without logits, inputs
    that it cannot take, or a reference whose own logits are not finite.
    """
    running = {"": reference, **models}
    sums = {name: _Sums() for name in running}
    size = max(1, TOKENS // text.length)
    progress = watch or Silent()
    progress.stage("running the models", text.sequences)
    for batch in text.batches(size):
        moved = {name: tensor.to(device) for name, tensor in batch.items()}
        outputs = {name: logits_of(model, moved) for name, model in running.items()}
        rows = predictions(reference, moved, outputs)
        for part in _parts(rows):
            theirs = part.logits[""]
            if not bool(theirs.isfinite().all()):
                raise InputError(
                    f"the logits of {type(reference).__name__}, the reference, are not finite: "
                    "there is nothing to compare with."
                )
            p = theirs.log_softmax(-1)
            for name in running:
                sums[name].add(p, part.logits[name], theirs, part.labels)
        progress.advance(len(next(iter(batch.values()))))
    if not sums[""].predictions:
        raise InputError("there is nothing to predict: every place of the batch is masked.")
    return {name: one.total() for name, one in sums.items()}


@torch.no_grad()
def logits_of(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Returns a model's logits; InputError where it has none, or cannot take the batch."""
    name = type(model).__name__
    embedding = model.get_input_embeddings() if "input_ids" in batch else None
    if isinstance(embedding, torch.nn.Embedding):
        check_vocabulary(batch["input_ids"], embedding.num_embeddings)
    try:
        output = model(**batch)
    except MISUSE as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise InputError(f"{name} cannot be run on the text: {said}.") from None
    logits = output.get("logits") if isinstance(output, Mapping) else None
    if not isinstance(logits, Tensor):
        raise InputError(
            f"{name} has no logits that could be compared: give checkpoints of a model with a "
            "head, as config.json names it."
        )
    return logits


@dataclass(frozen=True, slots=True)
class Predicted:
    """Predictions that count, one a row, of every model, and what would have been right."""

    logits: dict[str, Tensor] = field(repr=False)
    labels: Tensor | None


def predictions(
    model: Any, batch: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
) -> Predicted:
    """Returns the rows of the logits that count, and the labels they should have given."""
    first = next(iter(outputs.values()))
    shapes = {tuple(logits.shape) for logits in outputs.values()}
    if len(shapes) > 1:
        raise InputError(
            f"the models' logits have different shapes, {' and '.join(map(str, sorted(shapes)))}: "
            "they cannot be compared."
        )
    labels, mask = batch.get("labels"), batch.get("attention_mask")
    taken = {**outputs}
    if is_causal(model) and "input_ids" in batch:
        labels = (batch["input_ids"] if labels is None else labels)[:, 1:]
        mask = None if mask is None else mask[:, 1:]
        taken = {name: logits[:, :-1] for name, logits in taken.items()}
        first = next(iter(taken.values()))
    places = first.shape[:-1]
    keep = torch.ones(places, dtype=torch.bool, device=first.device)
    if mask is not None and mask.shape == places:
        keep = mask.bool()
    fits = labels is not None and labels.shape == places and not labels.is_floating_point()
    return Predicted(
        {name: logits[keep] for name, logits in taken.items()},
        labels[keep].long() if labels is not None and fits else None,
    )


def is_causal(model: Any) -> bool:
    """Returns whether a model predicts the next token, by the name of its class."""
    return type(model).__name__.endswith(CAUSAL) and not model.config.is_encoder_decoder


def perplexity(folder: Path, text: Path, *, windows: int | None = None) -> Perplexity:
    """Returns the perplexity of a causal language model on a text file.

    By the model's own tokenizer, in windows as `tokenize` cuts them, the first `windows` of them;
    in float32, whatever the dtype of the weights. Needs the `hf` extra.
    """
    from eckart.hf import load_model

    ids = tokenize(text, folder)[:windows]
    found = compare(load_model(folder), {}, Text({"input_ids": ids}))[""]
    assert found.nats is not None
    assert found.perplexity is not None
    return Perplexity(found.perplexity, found.nats, found.predictions)


def _parts(rows: Predicted) -> Iterator[Predicted]:
    """The rows in float64, a few at a time."""
    first = next(iter(rows.logits.values()))
    step = max(1, ENTRIES // max(1, first.shape[-1]))
    for start in range(0, len(first), step):
        some = slice(start, start + step)
        logits = {name: part[some].double() for name, part in rows.logits.items()}
        yield Predicted(logits, None if rows.labels is None else rows.labels[some])
