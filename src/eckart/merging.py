"""The stages of a resize or a merge: spectra of the cores, ranks, one adapter.

Knows the order of things; what is computed of each tensor is in `assemble.recombination`.
"""

import json
from collections.abc import Mapping, Sequence

from eckart.allocate import Choice, RankPolicy, Terms
from eckart.allocate.policies import Keep
from eckart.assemble.job import Job
from eckart.assemble.recombination import (
    Recombiner,
    SpectrumOf,
    Sum,
    certify_merged,
    entries_of,
    layout_of,
)
from eckart.certificate import Certificate
from eckart.checkpoint.paths import printable, write_file
from eckart.checkpoint.tensor_file import lay_out_file
from eckart.errors import CheckpointError, UsageError
from eckart.execute import Task, Workers
from eckart.formats import peft
from eckart.formats.adapters import Adapter


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


def choose_ranks(
    sums: Mapping[str, Sum],
    policy: RankPolicy,
    workers: Workers,
    *,
    align: int,
    dtype: str | None,
    rest_bytes: int,
) -> dict[str, Choice]:
    """Returns the policy's ranks, from the singular values of the exact sums."""
    tasks = [Task(name, (one,), one.seconds) for name, one in sums.items()]
    spectra = dict(workers.map(SpectrumOf(), tasks, "decomposing"))
    items = {name: one.item(dtype) for name, one in sums.items()}
    terms = Terms("ba", align, rest_bytes, additive=True)
    chosen = _against_given(policy, sums).choose(items, spectra, terms)
    return {
        name: Choice(min(choice.rank or 0, sums[name].rank), choice.reason)
        for name, choice in chosen.items()
    }


def write_merged(
    adapters: Sequence[Adapter],
    sums: Mapping[str, Sum],
    choices: Mapping[str, Choice],
    job: Job,
    workers: Workers,
    *,
    dtype: str | None,
) -> Certificate:
    """Lays the file out, fills it in any order, and certifies it."""
    first = adapters[0]
    _check_something_left(sums, choices, dtype)
    layout, orders = layout_of(sums, choices, first, dtype)
    files = lay_out_file(job.staged / peft.WEIGHTS, layout)
    unit = Recombiner(first.source, files, job.threads)
    tasks = [Task(name, (order,), order.seconds) for name, order in orders.items()]
    filled = [one for _, one in workers.map(unit, tasks, "writing")]
    files.sync()
    document = peft.configuration(
        entries_of(sums, {name: choice.rank for name, choice in choices.items()}),
        base=first.config.get("base_model_name_or_path"),
        task=first.config.get("task_type"),
        whole=first.whole,
        has_lora_bias=any(name.endswith(".lora_B.bias") for name in layout),
        is_tied=first.config.get("ensure_weight_tying") is True,
    )
    write_file(job.staged / peft.CONFIG, json.dumps(document, indent=2).encode("ascii") + b"\n")
    for adapter in adapters:
        adapter.source.check_unchanged()
    return certify_merged(job, adapters, sums, choices, filled)


def _check_something_left(
    sums: Mapping[str, Sum], choices: Mapping[str, Choice], dtype: str | None
) -> None:
    """No adapter is written that no loader takes, and no bias goes with its module."""
    if not any(choice.rank for choice in choices.values()):
        raise UsageError("the budget leaves no module a rank: there would be no adapter. Raise it.")
    for name, one in sums.items():
        if not choices[name].rank and one.bias_bytes(dtype):
            raise UsageError(
                f"the budget leaves {printable(name)} rank 0, and the bias that the adapter adds "
                "there would be lost: raise it."
            )


def _against_given(policy: RankPolicy, sums: Mapping[str, Sum]) -> RankPolicy:
    """`--keep` counts against the adapters' own parameters, not against the layers'."""
    if not isinstance(policy, Keep):
        return policy
    given = sum(one.parameters for one in sums.values())
    dense = sum(one.item(dtype=None).dense_parameters for one in sums.values())
    return Keep(min(policy.value * given / dense, 1.0))
