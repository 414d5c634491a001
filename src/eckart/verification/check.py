"""One thing that was looked at, and what was found."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

SHOWN = 3


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at, and what was found."""

    name: str
    held: bool
    detail: str
    figures: Mapping[str, float] = field(default_factory=dict[str, float])  # where it was measured

    @classmethod
    def of(cls, name: str, faults: Sequence[str], detail: str) -> "Check":
        """Returns what held, with its detail, or the first faults and how many more there are."""
        if not faults:
            return cls(name, held=True, detail=detail)
        more = f" (and {len(faults) - SHOWN} more)" if len(faults) > SHOWN else ""
        return cls(name, held=False, detail="; ".join(faults[:SHOWN]) + more)
