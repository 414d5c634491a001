"""Makes the two small language models and the four texts of `src/eckart/demonstration/`.

`base` learns the Python sources of the standard library of the Python that runs this file;
`tuned` is `base` with every parameter trained further on the language reference's prose in
`pydoc_data.topics`. What a run did, and the losses it reached, is in `models/TRAINING.json`.

    python tools/train_demo_models.py --scratch SCRATCH    # SCRATCH holds the resume files

The same seed, steps, threads, Python and torch repeat a run. A stopped run resumes from SCRATCH.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import tokenizers
import torch
import transformers
from demo_corpus import PYTHON, Corpus, split, stdlib_documents, write, write_texts
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

END_OF_TEXT = "<|endoftext|>"
END_ID = 256  # ids 0 to 255 are the bytes themselves
WINDOW = 256  # tokens, in training and in every reported loss
BATCH = 16


@dataclass(frozen=True, slots=True)
class Stage:
    """One training of all parameters, which starts from what the stage before it left."""

    name: str
    corpus: Corpus
    steps: int
    peak_learning_rate: float


def main() -> None:
    """Writes the texts, then trains, measures and writes one model after the other."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    options.scratch.mkdir(parents=True, exist_ok=True)
    modules, prose = split(stdlib_documents(), one_in=16), split(dict(topics), one_in=6)
    stages = [
        Stage("base", modules, options.base_steps, peak_learning_rate=3e-3),
        Stage("tuned", prose, options.tuned_steps, peak_learning_rate=1e-3),
    ]
    write_texts({stage.name: stage.corpus for stage in stages}, options.output / "texts")
    model = new_model(options.seed)
    record = {"seed": options.seed, "threads": options.threads, **origin(model)}
    for stage in stages:
        record[stage.name] = train(model, stage, options.scratch, seed=options.seed)
        record[stage.name]["heldout_nats_per_byte"] = publish(model, stage.name, options.output)
    write(options.output / "models" / "TRAINING.json", json.dumps(record, indent=2) + "\n")


def parse_options() -> argparse.Namespace:
    """Reads the command line; the defaults are the recorded run's."""
    parser = argparse.ArgumentParser(description="Makes the demonstration's models and texts.")
    parser.add_argument("--output", type=Path, default=Path("src/eckart/demonstration"))
    parser.add_argument("--scratch", type=Path, required=True, help="where a stopped run resumes")
    parser.add_argument("--base-steps", type=int, default=3300)
    parser.add_argument("--tuned-steps", type=int, default=700)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1936)
    return parser.parse_args()


def new_model(seed: int) -> LlamaForCausalLM:
    """Returns an untrained Llama of about a million parameters, with grouped-query attention."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=END_ID + 1,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=5,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            bos_token_id=END_ID,
            eos_token_id=END_ID,
        )
    )


def train(model: LlamaForCausalLM, stage: Stage, scratch: Path, *, seed: int) -> dict[str, object]:
    """Trains in place on random windows; returns the run's figures.

    A step's windows depend on the seed and the step alone: a resumed run repeats an unbroken one.
    """
    stream = token_stream(stage.corpus.train, seed)
    optimizer = new_optimizer(model)
    resume_file = scratch / f"{stage.name}-{stage.steps}-steps.pt"
    losses, seconds = restore(model, optimizer, resume_file)
    for step in range(len(losses), stage.steps):
        started = time.monotonic()
        for group in optimizer.param_groups:
            group["lr"] = stage.peak_learning_rate * schedule(step, stage.steps)
        losses.append(take_step(model, optimizer, windows(stream, seed + step)))
        seconds += time.monotonic() - started
        if (step + 1) % 100 == 0 or step + 1 == stage.steps:
            print(f"{stage.name} step {step + 1}: {figures(stage, losses, seconds)}", flush=True)
            save(model, optimizer, losses, seconds, resume_file)
    return {"corpus_tokens": len(stream), **figures(stage, losses, seconds)}


def figures(stage: Stage, losses: list[float], seconds: float) -> dict[str, object]:
    """Returns what the record says of a stage after its first `len(losses)` steps."""
    recent = losses[-100:]
    return {
        "peak_learning_rate": stage.peak_learning_rate,
        "steps": len(losses),
        "tokens": len(losses) * BATCH * WINDOW,
        "wall_minutes": round(seconds / 60, 1),
        "train_nats_per_byte_last_100_steps": round(sum(recent) / len(recent), 4),
    }


def token_stream(documents: dict[str, str], seed: int) -> Tensor:
    """Returns the documents' token ids in shuffled order, each closed by the end-of-text token."""
    names = sorted(documents)
    random.Random(seed).shuffle(names)
    tokens = [token for name in names for token in (*documents[name].encode(), END_ID)]
    return torch.tensor(tokens)


