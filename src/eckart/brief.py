"""What an extraction is asked to be, as far as options and headers tell.

Everything that those can refuse is refused here, before a weight is read.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from eckart.accounting import Fates, check_whole, fates_of
from eckart.allocate import RankPolicy, Terms
from eckart.certificate import Options
from eckart.checkpoint.source import Source
from eckart.checkpoint.statistics import Statistics, open_statistics
from eckart.comparison import Changes
from eckart.consumers import Consumer, check_component, component_of, consumer_of
from eckart.pairing import alike
from eckart.planning import check_align, open_dense, policy_of, stored_dtype

PathLike = str | Path


@dataclass(frozen=True, slots=True)
class Brief:
    """A model and its base, held alike, and what is to become of their difference."""

    tuned: Source
    base: Source
    policy: RankPolicy
    consumer: Consumer
    component: str | None  # of a diffusion pipeline
    align: int
    dtype: str | None  # of the factors, as safetensors spells it
    statistics: Statistics | None
    store_whole: Sequence[str]
    include: Sequence[str]
    exclude: Sequence[str]

    @property
    def inputs(self) -> list[Path]:
        """The folders that are read, which no output may touch."""
        statistics = self.statistics
        return [self.tuned.path, self.base.path, *([statistics.folder] if statistics else [])]

    def fates(self, changes: Changes) -> Fates:
        """Returns what becomes of every tensor that differs."""
        return fates_of(
            changes,
            store_whole=self.store_whole,
            include=self.include,
            exclude=self.exclude,
            consumer=self.consumer,
            component=self.component,
        )

    def addressed(self, names: Iterable[str]) -> "Brief":
        """Returns it with the model of a pipeline that these tensors are of, where one is."""
        names = [*names]
        if not self.consumer.components or not names:
            return self
        return replace(self, component=component_of(names, self.component))

    def options(self, dtype: str | None) -> Options:
        """Returns what a certificate says of it; `dtype` as the user spelled it."""
        return {
            self.policy.name: self.policy.value,
            "for": self.consumer.name,
            "component": self.component,
            "align": self.align,
            "store_whole": [*self.store_whole],
            "include": [*self.include],
            "exclude": [*self.exclude],
            "dtype": dtype,
        }


def brief_of(
    tuned: PathLike,
    base: PathLike,
    *,
    rank: int | str | None = None,
    energy: float | None = None,
    error: float | None = None,
    keep: float | None = None,
    size: int | None = None,
    align: int = 1,
    consumer: str = "peft",
    component: str | None = None,
    statistics: PathLike | None = None,
    store_whole: Sequence[str] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    dtype: str | None = None,
    allow_pickle: bool = False,
) -> Brief:
    """Returns a request; UsageError where its options contradict each other, InputError where
    headers show that the two models are not a pair."""
    policy = policy_of(rank=rank, energy=energy, error=error, keep=keep, size=size)
    reader = consumer_of(consumer)
    check_whole(store_whole, reader)
    check_component(reader, component)
    check_align(align)
    policy.check({}, Terms("ba", align, additive=True))  # as far as options tell
    stored = stored_dtype(dtype)
    model, origin = alike(
        *(open_dense(Path(path), allow_pickle=allow_pickle) for path in (tuned, base))
    )
    return Brief(
        tuned=model,
        base=origin,
        policy=policy,
        consumer=reader,
        component=component,
        align=align,
        dtype=stored,
        statistics=None if statistics is None else open_statistics(Path(statistics)),
        store_whole=[*store_whole],
        include=[*include],
        exclude=[*exclude],
    )
