"""What a causal language model is still worth at keep 0.8, 0.6 and 0.4, by which method.

Protocol. Statistics of the model by `eckart calibrate` on the calibration tokens; then, each
counted from the tensors that it stores, and run once over the evaluation tokens:

- SVD, uniform: every matrix cut to the rank that its own share allows, r(m + n) ≤ keep·mn;
- inputs, uniform: the same ranks, from W C^½ (Wang et al., SVD-LLM, 2024);
- inputs, uniform, pivoted: r(m + n − r) ≤ keep·mn (PIFA's storage, 2025);
- inputs + curvature, uniform: from G^½ W C^½;
- inputs + curvature, global: `eckart compress --statistics S --keep F`;
- … pivoted: the same with `--form auto`;
- … tried: with `--tokens`, too, of the calibration sequences: the last tenth of them chooses among
  ways to spend the budget, and the others are what factors are fitted to, where that tenth says so;
- dense int8, one scale a row, and dense int4, one scale for 32 weights: what the same bytes buy.

The first four are plain implementations that share no code with the package: eigenvectors and
`torch.linalg.svd` in float64. keep counts the matrices that `compress` targets. Bytes are shares of
the same matrices in half precision; scales are in half precision and count. The loss is the mean
over predicted tokens, in float32, whatever the dtype of the weights. `--heldout` chooses settings:
statistics from nine tenths of the calibration sequences, perplexity on the last tenth, and nothing
is written to the ledger. Results are appended to `bench/RESULTS.md`.
"""

import argparse
import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from bench_svd import LEDGER, heading
from safetensors.torch import load_file, save_file
from torch import Tensor

import eckart
from eckart.certificate import read_certificate
from eckart.checkpoint.opening import open_checkpoint
from eckart.checkpoint.statistics import Statistics, open_statistics
from eckart.demonstration.scene import embedded
from eckart.formats import factored
from eckart.hf import load_dense
from eckart.linalg.metric import CURVATURE_DAMPING, INPUT_DAMPING
from eckart.texts import read_tokens, tokenize

KEEPS = (0.8, 0.6, 0.4)
SEQUENCES = 128  # of the demo model's calibration text
GROUP = 32
HALF = 2  # bytes
TOKENS = "tokens.safetensors"


@dataclass
class Model:
    """A dense model that runs, with its targeted matrices, and how often it was run."""

    module: Any
    weights: Mapping[str, Tensor]  # the targeted matrices, float32
    tokens: Tensor
    runs: int = field(default=0)

    @property
    def parameters(self) -> int:
        """Of the targeted matrices."""
        return sum(W.numel() for W in self.weights.values())

    @torch.no_grad()
    def perplexity(self, changed: Mapping[str, Tensor]) -> float:
        """Returns exp of the mean loss with other matrices in the place of its own."""
        self.runs += 1
        state = self.module.state_dict()
        for name, W in self.weights.items():
            state[name].copy_(changed.get(name, W))
        nats = 0.0
        for batch in self.tokens.split(16):
            logits = self.module(input_ids=batch).logits[:, :-1].flatten(0, 1).float()
            labels = batch[:, 1:].flatten()
            nats += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        return math.exp(nats / self.tokens[:, 1:].numel())


@dataclass(frozen=True)
class Moments:
    """Damped roots of C and G of one matrix, symmetric, and their inverses."""

    C: tuple[Tensor, Tensor]
    G: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, statistics: Statistics, name: str) -> "Moments":
        """Returns them by eigenvectors, in float64."""
        G = statistics.curvature(name)
        assert G is not None, "the table needs --curvature full"
        C = _roots(statistics.inputs(name), INPUT_DAMPING)
        return cls(C, _roots(torch.diag(G) if G.ndim == 1 else G, CURVATURE_DAMPING))


