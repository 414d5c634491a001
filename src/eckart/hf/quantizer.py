"""The quantizer plugin by which transformers loads, saves and multiplies out format 1.

Knows transformers' quantizer interface; must not know how checkpoints are made.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from eckart.certificate import FactoredEntry
from eckart.checkpoint.header import read_header
from eckart.checkpoint.paths import printable
from eckart.checkpoint.source import Checkpoint, Source
from eckart.errors import CheckpointError, UsageError
from eckart.formats import dense, factored
from eckart.formats.manifest import METHOD, guards, parse_manifest
from eckart.hf.naming import (
    Destination,
    destinations,
    stored_names,
    with_products,
    without_products,
)
from eckart.nn import FactoredLayer
from eckart.surgery import factored_layer, fill_dense

PARTS = r"\.((A|B|K)\.weight|perm)$"
"""Factors of layers that are multiplied out: the loader need not report them."""


class EckartConfig(QuantizationConfigMixin):
    """`quantization_config` of a factored checkpoint: what is factored, by the files' names."""

    def __init__(self, **stated: Any) -> None:
        self.factored = parse_manifest({"quant_method": METHOD, "factored": {}, **stated})
        self.quant_method: Any = METHOD

    def to_dict(self) -> dict[str, Any]:
        """Returns what config.json holds."""
        return factored.quantization_config(self.factored)


@dataclass(frozen=True, slots=True)
class Layer:
    """A factored layer's entry, and the dense layer (without values) in whose place it stands."""

    entry: FactoredEntry
    original: nn.Module


@dataclass(frozen=True, slots=True)
class Plan:
    """A checkpoint's factored tensors: those whose layers stay so, and the others."""

    source: Source
    model: Any
    kept: Mapping[str, str]  # guard → module
    dense: Mapping[str, FactoredEntry]  # by guard

    def multiply(self, name: str) -> Tensor | None:
        """Returns the product of a guard that is to be dense; float64, rounded once."""
        if name not in self.dense:
            return None
        dtype = self.source.tensors[name].dtype
        return torch.cat([*dense.encode(self.source, name, self.dense[name], dtype)])

    @property
    def biases(self) -> dict[str, str]:
        """The biases that go back to their own names."""
        modules = {factored.module_of(name) for name in self.dense}
        moved = {f"{X}.B.bias": f"{X}.bias" for X in modules}
        return {stored: name for stored, name in moved.items() if stored in self.source.tensors}


