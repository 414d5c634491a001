"""The edge to transformers: importing this registers the loader of factored checkpoints.

After `import eckart.hf`, `AutoModel….from_pretrained(OUT)` loads what `eckart compress` wrote:
its factors stay factors. Only classes of the installed transformers are used, never code from a
checkpoint. Nothing else in eckart imports transformers, and nothing imports this before it is
needed.
"""

try:
    import transformers as _  # noqa: F401 whether it is installed
except ImportError as error:
    from eckart.errors import DependencyError

    raise DependencyError(
        f"this needs transformers, which cannot be imported ({str(error).partition(chr(10))[0]}): "
        "pip install 'eckart[hf]'."
    ) from None

from eckart.hf.adapters import load_adapted, require_peft
from eckart.hf.models import (
    load_dense,
    load_model,
    load_tokenizer,
    model_class,
    quiet_transformers,
)
from eckart.hf.quantizer import EckartConfig, EckartQuantizer, register

register()

__all__ = [
    "EckartConfig",
    "EckartQuantizer",
    "load_adapted",
    "load_dense",
    "load_model",
    "load_tokenizer",
    "model_class",
    "quiet_transformers",
    "require_peft",
]
