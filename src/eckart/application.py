"""The stages of folding an adapter into its base.

Knows the order of things; what is computed of each tensor is in `assemble.application`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from eckart.assemble.adapter_certification import certify_applied
from eckart.assemble.application import Applier, Order, Replace, orders_of
from eckart.assemble.job import Job
from eckart.assemble.sidecars import write_sidecars
from eckart.certificate import Certificate, read_certificate
from eckart.checkpoint.documents import read_json
from eckart.checkpoint.paths import printable
from eckart.checkpoint.source import Source
from eckart.checkpoint.tensor_file import (
    SHARD_BYTES,
    TensorLayout,
    lay_out_checkpoint,
    lay_out_shards,
)
from eckart.checkpoint.writer import CERTIFICATE
from eckart.errors import CheckpointError, InputError
from eckart.execute import Task, Workers
from eckart.formats.adapters import Adapter, open_adapter
from eckart.planning import intact, open_dense


@dataclass(frozen=True, slots=True)
class Application:
    """A base, an adapter, and an order and a place for every tensor of their sum."""

    base: Source
    adapter: Adapter
    orders: Mapping[str, Order]
    layout: Mapping[str, TensorLayout]

    @property
    def output_bytes(self) -> int:
        """Of the output's tensors."""
        return sum(place.nbytes for place in self.layout.values())

    @property
    def shards(self) -> dict[str, list[str]]:
        """The files of the base with the tensors in each; none of a base that is no folder of
        safetensors files."""
        found = dict[str, list[str]]()
        for name in self.layout:
            found.setdefault(self.base.tensors[name].file, []).append(name)
        named = self.base.folder is not None and all(f.endswith(".safetensors") for f in found)
        return {file: found[file] for file in sorted(found)} if named else {}


def application_of(
    adapter: str | Path,
    base: str | Path,
    *,
    subtract: bool = False,
    allow_pickle: bool = False,
) -> Application:
    """Returns what is to be done; CheckpointError where headers show that the adapter is for
    another model."""
    origin = open_dense(Path(base), allow_pickle=allow_pickle)
    parts = open_adapter(intact(Path(adapter)))
    orders, layout = orders_of(origin, parts, subtract=subtract)
    vocabulary_of(orders, layout, origin)
    return Application(origin, parts, orders, layout)


def write_applied(
    asked: Application, job: Job, workers: Workers, shard_bytes: int | None = None
) -> Certificate:
    """Lays the checkpoint out, fills it file by file, and certifies it.

    In the files of the base, unless `shard_bytes` cuts anew. A file is written and hashed from its
    first byte to its last, by one worker (see `FileStream`).
    """
    adapter, orders, layout = asked.adapter, asked.orders, asked.layout
    shards = asked.shards
    if shard_bytes is None and shards:
        files = lay_out_shards(job.staged, layout, shards)
    else:
        files = lay_out_checkpoint(job.staged, layout, shard_bytes or SHARD_BYTES)
    sign = -1 if job.options["subtract"] else 1
    unit = Applier(job.source, adapter.source, files, sign, job.threads)
    tasks = list[Task]()
    for file in files.files:
        held = tuple(orders[name] for name in files.held(file))
        tasks.append(Task(file, (file, held), sum(order.seconds for order in held)))
    written = dict(workers.map(unit, tasks, "writing"))
    filled = [one for file in written.values() for one in file.tensors]
    hashed = {file: one.digest for file, one in written.items()}
    write_sidecars(job, vocabulary_of(orders, layout, job.source))
    for source in (job.source, adapter.source):
        source.check_unchanged()
    return certify_applied(job, adapter, orders, filled, hashed)


def vocabulary_of(
    orders: Mapping[str, Order], layout: Mapping[str, TensorLayout], base: Source
) -> dict[str, object]:
    """Returns what config.json is to say of the vocabulary, where the adapter's tables have more
    rows than the base's; CheckpointError where it does not say how many there were."""
    grown = [
        name
        for name, order in orders.items()
        if isinstance(order, Replace) and layout[name].shape != base.tensors[name].shape
    ]
    if not grown or base.folder is None or not (path := base.folder / "config.json").exists():
        return {}
    before, after = base.tensors[grown[0]].shape[0], layout[grown[0]].shape[0]
    config = read_json(path)
    if config.get("vocab_size") == before:
        return {"vocab_size": after}
    text = config.get("text_config")
    if isinstance(text, dict) and text.get("vocab_size") == before:
        return {"text_config": {**text, "vocab_size": after}}
    raise CheckpointError(
        f"{printable(path)} does not say vocab_size {before}, the rows of {printable(grown[0])}, "
        f"which the adapter replaces by {after}: correct it first."
    )


def check_base(adapter: Path, fingerprint: str, base: Source) -> None:
    """Raises InputError where the adapter's certificate names another base."""
    if not (adapter / CERTIFICATE).exists():
        return
    known = read_certificate(adapter).base
    if known is not None and known.fingerprint != fingerprint:
        raise InputError(
            f"{printable(adapter)} was extracted from another base ({printable(known.name)}) than "
            f"{printable(base.path)}: their weights differ. Give that one, or add --other-base."
        )
