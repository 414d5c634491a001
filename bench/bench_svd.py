"""Times `truncated_svd` against `torch.svd_lowrank` at equal error, and against `torch.linalg.svd`.

Protocol. Matrices with known singular values: H diag(σ) G, with H and G products of random
Householder reflections, and Gaussian ones, whose values LAPACK computes once. For each case:

- ours: the whole public call `truncated_svd(W, rank=r)` with its defaults, checks included;
- tuned: `torch.svd_lowrank(W, q, niter)`, cut to r, with the cheapest of q = r + 0, 8, 16, 32 and
  the smallest niter that reaches an excess of max(ours, 1e-4) over the Eckart–Young optimum: an
  oracle's choice, which no user has without knowing the spectrum;
- default: `torch.svd_lowrank(W, q=r)`, niter 2, whatever its error.

The three run alternately; a ratio is the median of the ratios of the rounds. Excess is
‖W − U diag(s) Vh‖_F / optimum − 1, measured. Results are appended to `bench/RESULTS.md`.
"""

import argparse
import datetime
import math
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from eckart.linalg.randomized import residual_energy
from eckart.linalg.truncated import truncated_svd

LEDGER = Path(__file__).with_name("RESULTS.md")
EQUAL = 1e-4
OVERSAMPLING = (0, 8, 16, 32)
ITERATIONS = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40)


@dataclass(frozen=True)
class Case:
    """A matrix with its singular values, and a rank."""

    family: str
    W: Tensor
    values: Tensor
    rank: int

    @property
    def optimum(self) -> float:
        """The Eckart–Young error."""
        return math.sqrt(float(self.values[self.rank :].square().sum()))

    def excess(self, U: Tensor, s: Tensor, Vh: Tensor) -> float:
        """By how much the error of the first `rank` triplets is above the optimum."""
        r = self.rank
        error = math.sqrt(residual_energy(self.W, U[:, :r], s[:r], Vh[:r]))
        return error / self.optimum - 1


def with_values(values: Tensor, generator: torch.Generator, reflections: int = 4) -> Tensor:
    """Returns H diag(values) G in float32: dense, and its spectrum is known."""
    W = torch.diag(values)
    for _ in range(reflections):
        u, v = (torch.randn(len(W), 1, dtype=W.dtype, generator=generator) for _ in range(2))
        u, v = u / u.norm(), v / v.norm()
        W -= 2 * u @ (u.mT @ W)
        W -= 2 * (W @ v) @ v.mT
    return W.float()


