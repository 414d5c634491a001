"""What an output computes on a text, beside what it was made from: measured, not promised.

Knows which models belong to an output; must not know how they are run.
"""

import math
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eckart.certificate import Certificate
from eckart.checkpoint.documents import read_json
from eckart.checkpoint.paths import is_there, printable
from eckart.errors import CheckpointError, InputError, PromiseError, UsageError
from eckart.evaluation import Likeness, compare
from eckart.execute import Progress
from eckart.formats.peft import CONFIG
from eckart.texts import Text, check_vocabulary, open_text
from eckart.verification.check import Check


@dataclass(frozen=True, slots=True)
class TextOptions:
    """Where a text comes from, and how the models are run on it."""

    text: Path | None = None
    tokens: Path | None = None
    batch: Path | None = None
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @property
    def is_given(self) -> bool:
        """Whether there is any."""
        return any(path is not None for path in (self.text, self.tokens, self.batch))

    def open(self, model: Path) -> Text | None:
        """Returns the text; `model` is the folder whose tokenizer and vocabulary it is.

        Refuses whatever can be told before a model is loaded.
        """
        found = open_text(model, text=self.text, tokens=self.tokens, batch=self.batch)
        known = read_json(model / "config.json")
        part = known.get("text_config")
        size = {**known, **(part if isinstance(part, dict) else {})}.get("vocab_size")
        if found is not None and isinstance(size, int) and "input_ids" in found.inputs:
            check_vocabulary(found.inputs["input_ids"], size)
        return found


@dataclass(frozen=True, slots=True)
class Roles:
    """The folders that an output's text is run through."""

    out: Path
    source: Path  # what it was made from: SRC, TUNED, or of an applied one the adapter
    base: Path | None


RUN = ("factored", "dense", "adapter", "applied")
"""Kinds of outputs that can be run on a text, against what they were made from."""


def check_runs(certificate: Certificate, roles: Roles) -> None:
    """Raises, before any work, for what cannot be run: by its kind, the packages, config.json."""
    kind, out = certificate.kind, printable(roles.out)
    if kind not in RUN:
        raise UsageError(f"{out} is no model and has no base ({kind}): leave the text out.")
    if certificate.options.get("subtract"):
        raise UsageError(
            f"an adapter was taken out of {out}, and PEFT only adds them: leave the text out."
        )
    from eckart.hf import model_class, require_peft

    if roles.base is not None:
        require_peft()
        adapter = roles.out if kind == "adapter" else roles.source
        if not is_there(adapter / CONFIG):
            raise UsageError(
                f"{printable(adapter)} is no folder that PEFT loads: convert it with --for peft, "
                "or leave the text out."
            )
    for folder in (roles.base, None if kind == "applied" else roles.source):
        if folder is not None:
            model_class(folder)


def checks_of_outputs(
    certificate: Certificate,
    roles: Roles,
    text: Text,
    options: TextOptions,
    *,
    allow_pickle: bool,
    watch: Progress,
) -> Iterator[Check]:
    """Yields what the same inputs give through the output and through what it was made from.

    Every model is loaded by transformers in the same dtype. Only logits that are not finite fail.
    """
    from eckart.hf import load_adapted, load_model

    settings: dict[str, Any] = {"dtype": options.dtype, "allow_pickle": allow_pickle}
    is_adapter = certificate.kind == "adapter"
    name, origin = "base + adapter" if is_adapter else "the output", None
    models = dict[str, Any]()
    if not is_adapter:
        with _of_the_output():
            models[name] = load_model(roles.out, **settings)
    if roles.base is None:
        reference = load_model(roles.source, **settings)
    else:
        origin = "base"
        models[origin] = load_model(roles.base, **settings)
        added = load_adapted(roles.base, roles.out if is_adapter else roles.source, **settings)
        reference = load_model(roles.source, **settings) if is_adapter else added
        models |= {name: added} if is_adapter else {}
    for model in (reference, *models.values()):
        model.to(options.device)
    found = compare(reference, models, text, device=options.device, watch=watch)
    if origin is not None and not found[origin].finite:
        raise InputError(
            f"the logits of {printable(roles.base)}, the base, are not finite: there is nothing "
            "to compare with."
        )
    yield from rows_of(found, name, origin)


@contextmanager
def _of_the_output() -> Generator[None]:
    """What is wrong with the output itself breaks its promise."""
    try:
        yield
    except CheckpointError as error:
        raise PromiseError(str(error)) from None


def rows_of(found: Mapping[str, Likeness], name: str, origin: str | None) -> Iterator[Check]:
    """Yields the rows of a comparison: of `name`, and beside it of what the change began with."""
    ours, theirs = found[name], found[""]
    before = None if origin is None else found[origin]
    if not ours.finite:
        yield Check("outputs", held=False, detail=f"the logits of {name} are not finite")
        return
    if before is not None:
        yield _change(ours, before)
    if theirs.nats is not None and ours.nats is not None:
        yield _perplexity(ours, theirs, before)
    figures = {
        "divergence": ours.divergence,
        "agreement": ours.agreement,
        "largest_difference": ours.largest,
        "predictions": float(ours.predictions),
    }
    beside = ("", "")
    if before is not None:
        figures |= {"base_divergence": before.divergence, "base_agreement": before.agreement}
        beside = (f" (base {before.divergence:.3g})", f" (base {100 * before.agreement:.2f} %)")
    yield Check(
        "outputs",
        held=True,
        detail=f"KL {ours.divergence:.3g} nats{beside[0]}, the likeliest is the same in "
        f"{100 * ours.agreement:.2f} %{beside[1]}, the largest logit difference is "
        f"{ours.largest:.3g}; over {ours.predictions:,} predictions",
        figures=figures,
    )


def _change(ours: Likeness, before: Likeness) -> Check:
    """How far the logits are off, against how far the change moved them."""
    if before.distance == 0:
        return Check("logits", held=True, detail="what was added changes no logit on this text")
    share = ours.distance / before.distance
    detail = f"the logits are off by {100 * share:.3g} % of what was changed"
    return Check("logits", held=True, detail=detail, figures={"relative_logit_error": share})


def _perplexity(ours: Likeness, theirs: Likeness, before: Likeness | None) -> Check:
    assert ours.nats is not None
    assert theirs.nats is not None
    values = {"perplexity": ours.perplexity, "reference_perplexity": theirs.perplexity}
    values["added_nats"] = ours.nats - theirs.nats
    start = ""
    if before is not None and before.perplexity is not None:
        values["base_perplexity"] = before.perplexity
        start = f"; base {before.perplexity:.4f}"
    detail = (
        f"{theirs.perplexity:.4f} → {ours.perplexity:.4f} "
        f"({ours.nats - theirs.nats:+.4f} nats per token{start})"
    )
    figures = {k: v for k, v in values.items() if v is not None and math.isfinite(v)}
    return Check("perplexity", held=True, detail=detail, figures=figures)
