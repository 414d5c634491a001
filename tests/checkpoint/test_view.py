"""Spans of stored bytes under another name."""

import pytest
import torch
from builders import write_checkpoint

from eckart.checkpoint.header import TensorInfo
from eckart.checkpoint.opening import open_source
from eckart.checkpoint.view import Span, cut, view_of, whole


@pytest.mark.parametrize(
    ("begin", "end", "expected"),
    [
        (0, 0, []),
        (0, 10, [Span("a", 0, 10)]),
        (9, 11, [Span("a", 9, 10), Span("b", 4, 5)]),
        (10, 14, [Span("b", 4, 8)]),
        (0, 14, [Span("a", 0, 10), Span("b", 4, 8)]),
        (13, 99, [Span("b", 7, 8)]),
    ],
)
def test_a_cut_takes_the_bytes_that_lie_between(begin, end, expected):
    """At a border, across it, up to the end and beyond."""
    assert cut([Span("a", 0, 10), Span("b", 4, 8)], begin, end) == expected


def test_a_view_of_a_view_reads_what_is_stored(tmp_path):
    """Spans are followed to the source: no view stands on another."""
    A, B = torch.arange(12.0).reshape(3, 4), torch.arange(8.0).reshape(2, 4) + 100
    source = open_source(write_checkpoint(tmp_path / "m", {"a": A, "b": B}))
    info = TensorInfo((5, 4), "F32", "", 0, 80)
    spans = tuple(whole(name, source.tensors[name]) for name in "ab")
    both = view_of(source, {"ab": info}, {"ab": spans})
    middle = view_of(
        both, {"c": TensorInfo((2, 4), "F32", "", 0, 32)}, {"c": (Span("ab", 32, 64),)}
    )

    assert middle.of is source
    assert torch.equal(both.load("ab"), torch.cat([A, B]))
    assert torch.equal(middle.load("c"), torch.cat([A, B])[2:4])
    assert middle.origin is source


def test_digests_are_told_of_whole_tensors_alone(tmp_path):
    """Half a tensor says nothing of what is stored; a tensor by another name says all."""
    source = open_source(
        write_checkpoint(tmp_path / "m", {"a": torch.ones(2, 2), "b": torch.ones(2)})
    )
    infos = {"x": source.tensors["b"], "y": TensorInfo((1, 2), "F32", "", 0, 8)}
    view = view_of(source, infos, {"x": (whole("b", infos["x"]),), "y": (Span("a", 0, 8),)})

    assert view.told({"x": "1", "y": "2"}) == {"b": "1"}
