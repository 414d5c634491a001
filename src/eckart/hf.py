"""The edge to transformers: the only module that imports it, and only when called.

Only classes of the installed transformers are used, never code from a checkpoint.
"""

import math
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eckart.errors import InputError, UsageError

WINDOW = 256
"""Tokens per evaluated sequence; each is read afresh, without overlap."""


@dataclass(frozen=True, slots=True)
class Perplexity:
    """exp of the mean loss per predicted token."""

    value: float
    nats: float
    tokens: int


def perplexity(
    folder: Path, text: Path, *, window: int = WINDOW, windows: int | None = None
) -> Perplexity:
    """Returns the perplexity of a dense causal language model on a text file.

    The text is encoded with the model's own tokenizer and cut into windows of `window` tokens;
    the last, incomplete one is dropped, and so is what follows the first `windows`. Computed in
    float32, whatever the dtype of the weights. Needs the `hf` extra.
    """
    with quiet_transformers() as transformers:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        ids = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt")["input_ids"][0]
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32
        )
        return _perplexity(model.eval(), ids[: windows and windows * window], window)


@contextmanager
def quiet_transformers() -> Generator[Any]:
    """Yields the transformers package with its progress bars off, or says how to install it."""
    try:
        import transformers
    except ImportError:
        raise UsageError(
            "this needs transformers, which is not installed: pip install 'eckart[hf]'."
        ) from None
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield transformers
    finally:
        if shown:
            logging.enable_progress_bar()


@torch.no_grad()
def _perplexity(model: Any, ids: Tensor, window: int) -> Perplexity:
    count = len(ids) // window
    if count == 0:
        raise InputError(f"the text has {len(ids)} tokens: at least {window} are needed.")
    nats = 0.0
    for batch in ids[: count * window].reshape(count, window).split(16):
        logits = model(input_ids=batch).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="sum"
        )
        nats += float(loss)
    tokens = count * (window - 1)
    return Perplexity(math.exp(nats / tokens), nats / tokens, tokens)
