"""A checkpoint's tensors under other names, put together from what is stored; nothing is copied."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from eckart.checkpoint.header import TensorInfo
from eckart.checkpoint.source import Derived, Source


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive bytes of a tensor."""

    name: str
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """How many."""
        return self.end - self.begin


@dataclass(frozen=True)
class View(Derived):
    """A source whose tensors are spans of another's, one after the other.

    Experts stored one by one as the stack that loaders make of them, q, k and v as one tensor, or
    a tensor under another name. What joins or cuts tensors along their first dimension is a
    concatenation of bytes, so that reading any part of it reads that and no more.
    """

    spans: Mapping[str, tuple[Span, ...]] = field(kw_only=True)

    def read(self, name: str, buffer: memoryview, offset: int) -> None:
        """Fills `buffer` from every span that it reaches into."""
        filled = 0
        for span in cut(self.spans[name], offset, offset + len(buffer)):
            self.of.read(span.name, buffer[filled : filled + span.nbytes], span.begin)
            filled += span.nbytes

    def told(self, digests: Mapping[str, str]) -> dict[str, str]:
        """Returns what digests of the view's tensors tell of stored ones."""
        return self.of.told(
            {
                spans[0].name: digests[name]
                for name, spans in self.spans.items()
                if name in digests and is_whole(spans, self.of)
            }
        )


def view_of(
    source: Source, tensors: Mapping[str, TensorInfo], spans: Mapping[str, tuple[Span, ...]]
) -> View:
    """Returns a view of a source, or of what that is a view of; `spans` are of `source`."""
    kept = {
        name: tuple(found for span in given for found in _through(source, span))
        for name, given in spans.items()
    }
    of = source.of if isinstance(source, View) else source
    names = {spans[0].name: name for name, spans in kept.items() if is_whole(spans, of)}
    tied = {names[name]: names[to] for name, to in of.tied.items() if name in names and to in names}
    return View(source.path, dict(tensors), tied, of=of, spans=kept)


def whole(name: str, info: TensorInfo) -> Span:
    """Returns the span that is all of a tensor."""
    return Span(name, 0, info.nbytes)


def is_whole(spans: Sequence[Span], source: Source) -> bool:
    """Returns whether spans are one tensor of a source from its first byte to its last."""
    return len(spans) == 1 and spans[0] == whole(spans[0].name, source.tensors[spans[0].name])


def cut(spans: Sequence[Span], begin: int, end: int) -> list[Span]:
    """Returns the spans of bytes begin … end − 1 of what spans are, one after the other.

    >>> cut([Span("a", 0, 10), Span("b", 4, 8)], 7, 12)
    [Span(name='a', begin=7, end=10), Span(name='b', begin=4, end=6)]
    """
    found, start = list[Span](), 0
    for span in spans:
        low, high = max(start, begin), min(start + span.nbytes, end)
        if low < high:
            found.append(Span(span.name, span.begin + low - start, span.begin + high - start))
        start += span.nbytes
    return found


def unseen(source: Source) -> list[str]:
    """Returns the stored tensors whose digests those of a source's tensors do not tell."""
    told = source.told(dict.fromkeys(source.tensors, ""))
    return [name for name in source.origin.tensors if name not in told]


def _through(source: Source, span: Span) -> list[Span]:
    """A span of a view's tensor as those of what it is a view of."""
    if not isinstance(source, View):
        return [span]
    return cut(source.spans[span.name], span.begin, span.end)
