"""Module patterns of adapter configurations, matched without ever compiling one.

PEFT reads the keys of `rank_pattern` and `alpha_pattern` as regular expressions, matched as
`(.*\\.)?(KEY)$`; a key from a file can be made to take exponential time. What tools write are plain
names: those are matched here, with `^`, `$`, escapes and the dot's own meaning. Anything else is
refused by name.
"""

from collections.abc import Mapping

from eckart.checkpoint.paths import printable
from eckart.errors import CheckpointError

SPECIAL = frozenset("*+?[](){}|^$")


def first_match(patterns: Mapping[str, float], module: str) -> float | None:
    """Returns the value of the first pattern that matches a module, or None.

    >>> first_match({"layers.1.q": 4, "^model\\\\.layers\\\\.2\\\\.q": 8}, "model.layers.2.q")
    8
    """
    return next((value for key, value in patterns.items() if matches(key, module)), None)


def matches(pattern: str, module: str) -> bool:
    """Returns whether PEFT would find the pattern in the module's name; CheckpointError if it is
    more than a name.

    >>> matches("q_proj", "layers.0.q_proj"), matches("q_proj", "layers.0.xq_proj")
    (True, False)
    """
    anchored, characters = _parsed(pattern)
    start = len(module) - len(characters)
    if start < 0 or (anchored and start) or (start and module[start - 1] != "."):
        return False
    return all(
        expected is None or expected == found
        for expected, found in zip(characters, module[start:], strict=True)
    )


def _parsed(pattern: str) -> tuple[bool, list[str | None]]:
    """Whether it is anchored at the start, and its characters; None stands for any one."""
    anchored = pattern.startswith("^")
    body = pattern.removeprefix("^")
    if body.endswith("$") and not body.endswith("\\$"):
        body = body[:-1]
    found: list[str | None] = []
    escaped = False
    for c in body:
        if escaped:
            if c.isalnum():  # a class such as \d
                raise _refused(pattern)
            found.append(c)
            escaped = False
        elif c == "\\":
            escaped = True
        elif c in SPECIAL:
            raise _refused(pattern)
        else:
            found.append(None if c == "." else c)
    if escaped:
        raise _refused(pattern)
    return anchored, found


def _refused(pattern: str) -> CheckpointError:
    return CheckpointError(
        f"the pattern {printable(pattern)} in the adapter's configuration is more than a module's "
        "name, and no regular expression from a file is ever compiled: write the names in full."
    )
