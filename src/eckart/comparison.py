"""What differs between a model and its base, tensor by tensor: bytes, energy, digests.

Knows two sources; must not know what becomes of a difference.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from eckart.checkpoint.delta import Delta, delta_of
from eckart.checkpoint.hashing import Hash, bytes_of
from eckart.checkpoint.header import DTYPES
from eckart.checkpoint.paths import printable
from eckart.checkpoint.source import Source, same_bytes
from eckart.errors import NonFiniteError
from eckart.families import FLOATING, has_grown
from eckart.linalg.norms import energy, energy_from_above
from eckart.linalg.threads import computing_on

PIECE_ENTRIES = 2**22
"""Compared at once: they stay in memory as stored, and in blocks in the cache as subtracted."""

BLOCK = 2**20

DROWNS = 16.0
"""‖W‖²/‖W0‖² from which on what W has of W0 is lost in the rest."""


@dataclass(frozen=True, slots=True)
class Compared:
    """One tensor of both: the digest of its bytes in each, and ‖tuned − base‖_F² to 10⁻⁵."""

    digests: tuple[str, str]  # tuned, base
    energy: float
    equal: bool  # every entry
    sample: "Sample | None" = None  # of a matrix, or a stack of them


@dataclass(frozen=True, slots=True)
class Sample:
    """What the first entries of a tensor say of a pair: enough to tell a base from a stranger."""

    difference: float  # ‖W − W0‖²
    tuned: float  # ‖W‖²
    base: float  # ‖W0‖²


@dataclass(frozen=True, slots=True)
class Comparer:
    """Compares one tensor that stands in both with the same shape."""

    tuned: Source
    base: Source

    def __call__(self, name: str) -> Compared:
        """Reads both once, in pieces. Peak: a piece of each. NonFiniteError names the tensor.

        On one thread: it hashes, most of the time.
        """
        with computing_on(1):
            return self._compare(name)

    def _compare(self, name: str) -> Compared:
        ours, theirs = self.tuned.tensors[name], self.base.tensors[name]
        if {ours.dtype, theirs.dtype} - DTYPES.keys():
            return self._by_digest(name)
        ours_seen, theirs_seen = Hash(), None
        missed, equal, sample = 0.0, True, None
        for start in range(0, theirs.parameters, PIECE_ENTRIES):
            stop = min(start + PIECE_ENTRIES, theirs.parameters)
            W, W0 = (s.entries(name, start, stop) for s in (self.tuned, self.base))
            same = W.dtype == W0.dtype and same_bytes(W, W0)
            if theirs_seen is None and not same:
                theirs_seen = ours_seen.copy()  # equal up to here
            ours_seen.update(bytes_of(W))
            if theirs_seen is not None:
                theirs_seen.update(bytes_of(W0))
            floating = W.is_floating_point()
            missed_here = 0.0 if same or not floating else _energy_between(W, W0)
            equal = equal and (same or torch.equal(W, W0))
            missed += missed_here
            if sample is None and floating and W0.is_floating_point() and len(ours.shape) > 1:
                sample = _sample(W, W0, missed_here)
        for start in range(theirs.parameters, ours.parameters, PIECE_ENTRIES):  # rows of its own
            W = self.tuned.entries(name, start, min(start + PIECE_ENTRIES, ours.parameters))
            theirs_seen = theirs_seen or ours_seen.copy()
            ours_seen.update(bytes_of(W))
            equal = False
            missed += energy(W) if W.is_floating_point() else 0.0
        if not math.isfinite(missed) and {ours.dtype, theirs.dtype} <= {*FLOATING}:
            raise NonFiniteError(
                f"{printable(name)} has a NaN or Inf in {printable(self.tuned.path)} or in "
                f"{printable(self.base.path)}, or they are too far apart: repair it, or leave the "
                "tensor out with --exclude."
            )
        digest = ours_seen.hexdigest()
        digests = digest, digest if theirs_seen is None else theirs_seen.hexdigest()
        return Compared(digests, missed, equal, sample)

    def _by_digest(self, name: str) -> Compared:
        """Of what torch cannot hold, equal or not is all that can be told."""
        digests = self.tuned.digest(name), self.base.digest(name)
        return Compared(digests, 0.0, digests[0] == digests[1])


@dataclass(frozen=True, slots=True)
class Digester:
    """Hashes one tensor."""

    source: Source

    def __call__(self, name: str) -> str:
        """Returns the digest of its bytes."""
        return self.source.digest(name)


def comparable(tuned: Source, base: Source) -> dict[str, int]:
    """Returns the tensors that both have in one shape, and the bytes that comparing them reads."""
    return {
        name: info.nbytes + base.tensors[name].nbytes
        for name, info in tuned.tensors.items()
        if name in base.tensors
        and name not in tuned.tied
        and (
            base.tensors[name].shape == info.shape
            or has_grown(name, info.shape, base.tensors[name].shape)
        )
    }


@dataclass(frozen=True)
class Changes:
    """A model against its base: every tensor that both have with equal shapes, compared."""

    tuned: Source
    base: Source
    compared: Mapping[str, Compared]
    stored: tuple[Mapping[str, str], Mapping[str, str]] = ({}, {})  # digests that it does not tell

    @cached_property
    def changed(self) -> dict[str, float]:
        """The tensors that differ, and the energy of each difference."""
        return {name: one.energy for name, one in self.compared.items() if not one.equal}

    @property
    def unchanged(self) -> list[str]:
        """The tensors that are equal in both."""
        return [name for name, one in self.compared.items() if one.equal]

    @property
    def new(self) -> list[str]:
        """The tensors that only the tuned model has."""
        return [
            name
            for name in self.tuned.tensors
            if name not in self.compared and name not in self.tuned.tied
        ]

    @cached_property
    def added(self) -> dict[str, float]:
        """The energies of those."""
        return {name: _own_energy(self.tuned, name) for name in self.new}

    @property
    def grown(self) -> list[str]:
        """The changed tensors that have rows which the base has not."""
        return [
            name
            for name in self.compared
            if self.tuned.tensors[name].shape != self.base.tensors[name].shape
        ]

    @property
    def energy(self) -> float:
        """Of all that the tuned model has and the base has not."""
        return math.fsum([*self.changed.values(), *self.added.values()])

    @property
    def common(self) -> float:
        """How much of the base is in the tuned model: ⟨W, W0⟩/‖W0‖² over samples of all matrices.

        1 where W = W0 + something that does not point along it; about 0 of two models that have
        nothing to do with each other. 1 also where W is so much larger than W0 that it would drown
        it: nothing can be told then.
        """
        samples = [one.sample for one in self.compared.values() if one.sample is not None]
        base = math.fsum(one.base for one in samples)
        tuned = math.fsum(one.tuned for one in samples)
        twice = math.fsum(one.tuned + one.base - one.difference for one in samples)
        return twice / (2 * base) if tuned < DROWNS * base else 1.0

    def delta(self) -> Delta:
        """Returns the floating tensors that differ, as a source."""
        grown = self.grown
        names = {
            name: hashlib.sha256("".join(one.digests).encode()).hexdigest()
            for name, one in self.compared.items()
            if not one.equal
            and name not in grown
            and {s.tensors[name].dtype for s in (self.tuned, self.base)} <= {*FLOATING}
        }
        return delta_of(self.tuned, self.base, names)

    def fingerprints(self) -> tuple[str, str]:
        """Returns those of the tuned model and of the base. Cost: reads what only one has."""
        ours, theirs = (
            {name: one.digests[side] for name, one in self.compared.items()} for side in (0, 1)
        )
        sides = (self.tuned, ours, self.stored[0]), (self.base, theirs, self.stored[1])
        tuned, base = (
            source.origin.fingerprint({**source.told(seen), **rest}) for source, seen, rest in sides
        )
        return tuned, base


def supposed(tuned: Source, base: Source) -> Changes:
    """Returns the changes if all that may differ did, from headers alone: no energy is known."""
    unlike = Compared(("", ""), 0.0, equal=False)
    return Changes(tuned, base, dict.fromkeys(sorted(comparable(tuned, base)), unlike))


def _energy_between(W: Tensor, W0: Tensor) -> float:
    """‖W − W0‖² of two pieces to 10⁻⁵, rounded up, by blocks that stay in the cache."""
    wide = torch.float64 if 8 in (W.dtype.itemsize, W0.dtype.itemsize) else torch.float32
    W0 = W0.to(wide) if W0.dtype == torch.bool else W0  # which torch does not subtract
    memory = torch.empty(min(len(W), BLOCK), dtype=wide)
    blocks = zip(W.split(BLOCK), W0.split(BLOCK), strict=True)
    return sum(energy_from_above(memory[: len(a)].copy_(a).sub_(b)) for a, b in blocks)


def _sample(W: Tensor, W0: Tensor, difference: float) -> Sample:
    """Of one piece: half precision is widened a block at a time."""
    ours, theirs = (
        sum(energy_from_above(b.float() if b.itemsize < 4 else b) for b in piece.split(BLOCK))
        for piece in (W, W0)
    )
    return Sample(difference, ours, theirs)


def _own_energy(source: Source, name: str) -> float:
    info = source.tensors[name]
    if info.dtype not in FLOATING:
        return 0.0
    starts = range(0, info.parameters, PIECE_ENTRIES)
    pieces = (
        source.entries(name, start, min(start + PIECE_ENTRIES, info.parameters)) for start in starts
    )
    found = sum(energy(piece) for piece in pieces)
    if not math.isfinite(found):
        raise NonFiniteError(
            f"{printable(name)} in {printable(source.path)} has a NaN or Inf: repair it."
        )
    return found
