"""The stages of a resize or a merge: spectra of the cores, ranks, one adapter.

Knows the order of things; what is computed of each tensor is in `assemble.recombination`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from eckart.allocate import (
    AutoRank,
    Choice,
    FixedRank,
    Item,
    Keep,
    RankPolicy,
    Terms,
    one_rank,
)
from eckart.assemble.adapter_certification import certify_merged
from eckart.assemble.filling import Filled
from eckart.assemble.job import Job
from eckart.assemble.recombination import (
    RankOf,
    Recombiner,
    SpectrumOf,
    Sum,
    entries_of,
    layout_of,
    sums_of,
)
from eckart.certificate import Certificate
from eckart.checkpoint.documents import indented_json
from eckart.checkpoint.opening import open_source
from eckart.checkpoint.paths import printable, write_file
from eckart.checkpoint.tensor_file import lay_out_file
from eckart.consumers import Consumer, consumer_of
from eckart.errors import CheckpointError, UsageError
from eckart.execute import Task, Workers
from eckart.formats import peft
from eckart.formats.adapters import Adapter
from eckart.formats.forms import AdapterForm, check_held, check_largest, form_remarks
from eckart.formats.pipelines import addressed, open_lora
from eckart.planning import check_align, intact, policy_of, stored_dtype


def weights_of(weights: Sequence[float] | None, count: int) -> list[float]:
    """Returns one finite weight for each adapter: 1 unless given."""
    if weights is None or not weights:
        return [1.0] * count
    if len(weights) != count or not all(abs(weight) < float("inf") for weight in weights):
        raise UsageError(
            f"--weights {', '.join(map(str, weights))}: give one finite number for each of the "
            f"{count} adapters."
        )
    return [float(weight) for weight in weights]


def check_mergeable(adapters: Sequence[Adapter]) -> None:
    """Raises CheckpointError where a weighted sum is not defined: tensors that are stored whole."""
    if len(adapters) == 1:
        return
    for adapter in adapters:
        if adapter.whole:
            raise CheckpointError(
                f"{printable(adapter.source.path)} holds {printable(min(adapter.whole))} whole "
                "(modules_to_save), and without the base a sum of wholes means nothing: apply the "
                "adapters to the base one after the other, and extract the result."
            )


@dataclass(frozen=True, slots=True)
class MergeBrief:
    """A weighted sum of adapters that is asked for, as far as options and headers tell."""

    adapters: Sequence[Adapter]
    weights: Sequence[float]
    sums: Mapping[str, Sum]
    policy: RankPolicy | None  # as it holds for these sums; None: as the one adapter has them
    terms: Terms
    consumer: Consumer
    dtype: str | None  # of the factors, as safetensors spells it

    @property
    def items(self) -> dict[str, Item]:
        """The sums as a budget sees them."""
        return {name: one.item(self.dtype) for name, one in self.sums.items()}


def merge_of(
    adapters: Sequence[str | Path],
    *,
    weights: Sequence[float] | None = None,
    rank: int | str | None = None,
    energy: float | None = None,
    error: float | None = None,
    keep: float | None = None,
    size: int | None = None,
    align: int = 1,
    consumer: str = "peft",
    component: str | None = None,
    dtype: str | None = None,
) -> MergeBrief:
    """Returns the sum; refuses whatever options and headers can show is wrong with it."""
    policy = policy_of(rank=rank, energy=energy, error=error, keep=keep, size=size)
    check_align(align)
    if not adapters:
        raise UsageError("there is no adapter to merge: name one at least.")
    stored, reader = stored_dtype(dtype), consumer_of(consumer)
    opened = [addressed(open_lora(intact(Path(path))), reader, component) for path in adapters]
    brief = _summed(opened, weights_of(weights, len(opened)), reader, stored, align)
    policy.check(brief.items, brief.terms)
    policy = _against_given(policy, brief.sums)
    if reader.uniform:
        policy = one_rank(policy, brief.items, brief.terms)
    if isinstance(policy, FixedRank):
        limits = {name: min(policy.value, one.rank) for name, one in brief.sums.items()}
        check_largest(reader, limits)
    return replace(brief, policy=policy)


def conversion_of(
    adapter: str | Path,
    *,
    consumer: str,
    component: str | None = None,
    base: str | Path | None = None,
    dtype: str | None = None,
) -> MergeBrief:
    """Returns one adapter as it is in another form; refuses what the consumer cannot hold."""
    reader, stored = consumer_of(consumer), stored_dtype(dtype)
    listed = [] if base is None else open_source(Path(base)).tensors
    modules = [name.removesuffix(".weight") for name in listed]
    opened = addressed(open_lora(intact(Path(adapter)), modules), reader, component)
    return _summed([opened], [1.0], reader, stored, align=1)


def _summed(
    opened: Sequence[Adapter],
    weights: Sequence[float],
    reader: Consumer,
    dtype: str | None,
    align: int,
) -> MergeBrief:
    check_mergeable(opened)
    sums = sums_of(opened, weights)
    check_held_by(reader, opened, sums)
    rest = sum(opened[0].source.tensors[name].nbytes for name in opened[0].whole.values())
    rest += sum(one.bias_bytes(dtype) for one in sums.values())
    rest += reader.extra_bytes(len(sums))
    terms = Terms("ba", align, rest, additive=True)
    return MergeBrief(opened, weights, sums, None, terms, reader, dtype)


def choose_ranks(brief: MergeBrief, workers: Workers) -> dict[str, Choice]:
    """Returns the policy's ranks, from the singular values of the exact sums."""
    sums, policy = brief.sums, brief.policy
    if policy is None:
        return {name: Choice(one.given) for name, one in sums.items()}
    tasks = [Task(name, (one,), one.seconds) for name, one in sums.items()]
    if isinstance(policy, AutoRank):
        ranks = dict(workers.map(RankOf(), tasks, "finding ranks"))
        return {name: Choice(rank) for name, rank in ranks.items()}
    spectra = dict(workers.map(SpectrumOf(), tasks, "decomposing"))
    chosen = policy.choose(brief.items, spectra, brief.terms)
    return {
        name: Choice(min(choice.rank or 0, sums[name].rank), choice.reason)
        for name, choice in chosen.items()
    }


