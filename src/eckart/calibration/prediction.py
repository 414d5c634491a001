"""What a model predicts of a batch, and what each prediction costs, in nats.

Knows transformers' conventions by their names (`input_ids`, `labels`, `.logits`), and imports none
of it: anything that is called alike will do.
"""

import inspect
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812 as everybody calls it
from torch import Tensor, nn

from eckart.calibration.observation import Rows
from eckart.checkpoint.paths import printable
from eckart.errors import InputError
from eckart.linalg.matrices import named_generator
from eckart.texts import check_vocabulary

Batch = Mapping[str, Tensor]

IGNORED = -100
"""The label that counts for nothing."""

CAUSAL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""How the classes end whose logits are of the next place, where there is no encoder before."""


class Model(Protocol):
    """What calibration runs: it knows batches, padding, and a loss."""

    @property
    def module(self) -> Any:
        """What computes."""
        ...

    def mask(self, batch: Any) -> Tensor | None:
        """Which entries of the sequences (B×T) are no padding; None: all."""
        ...

    def tokens(self, batch: Any, predictions: int) -> int:
        """How many tokens a loss in nats per token counts, where so many were predicted."""
        ...

    def losses(self, batch: Any, first: int, rows: Rows) -> Tensor | None:
        """Runs it: the loss of every prediction, or None where there is none to be had.

        `first` is the number of the batch's first sequence.
        """
        ...


@dataclass(frozen=True, slots=True)
class Pretrained:
    """A model of transformers on `forward`'s arguments."""

    module: Any
    seed: int
    draws: bool = True  # labels, where there are none; or else there is no loss

    def mask(self, batch: Batch) -> Tensor | None:
        """The attention mask of the sequences that predict: of decoders, by the labels."""
        if not self._has_encoder:
            return _as_mask(batch.get("attention_mask"))
        labels = batch.get("labels")
        if labels is not None and labels.ndim == 2:
            return _as_mask(labels != IGNORED)
        return _as_mask(batch.get("decoder_attention_mask"))

    def tokens(self, batch: Batch, predictions: int = 0) -> int:
        """Unmasked tokens; of a decoder behind an encoder its own; of anything else, examples."""
        mask = self.mask(batch)
        if mask is not None:
            return int(mask.sum())
        names = ("labels", "decoder_input_ids") if self._has_encoder else ("input_ids",)
        return next(
            (batch[k].numel() for k in names if k in batch), len(next(iter(batch.values())))
        )

    def losses(self, batch: Batch, first: int, rows: Rows) -> Tensor | None:
        """Cross-entropy at the labels: those given, a text's next tokens, or drawn ones."""
        labels, mask = batch.get("labels"), self.mask(batch)
        output = self.run(batch, rows)
        logits = getattr(output, "logits", None)
        if not isinstance(logits, Tensor):
            return None
        if self._next_tokens(batch):
            return _next_token(logits, batch["input_ids"] if labels is None else labels, mask)
        if labels is None and not self.draws:
            return None
        if labels is None:
            self._check_classes(logits)
            return _at_labels(logits, _drawn(logits, self.seed, first), mask)
        if labels.shape == logits.shape[:-1] and not labels.is_floating_point():
            return _at_labels(logits, labels, None)
        loss: Tensor = output.loss  # a mean over examples, of a kind that only the model knows
        return loss.reshape(1).expand(examples(batch))

    def run(self, batch: Batch, rows: Rows) -> Any:
        """Returns what the module makes of a batch."""
        with self._encoder_rows(batch, rows):
            return self.module(**self.arguments(batch))

    def arguments(self, batch: Batch) -> dict[str, Any]:
        """Returns what `forward` is given: nothing is generated, so that no cache is kept."""
        given: dict[str, Any] = dict(batch)
        if self._next_tokens(batch):
            given.pop("labels", None)  # or the model would compute the same loss, and a mean of it
        if "use_cache" in inspect.signature(self.module.forward).parameters:
            given.setdefault("use_cache", False)
        return given

    def check(self, batch: Batch) -> None:
        """Raises InputError for what `forward` does not take, or tokens it does not know."""
        known = inspect.signature(self.module.forward).parameters
        for name in batch:
            if name not in known:
                some = ", ".join(k for k, p in known.items() if p.kind is not p.VAR_KEYWORD)
                raise InputError(
                    f"{type(self.module).__name__} takes no argument {printable(name)}: it takes "
                    f"{some}."
                )
        embedding = self.module.get_input_embeddings() if "input_ids" in batch else None
        if isinstance(embedding, nn.Embedding):
            check_vocabulary(batch["input_ids"], embedding.num_embeddings)

    @property
    def _has_encoder(self) -> bool:
        return bool(self.module.config.is_encoder_decoder)

    @property
    def _is_causal(self) -> bool:
        return not self._has_encoder and type(self.module).__name__.endswith(CAUSAL)

    def _next_tokens(self, batch: Batch) -> bool:
        return self._is_causal and ("labels" in batch or "input_ids" in batch)

    def _check_classes(self, logits: Tensor) -> None:
        if logits.shape[-1] == 1:
            raise InputError(
                f"{type(self.module).__name__} predicts a number, not a class: labels cannot be "
                "drawn from that. Give labels in --batch, or take --curvature none."
            )

    @contextmanager
    def _encoder_rows(self, batch: Batch, rows: Rows) -> Generator[None]:
        """While the encoder runs, padding is that of its own sequences; so it is of its output."""
        if not self._has_encoder:
            yield
            return
        mask = _as_mask(batch.get("attention_mask"))
        after = rows.mask

        def enter(*_: object) -> None:
            rows.mask = mask

        def leave(module: nn.Module, inputs: object, output: Any) -> None:
            rows.mask = after
            rows.remember(output[0], None if mask is None else mask.reshape(-1))

        encoder = self.module.get_encoder()
        hooks = encoder.register_forward_pre_hook(enter), encoder.register_forward_hook(leave)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


