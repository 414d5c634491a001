"""Times `calibrate`, beside one forward and backward pass and beside the SVDs, on a Llama's shapes.

Protocol. A model of Llama's architecture with random weights (default: 12 layers, hidden 768,
intermediate 2560: 99 M parameters in its linear layers), float32, and random tokens in sequences of
256. Measured in one process, on as many threads as there are cores, alternating:

- forward and backward: logits, cross-entropy and the gradient of every parameter, as a step of
  training takes them, in batches of the size that calibrate takes;
- SVDs alone: values and short-side vectors of every matrix in memory, one on each core;
- calibrate with each kind of curvature, and compress to 0.6 of the parameters with the statistics:
  as the Python functions are called, from a loaded package to the published folder, loading,
  hashing and measuring what was written included.

Ratios are of calibrate + compress to forward and backward + SVDs, the median of the rounds. Results
are appended to `bench/RESULTS.md`.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 as everybody calls it
from bench_svd import LEDGER, heading
from safetensors.torch import save_file
from threadpoolctl import threadpool_limits

from eckart.api import compress
from eckart.checkpoint.opening import open_source
from eckart.execute import cores, keep_freed_memory
from eckart.families import matrices
from eckart.linalg.gram import short_side_svd
from eckart.statistics import calibrate

LENGTH, VOCABULARY, HEAD = 256, 4096, 64
KINDS = ("full", "diagonal", "none")
KEEP = 0.6


def write_model(folder: Path, hidden: int, wide: int, layers: int) -> int:
    """Writes the model, and returns the parameters of its linear layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=wide,
        num_hidden_layers=layers,
        num_attention_heads=hidden // HEAD,
        num_key_value_heads=hidden // HEAD,
        vocab_size=VOCABULARY,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return layers * (4 * hidden**2 + 3 * hidden * wide)


def timed(call: Callable[[], Any]) -> float:
    """Returns the seconds of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def passes(folder: Path, ids: torch.Tensor, sequences: int) -> Callable[[], None]:
    """Returns one forward and backward pass over the tokens, ready to be run."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder).eval()
    model.config.use_cache = False

    def run() -> None:
        for batch in ids.split(sequences):
            logits = model(input_ids=batch).logits[:, :-1]
            labels = batch[:, 1:].flatten()
            F.cross_entropy(logits.flatten(0, 1), labels, reduction="sum").backward()

    return run


def svds(folder: Path) -> float:
    """Returns the seconds of every matrix's SVD, one on each core at a time, without reading."""
    source = open_source(folder)
    loaded = {name: source.load(name) for name in matrices(source)[0]}
    with one_thread(), ThreadPoolExecutor(cores()) as pool:
        return timed(lambda: [*pool.map(short_side_svd, loaded.values(), loaded)])


@contextmanager
def one_thread() -> Generator[None]:
    """One thread for each matrix, as compress has it for these shapes."""
    with threadpool_limits(1):
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(cores())


def main() -> None:
    """Runs the rounds and appends the figures to the ledger."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--wide", type=int, default=2560)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where there is room; default: temporary")
    parser.add_argument("--no-ledger", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(cores())
    keep_freed_memory()
    kinds = [*KINDS, *(f"compress {kind}" for kind in KINDS)]
    times: dict[str, list[float]] = {kind: [] for kind in ("passes", "svds", *kinds)}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        model, out, tokens = Path(name) / "model", Path(name) / "S", Path(name) / "ids.safetensors"
        parameters = write_model(model, options.hidden, options.wide, options.layers)
        ids = torch.randint(0, VOCABULARY, (options.tokens // LENGTH, LENGTH))
        save_file({"ids": ids}, tokens)
        for _ in range(options.rounds):
            for kind in KINDS:
                shutil.rmtree(out, ignore_errors=True)
                start = time.perf_counter()
                found = calibrate(model, out, tokens=tokens, curvature=kind)
                times[kind].append(time.perf_counter() - start)
                small = partial(compress, model, Path(name) / "small", keep=KEEP, statistics=out)
                times[f"compress {kind}"].append(timed(partial(small, force=True)))
                print(
                    kind, *(f"{times[k][-1]:.1f} s" for k in (kind, f"compress {kind}")), flush=True
                )
            together = int(str(found.document.options["sequences"]))
            times["passes"].append(timed(passes(model, ids, together)))
            times["svds"].append(svds(model))
            print(f"passes {times['passes'][-1]:.1f} s, SVDs {times['svds'][-1]:.1f} s", flush=True)
    middle = {kind: statistics.median(found) for kind, found in times.items()}
    ratios = {
        kind: statistics.median(
            (a + b) / (c + d)
            for a, b, c, d in zip(
                times[kind], times[f"compress {kind}"], times["passes"], times["svds"], strict=True
            )
        )
        for kind in KINDS
    }
    lines = [
        heading(),
        f"`calibrate`, `compress --keep {KEEP} --statistics`; {parameters / 1e6:.0f} M parameters "
        f"in {7 * options.layers} matrices (hidden {options.hidden}, intermediate {options.wide}), "
        f"{options.tokens} tokens; forward and backward alone {middle['passes']:.1f} s, SVDs alone "
        f"{middle['svds']:.1f} s.\n",
        "| curvature | calibrate, s | to the passes | compress, s | **both, to both alone** |",
        "|---|---|---|---|---|",
        *(
            f"| {kind} | {middle[kind]:.1f} | {middle[kind] / middle['passes']:.2f} "
            f"| {middle[f'compress {kind}']:.1f} | **{ratios[kind]:.2f}** |"
            for kind in KINDS
        ),
    ]
    print("\n".join(lines))
    if not options.no_ledger:
        with LEDGER.open("a", encoding="utf-8") as ledger:
            ledger.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
