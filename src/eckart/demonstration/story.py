"""What `eckart demo` tells: the worked example, then the same on a whole checkpoint.

Every number is measured as it is printed.
"""

import importlib.util
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from rich.console import Console

import eckart
from eckart import adaptation, api, folding
from eckart.demonstration import calibrated
from eckart.demonstration.scene import Scene, arrow
from eckart.errors import UsageError
from eckart.linalg.threads import computing_on

KEEPS = (0.8, 0.6, 0.4)
RANKS = (2, 8, 32)

SHOWN = "model.layers.2."
"""The layer whose rows are printed; all are measured."""


def tell(folder: Path, console: Console, *, force: bool = False) -> None:
    """Runs and prints the whole story; its outputs stay in `folder`."""
    scene = Scene(console, folder, force)
    taken = [path for path in [folder / "base", *_outputs(folder)] if path.exists()]
    if taken and not force:
        raise UsageError(f"{taken[0]} exists already: choose another -o, or add --force.")
    with computing_on(1):  # on models so small, two threads mostly wait for each other
        _tell(scene)


def _tell(scene: Scene) -> None:
    began = time.monotonic()
    worked_example(scene)
    base = scene.unpack("base")
    _inspect(scene, base)
    plain = {keep: _compress(scene, base, keep) for keep in KEEPS}
    runs = importlib.util.find_spec("transformers") is not None
    if runs:
        _calibrated(scene, base, plain)
    else:
        scene.heading("Skipped: calibrating, reloading and every perplexity")
        scene.say("They need transformers: pip install 'eckart[hf]', and tell the story again.")
    _adapters(scene, base, runs=runs)
    _next(scene, base, time.monotonic() - began)


def _outputs(folder: Path) -> list[Path]:
    names = [f"{kind}-{keep}" for kind in ("keep", "fit") for keep in KEEPS]
    names += [f"tried-{KEEPS[-1]}", f"fit-{KEEPS[1]}-dense", "statistics"]
    names += [f"{kind}-{rank}" for kind in ("lora", "with-lora") for rank in RANKS]
    return [folder / name for name in names]


def worked_example(scene: Scene) -> None:
    """Ten lines of PyTorch: a rank-2 matrix becomes 40 numbers instead of 100."""
    scene.heading("The worked example: W (10×10) = L (10×2) · R (2×10)")
    W = eckart.random_low_rank(10, 10, 2)
    svd = eckart.exact_svd(W)
    r = eckart.matrix_rank(W)
    assert isinstance(r, int)
    values = ", ".join(f"{value:.3g}" for value in svd.s[: r + 2].tolist())
    factors = eckart.factorize(W, rank=r, balanced=False)
    g = torch.Generator().manual_seed(1)
    x, b = torch.randn(10, generator=g), torch.randn(10, generator=g)
    y, factored = W @ x + b, factors.apply(x) + b
    scene.row("numerical rank of W", r)
    scene.row("singular values", f"{values}, …")
    scene.row("B = U_r S_r, A = V_rᵀ", f"{_size(factors.B)} and {_size(factors.A)}")
    scene.row("largest |(Wx + b) − (B(Ax) + b)|", f"{float((y - factored).abs().max()):.1e}")
    scene.row("parameters", f"{W.numel()} → {factors.parameters}")


def _inspect(scene: Scene, base: Path) -> None:
    scene.heading(f"eckart inspect {base}")
    report = api.inspect(base)
    table = scene.table("matrix", "shape", "rank", "verdict")
    for row in report.matrices:
        if row.name.startswith(SHOWN):
            shape = f"{row.shape[0]}×{row.shape[1]}"
            table.add_row(_short(row.name), shape, str(row.numerical_rank), row.verdict)
    scene.console.print(table)
    pays = sum(row.verdict.startswith("factor") for row in report.matrices)
    scene.say(
        f"{len(report.matrices)} matrices, those of layer 2 shown. Trained weights have full "
        f"rank:\nonly {pays} of them can be factored to fewer parameters at 10 % error or less."
    )


