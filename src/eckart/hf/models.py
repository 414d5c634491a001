"""Models and tokenizers of folders, loaded whole or not at all.

Only classes of the installed transformers are used, never code from a checkpoint; nothing is
fetched.
"""

import math
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from eckart.checkpoint.documents import read_json
from eckart.checkpoint.paths import printable
from eckart.errors import CheckpointError, InputError, UsageError
from eckart.formats.manifest import METHOD

WINDOW = 256
"""Tokens per evaluated sequence; each is read afresh, without overlap."""

REFUSALS = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError)
"""What transformers raises on folders that it cannot load."""


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
    ids = load_tokenizer(folder)(text.read_text(encoding="utf-8"), return_tensors="pt")
    model = load_dense(folder)
    return _perplexity(model, ids["input_ids"][0][: windows and windows * window], window)


def load_dense(
    folder: Path, *, dtype: torch.dtype | None = torch.float32, allow_pickle: bool = False
) -> Any:
    """Returns the model of an ordinary checkpoint: see `load_model`; a factored one is refused."""
    if not folder.is_dir():
        raise CheckpointError(f"{printable(folder)} is not a folder: check the path.")
    stated = read_json(folder / "config.json").get("quantization_config")
    if isinstance(stated, dict) and stated.get("quant_method") == METHOD:
        raise CheckpointError(
            f"{printable(folder)} is factored: give the model that it was made from."
        )
    return load_model(folder, dtype=dtype, allow_pickle=allow_pickle)


def load_model(
    folder: Path, *, dtype: torch.dtype | None = torch.float32, allow_pickle: bool = False
) -> Any:
    """Returns the model of a checkpoint, dense or factored, in evaluation mode.

    Its class is the one that config.json names as `architectures`, where the installed
    transformers has it. `dtype` None is the checkpoint's own. Raises CheckpointError where the
    class is unknown, or a weight of it is not in the folder (transformers would fill it at
    random).
    """
    with quiet_transformers() as transformers, refusals(folder):
        model, report = model_class(folder, transformers).from_pretrained(
            folder,
            dtype=dtype or "auto",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=None if allow_pickle else True,
            output_loading_info=True,
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{printable(folder)} lacks {len(missing)} weights of {type(model).__name__}, such as "
            f"{printable(missing[0])}: download it again."
        )
    return model.eval()


def load_tokenizer(folder: Path) -> Any:
    """Returns the tokenizer of a model's folder; CheckpointError if there is none."""
    with quiet_transformers() as transformers, refusals(folder):
        return transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )


def model_class(folder: Path, transformers: Any) -> Any:
    """Returns the class of a model: what config.json names, of the installed transformers."""
    if not folder.is_dir():
        raise CheckpointError(f"{printable(folder)} is not a folder: check the path.")
    config = read_json(folder / "config.json")
    named = config.get("architectures")
    if not isinstance(named, list) or not named:
        return transformers.AutoModelForCausalLM
    found = getattr(transformers, str(named[0]), None)
    base = transformers.PreTrainedModel
    if not (isinstance(found, type) and issubclass(found, base)):
        raise CheckpointError(
            f"{printable(folder)} is a {printable(named[0])}, which the installed transformers "
            f"{transformers.__version__} does not have: code from a checkpoint is never run."
        )
    return found


@contextmanager
def refusals(folder: Path) -> Generator[None]:
    """Turns what transformers raises over a folder into one sentence that names it."""
    try:
        yield
    except (UsageError, InputError):
        raise
    except REFUSALS as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"transformers cannot load {printable(folder)}: {printable(lines[0]).rstrip('.')}."
        ) from None


@contextmanager
def quiet_transformers() -> Generator[Any]:
    """Yields the transformers package with its progress bars off."""
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
