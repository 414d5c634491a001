"""What the user named, opened as the kind of source it is; ambiguity is an error."""

from pathlib import Path

from eckart.checkpoint.header import read_header
from eckart.checkpoint.index import PICKLE, SAFETENSORS, read_index
from eckart.checkpoint.numpy_source import open_arrays
from eckart.checkpoint.paths import is_there, printable
from eckart.checkpoint.pickle_source import open_pickles
from eckart.checkpoint.source import Checkpoint, Source
from eckart.errors import CheckpointError

NUMPY = (".npy", ".npz")


def open_source(path: Path | str, *, allow_pickle: bool = False) -> Source:
    """Returns the source at `path`, from its headers alone.

    A folder with `model.safetensors`, or with shards and an index that agree exactly; with
    `allow_pickle` also one with `pytorch_model.bin`, read with `weights_only=True`; or one
    `.safetensors`, `.npy`, `.npz` or (with `allow_pickle`) `.bin` file. Raises CheckpointError,
    naming the file, for anything that is not whole and unambiguous.
    """
    path = Path(path)
    if not is_there(path):
        raise CheckpointError(f"{printable(path)} does not exist: check the path.")
    return _open_folder(path, allow_pickle) if path.is_dir() else _open_file(path, allow_pickle)


def open_checkpoint(folder: Path | str) -> Checkpoint:
    """Returns the safetensors checkpoint in `folder`: what eckart itself writes."""
    source = open_source(folder)
    if not isinstance(source, Checkpoint):
        raise CheckpointError(
            f"{printable(folder)} is not a safetensors checkpoint: give a folder that has one."
        )
    return source


def _open_folder(folder: Path, allow_pickle: bool) -> Source:
    if SAFETENSORS.found_in(folder):
        if is_there(folder / SAFETENSORS.weights):
            return Checkpoint(folder, read_header(folder / SAFETENSORS.weights))
        index = read_index(folder, SAFETENSORS)
        return Checkpoint(folder, index.merge({s: read_header(folder / s) for s in index.shards}))
    if PICKLE.found_in(folder):
        _check_allowed(folder, allow_pickle)
        return open_pickles(folder)
    loose = sorted(file.name for file in folder.glob(f"*{SAFETENSORS.suffix}") if is_there(file))
    hint = f" (or one file, as {printable(folder / loose[0])})" if loose else ""
    names = (SAFETENSORS.weights, SAFETENSORS.index)
    broken = [name for name in names if (folder / name).is_symlink()]
    why = f" ({broken[0]} is a link to nothing)" if broken else ""
    raise CheckpointError(
        f"there is neither {SAFETENSORS.weights} nor {SAFETENSORS.index} in {printable(folder)}"
        f"{why}: give the folder of a safetensors checkpoint{hint}."
    )


def _open_file(path: Path, allow_pickle: bool) -> Source:
    if path.suffix == SAFETENSORS.suffix:
        return Checkpoint(path, read_header(path))
    if path.suffix in NUMPY:
        return open_arrays(path)
    if path.suffix in (PICKLE.suffix, ".pt", ".pth"):
        _check_allowed(path, allow_pickle)
        return open_pickles(path)
    raise CheckpointError(
        f"{printable(path)} is neither a folder nor a .safetensors, .npy or .npz file: give the "
        "folder of a checkpoint, or one such file."
    )


def _check_allowed(path: Path, allow_pickle: bool) -> None:
    if not allow_pickle:
        raise CheckpointError(
            f"{printable(path)} holds pickled weights, which can carry code: convert them to "
            "safetensors, or, if you trust their origin, add --allow-pickle (they are read with "
            "weights_only=True, never executed)."
        )
