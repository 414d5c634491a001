"""Tiny checkpoints in a temporary folder, and the command line run in this process."""

import contextlib
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from blake3 import blake3
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from eckart import cli, verify
from eckart.certificate import _digest
from eckart.checkpoint.documents import canonical_json
from eckart.checkpoint.opening import open_source
from eckart.checkpoint.statistics import (
    Curvature,
    Document,
    Group,
    Moments,
    Origin,
    Statistics,
    Text,
    write_statistics,
)
from eckart.errors import PromiseError
from eckart.families import matrices
from eckart.linalg.matrices import matrix_with_spectrum, named_generator

WEIGHTS = "model.safetensors"
CONFIG = {"model_type": "llama", "hidden_size": 48, "id2label": {"0": "ja", "1": "né"}}


@dataclass(frozen=True)
class Outcome:
    """What a command left behind on the terminal."""

    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """The error with its line breaks and frames taken out."""
        return " ".join(self.err.translate(dict.fromkeys(map(ord, "│╭╮╰╯─"), " ")).split())


def eckart(*args: object) -> Outcome:
    """Runs the command line here, as a shell would."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    argv = ["eckart", *map(str, args)]
    with (
        patch.object(sys, "argv", argv),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            cli.main()
        except SystemExit as stop:
            code = 0 if stop.code is None else int(stop.code)
    return Outcome(code, out.getvalue(), err.getvalue())


def decaying(name: str, m: int, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A matrix with σᵢ = 1/i, the same one for the same name."""
    values = torch.arange(1, min(m, n) + 1, dtype=torch.float64) ** -1.0
    return matrix_with_spectrum(values, m, n, generator=named_generator(7, name)).to(dtype)


def vector(name: str, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A Gaussian vector, the same one for the same name."""
    return torch.randn(n, generator=named_generator(7, name)).to(dtype)


def small_tensors(dtype: torch.dtype = torch.float32, layers: int = 1) -> dict[str, Tensor]:
    """A transformer in miniature: two matrices a layer, a bias, and tensors of every other kind."""
    tensors = {
        "embed_tokens.weight": decaying("embed", 20, 16, dtype),
        "lm_head.weight": decaying("head", 20, 16, dtype),
        "norm.weight": vector("norm", 16, dtype),
        "steps": torch.tensor(3),
        "empty": torch.zeros(0, 5),
        "mask": torch.tensor([True, False, True]),
        "table.weight": torch.arange(12, dtype=torch.int8).reshape(3, 4),
    }
    for i in range(layers):
        tensors |= {
            f"layers.{i}.q_proj.weight": decaying(f"q{i}", 24, 16, dtype),
            f"layers.{i}.q_proj.bias": vector(f"b{i}", 24, dtype),
            f"layers.{i}.up_proj.weight": decaying(f"u{i}", 40, 16, dtype),
        }
    return tensors


def law_tensors(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Enough matrices of three shapes that one rank of one of them is below 0.4 % of all."""
    tensors = {"embed_tokens.weight": decaying("embed", 20, 16, dtype), "steps": torch.tensor(3)}
    for i, (m, n) in enumerate([(64, 48), (48, 64), (56, 56)] * 4):
        tensors[f"layers.{i}.fc.weight"] = decaying(f"fc{i}", m, n, dtype) * (i + 1)
        tensors[f"layers.{i}.fc.bias"] = vector(f"fc{i}", m, dtype)
    return tensors


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, Tensor] | None = None,
    config: Mapping[str, Any] | None = CONFIG,
) -> Path:
    """Writes a checkpoint as transformers would, and returns its folder."""
    folder.mkdir(parents=True)
    chosen = small_tensors() if tensors is None else tensors
    apart = {
        name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in chosen.items()
    }
    save_file(apart, folder / WEIGHTS, metadata={"format": "pt"})
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "tokenizer.json").write_text('{"version": "1.0"}', encoding="utf-8")
    return folder


def second_moment(name: str, width: int, samples: int) -> Tensor:
    """E[x xᵀ] of so many Gaussian vectors, float32, the same one for the same name."""
    x = torch.randn(samples, width, dtype=torch.float64, generator=named_generator(7, name))
    x *= torch.arange(1, width + 1) ** -0.5
    return (x.mT @ x / samples).float()


