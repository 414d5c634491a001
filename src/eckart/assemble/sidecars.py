"""The files of a checkpoint that are not weights: copied, and config.json told of the change."""

import json
from pathlib import Path

from eckart.assemble.job import Job
from eckart.checkpoint.documents import read_json
from eckart.checkpoint.index import PICKLE, SAFETENSORS
from eckart.checkpoint.paths import printable, write_file
from eckart.checkpoint.source import Source
from eckart.checkpoint.writer import CERTIFICATE, copy_file
from eckart.errors import InputError

OTHER_WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".onnx",
    ".gguf",
    ".npy",
    ".npz",
)
"""Files that would carry the dense weights into the output: not copied."""


def sidecars(folder: Path) -> list[Path]:
    """Returns the files of a checkpoint that are neither weights nor eckart's, sorted, relative."""
    found = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return sorted(
        path
        for path in found
        if path.suffix not in OTHER_WEIGHTS
        and not any(part.startswith(".") for part in path.parts)
        and str(path) not in (CERTIFICATE, SAFETENSORS.index, PICKLE.index)
    )


def check_config(source: Source) -> None:
    """Raises InputError unless config.json, where there is one, can take `quantization_config`."""
    if source.folder is None or not (path := source.folder / "config.json").exists():
        return
    if found := read_json(path).get("quantization_config"):
        method = found.get("quant_method") if isinstance(found, dict) else found
        raise InputError(
            f"{printable(path)} has a quantization_config already ({printable(method)}): eckart "
            "factors plain weights. "
            "Give the checkpoint before it was quantized."
        )


def write_sidecars(job: Job, changes: dict[str, object]) -> None:
    """Copies the other files; config.json gains the given keys, and loses those that are None."""
    folder = job.source.folder
    if folder is None:  # a single file has none
        return
    for path in sidecars(folder):
        if str(path) != "config.json":
            copy_file(folder / path, job.staged / path)
    config = folder / "config.json"
    if config.exists():
        document = {**read_json(config), **changes}
        kept = {
            key: value for key, value in document.items() if value is not None or key not in changes
        }
        write_file(
            job.staged / "config.json",
            json.dumps(kept, indent=2).encode("ascii") + b"\n",
        )
