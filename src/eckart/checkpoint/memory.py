"""A module in memory as a source, as if its state had been saved."""

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from eckart.checkpoint.hashing import bytes_of
from eckart.checkpoint.header import TensorInfo
from eckart.checkpoint.source import Source
from eckart.checkpoint.tensor_file import NAMES


@dataclass(frozen=True)
class Memory(Source):
    """The state of a module; nothing of it is on disk."""

    state: dict[str, Tensor] = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "folder", None)

    @property
    def files(self) -> list[str]:
        """None."""
        return []

    def read(self, name: str, buffer: memoryview, offset: int) -> None:
        """Fills `buffer` with a tensor's bytes."""
        held = bytes_of(self.state[name].detach().cpu().contiguous())
        buffer[:] = held[offset : offset + len(buffer)]


def state_of(module: nn.Module) -> Memory:
    """Returns the source that a module is: its parameters and buffers, tied ones once."""
    state: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor) or tensor.dtype not in NAMES:
            continue
        known = first.setdefault(id(tensor), name)
        state[name] = tensor
        if known != name:
            tied[name] = known
    infos = {
        name: TensorInfo(tuple(t.shape), NAMES[t.dtype], "", 0, t.numel() * t.element_size())
        for name, t in state.items()
    }
    return Memory(Path(type(module).__name__), infos, tied, state=state)
