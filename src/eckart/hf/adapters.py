"""A base with an adapter on it, as PEFT loads it: all of the adapter, or nothing."""

import warnings
from pathlib import Path
from typing import Any

import torch

from eckart.checkpoint.header import read_header
from eckart.checkpoint.paths import printable
from eckart.errors import DependencyError, PromiseError
from eckart.formats.peft import CONFIG, WEIGHTS
from eckart.hf.models import load_model, refusals


def require_peft() -> Any:
    """Returns the peft package; DependencyError where it is not installed."""
    try:
        import peft
    except ImportError:
        raise DependencyError(
            "an adapter is run by peft, which is not installed: pip install 'eckart[hf,peft]'."
        ) from None
    return peft


def load_adapted(
    base: Path,
    adapter: Path,
    *,
    dtype: torch.dtype | None = torch.float32,
    allow_pickle: bool = False,
) -> Any:
    """Returns the base with the adapter beside its weights, in evaluation mode.

    PEFT only warns of what it did not find, and is silent over what it found no place for; here
    both are a PromiseError that names the tensor.
    """
    peft = require_peft()
    model = load_model(base, dtype=dtype, allow_pickle=allow_pickle)
    with refusals(adapter), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.PeftConfig.from_pretrained(str(adapter), local_files_only=True)
        adapted = peft.PeftModel.from_pretrained(model, str(adapter), config=config)
        held = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    stored = read_header(adapter / WEIGHTS)
    wanted = {name for name in held if ".lora_" in name}  # biases that did not change are not there
    for name in sorted((wanted - stored.keys()) | (stored.keys() - held.keys())):
        what = "has no place for" if name in stored else "finds no"
        raise PromiseError(
            f"{printable(adapter / CONFIG)} and {WEIGHTS} do not fit the base: PEFT {what} "
            f"{printable(name)}."
        )
    return adapted.get_base_model().eval()