def write_merged(
    brief: MergeBrief, choices: Mapping[str, Choice], job: Job, workers: Workers
) -> Certificate:
    """Lays the file out, fills it in any order, and certifies it.

    Without a policy factors are copied, not decomposed.
    """
    adapters, sums, consumer, dtype = brief.adapters, brief.sums, brief.consumer, brief.dtype
    exactly = brief.policy is None
    first = adapters[0]
    _check_something_left(sums, choices, dtype)
    check_largest(consumer, {name: choice.rank or 0 for name, choice in choices.items()})
    entries = entries_of(sums, {name: choice.rank for name, choice in choices.items()})
    form = AdapterForm.of(consumer, entries)
    layout, orders = layout_of(sums, choices, first, dtype, form=form, exactly=exactly)
    files = lay_out_file(job.staged / form.weights, layout)
    unit = Recombiner(first.source, files, form, job.threads)
    tasks = [Task(name, (order,), order.seconds) for name, order in orders.items()]
    filled = [one for _, one in workers.map(unit, tasks, "writing")]
    files.sync()
    document = form.configuration(
        entries,
        base=first.config.get("base_model_name_or_path"),
        task=first.config.get("task_type"),
        whole=first.whole,
        has_lora_bias=any(name.endswith(".lora_B.bias") for name in layout),
        is_tied=first.config.get("ensure_weight_tying") is True,
    )
    if document is not None:
        write_file(job.staged / peft.CONFIG, indented_json(document))
    for adapter in adapters:
        adapter.source.check_unchanged()
    remarks = form_remarks(form, entries, job.options)
    if exactly:
        remarks += rounding_remarks(filled)
    return certify_merged(
        job,
        adapters,
        sums,
        choices,
        filled,
        kind="converted" if exactly else "merged",
        form=form,
        remarks=remarks,
    )


def check_held_by(consumer: Consumer, adapters: Sequence[Adapter], sums: Mapping[str, Sum]) -> None:
    """Raises UsageError where the headers show that a consumer cannot hold the sum."""
    entries = entries_of(sums, {name: one.rank for name, one in sums.items()})
    biases = [name for name, one in sums.items() if one.bias_bytes(None)]
    check_held(consumer, entries, [*adapters[0].whole, *(f"the bias of {X}" for X in biases)])


def rounding_remarks(filled: Iterable[Filled]) -> list[str]:
    """Returns what a change of scale took, where it is no power of two."""
    errors = [one.record.relative_error for one in filled if one.record]
    rounded = [error for error in errors if error]
    if not rounded:
        return ["every number is the given one, or a power of two times it: nothing was rounded."]
    return [
        f"the numbers of {len(rounded)} of {len(errors)} modules were rounded, for a scale that is "
        f"no power of two or for another dtype: an error of {max(rounded):.2g} at most. --dtype "
        "float32 makes it least."
    ]


def _check_something_left(
    sums: Mapping[str, Sum], choices: Mapping[str, Choice], dtype: str | None
) -> None:
    """No adapter is written that no loader takes, and no bias goes with its module."""
    if not any(choice.rank for choice in choices.values()):
        raise UsageError(
            "no module is left a rank, and so no adapter: the budget is too small for any, or the "
            "adapters cancel each other. Raise it, or change the weights."
        )
    for name, one in sums.items():
        if not choices[name].rank and one.bias_bytes(dtype):
            raise UsageError(
                f"{printable(name)} is left rank 0, and the bias that the adapter adds there would "
                "be lost: raise the budget, or choose a rank."
            )


def _against_given(policy: RankPolicy, sums: Mapping[str, Sum]) -> RankPolicy:
    """`--keep` counts against the adapters' own parameters, not against the layers'."""
    if not isinstance(policy, Keep):
        return policy
    given = sum(one.parameters for one in sums.values())
    dense = sum(one.item(dtype=None).dense_parameters for one in sums.values())
    return Keep(min(policy.value * given / dense, 1.0))
