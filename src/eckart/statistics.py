"""The use cases of statistics, a few lines each: what a text says of a model's matrices."""

import hashlib
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from eckart.calibration import (
    Custom,
    Plan,
    Pretrained,
    Request,
    calibrate_into,
    plan_calibration,
)
from eckart.calibration.prediction import examples
from eckart.checkpoint.hashing import bytes_of
from eckart.checkpoint.memory import state_of
from eckart.checkpoint.paths import printable
from eckart.checkpoint.statistics import Curvature, Origin, Statistics
from eckart.checkpoint.statistics import Text as TextRecord
from eckart.checkpoint.writer import check_output
from eckart.errors import InputError, UsageError
from eckart.execute import Progress, Silent
from eckart.families import matrices
from eckart.matrix import Matrix
from eckart.planning import check_device, open_dense
from eckart.renaming import Place, places_of
from eckart.texts import Text, open_text

PathLike = str | Path

ACTIVATIONS = 2**32
"""Bytes that a batch's activations may take, about: what sums take comes on top."""

MOST_TOKENS = 4096
"""Of a batch: more would make no product faster."""

PLACES = 256
"""Of an example that is no sequence of tokens: an image's patches, about."""


def calibrate(
    model: PathLike,
    out: PathLike,
    *,
    text: PathLike | None = None,
    tokens: PathLike | None = None,
    batch: PathLike | None = None,
    curvature: Curvature = "full",
    memory: int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    seed: int = 0,
    device: str = "cpu",
    allow_pickle: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Statistics:
    """Runs a text through a model, and writes C = E[x xᵀ] and G of every matrix to `out`.

    One of `text`, `tokens` and `batch` names the text. The loss is the cross-entropy at the true
    labels, or, for a `batch` without labels, at ones drawn from the model's own output (`seed`).
    `memory` bounds the sums: matrices that do not fit together are summed in passes of their own.
    `out` appears whole or not at all, and a run that was stopped goes on when it is called again.

    Cost: a forward and a backward pass over the text, and n² + m² multiply-adds for each token
    and m×n matrix (about 9/16 of that, as products are symmetric). Memory: the model in float32,
    the activations of a few sequences, and `memory`. Needs the `hf` extra.
    """
    plan, inputs = _planned(
        Path(model),
        Path(out),
        text=text,
        tokens=tokens,
        batch=batch,
        curvature=curvature,
        memory=memory,
        include=include,
        exclude=exclude,
        seed=seed,
        device=device,
        allow_pickle=allow_pickle,
        force=force,
    )
    return calibrate_into(Path(out), plan, inputs=inputs, force=force, watch=progress or Silent())


def calibrate_module(
    module: nn.Module,
    batches: Sequence[Any],
    out: PathLike,
    *,
    loss: Callable[[nn.Module, Any], Tensor] | None,
    curvature: Curvature = "full",
    memory: int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    force: bool = False,
    progress: Progress | None = None,
) -> Statistics:
    """Takes the statistics of any module, on batches and with a loss of the caller's.

    `loss(module, batch)` runs the module and returns the loss of each prediction, unreduced;
    without one (`curvature="none"`) a batch is the module's arguments: a mapping, a tuple, or one
    tensor. An `attention_mask` in a mapping hides padding. The module's parameters are frozen
    while it runs, and it is put into evaluation mode; both are as they were afterwards.
    """
    _check_curvature(curvature)
    if not batches:
        raise InputError("there are no batches: nothing can be calibrated.")
    source, found = state_of(module), Path(out)
    check_output(found, inputs=[], force=force)
    chosen, _ = matrices(source, include=include, exclude=exclude)
    request = Request(
        model=Custom(module, loss),
        origin=Origin(name=source.name, fingerprint=source.fingerprint()),
        text=TextRecord(name="batches", digest=_digest(batches)),
        batches=lambda: batches,
        matrices=chosen,
        places={name: Place(name) for name in chosen},
        reasons={},
        curvature=curvature,
        device=str(next(module.parameters()).device),
        memory=memory,
        options={
            "include": [*include],
            "exclude": [*exclude],
            "threads": torch.get_num_threads(),
        },
        first=batches[0],
        tokens=sum(map(examples, batches)),
    )
    with _at_rest(module):
        plan = plan_calibration(request)
        return calibrate_into(found, plan, inputs=[], force=force, watch=progress or Silent())


def plan(model: PathLike, out: PathLike, **options: Any) -> Plan:
    """Returns what `calibrate` would do with the same options: every sum, in passes.

    Refuses whatever it would refuse before the first pass. Cost: the model is loaded, and one
    sequence of the text run through it, for only that shows which matrices share their inputs.
    """
    return _planned(Path(model), Path(out), **options)[0]


def _planned(
    model: Path,
    out: Path,
    *,
    text: PathLike | None = None,
    tokens: PathLike | None = None,
    batch: PathLike | None = None,
    curvature: Curvature = "full",
    memory: int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    seed: int = 0,
    device: str = "cpu",
    allow_pickle: bool = False,
    force: bool = False,
) -> tuple[Plan, list[Path]]:
    """The plan, and the inputs that the output must not lie in."""
    _check_curvature(curvature)
    check_device(device)
    named = [Path(path) for path in (text, tokens, batch) if path is not None]
    check_output(out, inputs=[model, *named], force=force)
    source = open_dense(model, allow_pickle=allow_pickle)
    chosen, _ = matrices(source, include=include, exclude=exclude)
    if not chosen:
        raise InputError(f"{printable(model)} has no matrix: there is nothing to calibrate.")
    ready = open_text(model, text=_path(text), tokens=_path(tokens), batch=_path(batch))
    if ready is None:
        raise UsageError("a text is needed: --text FILE, --tokens FILE or --batch FILE.")
    fingerprint = source.fingerprint()
    loaded = _loaded(model, device, allow_pickle)
    source.check_unchanged()
    places, reasons = places_of(loaded, source, chosen)
    runner = Pretrained(loaded, seed, draws=curvature != "none")
    runner.check(ready.inputs)
    together = _sequences(chosen, places, loaded, ready)
    request = Request(
        model=runner,
        origin=Origin(name=source.name, fingerprint=fingerprint),
        text=TextRecord(name=named[0].name, digest=ready.digest),
        batches=lambda: (_moved(one, device) for one in ready.batches(together)),
        matrices=chosen,
        places=places,
        reasons=reasons,
        curvature=curvature,
        device=device,
        memory=memory,
        options={
            "include": [*include],
            "exclude": [*exclude],
            "seed": seed,
            "device": device,
            "sequences": together,
            "threads": torch.get_num_threads(),
        },
        first=_moved(next(ready.batches(1)), device),
        tokens=runner.tokens(ready.inputs),
    )
    return plan_calibration(request), [model, *named]


def _loaded(folder: Path, device: str, allow_pickle: bool) -> Any:
    """The model, as it is to be run: every product with an expert one of its own, no cache."""
    from eckart.hf import load_dense  # transformers, when it is needed

    found = load_dense(folder, allow_pickle=allow_pickle).to(device)
    found.set_experts_implementation("eager")
    found.config.use_cache = False
    return found


def _sequences(
    chosen: Mapping[str, Matrix], places: Mapping[str, Place], model: Any, text: Text
) -> int:
    """How many sequences are run together: by shapes alone, so that it is the same everywhere.

    Heuristic: what is kept for the backward pass is half as much again as all layers' inputs and
    outputs; logits are held about four times.
    """
    sides = {place.parameter: sum(chosen[name].shape) for name, place in places.items()}
    head = model.get_output_embeddings()
    vocabulary = head.weight.shape[0] if head is not None else 0
    each = 4 * (1.5 * sum(sides.values()) + 4 * vocabulary)
    length = text.inputs["input_ids"].shape[1] if "input_ids" in text.inputs else PLACES
    most = min(MOST_TOKENS, int(ACTIVATIONS / max(each, 1.0)))
    return max(1, most // length)


@contextmanager
def _at_rest(module: nn.Module) -> Generator[None]:
    """Evaluation mode and frozen parameters, for a while."""
    modes = {one: one.training for one in module.modules()}
    trained = {one: one.requires_grad for one in module.parameters()}
    module.eval()
    try:
        yield
    finally:
        for one, mode in modes.items():
            one.training = mode
        for parameter, asked in trained.items():
            parameter.requires_grad_(asked)


def _check_curvature(curvature: str) -> None:
    if curvature not in get_args(Curvature):
        raise UsageError(f"--curvature {curvature} is none of full, diagonal and none.")


def _path(path: PathLike | None) -> Path | None:
    return None if path is None else Path(path)


def _moved(batch: Mapping[str, Tensor], device: str) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _digest(batches: Iterable[Any]) -> str:
    """SHA-256 over every tensor of the batches, in order."""
    found = hashlib.sha256()
    for batch in batches:
        items = batch.items() if isinstance(batch, Mapping) else [("", batch)]
        for name, value in items:
            for tensor in value if isinstance(value, list | tuple) else [value]:
                found.update(f"{name} {tensor.dtype} {[*tensor.shape]}\n".encode())
                found.update(bytes_of(tensor.detach().cpu().contiguous()))
    return found.hexdigest()