def _compress(scene: Scene, base: Path, keep: float) -> Path:
    """Plain SVD: as near to each weight as its rank allows, whatever the model does with it."""
    out = scene.folder / f"keep-{keep}"
    scene.heading(f"eckart compress {base} -o {out} --keep {keep}")
    certificate = api.compress(base, out, keep=keep, force=scene.force)
    errors = [row.relative_error for row in certificate.matrices]
    totals = certificate.totals
    dense = sum(row.reason.startswith("dense") for row in certificate.copied)
    count = scene.check(out, api.verify(out, base))
    scene.row("matrices", f"{len(errors)} factored, {dense} better left dense")
    scene.row("relative error per matrix", f"{min(errors):.3f} … {max(errors):.3f}")
    scene.row("parameters of the matrices", arrow(totals.targeted_parameters))
    scene.row("parameters of the whole model", arrow(totals.model_parameters))
    scene.row("bytes of all tensors", arrow(totals.tensor_bytes))
    scene.row("eckart verify", f"{count} checks hold, from the written files")
    return out


def _calibrated(scene: Scene, base: Path, plain: Mapping[float, Path]) -> None:
    """The same budgets with statistics of a text, and what the model has become of either."""
    known = calibrated.calibrate(scene, base)
    fit = {keep: calibrated.compress(scene, base, known, keep) for keep in KEEPS}
    tried = calibrated.compress_on(scene, base, known, KEEPS[-1])
    lines = [calibrated.Line(f"keep {keep}", plain[keep], fit[keep]) for keep in KEEPS]
    lines.append(calibrated.Line("… tried on a text", None, tried))
    calibrated.reload(scene, base, lines)
    calibrated.densify(scene, base, fit[KEEPS[1]])


def _adapters(scene: Scene, base: Path, *, runs: bool) -> None:
    """What a fine-tune changed, as adapters of rising rank, each proved and folded in again."""
    tuned = scene.unpack("tuned")
    scene.heading(f"eckart extract {tuned} --base {base} -o … --rank R")
    scene.say(
        "The same model, tuned on another kind of text. Its norms changed too: they are\n"
        "vectors, which no LoRA holds, so they are stored whole (--store-whole norms)."
    )
    models = {"base": base, "tuned": tuned}
    table = scene.table("adapter", "rank", "error of the change", "bytes", "of the model")
    for rank in RANKS:
        out, applied = scene.folder / f"lora-{rank}", scene.folder / f"with-lora-{rank}"
        table.add_row(*_extract(scene, (tuned, base), rank, out, applied))
        models[f"base + {out.name}"] = applied
    scene.console.print(table)
    scene.say("Each is verified against both models, and folded into base by eckart apply.")
    if runs:
        heldout = scene.text("tuned-heldout")
        scene.heading(f"Is it the tuned model? Perplexity per byte on {heldout}")
        text = calibrated.heldout_text(scene, tuned)
        for name, model in models.items():
            scene.row(name, f"{calibrated.measured(model, text).perplexity:8.3f}")


def _extract(
    scene: Scene, pair: tuple[Path, Path], rank: int, out: Path, applied: Path
) -> tuple[str, ...]:
    """One adapter, and the row that tells of it."""
    tuned, base = pair
    certificate = adaptation.extract(
        tuned, base, out, rank=rank, store_whole=["norms"], force=scene.force
    )
    folding.apply(out, base, applied, force=scene.force)
    scene.check(out, api.verify(out, tuned, base=base))
    scene.check(applied, api.verify(applied, out, base=base))
    assert certificate.change is not None
    model, size = certificate.totals.tensor_bytes
    error = f"{certificate.change.relative_error:.3f}"
    return f" {out.name}", str(rank), error, f"{size:,}", f"{100 * size / model:.1f} %"


def _next(scene: Scene, base: Path, seconds: float) -> None:
    folder = scene.folder
    scene.heading(f"Done in {seconds:.0f} s; everything is in {folder}. Try next")
    scene.say(
        f"eckart inspect {base}\n"
        f"eckart compress {base} -o {folder / 'rank-16'} --rank 16 --dry-run\n"
        f"eckart verify {folder / 'keep-0.6'} --against {base}\n"
        f"eckart resize {folder / 'lora-32'} -o {folder / 'lora-5'} --rank 5\n"
        "eckart compress YOUR-CHECKPOINT -o OUT --error 0.1\n"
        "eckart extract YOUR-FINE-TUNE --base ITS-BASE -o LORA --size 50MB"
    )


def _short(name: str) -> str:
    return " " + name.removeprefix(SHOWN).removesuffix(".weight")


def _size(tensor: torch.Tensor) -> str:
    return "×".join(map(str, tensor.shape))
