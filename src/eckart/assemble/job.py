"""What an output is made from, beside the numbers: the request, and when it began."""

import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from eckart.certificate import Options
from eckart.checkpoint.source import Source
from eckart.checkpoint.statistics import Statistics
from eckart.checkpoint.tensor_file import SHARD_BYTES


@dataclass(frozen=True, slots=True)
class Job:
    """One run: the source, the staged folder it fills, and the options as the user gave them."""

    source: Source
    staged: Path
    seed: int
    options: Options
    shard_bytes: int = SHARD_BYTES
    threads: int | None = None  # per matrix; None: by shape
    workers: int = 1
    statistics: Statistics | None = None  # whose metric the matrices are approximated in
    began: float = field(default_factory=time.monotonic)
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
