"""W ± s·BA in one pass over blocks of rows, as the formula says, whatever the blocks are."""

import hashlib
import json

import pytest
import torch
from blake3 import blake3
from builders import snapshot
from safetensors.torch import load_file, save_file

from eckart import apply, verify
from eckart.assemble import application
from eckart.errors import NonFiniteError
from eckart.execute import local

SHAPES = {
    "q.weight": (24, 20),
    "v.weight": (1, 20),
    "conv.weight": (12, 3, 3, 3),
    "model.embed_tokens.weight": (30, 16),
    "h.0.attn.c_attn.weight": (16, 48),  # in × out, as GPT-2 stores it
    "h.0.attn.c_attn.bias": (48,),
    "untouched.weight": (10, 10),
    "norm.weight": (16,),
}
TRANSPOSED = ("model.embed_tokens.weight", "h.0.attn.c_attn.weight")
RANK, SCALE = 3, 0.5


def draw(name, *shape):
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4])
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def write_pair(folder, dtype, size=0.1):
    """A base of every kind of matrix, and an adapter for all of them but one."""
    base, adapter = folder / "base", folder / "adapter"
    tensors = {name: draw(name, *shape).to(dtype) for name, shape in SHAPES.items()}
    parts = {}
    for name, shape in SHAPES.items():
        if len(shape) == 1 or name == "untouched.weight":
            continue
        X = f"base_model.model.{name.removesuffix('.weight')}"
        if name.startswith("model.embed"):
            A, B = draw(name + "A", RANK, shape[0]), draw(name + "B", shape[1], RANK)
            parts |= {f"{X}.lora_embedding_A": size * A, f"{X}.lora_embedding_B": B}
            continue
        sides = shape[::-1] if name in TRANSPOSED else shape
        A, B = draw(name + "A", RANK, *sides[1:]), draw(name + "B", sides[0], RANK)
        ones = (1,) * (len(shape) - 2)
        parts |= {f"{X}.lora_A.weight": size * A, f"{X}.lora_B.weight": B.view(*B.shape, *ones)}
    for path, held, file in ((base, tensors, "model"), (adapter, parts, "adapter_model")):
        path.mkdir(parents=True)
        save_file(held, path / f"{file}.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": SCALE * RANK}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return base, adapter, tensors, parts


def product(name, parts):
    """s·BA as the tensor is stored, in float64."""
    X = f"base_model.model.{name.removesuffix('.weight')}."
    ends = ("lora_embedding_A", "lora_embedding_B")
    if X + ends[0] not in parts:
        ends = ("lora_A.weight", "lora_B.weight")
    A, B = (parts[X + end].double().flatten(1) for end in ends)
    P = SCALE * (B @ A)
    return (P.mT if name in TRANSPOSED else P).reshape(SHAPES[name])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("entries", [1, 100, 2**19])
def test_the_sum_is_rounded_once(tmp_path, monkeypatch, dtype, entries):
    """Every kind of matrix, in one block, in several, and row by row."""
    monkeypatch.setattr(application, "BLOCK_ENTRIES", entries)
    base, adapter, tensors, parts = write_pair(tmp_path, dtype)
    certificate = apply(adapter, base, tmp_path / "out", shard_bytes=2000)
    found = {k: t for path in (tmp_path / "out").glob("*s") for k, t in load_file(path).items()}

    assert found.keys() == tensors.keys()
    assert len(certificate.matrices) == 5
    for record in certificate.matrices:
        added = product(record.name, parts)
        exact = tensors[record.name].double() + added
        assert torch.equal(found[record.name], exact.to(dtype)) or torch.allclose(
            found[record.name].double(), exact, rtol=1.01 * torch.finfo(dtype).eps, atol=1e-7
        )
        if dtype.itemsize == 2:
            missed = float((found[record.name].double() - exact).norm() / added.norm())
            assert record.relative_error == pytest.approx(missed, rel=1e-4)
    for name in ("untouched.weight", "norm.weight", "h.0.attn.c_attn.bias"):
        assert torch.equal(found[name], tensors[name])
    assert all(check.held for check in verify(tmp_path / "out", adapter, base=base))


def test_the_output_is_in_the_files_of_the_base(tmp_path):
    """By name and tensor, and its index says so; --shard-size cuts anew."""
    base, adapter, tensors, _ = write_pair(tmp_path, torch.bfloat16)
    cut, names = tmp_path / "cut", sorted(tensors)
    cut.mkdir()
    places = {name: f"model-{'ab'[i % 2]}.safetensors" for i, name in enumerate(names)}
    for file in {*places.values()}:
        save_file({n: tensors[n] for n in names if places[n] == file}, cut / file)
    index = {"metadata": {}, "weight_map": places}
    (cut / "model.safetensors.index.json").write_text(json.dumps(index))
    whole = apply(adapter, base, tmp_path / "whole")
    same = apply(adapter, cut, tmp_path / "same")
    anew = apply(adapter, cut, tmp_path / "anew", shard_bytes=10**9)
    stated = json.loads((tmp_path / "same" / "model.safetensors.index.json").read_text())

    assert stated["weight_map"] == places
    assert same.files.keys() == {"model.safetensors.index.json", *places.values()}
    assert anew.files == whole.files
    assert same.matrices == whole.matrices
    assert all(check.held for check in verify(tmp_path / "same", adapter, base=cut))


def test_the_output_does_not_depend_on_who_fills_it(tmp_path, monkeypatch):
    """In this process, and by two workers: the same bytes, and the same digests of them."""
    base, adapter, _, _ = write_pair(tmp_path, torch.bfloat16)
    one = apply(adapter, base, tmp_path / "one", workers=1, shard_bytes=2000)
    monkeypatch.setattr(local, "SHORT_SECONDS", -1.0)
    two = apply(adapter, base, tmp_path / "two", workers=2, shard_bytes=2000)
    sums = {name: blake3((tmp_path / "one" / name).read_bytes()).hexdigest() for name in one.files}

    assert {name: record.blake3 for name, record in one.files.items()} == sums
    assert one.files == two.files
    assert one.source == two.source
    assert one.matrices == two.matrices


@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_not_finite_is_refused(tmp_path, value, place):
    """In the base, in its first block or its last: by name, and nothing is left."""
    base, adapter, tensors, _ = write_pair(tmp_path, torch.bfloat16)
    tensors["q.weight"].view(-1)[place] = value
    save_file(tensors, base / "model.safetensors")
    before = snapshot(tmp_path)

    with pytest.raises(NonFiniteError, match=r"q\.weight"):
        apply(adapter, base, tmp_path / "out")
    assert snapshot(tmp_path) == before


def test_a_sum_that_overflows_the_dtype_is_refused(tmp_path):
    """float16 ends at 65504: what is finite in float32 is not written as Inf."""
    base, adapter, _, _ = write_pair(tmp_path, torch.float16, size=1e6)

    with pytest.raises(NonFiniteError, match="the sum of"):
        apply(adapter, base, tmp_path / "out")
    assert not (tmp_path / "out").exists()
