"""What is claimed of an output: `eckart.json`, as typed and frozen documents.

Knows the schema and its canonical spelling; must not know how the numbers were found.
"""

import hashlib
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from eckart.checkpoint.documents import canonical_json, parse_json
from eckart.checkpoint.paths import printable, read_bytes
from eckart.checkpoint.writer import CERTIFICATE
from eckart.errors import CheckpointError
from eckart.matrix import FactorForm, Orientation

SCHEMA = "eckart/1"
CERTIFICATE_BYTES = 2**28

Form = Literal["ba", "pivoted", "dense"]
MetricName = Literal["frobenius", "inputs", "curvature", "diagonal curvature"]
Kind = Literal["factored", "dense", "adapter", "applied", "merged", "converted"]
Options = dict[str, str | int | float | bool | list[str] | None]
Pair = tuple[int, int]  # before, after
Sides = Annotated[tuple[int, ...], msgspec.Meta(min_length=2, max_length=4)]


class Document(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A frozen JSON object that accepts no unknown field."""


class FileRecord(Document, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One file of the output, other than the certificate itself."""

    bytes: int
    blake3: str


class SourceRecord(Document, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the output was made from: the folder's own name, and a digest of its weight files."""

    name: str
    fingerprint: str


class StatisticsRecord(Document, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The statistics whose metric the matrices were approximated in."""

    name: str
    digest: str
    tokens: int


class OutputError(Document, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Wx + b against the factors' on seeded Gaussian inputs, in float64."""

    max: float
    relative: float


class Delta(Document, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The evidence for the rank of tuned − base: see `eckart.signal_rank`."""

    threshold: float
    bound: int
    share: float
    below_floor: bool
    weakest: float


class MatrixRecord(Document, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One factored matrix, measured from the written file."""

    name: str
    shape: Sides  # as the tensor is stored
    dtype: str
    orientation: Orientation
    rank: int
    form: Form
    parameters: Pair
    bytes: Pair
    relative_error: float
    excess_estimate: float
    optimum: float | None  # the Eckart–Young error in the metric, if all values are known
    output_error: OutputError | None  # null where nothing is left to be used: rank 0
    metric: MetricName
    method: str
    tail: list[tuple[int, float]]  # (rank, remaining share of the energy), in the metric
    metric_error: float | None = None  # ‖Lᵀ(W − BA)R‖_F/‖LᵀWR‖_F, in another metric …
    loss: float | None = None  # … and ½‖Lᵀ(W − BA)R‖_F², where that is in nats per token
    energy_share: float | None = None  # of an adapter's: its share of ‖tuned − base‖²
    delta: Delta | None = None  # … and, of `--rank auto`, what its rank rests on


class Row(Document, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A tensor that was not factored, and why."""

    name: str
    reason: str


class TiedRow(Document, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A second name of a tensor that is stored once."""

    name: str
    to: str


class ShareRow(Row, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A changed tensor that is stored whole, or lost, with its share of the change's energy."""

    energy_share: float


class Change(Document, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a tuned model adds to its base, and how much of it an adapter carries."""

    energy: float  # ‖tuned − base‖_F², over all tensors
    factored: float  # the share that lies in factored matrices, and …
    stored_whole: float
    lost: float
    relative_error: float  # ‖(tuned − base) − carried‖_F / ‖tuned − base‖_F


class FactoredEntry(
    Document, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True
):
    """What a loader must know of a factored matrix; also in config.json."""

    rank: int
    form: FactorForm
    shape: Sides
    orientation: Orientation
    module: str | None = None  # an adapter's, where it targets a parameter: it is stored there


class Totals(Document, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Honest counting, before and after."""

    targeted_parameters: Pair  # the matrices that the policy could choose among
    model_parameters: Pair
    tensor_bytes: Pair
    keep: float  # targeted, after / before


class Drift(Document, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Factors fitted to what the compressed part of the model feeds them, on a text."""

    written: bool  # whether they are what was written: on the tokens held out the better ones
    tokens: int  # that they were fitted to
    share: float  # of the drift, that they undo
    divergence: float  # KL(dense ‖ with them), on the tokens held out …
    unfitted: float  # … and with the factors of the matrices themselves
    left_out: dict[str, str] = {}  # matrices that could not be fitted, and why


class Loss(Document, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Loss increase in nats per token; null where nothing was predicted, or measured."""

    predicted: float | None = None  # the sum of the matrices' own: the picture near the start
    measured: float | None = None  # of what was written, on so many tokens held out
    divergence: float | None = None  # KL(dense ‖ written), on those
    tokens: int | None = None
    allocation: str | None = None  # the way in which the budget is spent: the best of …
    candidates: dict[str, float] = {}  # … these, by their divergence
    drift: Drift | None = None  # null: nothing was fitted


class Run(Document, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What may differ between two equal runs."""

    seconds: float
    started: str
    workers: int
    source_files: dict[str, int]  # name → bytes


class Certificate(Document, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything that is claimed of an output folder. `digest` covers all the rest."""

    schema: Literal["eckart/1"] = SCHEMA
    kind: Kind
    digest: str = ""
    source: SourceRecord
    base: SourceRecord | None = None  # what an adapter is added to
    adapter: SourceRecord | None = None  # what was added to the source
    statistics: StatisticsRecord | None = None  # null: matrices in the Frobenius norm
    merged: list[SourceRecord] = []  # adapters that were added up, or the one that was changed
    options: Options
    versions: dict[str, str]
    files: dict[str, FileRecord]
    matrices: list[MatrixRecord]
    copied: list[Row]
    tied: list[TiedRow] = []
    refitted: list[Row] = []
    stored_whole: list[ShareRow] = []
    lost: list[ShareRow] = []
    unchanged: list[str] = []
    factored: dict[str, FactoredEntry]
    loss: Loss = Loss()
    totals: Totals
    change: Change | None = None
    remarks: list[str] = []  # what a reader of the numbers should know
    run: Run

    @property
    def seed(self) -> int:
        """The seed that the output's random inputs were drawn with."""
        return int(str(self.options["seed"]))

    def entry(self, record: MatrixRecord) -> FactoredEntry:
        """Returns how a changed tensor is stored as factors in this output."""
        return self.factored[record.name.removesuffix(".weight")]

    def document(self) -> dict[str, object]:
        """Returns the JSON document with its digest filled in."""
        document = msgspec.to_builtins(self)
        document["digest"] = _digest(document)
        return document

    def encode(self) -> bytes:
        """Returns the file's contents: the canonical spelling, so any changed byte shows."""
        return canonical_json(self.document()) + b"\n"


class Inspection(Document, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One tensor's matrices as `inspect` saw them."""

    name: str
    shape: Sides
    dtype: str
    numerical_rank: int | None  # null where only the leading values were computed
    signal_rank: int | None  # half precision and deltas only
    effective_rank: float | None
    rank_90: int | None
    rank_99: int | None
    break_even: int
    verdict: str
    energy: float
    values: list[float]
    delta: Delta | None = None


class Summary(Document, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What 99 % of the energy of every matrix costs, before and after."""

    parameters: Pair
    text: str


class InspectionReport(Document, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The envelope of `inspect --json`."""

    schema: Literal["eckart/1"] = SCHEMA
    kind: Literal["inspection"] = "inspection"
    source: SourceRecord
    base: SourceRecord | None = None
    versions: dict[str, str]
    matrices: list[Inspection]
    copied: list[Row]
    summary: Summary
    remarks: list[str] = []


def read_certificate(folder: Path) -> Certificate:
    """Returns the certificate of an output folder; CheckpointError if it is not as written."""
    path = folder / CERTIFICATE
    if not folder.is_dir():
        raise CheckpointError(
            f"{printable(folder)} is not a folder: give the output of an eckart command."
        )
    if not path.exists():
        raise CheckpointError(
            f"there is no {CERTIFICATE} in {printable(folder)}: give a folder that eckart wrote."
        )
    content = read_bytes(path, CERTIFICATE_BYTES)
    document = parse_json(content, printable(path))
    try:
        certificate = msgspec.convert(document, Certificate)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{printable(path)} is damaged: {error}.") from None
    if certificate.encode() != content or certificate.digest != _digest(document):
        raise CheckpointError(
            f"{printable(path)} was changed after it was written: its digest does not hold."
        )
    return certificate


def _digest(document: dict[str, object]) -> str:
    rest = {key: value for key, value in document.items() if key != "digest"}
    return hashlib.sha256(canonical_json(rest)).hexdigest()
