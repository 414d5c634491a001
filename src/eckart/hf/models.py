"""Models and tokenizers of folders, loaded whole or not at all.

Only classes of the installed transformers are used, never code from a checkpoint; nothing is
fetched.
"""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from eckart.checkpoint.documents import read_json
from eckart.checkpoint.paths import is_there, printable
from eckart.errors import CheckpointError, EckartError
from eckart.formats.manifest import METHOD

REFUSALS = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError)
"""What transformers raises on folders that it cannot load."""


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
    with quiet_transformers(), refusals(folder):
        model, report = model_class(folder).from_pretrained(
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
    """Returns the tokenizer of a model's folder; CheckpointError if there is none.

    transformers makes one without words for some models, which takes everything for unknown.
    """
    try:
        with quiet_transformers(), refusals(folder):
            found = transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    except CheckpointError:
        found = None
    files = [] if found is None else found.vocab_files_names.values()
    if not any(is_there(folder / name) for name in files):
        raise CheckpointError(
            f"{printable(folder)} has no tokenizer that transformers can load: give the text as "
            "--tokens FILE.safetensors, encoded."
        )
    return found


def model_class(folder: Path) -> Any:
    """Returns the class of a model: what config.json names, of the installed transformers."""
    if not folder.is_dir():
        raise CheckpointError(f"{printable(folder)} is not a folder: check the path.")
    if not is_there(folder / "config.json"):
        raise CheckpointError(
            f"{printable(folder)} has no config.json that says which model it is: transformers "
            "cannot load it."
        )
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
    except EckartError:  # said already, nearer to the place
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
