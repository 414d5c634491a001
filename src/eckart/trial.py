"""A model that is run with other matrices in the place of its own: what that costs it, measured.

Knows the model and a text; must not know where the matrices come from.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eckart.checkpoint.paths import printable
from eckart.checkpoint.source import Source
from eckart.errors import CheckpointError, InputError
from eckart.linalg.divergence import divergence_between
from eckart.linalg.threads import computing_on
from eckart.renaming import Place, places_of
from eckart.texts import Text, check_vocabulary

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

    divergence: float  # KL(dense ‖ changed), in nats per predicted token
    loss: float  # at the true labels, in nats per predicted token


FITTED = 2**16
"""Tokens of the rest that are fitted to, at most: more would say little else of a drift."""


def held_out(text: Text) -> Text:
    """Returns the last tenth of a text's sequences, `MOST` of them at most.

    InputError where there are too few to hold any out, or a sequence predicts nothing.
    """
    tokens = text.inputs["input_ids"]
    if text.sequences < LEAST or tokens.shape[1] < 2:
        raise InputError(
            f"the text has {text.sequences} sequences of {tokens.shape[1]} tokens: a tenth is held "
            f"out, so that at least {LEAST} of two or more are needed."
        )
    return text.split(text.sequences - min(text.sequences // 10, MOST))[1]


def fitted_to(text: Text) -> Text:
    """Returns the sequences that are not held out, from the first on, `FITTED` tokens at most."""
    rest, length = text.sequences - held_out(text).sequences, text.inputs["input_ids"].shape[1]
    return text.split(min(rest, max(1, FITTED // length)))[0]


class Trial:
    """A dense causal language model and its logits on some tokens, to compare with.

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
        tokens = text.inputs["input_ids"].to(device)
        check_vocabulary(tokens, int(self.model.get_input_embeddings().weight.shape[0]))
        self.batches = tokens.split(8)
        with computing_on(self.threads), torch.no_grad():
            self.logits = [self._logits(batch) for batch in self.batches]
        self.dense = self._outcome(self.logits)

    @property
    def tokens(self) -> int:
        """How many are predicted."""
        return sum(batch[:, 1:].numel() for batch in self.batches)

    def outcome(self, changed: Iterable[tuple[str, Tensor]]) -> Outcome:
        """Returns what the model is with these tensors instead of its own, which are put back.

        Cost: a forward pass over the tokens, and a copy of what is changed.
        """
        before = dict[str, Tensor]()
        try:
            for name, tensor in changed:
                before[name] = self.own[name].clone()
                self.own[name].copy_(tensor)
            with computing_on(self.threads), torch.no_grad():
                return self._outcome(self._logits(batch) for batch in self.batches)
        finally:
            for name, tensor in before.items():
                self.own[name].copy_(tensor)

    def _logits(self, batch: Tensor) -> Tensor:
        return self.model(input_ids=batch, use_cache=False).logits[:, :-1].float()

    def _outcome(self, logits: Iterable[Tensor]) -> Outcome:
        divergence = loss = 0.0
        for batch, theirs, ours in zip(self.batches, self.logits, logits, strict=True):
            log_p, log_q = theirs.log_softmax(-1), ours.log_softmax(-1)
            divergence += divergence_between(log_p, log_q)
            picked = log_q.gather(-1, batch[:, 1:, None])
            loss -= float(picked.sum(dtype=torch.float64))
        if not math.isfinite(loss):
            raise InputError("the model's logits are not finite on this text: check the model.")
        return Outcome(max(divergence, 0.0) / self.tokens, loss / self.tokens)


def _threads_for(parameters: int) -> int:
    return next((threads for most, threads in THREADS if parameters <= most), 4)


def _piece(state: Mapping[str, Tensor], place: Place, rows: int) -> Tensor:
    """The part of a parameter that one tensor of the checkpoint became, in the model's memory."""
    whole = state[place.parameter]
    return (whole if place.expert is None else whole[place.expert])[place.row : place.row + rows]
