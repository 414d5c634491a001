"""Times and measures the adapters' commands as a user runs them: extract, resize, apply.

Protocol. Every command is a process of its own, on data that is on disk. Rounds alternate, and a
ratio is the median of the ratios of the rounds, so that a busy machine disturbs both sides.

- extract against `mergekit-extract-lora` 0.1.5, in an environment of its own, on a Llama-shaped
  pair in bfloat16 (tuned = base + an update of rank 16 and 5 % of each matrix + noise of 2 % of the
  update, rounded; embeddings and norms unchanged), rank 32, both with two threads, ours as two
  workers. The time of importing torch, each in its own environment, is measured in the same round
  and taken off both. Errors are ‖tuned − base − s·BA‖_F/‖tuned − base‖_F over all matrices, from
  the written files, in float64. Memory is the peak of the proportional set sizes (PSS) of the
  process and its children, looked at all the time: what processes share counts once.
- resize of an adapter of rank 128 of 4096-wide modules to 32, against forming each s·BA and its
  dense SVD (`torch.linalg.svd`), two threads, in float32.
- apply of rank 16 to a base, against the quicker of two times `cp` and `sync` of the base, one
  right after the other: a virtual machine that has given its free pages back pays for the first
  one with them. The bare process (start and end) is measured too, and the ratio is given with and
  without it. Beside it the least that the certificate costs: BLAKE3 of as many bytes twice, base
  and output, on two threads.
- memory of extract (two workers of one thread) for a model and for one with four times the layers.

mergekit needs an environment of its own:

    python3 -m venv .venv-mergekit
    .venv-mergekit/bin/pip install -c constraints.txt torch
    .venv-mergekit/bin/pip install mergekit==0.1.5

Results are appended to `bench/RESULTS.md`.
"""

import argparse
import contextlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from bench_svd import LEDGER, heading
from safetensors.torch import load_file, save_file
from torch import Tensor

from eckart.checkpoint.hashing import file_digest
from eckart.checkpoint.opening import open_source
from eckart.linalg.matrices import named_generator