def windows(stream: Tensor, seed: int) -> Tensor:
    """Returns BATCH random stretches of the stream, one token longer than WINDOW for the target."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(stream) - WINDOW, (BATCH, 1), generator=generator)
    return stream[starts + torch.arange(WINDOW + 1)]


def new_optimizer(model: LlamaForCausalLM) -> torch.optim.AdamW:
    """Returns AdamW, with weight decay on the matrices and none on the norms' gains."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    gains = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95))


def schedule(step: int, steps: int) -> float:
    """Returns the share of the peak rate: linear over 1/20 of the steps, then a cosine to 0."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


def take_step(model: LlamaForCausalLM, optimizer: torch.optim.AdamW, batch: Tensor) -> float:
    """Updates the model on one batch; returns the loss before the update."""
    loss = nats_per_token(model, batch)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def nats_per_token(model: LlamaForCausalLM, batch: Tensor) -> Tensor:
    """Returns the mean cross entropy of each row's tokens after the first."""
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def save(
    model: LlamaForCausalLM,
    optimizer: torch.optim.AdamW,
    losses: list[float],
    seconds: float,
    path: Path,
) -> None:
    """Replaces the resume file by one that is whole, also when the run stops while writing."""
    states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({**states, "losses": losses, "seconds": seconds}, path.with_suffix(".partial"))
    path.with_suffix(".partial").replace(path)


def restore(
    model: LlamaForCausalLM, optimizer: torch.optim.AdamW, path: Path
) -> tuple[list[float], float]:
    """Loads what `save` wrote; returns the losses and seconds so far, none on a first run."""
    if not path.exists():
        return [], 0.0
    state = torch.load(path)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["losses"], state["seconds"]


# What is published


def publish(model: LlamaForCausalLM, name: str, output: Path) -> dict[str, dict[str, float]]:
    """Writes the model's folder in bfloat16; returns held-out losses before and after rounding."""
    folder = output / "models" / name
    rounded = LlamaForCausalLM(model.config).to(torch.bfloat16)
    rounded.load_state_dict(model.state_dict())
    rounded.generation_config = GenerationConfig(
        bos_token_id=END_ID, eos_token_id=END_ID, pad_token_id=END_ID
    )
    rounded.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors lets only the owner read
    write_tokenizer(folder)
    stored = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {
        text.name: {
            "float32": heldout_loss(model, text),
            "stored_bfloat16": heldout_loss(stored, text),
        }
        for text in sorted((output / "texts").glob("*-heldout.txt"))
    }


@torch.no_grad()
def heldout_loss(model: LlamaForCausalLM, text: Path) -> float:
    """Returns nats per byte over windows side by side, each window's first byte given."""
    tokens = torch.tensor(list(text.read_bytes()))
    batches = tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW).split(BATCH)
    total = sum(nats_per_token(model, batch).item() * len(batch) for batch in batches)
    return round(total / (len(tokens) // WINDOW), 4)


def write_tokenizer(folder: Path) -> None:
    """Writes a byte-level BPE without merges: byte b is token b, and the end-of-text is 256."""
    vocabulary = {letter: byte for byte, letter in enumerate(byte_letters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    write(folder / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")


def byte_letters() -> list[str]:
    """Returns the letter ByteLevel writes for each byte: its own where visible, else U+0100 on."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]


def origin(model: LlamaForCausalLM) -> dict[str, object]:
    """Returns what made the model, and its size."""
    return {
        "python": PYTHON,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "parameters": model.num_parameters(),
        "parameters_in_blocks": sum(
            parameter.numel() for parameter in model.model.layers.parameters()
        ),
    }


if __name__ == "__main__":
    main()
