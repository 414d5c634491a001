"""Times and measures `compress --rank 32` on synthetic bfloat16 checkpoints, as a user runs it.

Protocol. Checkpoints of Llama's shapes (4096×4096 and 4096×1024 a layer), values Gaussian with a
falling spectrum under them, in shards of 500 MB, of three sizes. For each:

- memory: the command in a process of its own under RLIMIT_DATA = the bare process (torch and eckart
  imported, nothing read) + 8 × the largest matrix in float32, one worker, one thread. That it ends
  well is the proof; the peak of its private memory (VmData) is sampled every 5 ms, and said in
  parts of the limit, for the first and the last tenth of the run too;
- time: the same command with one worker and one thread, against (a) reading the source and writing
  the output's bytes, and (b) the kernels alone on matrices in memory: the truncated SVD, the other
  factor, and the measurement of what was written. The ratio is to the larger of the two;
- workers: two with one thread each against one.

Runs alternate; a ratio is the median of the rounds. Results are appended to `bench/RESULTS.md`.
"""

import argparse
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


def timed(source: Path, out: Path, workers: int) -> float:
    """Returns the seconds of a whole run, process start included."""
    shutil.rmtree(out, ignore_errors=True)
    start = time.perf_counter()
    subprocess.run(command(source, out, workers), check=True)
    return time.perf_counter() - start


def bare_bytes() -> int:
    """Returns the private memory of a process that has done nothing yet."""
    done = subprocess.run([sys.executable, "-c", BARE], capture_output=True, text=True, check=True)
    return 1024 * int(done.stdout)


def peaks(source: Path, out: Path, limit: int) -> tuple[int, int, int]:
    """Runs under a limit; returns the peak of VmData, and those of the first and last tenth."""
    shutil.rmtree(out, ignore_errors=True)

    samples: list[int] = []
    line = [sys.executable, "-c", LIMITED, str(limit), *command(source, out, 1)]
    with subprocess.Popen(line) as run:
        status = Path(f"/proc/{run.pid}/status")
        while run.poll() is None:
            try:
                lines = status.read_text().splitlines()
            except OSError:
                break
            samples += [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData")]
            time.sleep(0.005)
        code = run.wait()
    if code:
        raise SystemExit(f"the run under {limit:,} bytes of RLIMIT_DATA ended with {code}")
    tenth = max(len(samples) // 10, 1)
    third = samples[3 * tenth : 4 * tenth]  # the first tenth or two is the start of Python
    return max(samples), max(third), max(samples[-tenth:])


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


def row(source: Path, gigabytes: float, folder: Path, count: int) -> str:
    """Returns one row of the table."""
    out = folder / "out"
    bare = bare_bytes()
    limit = bare + COPIES * LARGEST
    peak, first, last = peaks(source, out, limit)
    times = rounds(
        count,
        lambda: timed(source, out, 1),
        lambda: bytes_alone(source, out, folder / "scratch"),
        lambda: kernels_alone(source),
        lambda: timed(source, out, 2),
    )
    one, moved, kernels, two = (statistics.median(column) for column in zip(*times, strict=True))
    overhead = statistics.median(t[0] / max(t[1], t[2]) for t in times)
    speedup = statistics.median(t[0] / t[3] for t in times)
    return (
        f"| {gigabytes} | {bare / 1e6:.0f} | {(peak - bare) / LARGEST:.1f} | "
        f"{100 * (last / first - 1):+.1f} % | {one:.1f} | {moved:.1f} | {kernels:.1f} | "
        f"**{overhead:.2f}** | {two:.1f} | **{speedup:.2f}** |"
    )


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
        "| GB | bare, MB | peak − bare, in largest matrices | growth | seconds | bytes alone "
        "| kernels alone | **ratio to the larger** | two workers | **speed-up** |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        for size in options.sizes:
            source = Path(name) / "source"
            write_checkpoint(source, size)
            lines.append(row(source, size, Path(name), options.rounds))
            print(lines[-1], flush=True)
            shutil.rmtree(source)
    if not options.no_ledger:
        with LEDGER.open("a", encoding="utf-8") as ledger:
            ledger.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
