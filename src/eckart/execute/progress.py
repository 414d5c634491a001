"""Who watches a run: told of stages, of work done in each, and of what should be known."""

from typing import Protocol


class Progress(Protocol):
    """Anything that shows how far a run is."""

    def stage(self, title: str, seconds: float) -> None:
        """A stage begins, of about so many seconds of work."""
        ...

    def advance(self, seconds: float) -> None:
        """So much of it is done."""
        ...

    def note(self, text: str) -> None:
        """Something that the user should know."""
        ...


class Silent:
    """Shows nothing."""

    def stage(self, title: str, seconds: float) -> None:
        """Nothing."""

    def advance(self, seconds: float) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""
