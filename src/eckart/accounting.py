"""What becomes of every tensor that differs: factored, stored whole, or lost, and then why.

Knows what an adapter can hold; must not know how it is made.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from eckart.comparison import Changes
from eckart.consumers import CONSUMERS, Consumer, component_of, naming_refusal
from eckart.errors import LossError, UsageError
from eckart.families import FLOATING, adaptable, is_embedding, is_norm, is_tied_to_head
from eckart.matrix import Matrix

WHOLE = ("norms", "biases", "embeddings")

ACCEPTED_SHARE = 1e-3
"""Of the change's energy: what may be lost without a word from the user."""

CHOSEN = ("excluded by --exclude", "not among --include")
"""Reasons that are the user's own word."""

TIED = (
    "tied to the output head: add --store-whole embeddings (a LoRA of it loads in PEFT, but is "
    "added twice when it is merged)"
)

UNTIED = "tied to the output head, which PEFT would leave as it was"

GROWN = (
    "has rows that the base has not: add --store-whole embeddings, and load it on a base whose "
    "embeddings were resized"
)

SHOWN = 40


@dataclass(frozen=True, slots=True)
class Fates:
    """Every changed tensor is in exactly one of these."""

    matrices: dict[str, Matrix]
    whole: list[str]
    lost: dict[str, str]  # and why, with what to do about it

    def without(self, failed: dict[str, str]) -> "Fates":
        """Returns the fates when some matrices could not be factored, and why."""
        lost = {name: why for name, why in failed.items() if why}
        return replace(self, lost={**self.lost, **lost})


def fates_of(
    changes: Changes,
    *,
    store_whole: Sequence[str] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    consumer: Consumer = CONSUMERS["peft"],
    component: str | None = None,
) -> Fates:
    """Returns what an adapter for a consumer can do about every tensor that differs."""
    tied = [
        name
        for name in changes.changed
        if is_tied_to_head(name, changes.tuned) and not _is_whole(name, store_whole, TIED)
    ]
    rest, grown = [name for name in changes.changed if name not in tied], changes.grown
    found, reasons = adaptable(
        changes.tuned, [*rest, *changes.new], include=include, exclude=exclude
    )
    reasons |= {name: GROWN for name in grown if reasons.get(name) not in CHOSEN}
    whole = [
        name
        for name in rest
        if _is_whole(name, store_whole, reasons.get(name)) and reasons.get(name) not in CHOSEN
    ]
    lost = {
        name: _remedy(name, why, consumer) for name, why in reasons.items() if name not in whole
    }
    new = [name for name in changes.new if lost.get(name) not in CHOSEN]
    lost |= dict.fromkeys(new, "not in the base: no adapter adds a tensor")
    found = {
        name: matrix for name, matrix in found.items() if name not in whole and name not in lost
    }
    lost |= {name: _tied_remedy(name, consumer) for name in tied}
    odd = [name for name in found if changes.base.tensors[name].dtype not in FLOATING]
    lost |= {name: f"dtype {changes.base.tensors[name].dtype} in the base" for name in odd}
    lost |= _refused(found, consumer, component)
    return Fates({name: found[name] for name in found if name not in lost}, whole, lost)


def check_whole(store_whole: Sequence[str], consumer: Consumer) -> None:
    """Raises UsageError for a kind of tensor that cannot be stored whole, or not there."""
    for kind in store_whole:
        if kind not in WHOLE:
            raise UsageError(
                f"--store-whole {kind} is unknown: choose among {', '.join(WHOLE)}, separated by "
                "commas."
            )
    if store_whole and not consumer.whole:
        raise UsageError(
            f"--store-whole {','.join(store_whole)}: {consumer.title} loads nothing but products. "
            "Leave it out, or choose --for peft."
        )


def _refused(
    found: Mapping[str, Matrix], consumer: Consumer, component: str | None
) -> dict[str, str]:
    """What the consumer has no place for, and why."""
    lost = {
        name: f"{why}: another --for"
        for name in found
        if (why := consumer.refusal(name, found[name]))
    }
    left = [name for name in found if name not in lost]
    if not consumer.components or not left:
        return lost
    of = component_of(left, component)
    named = {name: naming_refusal(consumer, f"{of}.{name}") for name in left}
    return lost | {name: why for name, why in named.items() if why}


def check_losses(changes: Changes, lost: dict[str, str]) -> None:
    """Raises LossError if more than a thousandth of the change would be lost, naming all of it."""
    energies = {**changes.changed, **changes.added}
    unasked = {name: why for name, why in lost.items() if why not in CHOSEN}
    chosen = lost_share(changes, {name: why for name, why in lost.items() if why in CHOSEN})
    share = lost_share(changes, unasked) / (1 - chosen) if chosen < 1 else 0.0
    if share <= ACCEPTED_SHARE:
        return
    error = LossError(
        f"{len(unasked)} of {len(energies)} changed tensors, {share:.1%} of the change's energy, "
        "would not be in the adapter: do what is said of each, or add --accept-loss."
    )
    for name in sorted(unasked, key=lambda name: -energies[name])[:SHOWN]:
        error.add_note(f"  {energies[name] / changes.energy:7.2%}  {name}: {unasked[name]}")
    if len(unasked) > SHOWN:
        error.add_note(f"  … and {len(unasked) - SHOWN} more, each with less")
    raise error


def lost_share(changes: Changes, lost: dict[str, str]) -> float:
    """Returns the share of the change's energy that lies in some of its tensors."""
    energies = {**changes.changed, **changes.added}
    return sum(energies[name] for name in lost) / (changes.energy or 1.0)


def _tied_remedy(name: str, consumer: Consumer) -> str:
    if not consumer.whole:
        return f"tied to the output head: {consumer.title} holds neither whole"
    return TIED if _is_peft_tied(name) else UNTIED


def _is_peft_tied(name: str) -> bool:
    """PEFT gives the output head what it gives an embedding of this name, and of no other."""
    return name.endswith("embed_tokens.weight")


def _is_whole(name: str, kinds: Sequence[str], why: str | None) -> bool:
    if why == GROWN:
        return "embeddings" in kinds
    if why == TIED and not _is_peft_tied(name):
        return False
    if is_norm(name):
        return "norms" in kinds
    if name.endswith(".bias"):
        return "biases" in kinds
    return "embeddings" in kinds and name.endswith(".weight") and is_embedding(name)


def _remedy(name: str, why: str, consumer: Consumer) -> str:
    if why == GROWN and not consumer.whole:
        grown = "has rows that the base has not"
        return f"{grown}: {consumer.title} holds none, PEFT does: --store-whole embeddings"
    if why in (*CHOSEN, GROWN):
        return why
    remedy = "add" if consumer.whole else f"{consumer.title} holds none, PEFT does:"
    if is_norm(name):
        return f"a norm: {remedy} --store-whole norms"
    if name.endswith(".bias"):
        return f"a bias: {remedy} --store-whole biases"
    return f"{why}: no LoRA holds it"
