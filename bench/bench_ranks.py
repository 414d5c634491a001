"""Does `extract --rank auto` find the rank of a LoRA that was merged and rounded, at full width?

Protocol. A base in bfloat16 (Gaussian; Student-t with 3 degrees of freedom, so that ulps differ a
thousandfold; or Gaussian with rows and columns of unlike size, up to 16 times), and the same with a
product of rank r added in float32 and rounded once: what merging a LoRA leaves. B and A are
Gaussian, scaled so that the smallest of the r singular values, σ_r, is a given multiple of
τ = 1.1·‖N‖₂, with N uniform in ±½ulp of the base: drawn here, and not by the code that is tested.
Every pair goes through the public `extract`, and ranks are read from the certificate.

- at σ_r ≥ 2τ the rank found must be r, and its change not among those below the rounding floor;
- at σ_r = τ/2 it must be among them, whatever rank is found;
- the product that was written must be within the rounding noise: ‖BA − found‖_F at most
  ‖tuned − (base + BA)‖_F, what rounding took from the change.

Results are appended to `bench/RESULTS.md`; the exit code is 1 where a rank at 2τ or more is not
exact.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from bench_svd import LEDGER, heading
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from eckart import extract
from eckart.certificate import Certificate
from eckart.linalg.matrices import named_generator
from eckart.linalg.rounding import ulp

RANKS = (1, 2, 4, 8, 16, 64)
MULTIPLES = (0.5, 2.0, 4.0, 16.0)
STUDIES = (
    ("Gaussian", (256, 256), 3, MULTIPLES),
    ("Gaussian", (512, 512), 3, MULTIPLES),
    ("Gaussian", (1024, 1024), 3, MULTIPLES),
    ("heavy", (1024, 1024), 2, (0.5, 2.0)),
    ("scaled", (1024, 1024), 2, (0.5, 2.0)),
    ("Gaussian", (2048, 2048), 2, (0.5, 2.0, 16.0)),
    ("Gaussian", (4096, 4096), 1, (0.5, 2.0, 16.0)),
    ("heavy", (4096, 4096), 1, (2.0,)),
    ("Gaussian", (4096, 11008), 1, (2.0,)),
    ("Gaussian", (11008, 4096), 1, (2.0,)),
)
"""Base, shape, seeds, multiples of τ: fewer where one matrix takes half a minute."""

MUST, BELOW = 2.0, 0.5
NOISE_STEPS = 12
STANDARD_DEVIATION = 0.02


@dataclass(frozen=True)
class Case:
    """One change that is known, and how large it is."""

    base: str
    shape: tuple[int, int]
    rank: int
    multiple: float
    seed: int

    @property
    def name(self) -> str:
        """Of its tensor."""
        m, n = self.shape
        return f"r{self.rank}.t{int(10 * self.multiple)}.s{self.seed}.w{m}x{n}.weight"


@dataclass(frozen=True)
class Result:
    """What was found of a case."""

    case: Case
    threshold: float  # τ
    found: int
    is_below: bool
    error: float  # of the product, in units of what rounding took

    @property
    def holds(self) -> bool:
        """Whether it is as promised."""
        if self.case.multiple >= MUST:
            return self.found == self.case.rank and not self.is_below
        return self.is_below or self.case.multiple > BELOW


def base_of(case: Case) -> Tensor:
    """Returns the weights before."""
    (m, n), g = case.shape, named_generator(case.seed, f"base of {case.name}")
    W = torch.randn(m, n, generator=g).mul_(STANDARD_DEVIATION)
    if case.base == "heavy":
        W /= sum(torch.randn(m, n, generator=g).square() for _ in range(3)).div_(3).sqrt_()
    if case.base == "scaled":
        W *= 4.0 ** (2 * torch.rand(m, 1, generator=g) - 1)
        W *= 4.0 ** (2 * torch.rand(1, n, generator=g) - 1)
    return W.bfloat16()


def factors_of(case: Case, tau: float) -> tuple[Tensor, Tensor]:
    """Returns B and A of the change, with σ_r = multiple·τ."""
    (m, n), g = case.shape, named_generator(case.seed, f"change of {case.name}")
    B, A = torch.randn(m, case.rank, generator=g), torch.randn(case.rank, n, generator=g)
    Rb, Ra = (torch.linalg.qr(side.double(), mode="r").R for side in (B, A.mT))
    smallest = float(torch.linalg.svdvals(Rb @ Ra.mT)[-1])
    return B * (case.multiple * tau / smallest), A


def noise_floor(W: Tensor, seed: int) -> float:
    """Returns τ: 1.1 times the norm of what is uniform in ±½ulp of every entry."""
    g = torch.Generator().manual_seed(seed)
    N = (torch.rand(W.shape, generator=g) - 0.5).mul_(ulp(W).float())
    x = torch.randn(W.shape[1], generator=g)
    for _ in range(NOISE_STEPS):
        y = N @ x
        x = N.mT @ (y / y.norm())
    return 1.1 * float(x.norm())


def write_pair(folder: Path, cases: Iterable[Case]) -> dict[Case, float]:
    """Writes base and tuned; returns τ of each case."""
    base, tuned, taus = dict[str, Tensor](), dict[str, Tensor](), dict[Case, float]()
    for case in cases:
        W = base_of(case)
        taus[case] = noise_floor(W, case.seed)
        B, A = factors_of(case, taus[case])
        base[case.name], tuned[case.name] = W, torch.addmm(W.float(), B, A).bfloat16()
    for name, tensors in (("base", base), ("tuned", tuned)):
        (folder / name).mkdir(parents=True)
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
    return taus


def results_of(folder: Path, taus: dict[Case, float], certificate: Certificate) -> Iterator[Result]:
    """Yields what was found of each case, and how far the written product is from the known one."""
    rows = {row.name: row for row in certificate.matrices}
    written = load_file(folder / "out" / "adapter_model.safetensors")
    with safe_open(folder / "tuned" / "model.safetensors", "pt") as tuned:
        for case, tau in taus.items():
            (B, A), W, row = factors_of(case, tau), base_of(case), rows[case.name]
            product = B @ A
            taken = float((tuned.get_tensor(case.name).float() - W.float() - product).norm())
            if row.rank:
                X = f"base_model.model.{case.name.removesuffix('.weight')}"
                left, right = (written[f"{X}.lora_{part}.weight"].float() for part in "BA")
                product.addmm_(left, right, alpha=-1)
            assert row.delta is not None
            error = float(product.norm()) / taken
            yield Result(case, tau, row.rank, row.delta.below_floor, error)


def study(
    base: str, shape: tuple[int, int], seeds: int, multiples: Sequence[float]
) -> Iterator[Result]:
    """Yields the results of one base and shape, a rank at a time."""
    for rank in RANKS:
        cases = [Case(base, shape, rank, x, seed) for seed in range(seeds) for x in multiples]
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            taus = write_pair(folder, cases)
            certificate = extract(
                folder / "tuned", folder / "base", folder / "out", rank="auto", accept_loss=True
            )
            yield from results_of(folder, taus, certificate)


def table(results: Sequence[Result]) -> list[str]:
    """Returns the rows: one for each base, shape and multiple, with a column for each rank."""
    rows: dict[tuple[str, tuple[int, int], float], list[Result]] = {}
    for one in results:
        rows.setdefault((one.case.base, one.case.shape, one.case.multiple), []).append(one)
    ranks = " | ".join(f"r = {rank}" for rank in RANKS)
    lines = [f"| base | shape | τ | σ_r/τ | {ranks} |", "|---" * (4 + len(RANKS)) + "|"]
    for (base, (m, n), multiple), found in sorted(rows.items(), key=lambda row: row[0][1]):
        cells = " | ".join(cell([one for one in found if one.case.rank == r]) for r in RANKS)
        tau = sum(one.threshold for one in found) / len(found)
        lines.append(f"| {base} | {m}×{n} | {tau:.3g} | {multiple:g} | {cells} |")
    return lines


def cell(found: Sequence[Result]) -> str:
    """Returns the ranks found, a mark where one is wrong, and the largest error.

    A rank of a change that is named as below the floor stands in parentheses.
    """
    ranks = ", ".join(f"({one.found})" if one.is_below else str(one.found) for one in found)
    mark = "" if all(one.holds for one in found) else " ✗"
    return f"{ranks}{mark}; {max(one.error for one in found):.2f}"


def main() -> None:
    """Runs the study, prints it and appends it to the ledger."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--largest", type=int, default=11008, help="no side above this")
    parser.add_argument("--dry", action="store_true", help="leave the ledger as it is")
    options = parser.parse_args()
    lines, results, began = [heading()], list[Result](), time.monotonic()
    for base, shape, seeds, multiples in STUDIES:
        if max(shape) <= options.largest:
            for one in study(base, shape, seeds, multiples):
                print(one, flush=True)
                results.append(one)
    promised = [one for one in results if one.case.multiple >= MUST]
    exact = sum(one.holds for one in promised)
    lower = [one for one in results if one.case.multiple <= BELOW]
    lines += [
        "`extract --rank auto` of bases in bfloat16 with a merged LoRA of rank r: the rank found, "
        "for each seed, in parentheses where it is named as below the floor; and the largest error "
        "of the product, in units of what rounding took.\n",
        *table(results),
        "",
        f"- at σ_r ≥ 2τ the rank is exact, and not below the floor, in **{exact} of "
        f"{len(promised)}**; at τ/2 {sum(one.is_below for one in lower)} of {len(lower)} are named "
        "as below the floor",
        f"- from 2τ on, the largest error is {max(one.error for one in promised):.3f}; "
        f"{time.monotonic() - began:.0f} s in all",
    ]
    print("\n".join(lines))
    if not options.dry:
        with LEDGER.open("a", encoding="utf-8") as ledger:
            ledger.write("\n".join([*lines, ""]))
    sys.exit(int(exact < len(promised)))


if __name__ == "__main__":
    main()
