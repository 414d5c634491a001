"""The form that an adapter has for a consumer: names, ranks as stored, and the files beside them.

Knows every layout; who holds what, `consumers` knows.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor

from eckart.certificate import Certificate, FactoredEntry, Options
from eckart.checkpoint.paths import printable
from eckart.checkpoint.source import Source
from eckart.checkpoint.tensor_file import TensorLayout
from eckart.consumers import (
    CONSUMERS,
    Consumer,
    ConsumerName,
    consumer_of,
    naming_refusal,
)
from eckart.errors import UsageError
from eckart.formats import diffusers, kohya, peft
from eckart.formats.factored import matrix_of
from eckart.linalg.factors import Factors, PivotedFactors

ALPHA = "F32"


@dataclass(frozen=True, slots=True)
class AdapterForm:
    """How the factors of an adapter are stored for a consumer: a value, for any process.

    >>> entry = FactoredEntry(rank=8, form="ba", shape=(32, 64), orientation="out_in")
    >>> AdapterForm("diffusers", component="unet").part_names("mid_block.proj.weight", entry)[1]
    'unet.mid_block.proj.lora_B.weight'
    """

    consumer: ConsumerName = "peft"
    rank: int | None = None  # of every module, zeros after its own; None: its own
    component: str | None = None  # put in front of the tensors' names
    numbered: bool = False  # kohya's: there are two text encoders

    @classmethod
    def of(
        cls,
        consumer: Consumer,
        entries: Mapping[str, FactoredEntry],
        component: str | None = None,
    ) -> "AdapterForm":
        """Returns the form of an adapter with these entries, by tensor."""
        largest = max((entry.rank for entry in entries.values()), default=1)
        return cls(
            consumer.name,
            largest if consumer.uniform else None,
            component,
            any(name.startswith("text_encoder_2.") for name in entries),
        )

    @property
    def weights(self) -> str:
        """The file that holds the tensors."""
        files: dict[str, str] = {"diffusers": diffusers.WEIGHTS, "kohya": kohya.WEIGHTS}
        return files.get(self.consumer, peft.WEIGHTS)

    @property
    def is_peft(self) -> bool:
        """Whether it is a folder as PEFT writes it."""
        return self.weights == peft.WEIGHTS

    def stored(self, entry: FactoredEntry) -> FactoredEntry:
        """Returns an entry with the rank that its factors are stored with."""
        return entry if self.rank is None else msgspec.structs.replace(entry, rank=self.rank)

    def part_names(self, name: str, entry: FactoredEntry) -> tuple[str, str]:
        """Returns the names of A and B of a tensor."""
        if self.is_peft:
            return peft.part_names(name, entry)
        full = self._full(name)
        if self.consumer == "diffusers":
            return diffusers.part_names(full)
        return kohya.part_names(full, numbered=self.numbered)

    def layout(
        self, name: str, entry: FactoredEntry, dtype: str, guard: str | None = None
    ) -> dict[str, TensorLayout]:
        """Returns the tensors that stand for what was added to one. No guard: it is an addition."""
        stored = self.stored(entry)
        if self.is_peft:
            return peft.layout(name, stored, dtype)
        shapes, (A, B) = matrix_of(stored).factors(stored.rank, "ba"), self.part_names(name, entry)
        tensors = {
            A: TensorLayout.of(dtype, shapes["A.weight"]),
            B: TensorLayout.of(dtype, shapes["B.weight"]),
        }
        if self.consumer == "kohya":
            tensors[self._alpha(name)] = TensorLayout.of(ALPHA, ())
        return tensors

    def encode(
        self, name: str, entry: FactoredEntry, product: Factors | PivotedFactors
    ) -> dict[str, Tensor]:
        """Returns the tensors of `layout`."""
        stored = self.stored(entry)
        assert isinstance(product, Factors), f"{name}: an adapter is B·A"
        padded = product if self.rank is None else product.padded(self.rank)
        if self.is_peft:
            return peft.encode(name, stored, padded)
        A, B = self.part_names(name, entry)
        tensors = {A: padded.A, B: padded.B}
        if self.consumer == "kohya":
            tensors[self._alpha(name)] = torch.tensor(float(stored.rank))
        return tensors

    def decode(self, source: Source, name: str, entry: FactoredEntry, index: int = 0) -> Factors:
        """Returns B and A as they are stored, with their zeros, and a scale of 1."""
        stored = self.stored(entry)
        if self.is_peft:
            return peft.decode(source, name, stored, index)
        A, B = self.part_names(name, entry)
        scale = float(source.load(self._alpha(name))) / stored.rank if self._has_alpha else 1.0
        factor = source.load(B).flatten(1)
        return Factors(factor if scale == 1 else factor.double() * scale, source.load(A).flatten(1))

    def configuration(
        self,
        entries: Mapping[str, FactoredEntry],
        *,
        base: object,
        task: object = None,
        whole: Collection[str] = (),
        has_lora_bias: bool = False,
        is_tied: bool = False,
    ) -> dict[str, object] | None:
        """Returns adapter_config.json, where the consumer reads one: see `peft.configuration`."""
        if not self.is_peft:
            return None
        return peft.configuration(
            {name: self.stored(entry) for name, entry in entries.items()},
            base=base,
            task=task,
            whole=whole,
            has_lora_bias=has_lora_bias,
            is_tied=is_tied,
        )

    @property
    def _has_alpha(self) -> bool:
        return self.consumer == "kohya"

    def _alpha(self, name: str) -> str:
        return kohya.alpha_name(self._full(name), numbered=self.numbered)

    def _full(self, name: str) -> str:
        return f"{self.component}.{name}" if self.component else name


def promised_consumer(certificate: Certificate) -> Consumer:
    """Returns who a written adapter is for."""
    return consumer_of(str(certificate.options.get("for", "peft")))


def form_of(certificate: Certificate, entries: Mapping[str, FactoredEntry]) -> AdapterForm:
    """Returns the form of a written adapter, as its certificate says."""
    consumer = promised_consumer(certificate)
    given = certificate.options.get("component")
    named = certificate.kind == "adapter" and given is not None
    return AdapterForm.of(consumer, entries, str(given) if named else None)


def check_held(
    consumer: Consumer, entries: Mapping[str, FactoredEntry], others: Iterable[str] = ()
) -> None:
    """Raises UsageError where headers show that a consumer cannot hold an adapter.

    `others` are what it holds beside products: tensors stored whole, and biases.
    """
    for name, entry in entries.items():
        why = consumer.refusal(name, matrix_of(entry))
        if why := why or (naming_refusal(consumer, name) if consumer.components else None):
            raise UsageError(f"{printable(name)} is {why}. Choose another --for.")
    for name in others:
        if not consumer.whole:
            raise UsageError(
                f"the adapter holds {printable(name)} beside its products, and {consumer.title} "
                "loads products alone: --for peft."
            )
    form, seen = AdapterForm.of(consumer, entries), dict[str, str]()
    for name, entry in entries.items():
        first = seen.setdefault(form.part_names(name, entry)[0], name)
        if first != name:
            raise UsageError(
                f"{printable(first)} and {printable(name)} have the same name in "
                f"{consumer.title}'s files. Choose another --for."
            )


def check_largest(consumer: Consumer, ranks: Mapping[str, int]) -> None:
    """Raises UsageError where a rank is above what a consumer takes."""
    for name, rank in ranks.items():
        if consumer.largest is not None and rank > consumer.largest:
            raise UsageError(
                f"{printable(name)} has rank {rank}, and {consumer.title} takes "
                f"{consumer.largest} at most: choose a smaller rank, or another --for."
            )


def form_remarks(
    form: AdapterForm, entries: Mapping[str, FactoredEntry], options: Options
) -> list[str]:
    """Returns what a reader should know of ranks that a consumer wants equal."""
    if form.rank is None:
        return []
    title, remarks = CONSUMERS[form.consumer].title, list[str]()
    less = [name for name, entry in entries.items() if entry.rank < form.rank]
    if less:
        remarks.append(
            f"{len(less)} of {len(entries)} modules have a smaller rank and are padded with zeros "
            f"to rank {form.rank}: {title} takes one rank for all."
        )
    for policy in ("keep", "size"):
        if policy in options:
            remarks.append(
                f"{title} takes one rank for all modules: {form.rank} is the largest within "
                f"--{policy} {options[policy]}."
            )
    return remarks
