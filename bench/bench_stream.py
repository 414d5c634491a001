"""Times and measures `compress --rank 32` on synthetic bfloat16 checkpoints, as a user runs it.

Protocol. Checkpoints of Llama's shapes (4096×4096 and 1024×4096), Gaussian values over a low rank,
in shards of 500 MB, of three sizes. For each:

- memory: the command in a process of its own under RLIMIT_DATA = that of a process that has
  imported torch and eckart and read nothing + 8 × the largest matrix in float32 (64 MiB), one
  worker, one thread. That it ends well, in every round, is the proof. Beside it the highest peak
  of resident memory (VmHWM), less that of the bare process, in largest matrices, and how much it
  grows from the first checkpoint to the last;
- time: one worker with one thread, a whole process; the bare process (start and end) is measured
  too, and taken off for the ratio to the larger of (a) reading the source and writing the output's
  bytes, and (b) the kernels alone on matrices in memory: the truncated SVD, the other factor, and
  the measurement of what was written;
- workers: two with one thread each against one, the bare process taken off both.

Runs alternate; a ratio is the median of the rounds. Results are appended to `bench/RESULTS.md`.
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bench_svd import LEDGER, heading
from safetensors.torch import save_file

from eckart.checkpoint.opening import open_source
from eckart.linalg.factors import from_short_side
from eckart.linalg.matrices import named_generator
from eckart.linalg.residual import compare
from eckart.linalg.truncated import truncated_svd

RANK = 32
LAYER = {"q_proj": (4096, 4096), "k_proj": (1024, 4096), "o_proj": (4096, 4096)}
LARGEST = 4 * 4096 * 4096
COPIES = 8

BARE = """
import eckart.api, eckart.cli.output
print([l.split()[1] for l in open("/proc/self/status") if l.startswith("VmData")][0])
"""

LIMITED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[1]),) * 2)
os.execv(sys.argv[2], sys.argv[2:])
"""


def write_checkpoint(folder: Path, gigabytes: float) -> None:
    """Writes a checkpoint of about that size, in shards."""
    folder.mkdir(parents=True)
    layer_bytes = sum(2 * m * n for m, n in LAYER.values())
    layers = max(1, round(gigabytes * 1e9 / layer_bytes))
    places: dict[str, str] = {}
    pending: dict[str, torch.Tensor] = {}
    number = 0

    def flush() -> None:
        nonlocal number, pending
        number += 1
        name = f"model-{number:05d}-of-99999.safetensors"
        save_file(pending, folder / name, metadata={"format": "pt"})
        places.update(dict.fromkeys(pending, name))
        pending = {}

    for layer in range(layers):
        for kind, (m, n) in LAYER.items():
            name = f"model.layers.{layer}.self_attn.{kind}.weight"
            g = named_generator(0, name)
            low = torch.randn(m, 64, generator=g) @ torch.randn(64, n, generator=g)
            pending[name] = (0.02 * torch.randn(m, n, generator=g) + 0.01 * low).bfloat16()
        if sum(tensor.nbytes for tensor in pending.values()) > 5e8:
            flush()
    if pending:
        flush()
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    os.sync()  # what is still to be written would be written during the first runs


def command(source: Path, out: Path, workers: int) -> list[str]:
    """Returns the command line that is measured."""
    line = ["compress", str(source), "-o", str(out), "--rank", str(RANK)]
    eckart = str(Path(sys.executable).with_name("eckart"))
    return [eckart, *line, "--workers", str(workers), "--threads", "1", "-q"]


def timed(line: list[str]) -> float:
    """Returns the seconds of a whole process."""
    start = time.perf_counter()
    subprocess.run(line, check=True, capture_output=True)
    return time.perf_counter() - start


def compress(source: Path, out: Path, workers: int) -> float:
    """Returns the seconds of a whole run."""
    shutil.rmtree(out, ignore_errors=True)
    return timed(command(source, out, workers))


def bare_bytes() -> int:
    """Returns the private memory (VmData) of a process that has done nothing yet."""
    done = subprocess.run([sys.executable, "-c", BARE], capture_output=True, text=True, check=True)
    return 1024 * int(done.stdout)


def peak(line: list[str]) -> int:
    """Returns the peak resident memory of a process; SystemExit unless it ends well.

    VmHWM, which only grows, looked at every 5 ms. (ru_maxrss would include the process that forked
    it.)
    """
    highest = 0
    with subprocess.Popen(line, stdout=subprocess.DEVNULL) as run:
        status = Path(f"/proc/{run.pid}/status")
        while run.poll() is None:
            with contextlib.suppress(OSError):
                words = status.read_text().split()
                if "VmHWM:" in words:  # not in a process that is about to end
                    highest = int(words[words.index("VmHWM:") + 1]) * 1024
            time.sleep(0.005)
    if run.returncode:
        raise SystemExit(f"{line[:3]} ended with {run.returncode}")
    return highest