class EckartQuantizer(HfQuantizer):
    """Puts factored layers into a model before its weights are loaded.

    Linear layers, GPT-2's Conv1D and convolutions stay factored. What else is factored on disk
    (experts that the model stacks, projections it fuses, embeddings, layers that are not simply
    called) is multiplied out as it is loaded: the disk is saved, the memory is not.
    """

    requires_calibration = True
    quantization_config: EckartConfig

    def __init__(self, quantization_config: EckartConfig, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self.layers: dict[str, Layer] = {}
        self.plan: Plan | None = None

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **_: Any
    ) -> Any:
        _check_alone(model.config, self.quantization_config)
        source = _open(checkpoint_files)
        found = guards(source, self.quantization_config.factored)
        goes = destinations(model, source.tensors)
        tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
        kept = dict[str, str]()
        for name, entry in found.items():
            place = goes.get(name)
            if place is None or place.group is not None or place.name in tied:
                continue
            module, _dot, part = place.name.rpartition(".")
            original = model.get_submodule(module)
            layer = factored_layer(original, entry) if part == "weight" else None
            if layer is not None:
                model.set_submodule(module, layer)
                self.layers[module], kept[name] = Layer(entry, original), module
        self._put_back_strays(model, source, kept)
        rest = {name: entry for name, entry in found.items() if name not in kept and name in goes}
        self.plan = Plan(source, model, kept, rest)
        if rest:
            ignored = model._keys_to_ignore_on_load_unexpected or set()
            model._keys_to_ignore_on_load_unexpected = {*ignored, PARTS}
        return model

    def _put_back_strays(self, model: Any, source: Source, kept: dict[str, str]) -> None:
        """A layer stays factored only if the loader's renaming brings all of its parts to it."""
        goes = destinations(model, source.tensors)
        for name, module in [*kept.items()]:
            X = factored.module_of(name)
            parts = model.get_submodule(module).state_dict()
            right = (
                Destination(f"{module}.{part}", None) == goes.get(f"{X}.{part}") for part in parts
            )
            if not all(right):
                model.set_submodule(module, self.layers.pop(module).original)
                del kept[name]

    def update_weight_conversions(
        self, weight_conversions: list[Any], model: Any = None
    ) -> list[Any]:
        """Returns the loader's conversions, with what is to be dense multiplied out first.

        Only later versions of transformers tell the model: it is the one that was prepared.
        """
        assert self.plan is not None, "the loader asks for conversions after it made the model"
        plan = self.plan
        if not plan.dense:
            return weight_conversions
        return with_products(
            weight_conversions,
            plan.model,
            [*plan.source.tensors],
            guards=plan.dense.keys(),
            biases=plan.biases,
            multiply=plan.multiply,
        )

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        model._weight_conversions = without_products(model._weight_conversions)
        for name in self.layers:
            _check_factors(name, model.get_submodule(name))
        self.plan = None
        # Nothing here is quantized: `.half()` and training are as of any other model.
        model.is_quantized = False
        self._update_manifest(model)
        return model

    def _update_manifest(self, model: Any) -> None:
        """What config.json says when the model is saved: the layers that are factored now."""
        entries = {
            f"{name}.weight": layer.entry
            for name, layer in self.layers.items()
            if isinstance(model.get_submodule(name), FactoredLayer)
        }
        stored = stored_names(model, entries)
        self.quantization_config.factored = {
            factored.module_of(stored[name]): entry for name, entry in entries.items()
        }

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        """Returns nothing of its own: factored layers have the format's state, guards included."""
        if not getattr(model, "_hf_peft_config_loaded", False):
            self._update_manifest(model)
        return None, {}

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        for name, layer in self.layers.items():
            current = model.get_submodule(name)
            if isinstance(current, FactoredLayer):
                if current.A.weight.is_meta:
                    raise UsageError(
                        f"{name} is offloaded to disk: load the model without offloading to "
                        "multiply its factors out, or use eckart densify."
                    )
                model.set_submodule(name, fill_dense(layer.original, current, layer.entry))
        self.layers = {}
        wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        return model if wanted in (None, model.dtype) else model.to(wanted)

    def is_serializable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """`save_pretrained` writes format 1 again."""
        return True

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Factors train."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """… all of them, not only adapters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """They are plain layers of torch."""
        return True


def register() -> None:
    """Makes the plugin known to transformers, once."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(EckartConfig)
        register_quantizer(METHOD)(EckartQuantizer)


def _open(files: list[str] | None) -> Source:
    """The checkpoint that the loader is about to read."""
    if not files or not all(file.endswith(".safetensors") for file in files):
        raise CheckpointError(
            "a factored checkpoint is loaded from its safetensors files: give the folder that "
            "eckart compress wrote, and no state_dict."
        )
    paths = [Path(file) for file in files]
    headers = {name: info for path in paths for name, info in read_header(path).items()}
    return Checkpoint(paths[0].parent, headers)


def _check_alone(config: Any, ours: EckartConfig) -> None:
    """A second method, in a part of a composite model, would be passed over in silence."""
    text = config.get_text_config()
    other = None if text is config else getattr(text, "quantization_config", None)
    if other is not None and other is not ours:
        raise CheckpointError(
            f"config.json has a second quantization_config ({printable(other)[:60]}), for a part "
            "of the model: a factored checkpoint takes no second method."
        )


def _check_factors(name: str, layer: nn.Module) -> None:
    """A permutation that is none would be obeyed without a word."""
    perm = getattr(layer, "perm", None)
    if perm is None or perm.is_meta:
        return
    if not torch.equal(perm.sort().values, torch.arange(len(perm), device=perm.device)):
        raise CheckpointError(f"{name}.perm is no permutation of its rows: download it again.")
