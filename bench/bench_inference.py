"""Times factored layers beside dense ones: tokens per second through a Llama block's seven.

Protocol. The linear layers of a block (hidden 2048, intermediate 5632; no biases) as `nn.Linear`,
`LowRankLinear` and `PivotedLinear`, with random weights, the ranks that keep 0.8, 0.6 and 0.4 of
each matrix's parameters, and random permutations. `--blocks` of them (default: two, 411 MB in
float32) stand in memory, so that no cache holds the weights. Each layer is called on an input of
its own width, without what is between them:

- decode: one sequence, one token: a row, so that reading the weights is the work;
- prefill: 64 sequences of 16 tokens: 1,024 rows, so that multiplying is.

One process, as many threads as there are cores, no gradients. In every round each of the models is
timed once, dense first; a ratio is the median over the rounds of a factored model's tokens per
second to those of dense in the same round, tokens per second are medians. With `--align N`, ranks
are multiples of N, as `compress --align N` chooses them. On a machine that others use, `--cpu-time`
counts the CPU's seconds on one thread. Results are appended to `bench/RESULTS.md`.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from bench_svd import LEDGER, heading
from torch import Tensor, nn

from eckart.execute import cores
from eckart.nn import LowRankLinear, PivotedLinear

DENSE = (None, 1.0)
KEEPS = (0.8, 0.6, 0.4)
DTYPES = (torch.float32, torch.bfloat16)
WORK = {"decode, 1 × 1": (1, 1), "prefill, 64 × 16": (64, 16)}
FORMS = ("LowRankLinear", "PivotedLinear")

Clock = Callable[[], float]

Kind = tuple[str | None, float]
"""A form, None for dense, and what it keeps."""


def shapes(hidden: int, wide: int) -> list[tuple[int, int]]:
    """Returns (m, n) of q, k, v, o, gate, up and down."""
    return [(hidden, hidden)] * 4 + [(wide, hidden)] * 2 + [(hidden, wide)]


def rank_at(m: int, n: int, form: str, keep: float, align: int) -> int:
    """Returns the largest rank whose parameters are within the share."""
    stored = {
        "LowRankLinear": lambda r: r * (m + n),
        "PivotedLinear": lambda r: r * (m + n - r),
    }[form]
    return max(r for r in range(align, min(m, n), align) if stored(r) <= keep * m * n)


def layer(m: int, n: int, form: str | None, rank: int, dtype: torch.dtype) -> nn.Module:
    """Returns a layer n → m with random weights."""
    if form is None:
        return nn.Linear(n, m, bias=False, dtype=dtype)
    if form == "LowRankLinear":
        return LowRankLinear(n, m, rank, bias=False, dtype=dtype)
    found = PivotedLinear(n, m, rank, bias=False, dtype=dtype)
    found.perm.copy_(torch.randperm(m))
    return found


def build(kind: Kind, dtype: torch.dtype, options: argparse.Namespace) -> list[nn.Module]:
    """Returns the layers of all blocks."""
    form, keep = kind
    found = list[nn.Module]()
    for m, n in shapes(options.hidden, options.wide) * options.blocks:
        rank = 0 if form is None else rank_at(m, n, form, keep, options.align)
        found.append(layer(m, n, form, rank, dtype))
    return found


def seconds(model: list[nn.Module], inputs: dict[int, Tensor], clock: Clock) -> float:
    """Returns the time of one pass through all layers, each on the input of its width."""
    given = [inputs[getattr(one, "A", one).in_features] for one in model]
    start = clock()
    for one, x in zip(model, given, strict=True):
        one(x)
    return clock() - start


def times_of(
    models: dict[Kind, list[nn.Module]], inputs: dict[int, Tensor], rounds: int, clock: Clock
) -> dict[Kind, list[float]]:
    """Returns the seconds of each model in every round; one before warms up."""
    found: dict[Kind, list[float]] = {kind: [] for kind in models}
    for turn in range(rounds + 1):
        for kind, model in models.items():
            took = seconds(model, inputs, clock)
            if turn:
                found[kind].append(took)
    return found


def table(dtype: torch.dtype, options: argparse.Namespace, clock: Clock) -> list[str]:
    """Returns the lines of one dtype."""
    kinds: list[Kind] = [DENSE, *((form, keep) for form in FORMS for keep in KEEPS)]
    models = {kind: build(kind, dtype, options) for kind in kinds}
    lines = list[str]()
    for name, (sequences, length) in WORK.items():
        widths, tokens = (options.hidden, options.wide), sequences * length * options.blocks
        inputs = {n: torch.randn(sequences, length, n).to(dtype) for n in widths}
        times = times_of(models, inputs, options.rounds, clock)
        start = f"| {str(dtype).removeprefix('torch.')} | {name} "
        speed = tokens / statistics.median(times[DENSE])
        lines.append(f"{start}| nn.Linear | {speed:,.0f} | | |")
        for form in FORMS:
            cells = (_cell(tokens, times[form, keep], times[DENSE]) for keep in KEEPS)
            lines.append(f"{start}| {form} | {' | '.join(cells)} |")
    return lines


def _cell(tokens: int, times: list[float], dense: list[float]) -> str:
    ratio = statistics.median(a / b for a, b in zip(dense, times, strict=True))
    return f"{tokens / statistics.median(times):,.0f} (**{ratio:.2f}**)"


def main() -> None:
    """Runs the rounds and appends the figures to the ledger."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--wide", type=int, default=5632)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--align", type=int, default=1, help="ranks in multiples of it")
    parser.add_argument("--cpu-time", action="store_true", help="one thread's, not the wall's")
    parser.add_argument("--no-ledger", action="store_true", help="print only")
    options = parser.parse_args()
    clock = time.process_time if options.cpu_time else time.perf_counter
    torch.set_num_threads(1 if options.cpu_time else cores())
    torch.manual_seed(0)
    lines = [
        heading(),
        f"Tokens per second through a block's seven linear layers (hidden {options.hidden}, "
        f"intermediate {options.wide}), and the ratio to dense; sequences × tokens, "
        f"{options.rounds} rounds, ranks in multiples of {options.align}"
        f"{', CPU time' if options.cpu_time else ''}.\n",
        "| dtype | work | layers | keep 0.8 | keep 0.6 | keep 0.4 |",
        "|---|---|---|---|---|---|",
    ]
    with torch.no_grad():
        for dtype in DTYPES:
            lines += table(dtype, options, clock)
    print("\n".join(lines))
    if not options.no_ledger:
        with LEDGER.open("a", encoding="utf-8") as ledger:
            ledger.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
