"""What a model is run on: a text, tokens, or a batch of forward's arguments, as tensors.

Knows files and the tokenizer's folder; must not know the model. One TEXT for `calibrate`,
`refine`, `compress` and `verify`.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from eckart.checkpoint.documents import read_json
from eckart.checkpoint.hashing import bytes_of
from eckart.checkpoint.header import DTYPES, TensorInfo, read_header
from eckart.checkpoint.paths import is_there, printable, read_bytes
from eckart.checkpoint.source import Checkpoint
from eckart.errors import InputError, UsageError
from eckart.linalg.arrays import check_finite

WINDOW = 256
"""Tokens of a sequence that a text is cut into, where the model takes as many."""

TEXT_BYTES = 2**30

INTEGERS = ("I64", "I32", "I16", "I8", "U8")

POSITIONS = ("max_position_embeddings", "n_positions", "max_sequence_length")
"""What config.json calls the longest sequence."""


@dataclass(frozen=True, slots=True)
class Text:
    """Named inputs of a model, whose first dimension counts sequences."""

    inputs: Mapping[str, Tensor]  # by forward's arguments

    @property
    def sequences(self) -> int:
        """How many there are."""
        return len(next(iter(self.inputs.values())))

    @property
    def length(self) -> int:
        """The tokens of a sequence; of what has none, what takes about as long as so many."""
        ids = self.inputs.get("input_ids")
        return ids.shape[1] if ids is not None and ids.ndim == 2 else WINDOW

    @property
    def digest(self) -> str:
        """SHA-256 over every input's name, dtype, shape and bytes."""
        found = hashlib.sha256()
        for name, tensor in sorted(self.inputs.items()):
            found.update(f"{name} {tensor.dtype} {[*tensor.shape]}\n".encode())
            found.update(bytes_of(tensor.contiguous()))
        return found.hexdigest()

    def batches(self, sequences: int) -> Iterator[dict[str, Tensor]]:
        """Yields the inputs, at most so many sequences at a time."""
        for start in range(0, self.sequences, sequences):
            rows = slice(start, start + sequences)
            yield {name: tensor[rows] for name, tensor in self.inputs.items()}

    def split(self, first: int) -> tuple["Text", "Text"]:
        """Returns the first sequences, and the others."""
        halves = ({k: t[:first] for k, t in self.inputs.items()}, self._from(first))
        return Text(halves[0]), Text(halves[1])

    def _from(self, start: int) -> dict[str, Tensor]:
        return {name: tensor[start:] for name, tensor in self.inputs.items()}


def open_text(
    model: Path,
    *,
    text: Path | None = None,
    tokens: Path | None = None,
    batch: Path | None = None,
    length: int = WINDOW,
) -> Text | None:
    """Returns what the one of the three options names, or None where none was given.

    Only a `text` needs the folder `model`, for its tokenizer. Raises UsageError for two options,
    InputError for what cannot be used.
    """
    given = {"--text": text, "--tokens": tokens, "--batch": batch}
    named = [option for option, path in given.items() if path is not None]
    if len(named) > 1:
        raise UsageError(f"{' and '.join(named)} name two texts: give one of them.")
    if text is not None:
        return Text({"input_ids": tokenize(text, model, length)})
    if tokens is not None:
        return Text({"input_ids": read_tokens(tokens)})
    return None if batch is None else Text(read_batch(batch))


def read_tokens(path: Path, name: str | None = None) -> Tensor:
    """Returns the tokens of a safetensors file, (sequences × length), int64.

    The file holds one 2-D integer tensor of any name, or `name` says which.
    """
    source = _open(path)
    fitting = [k for k, i in source.tensors.items() if len(i.shape) == 2 and i.dtype in INTEGERS]
    if name is None and len(fitting) != 1:
        found = ", ".join(map(printable, fitting[:3])) or "none"
        raise InputError(
            f"{printable(path)} must hold one 2-D integer tensor, of any name: it has "
            f"{len(fitting)} ({found})."
        )
    chosen = fitting[0] if name is None else name
    if chosen not in fitting:
        raise InputError(f"{printable(path)} has no 2-D integer tensor {printable(chosen)}.")
    _check_filled(path, chosen, source.tensors[chosen])
    ids = source.load(chosen).long()
    if int(ids.min()) < 0:
        raise InputError(
            f"{printable(chosen)} in {printable(path)} holds the token {int(ids.min())}: tokens "
            "are 0 or more. Give padded sequences as --batch, with an attention_mask."
        )
    return ids


def tokenize(path: Path, model: Path, length: int = WINDOW) -> Tensor:
    """Returns a text's tokens by the model's own tokenizer, (sequences × length), int64.

    Cut into windows of `length` tokens, or as many as the model takes; the last, incomplete one
    is dropped, unless it is the only one. Needs the `hf` extra.
    """
    from eckart.hf import load_tokenizer

    try:
        words = read_bytes(path, TEXT_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{printable(path)} is no UTF-8 text ({error.reason} at byte {error.start}): tokens "
            "are given as --tokens FILE.safetensors."
        ) from None
    encode = load_tokenizer(model)
    ids: Tensor = encode(words, return_tensors="pt", verbose=False)["input_ids"][0].long()
    if not words.strip() or len(ids) < 2:
        raise InputError(
            f"{printable(path)} makes {len(ids)} tokens: there is nothing to predict. Give a text "
            "of at least two."
        )
    window = min(_longest(model, length), len(ids))
    count = len(ids) // window
    return ids[: count * window].reshape(count, window)


def read_batch(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a safetensors file, which are named as forward's arguments are."""
    source = _open(path)
    counts = dict[int, str]()
    for name, info in source.tensors.items():
        _check_filled(path, name, info)
        counts.setdefault(info.shape[0] if info.shape else -1, name)
    if -1 in counts or len(counts) > 1:
        first = ", ".join(f"{printable(name)} {n}" for n, name in counts.items() if n >= 0)
        raise InputError(
            f"the first side of every tensor in {printable(path)} must be the number of examples: "
            f"it is not ({first or 'a scalar'})."
        )
    found = {name: source.load(name) for name in source.tensors}
    for name, tensor in found.items():
        if tensor.is_floating_point():
            check_finite(tensor, f"{printable(name)} in {printable(path)}")
    return found


def check_vocabulary(ids: Tensor, size: int) -> None:
    """Raises InputError for a token that a vocabulary of `size` does not have."""
    largest = int(ids.max())
    if largest >= size:
        raise InputError(
            f"the text holds the token {largest}, but the model's vocabulary has {size}: it was "
            "made with another tokenizer."
        )


def _open(path: Path) -> Checkpoint:
    if not is_there(path):
        raise InputError(f"{printable(path)} does not exist: check the path.")
    source = Checkpoint(path, read_header(path))
    if not source.tensors:
        raise InputError(f"{printable(path)} holds no tensor at all.")
    return source


def _check_filled(path: Path, name: str, info: TensorInfo) -> None:
    where = f"{printable(name)} in {printable(path)}"
    if 0 in info.shape:
        raise InputError(f"{where} is empty: {[*info.shape]}.")
    if info.dtype not in DTYPES:
        raise InputError(f"{where} has dtype {printable(info.dtype)}, which no model takes.")


def _longest(model: Path, length: int) -> int:
    """As many tokens as were asked for, or as the model takes, by its config.json."""
    config = read_json(model / "config.json")
    text = config.get("text_config")
    fields = {**config, **(text if isinstance(text, dict) else {})}
    known = [fields[key] for key in POSITIONS if isinstance(fields.get(key), int)]
    return min([length, *(size for size in known if size > 1)])
