"""Times `calibrate`, beside one forward and backward pass and beside the SVDs, on a Llama's shapes.

Protocol. A model of Llama's architecture with random weights (default: 12 layers, hidden 768,
intermediate 2560: 99 M parameters in its linear layers), float32, and random tokens in sequences of
256. Measured in one process, on as many threads as there are cores, alternating:

- forward and backward: logits, cross-entropy and the gradient of every parameter, as a step of
  training takes them, in batches of the size that calibrate takes; and the same with the parameters
  frozen, which is all that calibrate itself needs of a backward pass;
- SVDs alone: values and short-side vectors of every matrix in memory, one on each core;
- calibrate with each kind of curvature, and compress to 0.6 of the parameters with the statistics:
  as the Python functions are called, from a loaded package to the published folder, loading,
  hashing and measuring what was written included.

Ratios are of calibrate + compress to forward and backward + SVDs, the median of the rounds, beside
either backward pass. On a machine that others use, `--cpu-time` counts the CPU's seconds on one
thread instead of the wall's. Results are appended to `bench/RESULTS.md`.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Clock:
    """What seconds are, and on how many threads they pass."""

    read: Callable[[], float]
    threads: int

    def timed(self, call: Callable[[], Any]) -> float:
        """Returns the seconds of a call."""
        start = self.read()
        call()
        return self.read() - start


def passes(folder: Path, ids: torch.Tensor, sequences: int, *, frozen: bool) -> Callable[[], None]:
    """Returns one forward and backward pass over the tokens, ready to be run."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder).eval().requires_grad_(not frozen)
    model.config.use_cache = False
    embed = model.get_input_embeddings()

    def run() -> None:
        for batch in ids.split(sequences):
            x = embed(batch)
            logits = model(inputs_embeds=x.requires_grad_() if frozen else x).logits[:, :-1]
            labels = batch[:, 1:].flatten()
            F.cross_entropy(logits.flatten(0, 1), labels, reduction="sum").backward()

    return run


def svds(folder: Path, clock: Clock) -> float:
    """Returns the seconds of every matrix's SVD, one on each core at a time, without reading."""
    source = open_source(folder)
    loaded = {name: source.load(name) for name in matrices(source)[0]}
    with one_thread(clock), ThreadPoolExecutor(clock.threads) as pool:
        return clock.timed(lambda: [*pool.map(short_side_svd, loaded.values(), loaded)])


@contextmanager
def one_thread(clock: Clock) -> Generator[None]:
    """One thread for each matrix, as compress has it for these shapes."""
    with threadpool_limits(1):
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(clock.threads)


def one_round(folder: Path, model: Path, ids: torch.Tensor, clock: Clock) -> dict[str, float]:
    """Returns the seconds of everything, once each."""
    out, tokens, found = folder / "S", folder / "ids.safetensors", dict[str, float]()
    save_file({"ids": ids}, tokens)
    sequences = 1
    for kind in KINDS:
        shutil.rmtree(out, ignore_errors=True)
        start = clock.read()
        known = calibrate(model, out, tokens=tokens, curvature=kind)
        found[kind] = clock.read() - start
        sequences = int(str(known.document.options["sequences"]))
        small = partial(compress, model, folder / "small", keep=KEEP, statistics=out)
        found[f"compress {kind}"] = clock.timed(partial(small, force=True, workers=clock.threads))
    for name, frozen in (("passes", False), ("frozen", True)):
        found[name] = clock.timed(passes(model, ids, sequences, frozen=frozen))
    found["svds"] = svds(model, clock)
    print(*(f"{name} {seconds:.1f} s" for name, seconds in found.items()), sep=", ", flush=True)
    return found


def ratio(rounds: list[dict[str, float]], kind: str, passes: str) -> float:
    """Returns the median of what calibrate and compress take, beside a pass and the SVDs."""
    return statistics.median(
        (one[kind] + one[f"compress {kind}"]) / (one[passes] + one["svds"]) for one in rounds
    )


def main() -> None:
    """Runs the rounds and appends the figures to the ledger."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--wide", type=int, default=2560)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="one thread's, not the wall's")
    parser.add_argument("--folder", type=Path, help="where there is room; default: temporary")
    parser.add_argument("--no-ledger", action="store_true", help="print only")
    options = parser.parse_args()
    clock = Clock(time.process_time, 1) if options.cpu_time else Clock(time.perf_counter, cores())
    torch.set_num_threads(clock.threads)
    keep_freed_memory()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder, model = Path(name), Path(name) / "model"
        parameters = write_model(model, options.hidden, options.wide, options.layers)
        ids = torch.randint(0, VOCABULARY, (options.tokens // LENGTH, LENGTH))
        rounds = [one_round(folder, model, ids, clock) for _ in range(options.rounds)]
    middle = {kind: statistics.median(one[kind] for one in rounds) for kind in rounds[0]}
    lines = [
        heading(),
        f"`calibrate`, `compress --keep {KEEP} --statistics`; {parameters / 1e6:.0f} M parameters "
        f"in {7 * options.layers} matrices (hidden {options.hidden}, intermediate {options.wide}), "
        f"{options.tokens} tokens, {options.rounds} rounds"
        f"{', CPU time' if options.cpu_time else ''}; forward and backward alone "
        f"{middle['passes']:.1f} s, with frozen parameters {middle['frozen']:.1f} s, SVDs alone "
        f"{middle['svds']:.1f} s.\n",
        "| curvature | calibrate, s | to the passes | compress, s | **both, to both alone** "
        "| with frozen parameters |",
        "|---|---|---|---|---|---|",
        *(
            f"| {kind} | {middle[kind]:.1f} | {middle[kind] / middle['passes']:.2f} "
            f"| {middle[f'compress {kind}']:.1f} | **{ratio(rounds, kind, 'passes'):.2f}** "
            f"| {ratio(rounds, kind, 'frozen'):.2f} |"
            for kind in KINDS
        ),
    ]
    print("\n".join(lines))
    if not options.no_ledger:
        with LEDGER.open("a", encoding="utf-8") as ledger:
            ledger.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