def gaussian(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Returns a Gaussian matrix and its singular values, kept in the temporary folder."""
    W = torch.randn(n, n, generator=generator)
    cache = Path(tempfile.gettempdir()) / f"eckart-bench-gaussian-{n}-{torch.__version__}.pt"
    if not cache.exists():
        torch.save(torch.linalg.svdvals(W).double(), cache)
    return W, torch.load(cache)


def matrices(n: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yields the families: name, matrix, singular values."""
    i = torch.arange(1, n + 1, dtype=torch.float64)
    families = {"slow i^-0.5": i**-0.5, "fast i^-2": i**-2.0, "geometric 0.97^i": 0.97**i}
    for seed, (name, values) in enumerate(families.items()):
        yield name, with_values(values, torch.Generator().manual_seed(seed)), values
    yield "Gaussian", *gaussian(n, torch.Generator().manual_seed(9))


clock = time.perf_counter


def seconds(call: Callable[[], object]) -> float:
    """Returns the time of one call."""
    start = clock()
    call()
    return clock() - start


def lowrank(case: Case, extra: int, iterations: int) -> Callable[[], tuple[Tensor, ...]]:
    """Returns the rival with its two settings."""

    def call() -> tuple[Tensor, ...]:
        torch.manual_seed(0)  # a benchmark may: svd_lowrank knows no generator
        return torch.svd_lowrank(case.W, case.rank + extra, iterations)

    return call


def tuned(case: Case, limit: float) -> tuple[int, int]:
    """Returns the cheapest (oversampling, niter) of svd_lowrank with at most this excess."""
    found: list[tuple[float, int, int]] = []
    for extra in OVERSAMPLING:
        for iterations in ITERATIONS:
            call = lowrank(case, extra, iterations)
            if found and seconds(call) > 1.5 * min(found)[0]:
                break
            U, s, V = call()
            if case.excess(U, s, V.mT) <= limit:
                found.append((min(seconds(call) for _ in range(3)), extra, iterations))
                break
    return min(found)[1:]


def compare(case: Case, rounds: int) -> dict[str, float | int | str]:
    """Returns one row of the table."""
    svd = truncated_svd(case.W, rank=case.rank)
    ours = case.excess(svd.U, svd.s, svd.Vh)
    extra, iterations = tuned(case, max(ours, EQUAL))
    calls = (
        lambda: truncated_svd(case.W, rank=case.rank),
        lowrank(case, extra, iterations),
        lowrank(case, 0, 2),
    )
    times = [[seconds(call) for call in calls] for _ in range(rounds)]
    U, s, V = calls[1]()
    U0, s0, V0 = calls[2]()
    return {
        "n": len(case.W),
        "family": case.family,
        "rank": case.rank,
        "method": svd.method,
        "ms": 1e3 * statistics.median(t[0] for t in times),
        "excess": ours,
        "estimate": svd.excess_estimate,
        "tuned": f"q = r + {extra}, niter {iterations}",
        "tuned_excess": case.excess(U, s, V.mT),
        "ratio": statistics.median(t[0] / t[1] for t in times),
        "default_excess": case.excess(U0, s0, V0.mT),
        "default_ratio": statistics.median(t[0] / t[2] for t in times),
    }


def line(row: dict[str, float | int | str]) -> str:
    """Returns a row in Markdown."""
    return (
        "| {n} | {family} | {rank} | {method} | {ms:.0f} | {excess:.1e} | {estimate:.1e} | {tuned} "
        "| {tuned_excess:.1e} | **{ratio:.2f}** | {default_excess:.1e} | {default_ratio:.2f} |"
    ).format(**row)


def summary(rows: list[dict[str, float | int | str]]) -> list[str]:
    """Returns the geometric means and worst ratios: of the tuned rival and of its defaults."""
    texts: list[str] = []
    for key, label in (("ratio", "tuned (equal error)"), ("default_ratio", "defaults (its error)")):
        ratios = [float(row[key]) for row in rows]
        mean = math.exp(statistics.fmean(math.log(ratio) for ratio in ratios))
        texts.append(
            f"against svd_lowrank, {label}: geometric mean {mean:.2f}, worst {max(ratios):.2f}"
        )
    return texts


def against_exact(n: int, rank: int) -> str:
    """Returns the speed beside torch.linalg.svd on a Gaussian matrix and on a decaying one."""
    parts: list[str] = []
    for name, W, _ in matrices(n):
        if name.startswith(("slow", "Gauss")):
            ours = statistics.median(
                seconds(lambda W=W: truncated_svd(W, rank=rank)) for _ in range(3)
            )
            full = seconds(lambda W=W: torch.linalg.svd(W, full_matrices=False))
            parts.append(f"{name}: {full:.1f} s / {ours:.2f} s = {full / ours:.0f}×")
    return f"against torch.linalg.svd at {n}², rank {rank}: " + "; ".join(parts)


def heading() -> str:
    """Returns date, commit, machine, threads, dtype and load."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    load = Path("/proc/loadavg")
    return (
        f"\n## {datetime.date.today().isoformat()}, commit {commit.stdout.strip() or 'none'}\n\n"
        f"{cpu()}; {torch.get_num_threads()} threads; float32; torch {torch.__version__}, "
        f"Python {platform.python_version()}; load "
        f"{load.read_text().split()[0] if load.exists() else 'unknown'} at the start.\n"
    )


def cpu() -> str:
    """Returns the processor's name and the instruction set that torch uses."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    name = f"{len(names)}× {names[0]}" if names else platform.processor()
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{platform.system()} {platform.machine()}, {name}, {capability}"


def main() -> None:
    """Runs the table, prints it and appends it to the ledger."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sizes", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64, 128])
    parser.add_argument("--families", default="", help="only those whose name contains this")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-exact", action="store_true", help="leave out torch.linalg.svd")
    parser.add_argument("--no-ledger", action="store_true", help="print only")
    parser.add_argument("--cpu-time", action="store_true", help="for a busy machine, 1 thread")
    options = parser.parse_args()
    if options.cpu_time:
        globals()["clock"] = time.process_time
    torch.set_num_threads(options.threads)
    timed = "CPU time" if options.cpu_time else "wall time"
    lines = [
        heading() + f"Times are {timed}.\n",
        "| n | spectrum | rank | method | ms | excess | estimated | svd_lowrank at equal error "
        "| its excess | **ratio** | default's excess | ratio to default |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    rows = []
    for n in options.sizes:
        for name, W, values in matrices(n):
            if options.families not in name:
                continue
            for rank in options.ranks:
                rows.append(compare(Case(name, W, values, rank), options.rounds))
                lines.append(line(rows[-1]))
                print(lines[-1], flush=True)
    closing = ["", *(f"- {text}" for text in summary(rows))]
    if not options.no_exact:
        closing.append(f"- {against_exact(max(options.sizes), 64)}")
    print("\n".join(closing))
    if not options.no_ledger:
        with LEDGER.open("a", encoding="utf-8") as ledger:
            ledger.write("\n".join([*lines, *closing]) + "\n")


if __name__ == "__main__":
    main()