def write_moments(
    folder: Path,
    src: Path,
    *,
    curvature: Curvature = "full",
    tokens: int = 500,
    without: tuple[str, ...] = (),
    group: Callable[[str], str] = str,
    changes: Mapping[str, Tensor] | None = None,
) -> Statistics:
    """Writes statistics of a checkpoint's matrices, as if it had been run on some text.

    Of unlike size and direction from matrix to matrix, but for those of one `group`, which share
    their input; `changes` are other tensors than those.
    """
    source, groups, known = open_source(src), dict[str, Group](), dict[str, Moments]()
    tensors: dict[str, Tensor] = {}
    for name, matrix in matrices(source)[0].items():
        if name in without:
            continue
        (m, n), scale = matrix.shape, float(torch.rand(1, generator=named_generator(8, name))) + 0.1
        X = group(name)
        groups[X] = Group(width=n, rows=tokens)
        known[name] = Moments(shape=(m, n), groups=[X], curvature=curvature, count=matrix.count)
        tensors[f"{X}.C"] = second_moment(f"C of {X}", n, tokens)
        G = [second_moment(f"G{i} of {name}", m, tokens) * scale for i in range(matrix.count)]
        parts = torch.stack([one.diagonal() if curvature == "diagonal" else one for one in G])
        if curvature != "none":
            tensors[f"{name}.G"] = parts if matrix.count > 1 else parts[0].clone()
    document = Document(
        model=Origin(name=source.name, fingerprint=source.fingerprint()),
        text=Text(name="text.txt", digest="0" * 64),
        tokens=tokens,
        loss=None,
        curvature=curvature,
        options={},
        versions={},
        groups=groups,
        matrices=known,
    )
    folder.mkdir(parents=True)
    return write_statistics(folder, document, tensors | dict(changes or {}))


def write_raw(path: Path, header: bytes | Mapping[str, Any], data: bytes = b"") -> Path:
    """Writes a safetensors file from its header and data, whatever they say."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, read by the safetensors library."""
    with safe_open(folder / WEIGHTS, framework="pt", backend="pread") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def raw_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and where its data begins."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), 8 + length


def read_document(folder: Path) -> dict[str, Any]:
    """The certificate as JSON."""
    return json.loads((folder / "eckart.json").read_bytes())


def forge(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes a certificate and makes its digest and its files' digests hold again."""
    document = read_document(folder)
    for name, record in document["files"].items():
        content = (folder / name).read_bytes()
        record |= {"bytes": len(content), "blake3": blake3(content).hexdigest()}
    change(document)
    document["digest"] = _digest(document)
    (folder / "eckart.json").write_bytes(canonical_json(document) + b"\n")


def snapshot(folder: Path) -> dict[str, str]:
    """Every path below a folder, with what it is and the digest of the files."""
    return {str(path.relative_to(folder)): _state(path) for path in sorted(folder.rglob("*"))}


def _state(path: Path) -> str:
    if path.is_symlink():
        return f"link to {path.readlink()}"
    if path.is_file():
        return blake3(path.read_bytes()).hexdigest()
    return "folder" if path.is_dir() else "special"


def product_of(tensors: Mapping[str, Tensor], X: str) -> np.ndarray:
    """B·A, or the pivoted product, of the tensors as stored: float64, by numpy alone."""
    A = tensors[f"{X}.A.weight"].double().numpy()
    if f"{X}.B.weight" in tensors:
        return tensors[f"{X}.B.weight"].double().numpy() @ A
    rows = np.concatenate([A, tensors[f"{X}.K.weight"].double().numpy() @ A])
    W = np.empty_like(rows)
    W[tensors[f"{X}.perm"].numpy()] = rows
    return W


def numpy_error(W: Tensor, product: np.ndarray) -> float:
    """‖W − W'‖_F/‖W‖_F in long double, by numpy alone."""
    exact = W.double().numpy().astype(np.longdouble)
    missed, total = np.sqrt(((exact - product) ** 2).sum()), np.sqrt((exact**2).sum())
    return float(missed / total) if total else float(missed)


class Killer:
    """Kills this very process at the N-th storage call, as a power cut would."""

    CALLS = ("mkdir", "open", "truncate", "pwrite", "fsync", "rename")

    def __init__(self, at: int) -> None:
        self.count, self.at = 0, at
        for call in self.CALLS:
            setattr(os, call, self.wrap(getattr(os, call)))

    def wrap(self, real: Callable[..., object]) -> Callable[..., object]:
        def called(*args: object, **options: object) -> object:
            self.count += 1
            if self.count == self.at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)

        return called


def in_a_process_killed_at(number: int, run: Callable[[], object]) -> bool:
    """Calls it in a forked process that dies at its N-th storage call; whether it died."""
    child = os.fork()
    if child == 0:
        Killer(number)
        try:
            run()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def undetected(out: Path, step: int) -> list[tuple[str, int]]:
    """The places, every so many bytes of every file, where a flipped bit passes `verify`."""
    missed: list[tuple[str, int]] = []
    for path in sorted(out.iterdir()):
        content = path.read_bytes()
        for place in range(0, len(content), step):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            try:
                if all(check.held for check in verify(out)):
                    missed.append((path.name, place))
            except PromiseError:
                pass
        path.write_bytes(content)
    return missed
