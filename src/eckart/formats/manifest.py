"""What a factored checkpoint says of itself, held against its headers.

In config.json, or in eckart.json where there is none. Knows documents and headers; must not know
the model.
"""

from collections.abc import Mapping
from pathlib import Path

import msgspec

from eckart.certificate import FactoredEntry, read_certificate
from eckart.checkpoint.documents import read_json
from eckart.checkpoint.paths import is_there, printable
from eckart.checkpoint.source import Source
from eckart.errors import CheckpointError, PromiseError
from eckart.formats.factored import FORMAT_VERSION, check, module_of

METHOD = "eckart"

Manifest = Mapping[str, FactoredEntry]
"""By module X, in the names of the files."""


def read_manifest(folder: Path) -> Manifest:
    """Returns what is factored in a folder: by config.json, or by eckart.json where none is."""
    config = folder / "config.json"
    if not is_there(config):
        return read_certificate(folder).factored
    stated = read_json(config).get("quantization_config")
    if not isinstance(stated, dict) or stated.get("quant_method") != METHOD:
        raise CheckpointError(
            f"{printable(config)} names no factored matrices: give a folder that eckart compress "
            "wrote."
        )
    return parse_manifest(stated)


def parse_manifest(stated: Mapping[str, object]) -> Manifest:
    """Returns the entries of a `quantization_config`; CheckpointError for any other field.

    Such a field is another method's as a rule, and two methods on one weight are none.
    """
    known = {"quant_method", "format_version", "factored"}
    if others := sorted(stated.keys() - known):
        raise CheckpointError(
            f"quantization_config has the field {printable(others[0])} beside eckart's own: a "
            "factored checkpoint takes no second method. Quantize the model after it is loaded."
        )
    if stated.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"the checkpoint has format {printable(stated.get('format_version'))}, this eckart "
            f"reads format {FORMAT_VERSION}: update one of them."
        )
    try:
        return msgspec.convert(stated.get("factored"), dict[str, FactoredEntry])
    except msgspec.ValidationError as error:
        raise CheckpointError(f"quantization_config is damaged: {printable(error)}.") from None


def guards(source: Source, manifest: Manifest) -> dict[str, FactoredEntry]:
    """Returns the entries by the tensor that each stands for, after holding them to the headers.

    Raises CheckpointError for an entry whose tensors are not there in its shapes, and for
    factors without an entry: their layer would be filled at random.
    """
    named = {name: manifest[X] for name in source.tensors if (X := module_of(name)) in manifest}
    found = {name: entry for name, entry in named.items() if source.tensors[name].shape == (0,)}
    for X in manifest.keys() - {module_of(name) for name in found}:
        raise CheckpointError(
            f"{printable(X)} is said to be factored, but {printable(source.path)} has no guard of "
            "it: config.json and the weights do not belong together."
        )
    for name, entry in found.items():
        try:
            check(source, name, entry)
        except PromiseError as error:
            raise CheckpointError(str(error).replace("the certificate", "config.json")) from None
    _check_complete(source, manifest)
    return found


def _check_complete(source: Source, manifest: Manifest) -> None:
    for name, info in source.tensors.items():
        X = module_of(name)
        if info.shape == (0,) and f"{X}.A.weight" in source.tensors and X not in manifest:
            raise CheckpointError(
                f"{printable(source.path)} holds factors of {printable(X)}, which config.json "
                "does not name: its layer would be filled at random. Take both from one output."
            )
