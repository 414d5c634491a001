"""Every product of a model's own matrices with something, seen as it is computed.

Not by hooks on modules, but on torch's functions: so GPT-2's Conv1D, a router that is no layer, a
head tied to its embedding and one expert out of a fused stack are all the same, a product whose
second factor is a parameter (or a slice of one).
"""

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 as everybody calls it
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

LINEAR = {F.linear}
MATMUL = {
    torch.matmul,
    torch.mm,
    torch.bmm,
    Tensor.matmul,
    Tensor.__matmul__,
    Tensor.mm,
    Tensor.bmm,
}
ADDMM = {torch.addmm, Tensor.addmm}
CONV = {F.conv2d}
GATHER = {Tensor.__getitem__}

Key = tuple[str, int | None]
"""A parameter, and which of its matrices where it is a stack."""


@dataclass(frozen=True, slots=True)
class Product:
    """y = x Wᵀ, as one parameter's matrix takes part in it."""

    key: Key
    width: int  # n
    height: int  # m
    source: Tensor  # what tells that two matrices share their input: the very tensor
    rows: Callable[[], Tensor]  # its rows that are no padding, count×n
    keep: Tensor | None  # which rows of y are no padding; None: all
    count: int  # how many those are
    known: bool  # whether padding could be told apart, where there is some


Seen = Callable[[Product], Callable[[Tensor], None] | None]
"""Told of every product; what it returns, if anything, is given y's gradient, rows×m."""


@dataclass
class Rows:
    """Which rows are padding, of tensors that come in many shapes.

    `mask` is that of the sequences at hand (B×T); some tensors are remembered by identity.
    """

    mask: Tensor | None = None
    _known: dict[int, tuple[weakref.ref[Tensor], Tensor | None, Tensor]] = field(
        default_factory=dict[int, tuple[weakref.ref[Tensor], Tensor | None, Tensor]]
    )

    def remember(self, tensor: Tensor, keep: Tensor | None, source: Tensor | None = None) -> None:
        """Notes which rows of a tensor are none, and what it was gathered from."""
        origin = tensor if source is None else source
        self._known[id(tensor)] = (weakref.ref(tensor), keep, origin)

    def gathered(self, result: Tensor, source: Tensor, index: Any) -> None:
        """Notes the rows that an index took out of all tokens, as a router does."""
        one = isinstance(index, Tensor) and index.ndim == 1 and index.dtype == torch.int64
        if one and source.ndim == 2 and source.is_floating_point():
            keep, known = self.of(source)
            if known:
                self.remember(result, None if keep is None else keep[index], source)

    def remembered(self, x: Tensor) -> bool:
        """Whether this very tensor is one that was noted."""
        return self._find(x) is not None

    def of(self, x: Tensor) -> tuple[Tensor | None, bool]:
        """Returns which rows of x, flattened, are no padding, and whether that could be told."""
        found = self._find(x)
        if found is not None:
            return found[1], True
        if self.mask is None:
            return None, True
        count = x[..., 0].numel()
        if count == self.mask.numel():
            return self.mask.reshape(-1), True
        return None, count == len(self.mask)  # one row for each sequence: pooled

    def within(self, rows: Tensor) -> Tensor:
        """Returns which of the rows that are meant are no padding, where there is one per token."""
        whole = self.mask is not None and self.mask.numel() == len(rows)
        return rows & self.mask.reshape(-1) if self.mask is not None and whole else rows

    def origin(self, x: Tensor) -> Tensor:
        """Returns what a tensor was gathered from, or itself."""
        found = self._find(x)
        return x if found is None else found[2]

    def forget(self) -> None:
        """Between two forward passes."""
        self._known.clear()

    def _find(self, x: Tensor) -> tuple[weakref.ref[Tensor], Tensor | None, Tensor] | None:
        found = self._known.get(id(x))
        return found if found is not None and found[0]() is x else None


