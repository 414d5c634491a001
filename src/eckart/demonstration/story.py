"""What `eckart demo` tells: the worked example, then the same on a whole checkpoint.

Every number is measured as it is printed.
"""

import importlib.util
import time
from importlib.resources import files
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import eckart
from eckart import adaptation, api
from eckart.certificate import Certificate
from eckart.checkpoint.paths import write_file
from eckart.checkpoint.writer import copy_file
from eckart.errors import PromiseError, UsageError

KEEPS = (0.8, 0.6)
RANKS = (2, 8, 32)
WINDOWS = 96
"""Of the held-out text: enough to see the damage, few enough to end within the minute."""

SHOWN = "model.layers.2."
"""The layer whose rows are printed; all are measured."""


def embedded(*parts: str) -> Path:
    """Returns the path of an embedded model or text."""
    return Path(str(files("eckart.demonstration"))).joinpath(*parts)


def tell(folder: Path, console: Console, *, force: bool = False) -> None:
    """Runs and prints the whole story; its outputs stay in `folder`."""
    began = time.monotonic()
    names = [name for keep in KEEPS for name in (f"keep-{keep}", f"keep-{keep}-dense")]
    names += [name for rank in RANKS for name in (f"lora-{rank}", f"with-lora-{rank}")]
    outputs = [folder / name for name in names]
    taken = [path for path in [folder / "base", *outputs] if path.exists()]
    if taken and not force:
        raise UsageError(f"{taken[0]} exists already: choose another -o, or add --force.")
    worked_example(console)
    base, heldout = _unpack(folder, "base")
    _inspect(base, console)
    factored = [_compress(base, folder, keep, console, force) for keep in KEEPS]
    _perplexities(base, heldout, factored, console, force)
    _adapters(folder, base, console, force)
    _next(folder, base, console, time.monotonic() - began)


def worked_example(console: Console) -> None:
    """Ten lines of PyTorch: a rank-2 matrix becomes 40 numbers instead of 100."""
    _heading(console, "The worked example: W (10×10) = L (10×2) · R (2×10)")
    W = eckart.random_low_rank(10, 10, 2)
    svd = eckart.exact_svd(W)
    r = eckart.matrix_rank(W)
    assert isinstance(r, int)
    values = ", ".join(f"{value:.3g}" for value in svd.s[: r + 2].tolist())
    console.print(f"  numerical rank of W                {r}")
    console.print(f"  singular values                    {values}, …")
    factors = eckart.factorize(W, rank=r, balanced=False)
    g = torch.Generator().manual_seed(1)
    x, b = torch.randn(10, generator=g), torch.randn(10, generator=g)
    y, factored = W @ x + b, factors.apply(x) + b
    console.print(f"  B = U_r S_r, A = V_rᵀ              {_size(factors.B)} and {_size(factors.A)}")
    console.print(f"  largest |(Wx + b) − (B(Ax) + b)|   {float((y - factored).abs().max()):.1e}")
    console.print(f"  parameters                         {W.numel()} → {factors.parameters}")


def _unpack(folder: Path, name: str) -> tuple[Path, Path]:
    """An embedded model, and text that it has not seen, where the user can look at them."""
    model, heldout = folder / name, folder / f"{name}-heldout.txt"
    for source in sorted(embedded("models", name).iterdir()):
        copy_file(source, model / source.name)
    if not heldout.exists():
        write_file(heldout, embedded("texts", f"{name}-heldout.txt").read_bytes())
    return model, heldout


def _inspect(base: Path, console: Console) -> None:
    _heading(console, f"eckart inspect {base}")
    report = api.inspect(base)
    table = _table("matrix", "shape", "rank", "verdict")
    for row in report.matrices:
        if row.name.startswith(SHOWN):
            shape = f"{row.shape[0]}×{row.shape[1]}"
            table.add_row(_short(row.name), shape, str(row.numerical_rank), row.verdict)
    console.print(table)
    pays = sum(row.verdict.startswith("factor") for row in report.matrices)
    console.print(
        f"  {len(report.matrices)} matrices, those of layer 2 shown. Trained weights have full "
        f"rank:\n  only {pays} of them can be factored to fewer parameters at 10 % error or less."
    )


def _compress(
    base: Path, folder: Path, keep: float, console: Console, force: bool
) -> tuple[Path, Certificate]:
    out = folder / f"keep-{keep}"
    _heading(console, f"eckart compress {base} -o {out} --keep {keep}")
    certificate = api.compress(base, out, keep=keep, force=force)
    errors = [row.relative_error for row in certificate.matrices]
    targeted, model, size = (
        certificate.totals.targeted_parameters,
        certificate.totals.model_parameters,
        certificate.totals.tensor_bytes,
    )
    dense = sum(row.reason.startswith("dense") for row in certificate.copied)
    console.print(f"  {len(errors)} matrices factored, {dense} better left dense")
    console.print(f"  relative error per matrix          {min(errors):.3f} … {max(errors):.3f}")
    console.print(f"  parameters of the matrices         {_arrow(targeted)}")
    console.print(f"  parameters of the whole model      {_arrow(model)}")
    console.print(f"  bytes of all tensors               {_arrow(size)}")
    checks = api.verify(out, base)
    if failed := [check for check in checks if not check.held]:
        raise PromiseError(f"{out} does not hold its promise: {failed[0].detail}")
    console.print(
        f"  eckart verify                      {len(checks)} checks hold, from the written files"
    )
    return out, certificate


