"""A model that is run twice over a text, with its own matrices and with others, group by group.

Knows how to go no further than is needed, and not to begin at the beginning where a block's
outputs are known. Must not know what is made of the inputs.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal

import torch
from torch import Tensor, nn

from eckart.calibration.observation import Observer, Product, Rows
from eckart.drift.order import Group, Stretch
from eckart.linalg.threads import computing_on
from eckart.texts import Text
from eckart.trial import Trial, batches_of

Variant = Literal["dense", "changed"]


class _Reached(Exception):  # noqa: N818 no error: what was to be seen has been
    """Thrown through a forward pass that need not go on."""


class Relay:
    """A trial's model on a text of its own, one of its variants at a time.

    Memory: beside the model, the outputs of one block on the whole text, of either variant.
    """

    def __init__(self, trial: Trial, text: Text, device: str) -> None:
        self.trial = trial
        self.batches = batches_of(text, device)
        self._modules: list[nn.Module] = []  # behind us: their outputs are known
        self._outputs: dict[Variant, list[Any]] = {}

    @property
    def first(self) -> dict[str, Tensor]:
        """One sequence, for a look at the model."""
        return {name: tensor[:1] for name, tensor in self.batches[0].items()}

    @property
    def tokens(self) -> int:
        """How many are fitted to."""
        return sum(map(self.trial.predictor.tokens, self.batches))

    def put(self, tensors: Iterator[tuple[str, Tensor]]) -> None:
        """Gives the model other matrices."""
        for name, tensor in tensors:
            self.trial.own[name].copy_(tensor)

    def inputs(self, group: Group, variant: Variant) -> Iterator[Tensor]:
        """Yields the rows of a group's input, a batch at a time, of the matrices that it holds."""
        parameter = self.trial.model.get_parameter(group.key[0])
        for number in range(len(self.batches)):
            rows = list[Tensor]()

            def seen(product: Product, rows: list[Tensor] = rows) -> None:
                if product.key == group.key:
                    rows.append(product.rows())
                if len(rows) == group.calls:
                    raise _Reached

            masked = Rows(self.trial.predictor.mask(self.batches[number]))
            with Observer({group.key[0]: parameter}, seen, masked):
                self._run(number, variant, masked)
            yield torch.cat(rows)

    def pass_block(self, block: str, variant: Variant) -> list[Any]:
        """Returns a block's outputs on the whole text, as `behind` takes them."""
        found = list[Any]()

        def keep(_: nn.Module, __: Any, output: Any) -> None:
            found.append(_copied(output))
            raise _Reached

        hook = self.trial.model.get_submodule(block).register_forward_hook(keep)
        try:
            for number in range(len(self.batches)):
                self._run(number, variant)
        finally:
            hook.remove()
        return found

    def behind(self, block: str, outputs: dict[Variant, list[Any]]) -> None:
        """From now on nothing up to the end of a block is computed any more."""
        self._modules.append(self.trial.model.get_submodule(block))
        self._outputs = outputs

    def replays(self, course: Sequence[Stretch]) -> bool:
        """Returns whether the model is a chain of these blocks, by trying each on one sequence.

        It is one where, with a block and those before it replaced by its output, logits are the
        same bit for bit. Cost: a forward pass over a sequence for each block, and another.
        """
        blocks = [stretch.block for stretch in course]
        blocks = blocks[:-1] if blocks and not blocks[-1] else blocks
        if "" in blocks or len({*blocks}) < len(blocks):
            return False
        modules = [self.trial.model.get_submodule(block) for block in blocks]
        logits, outputs = self._recorded(modules)
        if any(len(found) != 1 for found in outputs):
            return False
        for place, found in enumerate(outputs):
            with _replaced(modules[: place + 1], found[0]):
                if not torch.equal(self._logits(), logits):
                    return False
        return True

    def _recorded(self, modules: Sequence[nn.Module]) -> tuple[Tensor, list[list[Any]]]:
        outputs: list[list[Any]] = [[] for _ in modules]

        def keeper(found: list[Any]) -> Callable[[nn.Module, Any, Any], None]:
            return lambda _, __, output: found.append(_copied(output))

        hooks = [
            module.register_forward_hook(keeper(found))
            for module, found in zip(modules, outputs, strict=True)
        ]
        try:
            return self._logits(), outputs
        finally:
            for hook in hooks:
                hook.remove()

    def _logits(self) -> Tensor:
        with computing_on(self.trial.threads), torch.no_grad():
            return self.trial.predictor.run(self.first, Rows()).logits

    def _run(self, number: int, variant: Variant, rows: Rows | None = None) -> None:
        known = self._outputs[variant][number] if self._modules else None
        with (
            computing_on(self.trial.threads),
            torch.no_grad(),
            _replaced(self._modules, known),
            suppress(_Reached),
        ):
            self.trial.predictor.run(self.batches[number], rows or Rows())


@contextmanager
def _replaced(modules: Sequence[nn.Module], output: Any) -> Generator[None]:
    """While entered, the modules compute nothing, and return an output that is known."""
    before = [vars(module).get("forward") for module in modules]
    for module in modules:
        module.forward = lambda *_, **__: _copied(output)
    try:
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            del module.forward
            if forward is not None:
                module.forward = forward


def _copied(output: Any) -> Any:
    """An output that nobody else changes in place: a tensor, or some in a tuple or a mapping."""
    if isinstance(output, Tensor):
        return output.detach().clone()
    if isinstance(output, tuple | list):
        return type(output)(_copied(one) for one in output)
    return {k: _copied(v) for k, v in output.items()} if isinstance(output, Mapping) else output