def _roots(S: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    values, X = torch.linalg.eigh(S.double())
    roots = (values.clamp(min=0) + damping * S.diagonal().double().mean()).sqrt()
    return X @ torch.diag(roots) @ X.mT, X @ torch.diag(1 / roots) @ X.mT


def plain(W: Tensor, _: Moments, rank: int) -> Tensor:
    """The nearest product in the Frobenius norm."""
    return _cut(W.double(), rank)


def by_inputs(W: Tensor, moments: Moments, rank: int) -> Tensor:
    """… on the inputs."""
    root, inverse = moments.C
    return _cut(W.double() @ root, rank) @ inverse


def by_both(W: Tensor, moments: Moments, rank: int) -> Tensor:
    """… on the inputs, as the loss weighs the outputs."""
    (root, inverse), (left, left_inverse) = moments.C, moments.G
    return left_inverse @ _cut(left @ W.double() @ root, rank) @ inverse


def _cut(M: Tensor, rank: int) -> Tensor:
    U, s, Vh = torch.linalg.svd(M, full_matrices=False)
    return (U[:, :rank] * s[:rank]) @ Vh[:rank]


def cost(shape: tuple[int, ...], rank: int, pivoted: bool) -> int:
    """Parameters that a matrix of the rank stores."""
    m, n = shape
    return rank * (m + n - (rank if pivoted else 0))


Method = Callable[[Tensor, Moments, int], Tensor]

UNIFORM: dict[str, tuple[Method, bool]] = {
    "SVD, uniform": (plain, False),
    "inputs, uniform (SVD-LLM)": (by_inputs, False),
    "inputs, uniform, pivoted (PIFA's storage)": (by_inputs, True),
    "inputs + curvature, uniform": (by_both, False),
}
GLOBAL = {  # the form, and whether ways to spend are tried on the calibration tokens
    "inputs + curvature, global": ("ba", False),
    "**inputs + curvature, global, pivoted**": ("auto", False),
    "**… tried on the text**": ("auto", True),
}


def uniform(
    model: Model, moments: Mapping[str, Moments], method: Method, pivoted: bool, keep: float
) -> tuple[dict[str, Tensor], float]:
    """Returns every matrix at the rank that its own share allows, and what is kept in all."""
    changed, stored = dict[str, Tensor](), 0
    for name, W in model.weights.items():
        allowed, smaller = keep * W.numel(), min(W.shape)
        rank = max(r for r in range(1, smaller) if cost(tuple(W.shape), r, pivoted) <= allowed)
        changed[name] = method(W, moments[name], rank).float()
        stored += cost(tuple(W.shape), rank, pivoted)
    return changed, stored / model.parameters


def by_eckart(
    folder: Path, model: Path, form: str, tried: bool, keep: float
) -> tuple[dict[str, Tensor], float, float]:
    """Returns the matrices as `compress` wrote them, what it keeps, and its seconds."""
    out = folder / f"{form}-{tried}-{keep}"
    began = time.monotonic()
    certificate = eckart.compress(
        model,
        out,
        statistics=folder / "S",
        keep=keep,
        form=form,  # type: ignore[arg-type]
        tokens=folder / TOKENS if tried else None,
    )
    seconds = time.monotonic() - began
    written = open_checkpoint(out)
    changed = {
        row.name: torch.cat(
            [
                product.rows(0, product.shape[0])
                for product in factored.products(written, row.name, certificate.entry(row))
            ]
        ).float()
        for row in read_certificate(out).matrices
    }
    return changed, certificate.totals.keep, seconds


def quantized(W: Tensor, bits: int, group: int | None) -> tuple[Tensor, int]:
    """Returns W rounded to nearest with a half-precision scale per row or group, and its bits."""
    m, n = W.shape
    size = n if group is None else group
    padded = torch.nn.functional.pad(W, (0, -n % size)).reshape(m, -1, size)
    scale = padded.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    scale = scale.half().float().clamp(min=torch.finfo(torch.float16).tiny)
    rounded = (padded / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (rounded * scale).reshape(m, -1)[:, :n], W.numel() * bits + scale.numel() * 16


def quantized_rows(model: Model) -> Iterator[tuple[str, float, float]]:
    """Yields the name, the share of half precision's bytes and the perplexity of each."""
    for name, bits, group in (
        ("dense int8, a scale per row", 8, None),
        (f"dense int4, a scale per {GROUP}", 4, GROUP),
    ):
        found = {key: quantized(W, bits, group) for key, W in model.weights.items()}
        size = sum(count for _, count in found.values()) / 8
        changed = {key: W for key, (W, _) in found.items()}
        yield name, size / (HALF * model.parameters), model.perplexity(changed)


def open_model(folder: Path, tokens: Tensor) -> Model:
    """Returns the model in float32, with the matrices that `compress` would target."""
    from eckart.api import plan, policy_of

    module = load_dense(folder)
    names = [row.name for row in plan(folder, policy_of(keep=1.0)).matrices]
    return Model(module, {name: module.state_dict()[name].clone() for name in names}, tokens)


def tokens_of(model: Path, path: Path | None) -> tuple[Tensor, Tensor]:
    """Returns the calibration and the evaluation tokens: of a file, or of the demo's texts."""
    if path is not None:
        return read_tokens(path, "calibration"), read_tokens(path, "evaluation")
    texts = (embedded("texts", f"base-{split}.txt") for split in ("calibration", "heldout"))
    calibration, evaluation = (tokenize(text, model) for text in texts)
    return calibration[:SEQUENCES], evaluation


def in_dtype(model: Path, folder: Path, dtype: str | None) -> Path:
    """Returns the model, saved in another dtype where one is asked."""
    if dtype is None:
        return model
    folder.mkdir()
    for file in model.iterdir():
        if file.suffix != ".safetensors" and file.is_file():
            shutil.copyfile(file, folder / file.name)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": dtype}))
    tensors = load_file(model / "model.safetensors")
    cast = {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}
    save_file(cast, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def table(folder: Path, model: Model, source: Path) -> Iterator[str]:
    """Yields the lines of the table, as they are found."""
    known = open_statistics(folder / "S")
    moments = {name: Moments.of(known, name) for name in model.weights}
    yield "| method | " + " | ".join(f"keep {keep}" for keep in KEEPS) + " |"
    yield "|---|" + "---|" * len(KEEPS)
    yield f"| dense | {model.perplexity({}):.4f} |" + " |" * (len(KEEPS) - 1)
    for name, (method, pivoted) in UNIFORM.items():
        cells = (uniform(model, moments, method, pivoted, keep) for keep in KEEPS)
        yield _line(name, [_cell(model.perplexity(changed), kept) for changed, kept in cells])
    seconds = list[str]()
    for name, (form, tried) in GLOBAL.items():
        cells, total = list[str](), 0.0
        for keep in KEEPS:
            changed, kept, took = by_eckart(folder, source, form, tried, keep)
            cells.append(_cell(model.perplexity(changed), kept))
            total += took
        seconds.append(f"{total:.1f} s")
        yield _line(name, cells)
    yield ""
    yield "At equal bytes (half precision = 1; what is kept above is also the share of its bytes):"
    for name, size, value in quantized_rows(model):
        yield f"- {name}: {size:.4f} of the bytes, {value:.4f}"
    yield f"- compress, three runs of each of its rows: {', '.join(seconds)}"


def _line(name: str, cells: list[str]) -> str:
    return f"| {name} | " + " | ".join(cells) + " |"


def _cell(value: float, kept: float) -> str:
    return f"{value:.4f} ({kept:.4f})"


def main() -> None:
    """Runs the table, prints it and appends it to the ledger."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="default: the embedded demo model")
    parser.add_argument("--tokens", type=Path, help="safetensors: calibration and evaluation")
    parser.add_argument("--dtype", help="save the model in this dtype first")
    parser.add_argument("--heldout", action="store_true", help="choose settings; no evaluation")
    asked = parser.parse_args()
    if (asked.model is None) != (asked.tokens is None):
        parser.error("--model and --tokens go together")
    original = asked.model or embedded("models", "base")
    calibration, evaluation = tokens_of(original, asked.tokens)
    if asked.heldout:
        kept = len(calibration) - len(calibration) // 10
        calibration, evaluation = calibration[:kept], calibration[kept:]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = in_dtype(original, folder / "model", asked.dtype)
        save_file({"tokens": calibration.int().contiguous()}, folder / TOKENS)
        began = time.monotonic()
        eckart.calibrate(source, folder / "S", tokens=folder / TOKENS)
        calibrating = time.monotonic() - began
        model = open_model(source, evaluation)
        lines = [
            f"Perplexity (parameters kept, of {model.parameters:,}) of "
            f"{original.name}{f' in {asked.dtype}' if asked.dtype else ''}: statistics from "
            f"{len(calibration)} sequences of {calibration.shape[1]} tokens in "
            f"{calibrating:.1f} s, "
            f"{len(evaluation)} other sequences evaluated.",
            "",
        ]
        for line in lines:
            print(line, flush=True)
        for line in table(folder, model, source):
            print(line, flush=True)
            lines.append(line)
        lines.append(f"- the evaluation tokens were run {model.runs} times, once for each figure")
        print(lines[-1])
    if not asked.heldout:
        with LEDGER.open("a", encoding="utf-8") as ledger:
            ledger.write(heading() + "\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