def _perplexities(
    base: Path,
    heldout: Path,
    factored: list[tuple[Path, Certificate]],
    console: Console,
    force: bool,
) -> None:
    """What the model has become, honestly: multiplied out, and read by transformers."""
    dense = [out.with_name(f"{out.name}-dense") for out, _ in factored]
    for (out, _), target in zip(factored, dense, strict=True):
        api.densify(out, target, force=force)
    if importlib.util.find_spec("transformers") is None:
        console.print("\n  (pip install 'eckart[hf]' and this prints what the model has become)")
        return
    from eckart.evaluation import perplexity

    _heading(console, f"Is it still the same model? Perplexity per byte on {heldout}")
    before = perplexity(base, heldout, windows=WINDOWS)
    console.print(f"  base                               {before.value:8.3f}")
    for (_, certificate), target in zip(factored, dense, strict=True):
        after = perplexity(target, heldout, windows=WINDOWS)
        console.print(
            f"  keep {certificate.totals.keep:.3f}, multiplied out         {after.value:8.3f}"
            f"   (+{after.nats - before.nats:.3f} nats per byte)"
        )
    console.print(
        "  Plain SVD hurts: a trained weight has no small tail to cut, and an error\n"
        "  small for the matrix need not be small for the model. The certificate\n"
        "  proves the matrices; what the model lost, only the model can tell."
    )


def _adapters(folder: Path, base: Path, console: Console, force: bool) -> None:
    """What a fine-tune changed, as adapters of rising rank, each proved and folded in again."""
    tuned, heldout = _unpack(folder, "tuned")
    _heading(console, f"eckart extract {tuned} --base {base} -o … --rank R")
    console.print(
        "  The same model, tuned on another kind of text. Its norms changed too: they are"
    )
    console.print("  vectors, which no LoRA holds, so they are stored whole (--store-whole norms).")
    models = {"base": base, "tuned": tuned}
    table = _table("adapter", "rank", "error of the change", "bytes", "of the model")
    for rank in RANKS:
        out, applied = folder / f"lora-{rank}", folder / f"with-lora-{rank}"
        certificate = adaptation.extract(
            tuned, base, out, rank=rank, store_whole=["norms"], force=force
        )
        adaptation.apply(out, base, applied, force=force)
        checks = [*api.verify(out, tuned, base=base), *api.verify(applied, out, base=base)]
        if failed := [check for check in checks if not check.held]:
            raise PromiseError(f"{out} does not hold its promise: {failed[0].detail}")
        assert certificate.change is not None
        model, size = certificate.totals.tensor_bytes
        error = f"{certificate.change.relative_error:.3f}"
        table.add_row(f" {out.name}", str(rank), error, f"{size:,}", f"{100 * size / model:.1f} %")
        models[f"base + {out.name}"] = applied
    console.print(table)
    console.print("  Each is verified against both models, and folded into base by eckart apply.")
    if importlib.util.find_spec("transformers") is None:
        return
    from eckart.evaluation import perplexity

    _heading(console, f"Is it the tuned model? Perplexity per byte on {heldout}")
    for name, model in models.items():
        found = perplexity(model, heldout, windows=WINDOWS)
        console.print(f"  {name:34} {found.value:8.3f}")


def _next(folder: Path, base: Path, console: Console, seconds: float) -> None:
    _heading(console, f"Done in {seconds:.0f} s; everything is in {folder}. Try next")
    console.print(f"  eckart inspect {base}")
    console.print(f"  eckart compress {base} -o {folder / 'rank-16'} --rank 16 --dry-run")
    console.print(f"  eckart verify {folder / 'keep-0.6'} --against {base}")
    console.print(f"  eckart resize {folder / 'lora-32'} -o {folder / 'lora-5'} --rank 5")
    console.print("  eckart compress YOUR-CHECKPOINT -o OUT --error 0.1")
    console.print("  eckart extract YOUR-FINE-TUNE --base ITS-BASE -o LORA --size 50MB")


def _heading(console: Console, text: str) -> None:
    console.print(f"\n{text}", style="bold", markup=False, soft_wrap=True)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 1, 0, 1))
    for column in columns:
        left = column in ("matrix", "adapter", "shape", "verdict")
        first = column in ("matrix", "adapter")
        table.add_column(f" {column}" if first else column, justify="left" if left else "right")
    return table


def _short(name: str) -> str:
    return " " + name.removeprefix(SHOWN).removesuffix(".weight")


def _size(tensor: torch.Tensor) -> str:
    return "×".join(map(str, tensor.shape))


def _arrow(pair: tuple[int, int]) -> str:
    before, after = pair
    return f"{before:,} → {after:,} ({100 * after / before:.1f} %)"