MERGEKIT = Path(".venv-mergekit/bin/mergekit-extract-lora")
EXTRACTED, UPDATE, TRAINED, LARGE = 32, 16, 16, 128
PARTS = ("mergekit", "resize", "apply", "memory")
TWO = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "2")
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Shape:
    """A Llama of so many layers."""

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int

    def matrices(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Yields the names and shapes of what an adapter holds."""
        h, i = self.hidden, self.intermediate
        sides = {"self_attn.k_proj": (h // 4, h), "self_attn.v_proj": (h // 4, h)}
        sides |= {"self_attn.q_proj": (h, h), "self_attn.o_proj": (h, h)}
        sides |= {"mlp.gate_proj": (i, h), "mlp.up_proj": (i, h), "mlp.down_proj": (h, i)}
        for layer in range(self.layers):
            for kind, shape in sides.items():
                yield f"model.layers.{layer}.{kind}.weight", shape

    def others(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yields the names and shapes of what stays as it is."""
        for layer in range(self.layers):
            for norm in ("input_layernorm", "post_attention_layernorm"):
                yield f"model.layers.{layer}.{norm}.weight", (self.hidden,)
        yield "model.norm.weight", (self.hidden,)
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        yield "lm_head.weight", (self.vocabulary, self.hidden)

    def config(self) -> dict[str, object]:
        """Returns what other tools want to know."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.hidden // 128,
            "num_key_value_heads": self.hidden // 512,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }


def drawn(name: str, shape: tuple[int, ...]) -> Tensor:
    """Returns a weight: Gaussian, or ones for a norm."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.randn(shape, generator=named_generator(0, name)).mul_(0.02).bfloat16()


def tuned(name: str, W: Tensor) -> Tensor:
    """Returns W with an update of rank 16 and 5 % of its norm, and 2 % of noise in it."""
    (m, n), g = W.shape, named_generator(1, name)
    update = torch.randn(m, UPDATE, generator=g) @ torch.randn(UPDATE, n, generator=g)
    update *= 0.05 * W.float().norm() / update.norm()
    noise = torch.randn(m, n, generator=g)
    update += noise.mul_(0.02 * update.norm() / noise.norm())
    return (W.float() + update).bfloat16()


def write_model(folder: Path, shape: Shape, change: Callable[[str, Tensor], Tensor]) -> None:
    """Writes a checkpoint, a shard for each layer and one for the rest."""
    folder.mkdir(parents=True)
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    changed = dict(shape.matrices())
    for name, sides in [*changed.items(), *shape.others()]:
        layer = name.split(".")[2] if ".layers." in name else "rest"
        shards.setdefault(layer, {})[name] = sides
    places: dict[str, str] = {}
    for number, held in enumerate(shards.values(), 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: drawn(name, sides) for name, sides in held.items()}
        tensors |= {name: change(name, tensors[name]) for name in held if name in changed}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(held, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(shape.config()))


def write_adapter(folder: Path, shapes: Sequence[tuple[str, tuple[int, int]]], rank: int) -> None:
    """Writes an adapter of that rank in PEFT's format, about 1 % of a weight."""
    folder.mkdir(parents=True)
    tensors: dict[str, Tensor] = {}
    for name, (m, n) in shapes:
        X, g = PREFIX + name.removesuffix(".weight"), named_generator(2, name)
        A, B = torch.randn(rank, n, generator=g), torch.randn(m, rank, generator=g)
        tensors[f"{X}.lora_A.weight"] = (0.01 * A).bfloat16()
        tensors[f"{X}.lora_B.weight"] = (0.01 * B).bfloat16()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def eckart(*line: object) -> list[str]:
    """Returns a command line of ours."""
    return [str(Path(sys.executable).with_name("eckart")), *map(str, line), "-q"]


def timed(line: Sequence[str], **environment: str) -> float:
    """Returns the seconds of a whole process; SystemExit unless it ends well."""
    start = time.perf_counter()
    done = subprocess.run(
        line, capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{' '.join(line[:3])} … ended with {done.returncode}:\n{done.stderr}")
    return seconds


def fresh(out: Path, line: Sequence[str], **environment: str) -> float:
    """Returns the seconds of a command that writes `out`, which is removed before."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()  # what an earlier one left to be written is not this one's time
    return timed(line, **environment)


def peak(out: Path, line: Sequence[str], **environment: str) -> int:
    """Returns the highest sum of the proportional set sizes of a process and its children."""
    shutil.rmtree(out, ignore_errors=True)
    highest, ended = 0, threading.Event()
    run = subprocess.Popen(
        line,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **environment},
        start_new_session=True,  # its children are in it: the fork server's too
    )

    def watch() -> None:
        nonlocal highest
        while not ended.is_set():
            highest = max(highest, sum(_pss(pid) for pid in _session(run.pid)))
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = run.wait()
    ended.set()
    watcher.join()
    if code:
        raise SystemExit(f"{' '.join(line[:3])} … ended with {code}")
    return highest


def _session(leader: int) -> Iterator[int]:
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            if int((path / "stat").read_text().rsplit(")", 1)[1].split()[3]) == leader:
                yield int(path.name)


def _pss(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def rounds(count: int, *calls: Callable[[], float]) -> list[list[float]]:
    """Returns the times of calls that alternate."""
    return [[call() for call in calls] for _ in range(count)]


def medians(times: list[list[float]]) -> list[float]:
    """Returns the median of each call."""
    return [statistics.median(column) for column in zip(*times, strict=True)]


def error_of(adapter: Path, model: Path, base: Path) -> float:
    """Returns ‖tuned − base − s·BA‖_F/‖tuned − base‖_F over all matrices, in float64."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    factors = load_file(adapter / "adapter_model.safetensors")
    if set(config.get("alpha_pattern") or {}) != set(config.get("rank_pattern") or {}):
        raise SystemExit(f"{adapter}: the scale differs from module to module")
    scale = config["lora_alpha"] / config["r"]
    after, before = open_source(model), open_source(base)
    missed = total = 0.0
    for key in factors:
        if not key.endswith(".lora_A.weight"):
            continue
        name = key.removeprefix(PREFIX).replace(".lora_A.weight", ".weight")
        A, B = factors[key].double(), factors[key.replace("lora_A", "lora_B")].double()
        delta = after.load(name).double() - before.load(name).double()
        total += float(delta.square().sum())
        missed += float(delta.addmm_(B, A, alpha=-scale).square().sum())
    return math.sqrt(missed / total)


def extract_rows(folder: Path, hiddens: Sequence[int], mergekit: Path, count: int) -> Iterator[str]:
    """Yields the table of extract against mergekit."""
    yield (
        f"`extract --rank {EXTRACTED} --workers 2` against mergekit-extract-lora 0.1.5, net of "
        "importing torch.\n\n"
        "| hidden, intermediate, layers | ours, s | torch, s | mergekit, s | torch, s "
        "| **ratio, net** | error / mergekit's | PSS, MB | mergekit's |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )
    for hidden in hiddens:
        layers = 2 if hidden <= 2048 else 1
        shape = Shape(hidden, hidden * 11 // 4, layers, 4 * hidden)
        base, model, out, theirs = (folder / name for name in ("base", "tuned", "out", "theirs"))
        write_model(base, shape, lambda _, W: W)
        write_model(model, shape, tuned)
        ours = eckart("extract", model, "--base", base, "-o", out, "--rank", EXTRACTED)
        ours += ["--workers", "2"]
        rival = [str(mergekit), "--model", str(model), "--base-model", str(base)]
        rival += ["--out-path", str(theirs), "--max-rank", str(EXTRACTED), "--skip-undecomposable"]
        rival += ["-e", "embed_tokens", "-e", "lm_head"]
        quiet = {**TWO, "HF_HUB_OFFLINE": "1"}
        times = rounds(
            count,
            lambda: timed([sys.executable, "-c", "import torch"]),
            lambda ours=ours, out=out: fresh(out, ours),
            lambda: timed([str(mergekit.with_name("python")), "-c", "import torch"]),
            lambda rival=rival, theirs=theirs, quiet=quiet: fresh(theirs, rival, **quiet),
        )
        start, mine, its_start, its = medians(times)
        ratio = statistics.median((t[3] - t[2]) / (t[1] - t[0]) for t in times)
        errors = [error_of(one, model, base) for one in (out, theirs)]
        peaks = peak(out, ours), peak(theirs, rival, **quiet)
        yield (
            f"| {hidden}, {shape.intermediate}, {layers} | {mine:.2f} | {start:.2f} | {its:.1f} | "
            f"{its_start:.2f} | **{ratio:.1f}** | {errors[0] / errors[1]:.5f} | "
            f"{peaks[0] / 1e6:.0f} | {peaks[1] / 1e6:.0f} |"
        )
        for path in (base, model, out, theirs):
            shutil.rmtree(path)


def dense_svds(adapter: Path, modules: Sequence[str]) -> float:
    """Returns the seconds of forming each B·A of an adapter and taking its dense SVD."""
    factors = load_file(adapter / "adapter_model.safetensors")
    torch.set_num_threads(2)
    start = time.perf_counter()
    for name in modules:
        X = PREFIX + name.removesuffix(".weight")
        B, A = (factors[f"{X}.lora_{part}.weight"].float() for part in "BA")
        torch.linalg.svd(B @ A, full_matrices=False)
    return time.perf_counter() - start


def resize_rows(folder: Path, count: int) -> Iterator[str]:
    """Yields the figures of resize against dense SVDs."""
    modules = [(f"model.layers.{i}.self_attn.q_proj.weight", (4096, 4096)) for i in range(32)]
    adapter, out = folder / "adapter", folder / "out"
    write_adapter(adapter, modules, LARGE)
    os.sync()
    line = eckart("resize", adapter, "-o", out, "--rank", EXTRACTED, "--workers", "2")
    times = rounds(
        count,
        lambda: timed([sys.executable, "-c", "import torch"]),
        lambda: fresh(out, line),
        lambda: len(modules) * dense_svds(adapter, [modules[0][0]]),  # they are all alike
    )
    start, ours, dense = medians(times)
    gross = statistics.median(t[2] / t[1] for t in times)
    net = statistics.median(t[2] / (t[1] - t[0]) for t in times)
    yield (
        f"\n- resize of rank {LARGE} to {EXTRACTED}, {len(modules)} modules of 4096×4096: "
        f"{ours:.2f} s (importing torch takes {start:.2f} s of it), dense SVDs {dense:.0f} s (one "
        f"of them × {len(modules)}): **{gross:.0f}×**, net of the import {net:.0f}×"
    )
    shutil.rmtree(adapter)
    shutil.rmtree(out)


def hashed_twice(folder: Path) -> float:
    """Returns the seconds of hashing every file of a folder, twice, by two threads."""

    def read_all() -> None:
        for path in sorted(folder.iterdir()):
            file_digest(path)

    start = time.perf_counter()
    threads = [threading.Thread(target=read_all) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - start


def apply_rows(folder: Path, gigabytes: float, count: int) -> Iterator[str]:
    """Yields the figures of apply against cp and sync."""
    layers = max(1, round((gigabytes - 0.52) / 0.352))
    shape = Shape(4096, 11008, layers, 32000)
    base, adapter, out, copy = (folder / name for name in ("base", "adapter", "out", "copy"))
    write_model(base, shape, lambda _, W: W)
    write_adapter(adapter, [*shape.matrices()], TRAINED)
    size = sum(path.stat().st_size for path in base.iterdir())
    os.sync()
    line = eckart("apply", adapter, "--base", base, "-o", out, "--workers", "2")
    copying = ["sh", "-c", 'cp -r "$0" "$1" && sync', str(base), str(copy)]
    bare = [sys.executable, "-c", "import eckart.folding, eckart.cli"]

    def copied() -> float:
        found = list[float]()
        for _ in range(2):
            found.append(fresh(copy, copying))
            shutil.rmtree(copy)
        return min(found)

    def applied() -> float:
        seconds = fresh(out, line)
        shutil.rmtree(out)
        return seconds

    times = rounds(count, lambda: timed(bare), applied, copied, lambda: hashed_twice(base))
    start, ours, cp, hashed = medians(times)
    gross = statistics.median(t[1] / t[2] for t in times)
    net = statistics.median((t[1] - t[0]) / t[2] for t in times)
    yield (
        f"- apply of rank {TRAINED} to {size / 1e9:.1f} GB: {ours:.2f} s, of which the bare "
        f"process {start:.2f} s; cp and sync {cp:.2f} s: **{gross:.2f}×**, net of the bare "
        f"process {net:.2f}×; BLAKE3 alone, of what is read and of what is written, on two "
        f"threads {hashed:.2f} s"
    )
    shutil.rmtree(base)
    shutil.rmtree(adapter)


def memory_rows(folder: Path, count: int) -> Iterator[str]:
    """Yields how the memory of extract grows with the model."""
    found: list[int] = []
    for layers in (2, 8):
        shape = Shape(2048, 5632, layers, 8192)
        base, model, out = (folder / name for name in ("base", "tuned", "out"))
        write_model(base, shape, lambda _, W: W)
        write_model(model, shape, tuned)
        line = eckart("extract", model, "--base", base, "-o", out, "--rank", EXTRACTED)
        line += ["--workers", "2", "--threads", "1"]
        found.append(max(peak(out, line) for _ in range(count)))
        for path in (base, model, out):
            shutil.rmtree(path)
    yield (
        f"- memory of extract, hidden 2048, two workers: {found[0] / 1e6:.0f} MB (PSS) for 2 "
        f"layers, {found[1] / 1e6:.0f} MB for 8: **{found[1] / found[0] - 1:+.1%}**"
    )


def main() -> None:
    """Runs the parts asked for, prints what was found and appends it to the ledger."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--mergekit", type=Path, default=MERGEKIT, help="mergekit-extract-lora")
    parser.add_argument("--hidden", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--gigabytes", type=float, default=4.0, help="of the base for apply")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where there is room; default: temporary")
    parser.add_argument("--no-ledger", action="store_true", help="print only")
    options = parser.parse_args()
    if "mergekit" in options.parts and not options.mergekit.is_file():
        raise SystemExit(
            f"there is no {options.mergekit}: make its environment as the head of {__file__} says, "
            "or name another with --mergekit, or leave it out with --parts resize apply memory."
        )
    lines = [heading()]
    print(lines[0], flush=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        tables = {
            "mergekit": lambda: extract_rows(
                folder, options.hidden, options.mergekit, options.rounds
            ),
            "resize": lambda: resize_rows(folder, options.rounds),
            "apply": lambda: apply_rows(folder, options.gigabytes, options.rounds),
            "memory": lambda: memory_rows(folder, options.rounds),
        }
        for part in options.parts:
            for text in tables[part]():
                lines.append(text)
                print(text, flush=True)
    if not options.no_ledger:
        with LEDGER.open("a", encoding="utf-8") as ledger:
            ledger.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
