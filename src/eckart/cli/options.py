"""The options that commands share, and the sizes that users write."""

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from eckart.errors import UsageError


class FormOption(StrEnum):
    """How a factored matrix is stored."""

    auto = "auto"
    ba = "ba"
    pivoted = "pivoted"


class ConsumerOption(StrEnum):
    """Who must be able to load an adapter."""

    peft = "peft"
    vllm = "vllm"
    llama_cpp = "llama.cpp"
    diffusers = "diffusers"
    kohya = "kohya"


For = Annotated[ConsumerOption, typer.Option("--for", help="Who must be able to load it.")]
Component = Annotated[
    str | None,
    typer.Option(
        "--component", metavar="NAME", help="Of a diffusion pipeline: unet, transformer, …"
    ),
]
Source = Annotated[
    Path, typer.Argument(metavar="SRC", help="A checkpoint's folder, or one weight file.")
]
Out = Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="Folder to write.")]
Include = Annotated[
    list[str] | None, typer.Option("--include", metavar="GLOB", help="Only these matrices.")
]
Exclude = Annotated[
    list[str] | None, typer.Option("--exclude", metavar="GLOB", help="Not these matrices.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the document instead of a table.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Print nothing but errors.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an output that eckart wrote.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything random.")]
Device = Annotated[str, typer.Option("--device", help="Where to factor: cpu, cuda, cuda:1.")]
ShardSize = Annotated[
    str, typer.Option("--shard-size", metavar="BYTES", help="Largest weight file: 5GB, 500MB, …")
]
Threads = Annotated[
    int | None, typer.Option("--threads", help="Threads per matrix; default: by its shape.")
]
Workers = Annotated[
    int | None, typer.Option("--workers", help="Matrices at a time; default: cores ÷ threads.")
]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Read pytorch_model.bin too, as tensors only.")
]

TextFile = Annotated[
    Path | None,
    typer.Option("--text", metavar="FILE", help="A text, by the model's own tokenizer."),
]
TokensFile = Annotated[
    Path | None,
    typer.Option("--tokens", metavar="FILE", help="One 2-D integer tensor, as safetensors."),
]
BatchFile = Annotated[
    Path | None,
    typer.Option("--batch", metavar="FILE", help="Forward's arguments by name, as safetensors."),
]

StatisticsFolder = Annotated[
    Path | None, typer.Option("--statistics", metavar="S", help="What calibrate wrote.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Read headers only; write nothing.")]
FactorDtype = Annotated[
    str | None, typer.Option("--dtype", help="Of the factors; default: as what they stand for.")
]
Align = Annotated[int, typer.Option("--align", help="Ranks in multiples of this.")]
AdapterRank = Annotated[
    str | None,
    typer.Option("--rank", metavar="R|auto", help="The same for all, or as each module has."),
]
AdapterEnergy = Annotated[
    float | None, typer.Option("--energy", help="Fraction of each change to keep.")
]
AdapterError = Annotated[
    float | None, typer.Option("--error", help="Largest relative error, each.")
]
AdapterSize = Annotated[
    str | None,
    typer.Option("--size", metavar="BYTES", help="Bytes of the adapter's tensors: 50MB, …"),
]

SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(k|m|g|t)?(i)?b?", re.IGNORECASE)


def byte_count(text: str, option: str) -> int:
    """Returns the bytes that "5GB", "500MB", "1GiB" or "4096" say."""
    found = SIZE.fullmatch(text.strip())
    if not found:
        raise UsageError(f"{option} {text} is no size: write 5GB, 500MB, 1GiB or a number.")
    number, unit, binary = found.groups()
    power = " kmgt".index(unit.lower()) if unit else 0
    size = int(float(number) * (1024 if binary else 1000) ** power)
    if size < 1:
        raise UsageError(f"{option} {text} is out of range: choose 1 byte or more.")
    return size


def numbers(text: str | None, option: str) -> list[float] | None:
    """Returns the numbers that "0.5,-1" says."""
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{option} {text} is no list of numbers: write 0.5,-1.") from None


def rank_of(text: str | None) -> int | str | None:
    """Returns the number that a rank says, or "auto"."""
    if text is None or text == "auto":
        return text
    if not text.isascii() or not text.isdigit():
        raise UsageError(f"--rank {text} is neither a whole number nor auto.")
    return int(text)
