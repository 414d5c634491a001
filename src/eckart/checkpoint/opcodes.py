"""Pickles looked through before torch sees them: opcode by opcode, without doing what they say."""

import pickletools
import re
from pathlib import Path
from typing import IO

from eckart.checkpoint.paths import printable
from eckart.errors import CheckpointError

FUNCTIONS = {
    "collections OrderedDict",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_tensor_v3",
}
TYPES = re.compile(r"torch(\.storage)? \w*Storage|torch (bfloat|bool|complex|float|u?int)\w*")
"""All that plain tensors need. weights_only allows more: bytearray(10**11) fills the memory."""

OPERATIONS, TUPLE_ITEMS = 2**21, 1000
"""An operation of one byte can cost 100 in memory; a tuple of tuples of …, used as a key, takes
for ever to hash, or overflows the stack. A tensor needs about 30 of them, and tuples of 10."""

Constant = tuple[object, int]
"""A value on a pickle's stack, as far as it is known without doing anything; its size."""


def scan_pickle(stream: IO[bytes], path: Path) -> tuple[list[object], list[str]]:
    """Returns the storages that a pickle refers to, and its strings, without doing what it says.

    Reads up to its end. Raises CheckpointError if it asks for anything but plain tensors,
    ValueError or LookupError if it makes no sense, or would cost out of proportion.
    """
    stack, marks, memo = list[Constant](), list[int](), dict[object, Constant]()
    storages, strings = list[object](), list[str]()
    for count, (operation, argument, _) in enumerate(pickletools.genops(stream)):
        taken = _take(operation, stack, marks)
        match operation.name:
            case "MARK":
                marks.append(len(stack))
                continue
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINPERSID":
                storages.append(taken[0][0])
            case "GLOBAL":
                _check_plain(str(argument), path)
            case "REDUCE" if taken[0][0] not in FUNCTIONS:
                raise ValueError("its pickle calls what is no function")
            case _ if isinstance(argument, str):
                strings.append(argument)
            case _:
                pass
        result = _result(operation.name, argument, taken, memo)
        if result[1] > TUPLE_ITEMS or count > OPERATIONS:
            raise ValueError("its pickle is made to take all memory, or for ever")
        stack += [result] * len(operation.stack_after)
    return storages, strings


def _take(
    operation: pickletools.OpcodeInfo, stack: list[Constant], marks: list[int]
) -> list[Constant]:
    """What an operation takes off the stack: some values, or all above the last mark and some."""
    before, top = operation.stack_before, len(stack)
    if pickletools.markobject in before:
        before, top = before[: before.index(pickletools.markobject)], marks.pop()
    start = max(top - len(before), 0)
    taken = stack[start:]
    del stack[start:]
    return taken


def _result(
    name: str, argument: object, taken: list[Constant], memo: dict[object, Constant]
) -> Constant:
    """What an operation puts on the stack, if anything."""
    if name in ("BINGET", "LONG_BINGET"):
        return memo[argument]
    if name.startswith("TUPLE"):
        return tuple(value for value, _ in taken), 1 + sum(size for _, size in taken)
    return argument, 1


def _check_plain(wanted: str, path: Path) -> None:
    if wanted not in FUNCTIONS and not TYPES.fullmatch(wanted):
        raise CheckpointError(
            f"{printable(path)} asks for {printable(wanted)}, which is no part of plain tensors: "
            "it was not read, and nothing in it was run. Convert it to safetensors if you trust it."
        )
