"""Statistics on disk: what is written is read, and nothing else passes for it."""

import json
from pathlib import Path

import msgspec
import pytest
import torch
from builders import raw_header, snapshot
from torch import Tensor

from eckart.checkpoint.documents import canonical_json
from eckart.checkpoint.statistics import (
    Document,
    Group,
    LeftOut,
    Moments,
    Origin,
    Text,
    _digest,
    blocks_of,
    open_statistics,
    write_statistics,
)
from eckart.checkpoint.writer import new_output
from eckart.errors import CheckpointError
from eckart.linalg.matrices import named_generator

Q, K, DOWN, EXPERTS = "m.0.q.weight", "m.0.k.weight", "m.10.down.weight", "m.2.experts.down_proj"


def document(**changes) -> Document:
    """Two matrices that share their input, a lone one, and three fused experts."""
    plain = Document(
        model=Origin(name="model", fingerprint="f" * 64),
        text=Text(name="text.txt", digest="0" * 64),
        tokens=100,
        loss=1.5,
        curvature="full",
        options={"include": []},
        versions={"torch": "2"},
        groups={
            K: Group(width=4, rows=100),
            DOWN: Group(width=3, rows=100),
            **{f"{EXPERTS}[{i}]": Group(width=2, rows=30) for i in range(3)},
        },
        matrices={
            Q: Moments(shape=(6, 4), groups=[K], curvature="full"),
            K: Moments(shape=(5, 4), groups=[K], curvature="diagonal"),
            DOWN: Moments(shape=(4, 3), groups=[DOWN], curvature="none"),
            EXPERTS: Moments(
                shape=(4, 2),
                groups=[f"{EXPERTS}[{i}]" for i in range(3)],
                curvature="diagonal",
                count=3,
                pooled=[1],
            ),
        },
        left_out=[LeftOut(name="m.9.weight", reason="never called")],
    )
    return msgspec.structs.replace(plain, **changes)


def tensors(of: Document) -> dict[str, Tensor]:
    return {
        name: torch.randn(shape, generator=named_generator(1, name))
        for name, shape in of.layout().items()
    }


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "S"
    path.mkdir()
    write_statistics(path, document(), tensors(document()))
    return path


def test_what_was_written_is_read_one_matrix_at_a_time(folder):
    """C by group, G in each of its kinds, and experts by their number."""
    found, written = open_statistics(folder), tensors(document())

    assert found.names == sorted([Q, K, DOWN, EXPERTS])
    assert (found.tokens, found.fingerprint) == (100, "f" * 64)
    assert torch.equal(found.inputs(Q), written[f"{K}.C"])
    assert torch.equal(found.inputs(K), written[f"{K}.C"])
    assert torch.equal(found.curvature(Q), written[f"{Q}.G"])
    assert torch.equal(found.curvature(K), written[f"{K}.G"])
    assert found.curvature(DOWN) is None
    for i in range(3):
        assert torch.equal(found.inputs(EXPERTS, i), written[f"{EXPERTS}[{i}].C"])
        assert torch.equal(found.curvature(EXPERTS, i), written[f"{EXPERTS}.G"][i])


