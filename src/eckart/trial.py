"""A model that is run with other matrices in the place of its own: what that costs it, measured.

Knows the model and a text; must not know where the matrices come from.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eckart.calibration.prediction import Pretrained
from eckart.checkpoint.paths import printable
from eckart.checkpoint.source import Source
from eckart.errors import CheckpointError, InputError
from eckart.evaluation import IGNORED, Predicted, logits_of, predictions
from eckart.linalg.divergence import divergence_between
from eckart.linalg.threads import computing_on
from eckart.renaming import Place, places_of
from eckart.texts import Text

MOST = 32
"""Sequences that are held out: their logits are kept."""

LEAST = 10
"""Sequences of a text of which a tenth can be held out."""

THREADS = ((2**24, 1), (2**28, 2))
"""For a model of up to so many parameters; 4 for a larger one. Whatever the machine has: the same
threads give the same bits, and so the same choice."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a changed model is, on the tokens held out."""

    divergence: float  # KL(dense ‖ changed), in nats per prediction
    loss: float | None  # at the true labels, in nats per prediction; None where there are none


TOGETHER = 8
"""Sequences of a batch."""

FITTED = 2**16
"""Tokens of the rest that are fitted to, at most: more would say little else of a drift."""


def held_out(text: Text) -> Text:
    """Returns the last tenth of a text's sequences, `MOST` of them at most.

    InputError where there are too few to hold any out, or a sequence of tokens predicts nothing.
    """
    alone = {*text.inputs} == {"input_ids"}
    if text.sequences < LEAST or (alone and text.length < 2):
        raise InputError(
            f"the text has {text.sequences} sequences of {text.length} tokens: a tenth is held "
            f"out, so that at least {LEAST} of two or more are needed."
            if alone
            else f"the batch has {text.sequences} examples: a tenth is held out, so that at least "
            f"{LEAST} are needed."
        )
    return text.split(text.sequences - min(text.sequences // 10, MOST))[1]


def fitted_to(text: Text) -> Text:
    """Returns the sequences that are not held out, from the first on, `FITTED` tokens at most."""
    rest = text.sequences - held_out(text).sequences
    return text.split(min(rest, max(1, FITTED // text.length)))[0]


def batches_of(text: Text, device: str) -> list[dict[str, Tensor]]:
    """Returns a text's inputs, a few sequences at a time, where they are computed on."""
    return [
        {name: tensor.to(device) for name, tensor in batch.items()}
        for batch in text.batches(TOGETHER)
    ]


class Trial:
    """A dense model and its logits on some inputs, to compare with.

    Memory: the model in float32, and the logits in float32.
    """

    def __init__(
        self,
        source: Source,
        text: Text,
        *,
        names: Iterable[str],
        device: str = "cpu",
        threads: int | None = None,
        allow_pickle: bool = False,
    ) -> None:
        from eckart.hf import load_dense  # transformers, when it is needed

        self.model: Any = load_dense(source.path, allow_pickle=allow_pickle)
        self.threads = threads or _threads_for(self.model.num_parameters())
        places, reasons = places_of(self.model, source, names)
        if reasons:
            name, why = next(iter(sorted(reasons.items())))
            raise CheckpointError(
                f"{printable(name)} of {printable(source.path)} cannot be tried out in "
                f"{type(self.model).__name__} ({why}): compress without a text."
            )
        self.places, self.device, self.digest = places, device, text.digest
        self.model.to(device)
        state: dict[str, Tensor] = self.model.state_dict()
        rows = {name: source.tensors[name].shape[0] for name in places}
        self.own = {name: _piece(state, place, rows[name]) for name, place in places.items()}
        self.predictor = Pretrained(self.model, 0, draws=False)
        self.batches = batches_of(text, device)
        self.predictor.check(self.batches[0])
        with computing_on(self.threads):
            self.predicted = [self._predicted(batch) for batch in self.batches]
        if not self.tokens:
            raise InputError("there is nothing to predict: every place that is held out is masked.")
        self.dense = self._outcome(one.logits[""] for one in self.predicted)

    @property
    def tokens(self) -> int:
        """How many predictions are compared."""
        return sum(len(one.logits[""]) for one in self.predicted)

    def rise(self, outcome: Outcome) -> float | None:
        """Returns how far the loss is above the dense model's; None where there are no labels."""
        if outcome.loss is None or self.dense.loss is None:
            return None
        return outcome.loss - self.dense.loss

    def outcome(self, changed: Iterable[tuple[str, Tensor]]) -> Outcome:
        """Returns what the model is with these tensors instead of its own, which are put back.

        Cost: a forward pass over the tokens, and a copy of what is changed.
        """
        before = dict[str, Tensor]()
        try:
            for name, tensor in changed:
                before[name] = self.own[name].clone()
                self.own[name].copy_(tensor)
            with computing_on(self.threads):
                return self._outcome(self._predicted(b).logits[""] for b in self.batches)
        finally:
            for name, tensor in before.items():
                self.own[name].copy_(tensor)

    def _predicted(self, batch: Mapping[str, Tensor]) -> Predicted:
        """The rows of the logits that count, in float32."""
        logits = logits_of(self.model, self.predictor.arguments(batch))
        return predictions(self.model, batch, {"": logits.float()})

    def _outcome(self, logits: Iterable[Tensor]) -> Outcome:
        divergence, loss, labelled = 0.0, 0.0, 0
        for dense, ours in zip(self.predicted, logits, strict=True):
            log_p, log_q = dense.logits[""].log_softmax(-1), ours.log_softmax(-1)
            divergence += divergence_between(log_p, log_q)
            if dense.labels is not None:
                known = dense.labels != IGNORED
                picked = log_q[known].gather(-1, dense.labels[known, None])
                loss -= float(picked.sum(dtype=torch.float64))
                labelled += len(picked)
        if not math.isfinite(divergence + loss):
            raise InputError("the model's logits are not finite on this text: check the model.")
        mean = loss / labelled if labelled else None
        return Outcome(max(divergence, 0.0) / self.tokens, mean)


def _threads_for(parameters: int) -> int:
    return next((threads for most, threads in THREADS if parameters <= most), 4)


def _piece(state: Mapping[str, Tensor], place: Place, rows: int) -> Tensor:
    """The part of a parameter that one tensor of the checkpoint became, in the model's memory."""
    whole = state[place.parameter]
    return (whole if place.expert is None else whole[place.expert])[place.row : place.row + rows]