def bytes_alone(source: Path, out: Path, scratch: Path) -> float:
    """Returns the seconds of reading the source and writing and syncing the output's bytes."""
    start = time.perf_counter()
    for path in sorted(source.glob("*.safetensors")):
        with path.open("rb", buffering=0) as stream:
            while stream.read(2**26):
                pass
    for path in sorted(out.glob("*.safetensors")):
        shutil.copyfile(path, scratch)
    subprocess.run(["sync", "-d", scratch], check=True)
    return time.perf_counter() - start


def kernels_alone(source: Path) -> float:
    """Returns the seconds of the mathematics, matrix by matrix, reading not counted."""
    opened, total = open_source(source), 0.0
    torch.set_num_threads(1)
    for name in opened.tensors:
        W = opened.load(name)
        start = time.perf_counter()
        svd = truncated_svd(W, rank=RANK, generator=named_generator(0, name), name=name)
        vectors = svd.U.mT if W.shape[0] <= W.shape[1] else svd.Vh
        product = from_short_side(W, vectors, svd.s, torch.float32).to(torch.bfloat16)
        compare(W, product, generator=named_generator(0, name), name=name)
        total += time.perf_counter() - start
    return total


def rounds(count: int, *calls: Callable[[], float]) -> list[list[float]]:
    """Returns the times of calls that alternate."""
    return [[call() for call in calls] for _ in range(count)]


def row(source: Path, gigabytes: float, folder: Path, count: int) -> tuple[str, float]:
    """Returns one row of the table, and the peak in largest matrices."""
    out, bare = folder / "out", [sys.executable, "-c", BARE]
    limit = bare_bytes() + COPIES * LARGEST
    limited = [sys.executable, "-c", LIMITED, str(limit), *command(source, out, 1)]
    highest = 0
    for _ in range(count):  # one and the same run differs by a matrix and a half
        shutil.rmtree(out, ignore_errors=True)
        highest = max(highest, peak(limited))
    above = (highest - peak(bare)) / LARGEST
    times = rounds(
        count,
        lambda: timed(bare),
        lambda: compress(source, out, 1),
        lambda: bytes_alone(source, out, folder / "scratch"),
        lambda: kernels_alone(source),
        lambda: compress(source, out, 2),
    )
    start, one, moved, kernels, two = (statistics.median(c) for c in zip(*times, strict=True))
    overhead = statistics.median((t[1] - t[0]) / max(t[2], t[3]) for t in times)
    speedup = statistics.median((t[1] - t[0]) / (t[4] - t[0]) for t in times)
    text = (
        f"| {gigabytes} | {limit / 1e6:.0f} | {above:.2f} | {start:.1f} | {one:.1f} | "
        f"{moved:.1f} | {kernels:.1f} | **{overhead:.2f}** | {two:.1f} | **{speedup:.2f}** |"
    )
    return text, above


def main() -> None:
    """Runs the table, prints it and appends it to the ledger."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.3, 1.0, 3.0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where there is room; default: temporary")
    parser.add_argument("--no-ledger", action="store_true", help="print only")
    options = parser.parse_args()
    lines = [
        heading(),
        f"`compress --rank {RANK}`, one thread per matrix, RLIMIT_DATA = bare + {COPIES} × the "
        "largest matrix in float32 (64 MiB).\n",
        "| GB | RLIMIT_DATA held, MB | peak − bare, in largest matrices | bare, s | one worker, s "
        "| bytes alone, s | kernels alone, s | **ratio to the larger** | two workers, s "
        "| **speed-up** |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    found: list[float] = []
    base = peak([sys.executable, "-c", BARE])
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        for size in options.sizes:
            source = Path(name) / "source"
            write_checkpoint(source, size)
            text, above = row(source, size, Path(name), options.rounds)
            lines.append(text)
            found.append(above)
            print(text, flush=True)
            shutil.rmtree(source)
    growth = (found[-1] * LARGEST + base) / (found[0] * LARGEST + base) - 1
    lines += ["", f"- peak resident memory, from the first to the last: {growth:+.1%}"]
    print(lines[-1])
    if not options.no_ledger:
        with LEDGER.open("a", encoding="utf-8") as ledger:
            ledger.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
