"""An adapter's parts at the tensors of a checkpoint as they are stored.

An adapter names what a loader holds; a checkpoint may store it under another name, or a stack of
experts one by one (see `arrangement`).
"""

from collections.abc import Iterable
from dataclasses import replace

from eckart.arrangement import as_loaded
from eckart.checkpoint.paths import printable
from eckart.checkpoint.source import Source
from eckart.checkpoint.view import View
from eckart.errors import CheckpointError
from eckart.formats.adapters import Adapter, Part


def placed(adapter: Adapter, base: Source) -> Adapter:
    """Returns the adapter with its parts at the base's stored tensors.

    A part for which there is no place stays as it is: who adds it will say so. CheckpointError
    where a stack of experts is of another size.
    """
    view = as_loaded(base)
    if not isinstance(view, View):
        return adapter
    parts = {
        one.name: one
        for part in adapter.parts.values()
        for one in _places(part, view, base, adapter)
    }
    whole, bases = (
        {_stored(name, view, base): stored for name, stored in names.items()}
        for names in (adapter.whole, adapter.bases)
    )
    return replace(adapter, parts=parts, whole=whole, bases=bases)


def _stored(name: str, view: View, base: Source) -> str:
    """The name of what is stored, where it is one tensor."""
    spans = view.spans.get(name, ())
    return name if name in base.tensors or len(spans) != 1 else spans[0].name


def _places(part: Part, view: View, base: Source, adapter: Adapter) -> Iterable[Part]:
    """What is added to each of the stored tensors that one is put together from."""
    spans = view.spans.get(part.name, ())
    if part.name in base.tensors or len(spans) < 2:
        yield replace(part, name=_stored(part.name, view, base))
        return
    shape, (m, n) = view.tensors[part.name].shape, part.shape
    if shape != (part.experts, m, n):
        raise CheckpointError(
            f"{printable(part.name)} is {[*shape]} in {printable(base.path)}, and "
            f"{printable(adapter.source.path)} adds {part.count} products of {m}×{n}: it is an "
            "adapter for another model."
        )
    begin = 0
    for span in spans:
        rows = base.tensors[span.name].shape[0]
        expert, first = divmod(begin, m)
        place = (first, first + rows)
        yield replace(part.one(expert), name=span.name, rows=place, shape=(rows, n))
        begin += rows
