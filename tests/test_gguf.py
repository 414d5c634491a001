"""The LoRA file of llama.cpp, written and read by its own package: names, shapes and scales.

llama.cpp itself is not run. What is checked is its rule: one `adapter.lora.alpha` for all, over
the rank of each tensor.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from test_merging import products, write_adapter

from eckart import convert, lint

gguf = pytest.importorskip("gguf")

RANKS = {"layers.0.q": 8, "layers.0.up": 3, "layers.1.q": 1}
NAMES = {
    "layers.0.q": "model.layers.0.self_attn.q_proj",
    "layers.0.up": "model.layers.0.mlp.up_proj",
    "layers.1.q": "model.layers.1.self_attn.q_proj",
}


def write_gguf(adapter: Path, file: Path) -> Path:
    """Writes what `convert_lora_to_gguf.py` makes of a folder in PEFT's format."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(config["lora_alpha"]))
    for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
        X, part, _ = name.removeprefix("base_model.model.").rsplit(".", 2)
        base = names.get_name(f"{NAMES[X]}.weight", try_suffixes=(".weight",))
        writer.add_tensor(f"{base}.{part.lower()}", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def read_gguf(file: Path) -> dict[str, np.ndarray]:
    """What llama.cpp adds to each tensor of a model: alpha / rank of the tensor · B·A."""
    reader = gguf.GGUFReader(file)
    assert reader.get_field("general.type").contents() == "adapter"
    assert reader.get_field("adapter.type").contents() == "lora"
    alpha = reader.get_field("adapter.lora.alpha").contents()
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    added = {}
    for name in {name.rpartition(".")[0] for name in tensors}:
        A, B = (tensors[f"{name}.lora_{part}"] for part in "ab")
        assert A.shape[1] == B.shape[0], "ne, the fastest side first"
        added[name] = alpha / B.shape[0] * (B.data.astype(np.float64) @ A.data.astype(np.float64))
    return added


NAMED = {
    "layers.0.q": "blk.0.attn_q.weight",
    "layers.0.up": "blk.0.ffn_up.weight",
    "layers.1.q": "blk.1.attn_q.weight",
}


def test_an_adapter_for_llama_cpp_is_what_it_was_in_its_file(tmp_path):
    """Three ranks, lora_alpha twice the rank: the same products, by the names of its tensors."""
    given = write_adapter(tmp_path / "given", RANKS, 1, {"alpha_pattern": {"up": 6, "1.q": 2}})
    convert(given, tmp_path / "out", consumer="llama.cpp")
    added = read_gguf(write_gguf(tmp_path / "out", tmp_path / "lora.gguf"))
    expected = products(given, lambda X, r: 2.0)

    assert added.keys() == {NAMED[X] for X in RANKS}
    for X, product in expected.items():
        assert np.abs(added[NAMED[X]] - product).max() < 1e-6 * np.abs(product).max()


def test_a_compact_adapter_would_be_too_strong_there_and_lint_says_by_how_much(tmp_path):
    """Right in PEFT, 8/3 and 8 times as strong in llama.cpp: the reason why it is refused."""
    given = write_adapter(tmp_path / "given", RANKS, 1, {"alpha_pattern": {"up": 6, "1.q": 2}})
    convert(given, tmp_path / "out", consumer="peft")
    added = read_gguf(write_gguf(tmp_path / "out", tmp_path / "lora.gguf"))
    expected = products(given, lambda X, r: 2.0)
    strength = {
        X: np.linalg.norm(added[NAMED[X]]) / np.linalg.norm(product)
        for X, product in expected.items()
    }
    (found,) = (fit for fit in lint(tmp_path / "out") if fit.consumer == "llama.cpp")

    assert strength == pytest.approx({"layers.0.q": 1, "layers.0.up": 8 / 3, "layers.1.q": 8})
    assert not found.loads
    assert "layers.0.up.weight 2.67 times as strongly" in found.detail