def test_the_files_are_one_for_each_block_and_the_same_every_time(folder, tmp_path):
    """In the order of people: block 2 before block 10."""
    again = tmp_path / "again"
    again.mkdir()
    write_statistics(again, document(), tensors(document()))
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    held = [sorted(raw_header(folder / file)[0].keys() - {"__metadata__"}) for file in files]

    assert files == [f"statistics-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    assert held[0] == sorted([f"{K}.C", f"{K}.G", f"{Q}.G"])
    assert held[2] == [f"{DOWN}.C"]
    assert snapshot(folder) == snapshot(again)


def test_names_without_a_number_are_a_block_of_their_own():
    """An output head stands in no layer."""
    assert [*blocks_of(["lm_head.weight.C", "h.1.x.C"])] == ["", "h.1"]


def test_the_digest_is_of_everything_said(folder):
    """Equal digests mean equal numbers."""
    found = open_statistics(folder)
    other = document(tokens=101)

    assert found.digest == _digest(json.loads((folder / "statistics.json").read_bytes()))
    assert json.loads(other.encode())["digest"] != json.loads(document().encode())["digest"]


def test_a_matrix_without_statistics_is_named_with_the_reason(folder):
    """As far as there is one."""
    found = open_statistics(folder)

    with pytest.raises(CheckpointError, match=r"no statistics of m\.9\.weight \(never called\)"):
        found.inputs("m.9.weight")
    with pytest.raises(CheckpointError, match=r"no statistics of nonsense: calibrate"):
        found.curvature("nonsense")


def test_what_is_no_folder_of_statistics_is_told(tmp_path):
    """A checkpoint, say."""
    with pytest.raises(CheckpointError, match=r"there is no statistics\.json in"):
        open_statistics(tmp_path)
    with pytest.raises(CheckpointError, match="nowhere does not exist: check the path"):
        open_statistics(tmp_path / "nowhere")


def test_a_changed_byte_of_a_tensor_is_seen_when_it_is_read(folder):
    """Opening reads headers only."""
    path = folder / "statistics-00003-of-00003.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    found = open_statistics(folder)

    assert found.inputs(Q).shape == (4, 4)
    with pytest.raises(CheckpointError, match=r"down\.weight\.C .* not as it was written"):
        found.inputs(DOWN)


def test_a_changed_document_is_refused(folder):
    """Even where it is canonical."""
    path = folder / "statistics.json"
    said = json.loads(path.read_bytes()) | {"tokens": 7}
    path.write_bytes(canonical_json(said) + b"\n")

    with pytest.raises(CheckpointError, match="digest does not hold"):
        open_statistics(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d | {"kind": "factored"}, "damaged"),
        (lambda d: d | {"more": 1}, "damaged"),
        (lambda d: d | {"tokens": 0}, "of no token"),
        (lambda d: d | {"files": d["files"] | {"../x.safetensors": 1}}, "no name of a file"),
        (lambda d: d | {"sums": d["sums"] | {"y.C": "0"}}, r"says of y\.C"),
        (lambda d: d | {"groups": d["groups"] | {DOWN: {"width": 4, "rows": 1}}}, r"down\.weight"),
        (lambda d: _with(d, Q, groups=["gone"]), rf"contradicts itself over {Q}"),
        (lambda d: _with(d, Q, groups=[]), rf"contradicts itself over {Q}"),
        (lambda d: _with(d, Q, shape=[6, 3]), rf"contradicts itself over {Q}"),
        (lambda d: _with(d, Q, shape=[7, 4]), r"q\.weight\.G"),
        (lambda d: _with(d, Q, count=2), r"q\.weight\.G"),
        (lambda d: _with(d, EXPERTS, groups=[f"{EXPERTS}[0]"] * 2), "contradicts itself"),
    ],
)
def test_a_document_that_does_not_fit_its_files_is_refused(folder, change, message):
    """With a digest that holds: somebody else's program may have written it."""
    path = folder / "statistics.json"
    said = change(json.loads(path.read_bytes()))
    path.write_bytes(canonical_json(said | {"digest": _digest(said)}) + b"\n")

    with pytest.raises(CheckpointError, match=message):
        open_statistics(folder)


def _with(said, name, **changes):
    return said | {"matrices": said["matrices"] | {name: said["matrices"][name] | changes}}


def test_a_missing_or_shortened_file_is_refused(folder):
    """When it is opened."""
    path = folder / "statistics-00001-of-00003.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-4])
    with pytest.raises(CheckpointError, match="damaged"):
        open_statistics(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot open"):
        open_statistics(folder)


def test_force_replaces_statistics_and_nothing_that_is_not_ours(folder):
    """An output of ours is known by its document."""
    with new_output(folder, inputs=[], force=True) as run:
        write_statistics(run.staged, document(tokens=7), tensors(document()))

    assert open_statistics(folder).tokens == 7
