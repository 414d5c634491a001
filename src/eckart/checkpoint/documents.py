"""JSON, read strictly and written canonically.

Python's own reader keeps the last of two equal keys and accepts NaN; a checkpoint that says two
things is refused here instead.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from eckart.checkpoint.paths import printable, read_bytes
from eckart.errors import CheckpointError

JSON_BYTES = 2**26
"""64 MiB, more than any index or config in use: parsed, brackets take 30 times their bytes."""


def sealed_json(document: Mapping[str, Any]) -> bytes:
    """Returns an object in canonical JSON, its `digest` that of the same with `digest` empty."""
    empty = {**document, "digest": ""}
    return canonical_json({**empty, "digest": hashlib.sha256(canonical_json(empty)).hexdigest()})


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a regular file, or raises CheckpointError naming it."""
    return parse_json(read_bytes(path, JSON_BYTES), printable(path))


def parse_json(text: bytes, name: str) -> dict[str, Any]:
    """Returns the JSON object in `text`; duplicate keys, NaN and non-objects are errors."""
    try:
        document = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError too
        raise CheckpointError(
            f"{name} is not valid JSON: {printable(error)}. Download it again."
        ) from None
    if not isinstance(document, dict):
        raise CheckpointError(
            f"{name} holds a JSON {type(document).__name__}, not an object. Download it again."
        )
    return document


def indented_json(document: object) -> bytes:
    """Returns a JSON document as people read it."""
    return json.dumps(document, indent=2).encode("ascii") + b"\n"


def canonical_json(document: object) -> bytes:
    """Returns the one spelling of a JSON document: sorted keys, no spaces, ASCII.

    >>> canonical_json({"b": 1, "a": [0.5]})
    b'{"a":[0.5],"b":1}'
    """
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} stands there twice")
        found[key] = value
    return found


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refuse_constant(text)


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")
