"""What a compression is tried on: a text that was given, and the model on a tenth of it.

Knows what was asked for; must not know what is tried.
"""

from collections.abc import Mapping
from pathlib import Path

from eckart.allocate import Loss
from eckart.checkpoint.paths import printable
from eckart.checkpoint.source import Source
from eckart.errors import InputError, ResourceError, UsageError
from eckart.execute import free_in_process, free_memory
from eckart.planning import Targets
from eckart.texts import Text, open_text
from eckart.trial import Trial, held_out

Given = Mapping[str, str | Path | None]
"""`text`, `tokens` and `batch`, of which one may name a file."""


def check_text(targets: Targets, given: Given) -> None:
    """Raises UsageError for a text that nothing can be measured with, or where one is missing."""
    policy, source = targets.policy, targets.source
    if all(path is None for path in given.values()):
        if isinstance(policy, Loss):
            raise UsageError(
                f"--loss {policy.value} is kept by measuring: give a text, with --text, --tokens "
                "or --batch."
            )
        return
    if targets.statistics is None:
        raise UsageError(
            "a text is measured on together with --statistics: eckart calibrate, then give both."
        )
    if source.folder is None:
        raise UsageError(f"{printable(source.path)} is no model's folder: leave the text out.")


def text_of(targets: Targets, given: Given) -> Text | None:
    """Returns the text that a compression is tried on, where one is given; see `check_text`."""
    check_text(targets, given)
    text, tokens, batch = (
        None if path is None else Path(path)
        for path in (given["text"], given["tokens"], given["batch"])
    )
    return open_text(targets.source.path, text=text, tokens=tokens, batch=batch)


def trial_of(
    targets: Targets, text: Text, *, device: str, threads: int | None, allow_pickle: bool
) -> Trial:
    """Returns the model on the tenth that is held out of a text."""
    _check_memory(targets.source)
    trial = Trial(
        targets.source,
        held_out(text),
        names=targets.requests,
        device=device,
        threads=threads,
        allow_pickle=allow_pickle,
    )
    if isinstance(targets.policy, Loss) and trial.dense.loss is None:
        raise InputError(
            f"--loss {targets.policy.value} is measured at labels, and what was given has none "
            f"that fit the logits of {type(trial.model).__name__}: add `labels` to --batch, or "
            "choose --keep or --size."
        )
    return trial


def _check_memory(source: Source) -> None:
    """Raises ResourceError where a model in float32 is larger than the memory that is free."""
    needed = 4 * sum(
        info.parameters for name, info in source.tensors.items() if name not in source.tied
    )
    free = min(free_memory(), free_in_process())
    if needed > free:
        raise ResourceError(
            f"{printable(source.path)} takes {needed:,} bytes of memory in float32, to be tried on "
            f"a text, and {free:,} are free: leave the text out, or take a machine with more."
        )