@dataclass(frozen=True, slots=True)
class Custom:
    """Any module, and a loss that the user wrote: `loss(module, batch)` for each prediction."""

    module: nn.Module
    loss: Callable[[nn.Module, Any], Tensor] | None

    def mask(self, batch: Any) -> Tensor | None:
        """The `attention_mask` of a batch that is a mapping and has one."""
        return _as_mask(batch.get("attention_mask")) if isinstance(batch, Mapping) else None

    def tokens(self, batch: Any, predictions: int) -> int:
        """The predictions that the loss is of; without a loss, examples."""
        return predictions or examples(batch)

    def losses(self, batch: Any, first: int, rows: Rows) -> Tensor | None:
        """What the user's loss says; without one, the module is only run."""
        if self.loss is None:
            if isinstance(batch, Mapping):
                self.module(**batch)
            else:
                self.module(*batch) if isinstance(batch, tuple) else self.module(batch)
            return None
        found = self.loss(self.module, batch)
        if not isinstance(found, Tensor) or found.ndim == 0:
            raise InputError(
                "loss(module, batch) must return the loss of each prediction, a tensor of one or "
                "more dimensions, not their sum or mean: use reduction='none'."
            )
        return found.reshape(-1)


def examples(batch: Any) -> int:
    """Returns how many examples a batch has: the first side of its first tensor."""
    values = [*batch.values()] if isinstance(batch, Mapping) else batch
    first = values[0] if isinstance(values, list | tuple) else values
    return len(first)


def _next_token(logits: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
    """Each place's logits against the token behind it, where both are no padding."""
    pair = None if mask is None else mask[:, :-1] & mask[:, 1:]
    return _at_labels(logits[:, -labels.shape[1] : -1], labels[:, 1:], pair)


def _at_labels(logits: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
    """Cross-entropy in nats of each prediction that counts."""
    if mask is not None and mask.shape == labels.shape:
        labels = labels.masked_fill(~mask, IGNORED)
    flat = labels.reshape(-1)
    count = logits.shape[-1]
    if bool((flat >= count).any()):
        raise InputError(
            f"the labels hold the class {int(flat.max())}, but the model has {count}: they were "
            "made for another one."
        )
    rows = logits.reshape(-1, count)
    losses = F.cross_entropy(rows.float(), flat, reduction="none", ignore_index=IGNORED)
    return losses[flat != IGNORED]


@torch.no_grad()
def _drawn(logits: Tensor, seed: int, first: int) -> Tensor:
    """Labels from the model's own distribution; every sequence has a generator of its own."""
    found = [
        torch.multinomial(
            one.detach().float().cpu().softmax(-1).reshape(-1, one.shape[-1]),
            1,
            generator=named_generator(seed, f"labels {first + i}"),
        ).reshape(one.shape[:-1])
        for i, one in enumerate(logits)
    ]
    return torch.stack(found).to(logits.device)


def _as_mask(tensor: Tensor | None) -> Tensor | None:
    """A padding mask that hides something, as booleans."""
    if tensor is None or tensor.ndim != 2 or bool(tensor.all()):
        return None
    return tensor.bool()