class Observer(TorchFunctionMode):
    """While entered, tells `seen` of every product with one of the parameters.

    The products are computed as ever; where `seen` wants a gradient and y would have none, y
    becomes y + 0, which has. Parameters are found by the memory they lie in, so views count.
    """

    def __init__(self, parameters: Mapping[str, Tensor], seen: Seen, rows: Rows) -> None:
        super().__init__()
        self._seen, self._rows = seen, rows
        self._held = {_storage(p): (name, p) for name, p in reversed([*parameters.items()])}
        self._routed: dict[str, tuple[int, Tensor | None, bool]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Computes what was asked, and looks at it."""
        y = func(*args, **(kwargs or {}))
        if func in LINEAR:
            return self._product(y, *_named(args, kwargs, "input", "weight"))
        if func in MATMUL:
            return self._product(y, *_named(args, kwargs, "input", "other"))
        if func in ADDMM:
            return self._product(y, *_named(args[1:], kwargs, "mat1", "mat2"))
        if func in CONV:
            return self._convolution(y, args, kwargs or {})
        if func in GATHER:
            self._rows.gathered(y, args[0], args[-1])
        return y

    def _product(self, y: Tensor, x: Any, w: Any) -> Tensor:
        """A product with a parameter, or with one matrix of a stack, on either side of its mT."""
        found = self._find(w) if isinstance(w, Tensor) else None
        if found is None or not isinstance(x, Tensor) or x.numel() == 0:
            return y
        name, expert = found
        if w.ndim == 3:  # all experts at once, each with its own rows
            return self._stack(y, x, name)
        keep, known = self._keep(name, expert, x)
        source, kept = x, keep
        if expert is not None:  # the layer's tokens, of which a router took some for this one
            source = self._rows.origin(x)
            kept = keep if source is x else self._rows.of(source)[0]
        flat = source.detach().reshape(-1, x.shape[-1])
        count = x[..., 0].numel() if keep is None else int(keep.sum())
        product = Product(
            key=(name, expert),
            width=x.shape[-1],
            height=y.shape[-1],
            source=source,
            rows=lambda: flat if kept is None else flat[kept],
            keep=keep,
            count=count,
            known=known,
        )
        return self._tell(y, product, _flat)

    def _stack(self, y: Tensor, x: Tensor, name: str) -> Tensor:
        for e in range(len(x)):  # rows that a router has set to zero were not routed here
            rows = x[e].detach()
            routed = self._rows.within(rows.any(-1))
            product = Product(
                key=(name, e),
                width=x.shape[-1],
                height=y.shape[-1],
                source=rows,
                rows=lambda rows=rows, routed=routed: rows[routed],
                keep=routed,
                count=int(routed.sum()),
                known=True,
            )
            y = self._tell(y, product, itemgetter(e))
        return y

    def _convolution(self, y: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        given = dict(zip(names, args, strict=False)) | dict(kwargs)
        x, w = given["input"], given["weight"]
        held = self._held.get(_storage(w)) if isinstance(w, Tensor) else None
        if held is None or held[1].shape != w.shape or x.numel() == 0:
            return y
        inputs, groups = x.detach(), given.get("groups", 1)
        product = Product(
            key=(held[0], None),
            width=w[0].numel(),
            height=len(w),
            source=x,
            rows=lambda: _patches(inputs, w, given, groups),
            keep=None,
            count=y[:, 0].numel(),
            known=True,
        )
        return self._tell(y, product, _places)

    def _tell(self, y: Tensor, product: Product, arrange: Callable[[Tensor], Tensor]) -> Tensor:
        wanted = self._seen(product)
        if wanted is None or not torch.is_grad_enabled():
            return y
        if not y.requires_grad:
            y = y + torch.zeros((), dtype=y.dtype, device=y.device, requires_grad=True)

        def hook(g: Tensor) -> None:
            wanted(arrange(g.detach()))

        y.register_hook(hook)
        return y

    def _keep(self, name: str, expert: int | None, x: Tensor) -> tuple[Tensor | None, bool]:
        """Padding among x; an expert's second layer has the rows that its first one had."""
        keep, known = self._rows.of(x)
        if expert is None:
            return keep, known
        module = name.rpartition(".")[0]
        if not self._rows.remembered(x) and module in self._routed:
            before, rows, told = self._routed[module]
            if before == expert and (rows is None or len(rows) == len(x)):
                return rows, told
        self._routed[module] = (expert, keep, known)
        return keep, known

    def _find(self, w: Tensor) -> tuple[str, int | None] | None:
        """The parameter that w or its transpose is, or lies in as one matrix of a stack."""
        held = self._held.get(_storage(w))
        if held is None or w.ndim not in (2, 3):
            return None
        name, p = held
        offset, size = w.storage_offset() - p.storage_offset(), p[0].numel()
        if w.ndim == p.ndim:
            return (name, None) if offset == 0 and w.numel() == p.numel() else None
        whole = p.ndim == 3 and w.numel() == size and offset % size == 0
        return (name, offset // size) if whole else None


def observed(module: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """Returns the parameters of those names, each once, frozen; tied ones under the first.

    Only activations carry gradients: those of parameters are never needed.
    """
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    everything = dict(module.named_parameters(remove_duplicate=False))
    return {name: everything[name] for name in names if name in everything}


def _storage(tensor: Tensor) -> int:
    """What tells one memory from another, on the meta device too."""
    return tensor.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]


def _named(args: tuple[Any, ...], kwargs: Mapping[str, Any] | None, *names: str) -> list[Any]:
    """The first arguments, wherever they were given."""
    given = kwargs or {}
    return [args[i] if i < len(args) else given.get(name) for i, name in enumerate(names)]


def _patches(x: Tensor, w: Tensor, given: Mapping[str, Any], groups: int) -> Tensor:
    """What a convolution multiplies its matrix with: one row for each place and group."""
    kernel = (w.shape[2], w.shape[3])
    padding, dilation = given.get("padding", 0), given.get("dilation", 1)
    if isinstance(padding, str):
        steps = (dilation, dilation) if isinstance(dilation, int) else dilation
        total = [
            d * (k - 1) if padding == "same" else 0 for d, k in zip(steps, kernel, strict=True)
        ]
        (top, left) = (side // 2 for side in total)
        x = F.pad(x, (left, total[1] - left, top, total[0] - top))
        padding = 0
    columns = F.unfold(x, kernel, dilation, padding, given.get("stride", 1))  # B×(C·kh·kw)×places
    count, places = len(x), columns.shape[-1]
    rows = columns.reshape(count, groups, -1, places).permute(0, 3, 1, 2)
    return rows.reshape(count * places * groups, -1)


def _flat(g: Tensor) -> Tensor:
    return g.reshape(-1, g.shape[-1])


def _places(g: Tensor) -> Tensor:
    """A convolution's output as one row for each place, with all its channels."""
    return g.permute(0, 2, 3, 1).reshape(-1, g.shape[1])
