"""Products of the parts, tried out in the model: one matrix at a time, or all that was chosen.

Knows parts and trials, and what was measured before; must not know how choices are made of it.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from eckart.allocate import Choice
from eckart.allocate.budget import Menu
from eckart.allocate.candidates import Probe, probe_ranks
from eckart.assemble.checkpoints import entry_of
from eckart.assemble.filling import Factor
from eckart.assemble.job import Job
from eckart.assemble.multiplying import multiplied, restored
from eckart.checkpoint.documents import canonical_json
from eckart.checkpoint.journal import append_line, read_lines
from eckart.decompose.request import on_threads
from eckart.decompose.weighting import Metrics
from eckart.decompose.work import Work
from eckart.execute import Workers
from eckart.linalg.spectrum import Spectrum
from eckart.planning import Targets
from eckart.trial import Outcome, Trial

PROBES = "probes"
"""The journal of what was measured, in the work folder: a line for each matrix and rank."""


@dataclass(frozen=True, slots=True)
class Tried:
    """Products of the parts, tried out in the model."""

    work: Work
    targets: Targets
    job: Job
    workers: Workers
    trial: Trial

    def outcome(self, choices: Mapping[str, Choice]) -> Outcome:
        """What the model becomes with all of the choices, as they would be written."""
        changed = (
            (name, self._written(name, choice)) for name, choice in choices.items() if choice.rank
        )
        return self.trial.outcome(changed)

    def all_probes(
        self, menus: Mapping[str, Menu], spectra: Mapping[str, Spectrum]
    ) -> dict[str, list[Probe]]:
        """What the model becomes with each of the matrices at some ranks, the others as they are.

        Cost: a forward pass over the tokens held out for each, unless it was measured before.
        """
        known, found = self._journal(), dict[str, list[Probe]]()
        for name, menu in menus.items():
            ranks = probe_ranks(menu)
            measured = known.get((name, *ranks)) or self._measured(name, ranks)
            found[name] = [
                Probe(rank, spectra[name].tail_energy(rank) / 2, divergence)
                for rank, divergence in zip(ranks, measured, strict=True)
            ]
        return found

    def _measured(self, name: str, ranks: list[int]) -> list[float]:
        """One after the other; all of them in the journal when they are done."""
        self.workers.watch.note(f"trying {name} at {len(ranks)} ranks")
        largest, found = [*self._factors(name, max(ranks))], list[float]()
        for rank in ranks:
            parts = [B[:, :rank] @ A[:rank] for B, A in largest]
            tensor = restored(self.targets.matrices[name], parts)
            found.append(self.trial.outcome([(name, tensor)]).divergence)
        entry = {"name": name, "identity": self._identity, "ranks": ranks, "divergences": found}
        append_line(self.work.folder / PROBES, entry)
        return found

    def _journal(self) -> dict[tuple[str | int, ...], list[float]]:
        """What was measured before with the same parts, on the same tokens and threads."""
        return {
            (line["name"], *line["ranks"]): line["divergences"]
            for line in read_lines(self.work.folder / PROBES)
            if line["identity"] == self._identity
        }

    @property
    def _identity(self) -> str:
        on = {"work": self.work.digest, "text": self.trial.digest, "threads": self.trial.threads}
        return hashlib.sha256(canonical_json(on)).hexdigest()

    def _factors(self, name: str, rank: int) -> Iterator[tuple[Tensor, Tensor]]:
        matrix, metrics = self.targets.matrices[name], Metrics(self.job.statistics, name)
        with on_threads(matrix.shape, self.job.threads):
            for index in range(matrix.count):
                W = matrix.load(self.job.source, name, index)
                factors = self.work.done[name].factors(W, rank, index, metric=metrics(index))
                yield factors.B, factors.A

    def _written(self, name: str, choice: Choice) -> Tensor:
        matrix, dtype = self.targets.matrices[name], self.targets.dtypes[name]
        entry = entry_of(matrix, choice.rank or 0, choice.form)
        order = Factor(name, entry, self.work.done[name], dtype)
        return multiplied(order, self.job.source, self.job.statistics, self.job.threads)
