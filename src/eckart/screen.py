"""Documents as tables for a terminal. Every name from a file is escaped before it is shown."""

from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from eckart.api import Plan
from eckart.calibration import Plan as CalibrationPlan
from eckart.certificate import (
    Certificate,
    Inspection,
    InspectionReport,
    Loss,
    MatrixRecord,
    ShareRow,
)
from eckart.checkpoint.paths import printable
from eckart.checkpoint.statistics import Statistics
from eckart.consumers import CONSUMERS
from eckart.forecast import AdapterPlan, PlannedMatrix
from eckart.verification import Check, Fit

WIDE = 130
"""Columns a terminal must have for every figure of `inspect`; a narrower one shows fewer."""

MIDDLE = 100
"""… and for every figure of a certificate."""

SHOWN = 12
"""Tensors stored whole, or lost, that are named one by one."""

LEFT = ("shape", "dtype", "form", "verdict", "why", "shares C with", "G")


def inspection_table(report: InspectionReport, width: int) -> Group:
    """Returns the table of `inspect`, and a line on what was not looked at."""
    columns: dict[str, Callable[[Inspection], str]] = {
        "shape": lambda row: _shape(row.shape),
        "dtype": lambda row: row.dtype,
        "rank": lambda row: _or_more(row.numerical_rank, row),
        "signal": lambda row: "–" if row.signal_rank is None else str(row.signal_rank),
        "effective": lambda row: "–" if row.effective_rank is None else f"{row.effective_rank:.1f}",
        "90 %": lambda row: _or_more(row.rank_90, row),
        "99 %": lambda row: _or_more(row.rank_99, row),
        "pays to": lambda row: str(row.break_even),
        "verdict": lambda row: row.verdict,
    }
    if width < WIDE:
        columns = {name: columns[name] for name in ("shape", "rank", "verdict")}
    names = [row.name for row in report.matrices]
    table = _table(names, columns)
    for row, short in zip(report.matrices, _short(names), strict=True):
        table.add_row(short, *(cell(row) for cell in columns.values()))
    others = f"{len(report.copied)} other tensors are not matrices to factor"
    closing = [] if report.base else [Text(report.summary.text, "bold")]
    return Group(table, Text(others, "dim"), *closing)


def plan_table(plan: Plan) -> Group:
    """Returns what `compress --dry-run` shows."""
    others = f"{len(plan.copied)} other tensors are copied as they are"
    return Group(_planned(plan.matrices), Text(others, "dim"))


def adapter_plan_table(plan: AdapterPlan) -> Group:
    """Returns what the commands of adapters show of `--dry-run`."""
    lines: list[RenderableType] = [_planned(plan.matrices)] if plan.matrices else []
    rows = [("whole", name, "") for name in plan.whole]
    rows += [("lost, if it differs", name, why) for name, why in plan.lost.items()]
    if rows:
        grid = Table.grid(padding=(0, 2))
        for title, name, why in rows[:SHOWN]:
            grid.add_row(Text(title, "dim"), Text(printable(name)), Text(printable(why), "dim"))
        if len(rows) > SHOWN:
            grid.add_row(Text(f"… {len(rows) - SHOWN} more: see --json", "dim"))
        lines.append(grid)
    sizes = [
        ("to read", plan.read_bytes, ""),
        ("to write", plan.output_bytes, f"at most, of {plan.free_bytes:,} that are free"),
        ("meanwhile", plan.work_bytes, "of decompositions, at most"),
        ("memory", plan.peak_bytes, f"at most, with {plan.workers} at a time"),
    ]
    lines += [Text(f"{what:10} {size:>16,} bytes {why}") for what, size, why in sizes if size]
    return Group(*lines)


def _planned(matrices: Sequence[PlannedMatrix]) -> Table:
    names = [row.name for row in matrices]
    table = _table(names, ("shape", "rank", "parameters", "why"))
    for row, short in zip(matrices, _short(names), strict=True):
        low, high = row.ranks
        ranks = "dense" if high == 0 else str(high) if low == high else f"{low}–{high}"
        before, after = row.parameters
        at_most = "≤ " if low != high else ""
        why = row.reason.removeprefix("dense: ")
        parameters = f"{before:,} → {at_most}{after:,}" if high else f"{before:,}"
        table.add_row(short, _shape(row.shape), ranks, parameters, why)
    return table


def certificate_table(certificate: Certificate, width: int) -> Group:
    """Returns the rows of a certificate, the matrices left dense and why, and its totals."""
    left = [row for row in certificate.copied if row.reason.startswith("dense: ")]
    names = [row.name for row in [*certificate.matrices, *left]]
    shorts = iter(_short(names))
    columns = ["shape", "rank", "form", "parameters", "error", "optimum", "|Wx−BAx|"]
    measure = "error"
    if certificate.statistics is not None:  # the optimum is one in the metric, too
        measure = "in the metric"
        columns.insert(5, measure)
    shown = columns if width >= MIDDLE else [*columns[:4], measure]
    table = _table(names, shown)
    for row, short in zip(certificate.matrices, shorts, strict=False):
        cells = _record(row)
        table.add_row(short, *(cells[column] for column in shown))
    lines = [table]
    if left:
        dense = Table.grid(padding=(0, 2))
        for row in left:
            name = printable(row.name).removesuffix(".weight")
            dense.add_row(Text(name), Text(printable(row.reason), "dim"))
        lines.append(dense)
    return Group(*lines, _totals(certificate))


def adapter_table(certificate: Certificate, width: int) -> Group:
    """Returns the rows of an adapter's certificate, what is whole or lost and why, and totals."""
    names = [row.name for row in certificate.matrices]
    columns = ["shape", "rank", "of the change", "parameters", "error", "optimum"]
    if certificate.statistics is not None:
        columns.insert(5, "in the metric")
    if width < MIDDLE:
        columns = [column for column in columns if column not in ("parameters", "optimum")]
    table = _table(names, columns)
    for row, short in zip(certificate.matrices, _short(names), strict=True):
        cells = _record(row)
        table.add_row(short, *(cells[column] for column in columns))
    lines = [table]
    lines += [*_apart("whole", certificate.stored_whole), *_apart("lost", certificate.lost)]
    return Group(*lines, _change(certificate))


def _apart(title: str, rows: Sequence[ShareRow]) -> list[Table]:
    """The changed tensors that are no product, the largest shares first, and how many more."""
    if not rows:
        return []
    grid, style = Table.grid(padding=(0, 2)), "bold red" if title == "lost" else "dim"
    ordered = sorted(rows, key=lambda row: -row.energy_share)
    for row in ordered[:SHOWN]:
        cells = (_share(row.energy_share), printable(row.name), printable(row.reason))
        grid.add_row(Text(title, style), *map(Text, cells))
    if rest := ordered[SHOWN:]:
        share = _share(sum(row.energy_share for row in rest))
        grid.add_row(Text(title, style), Text(share), Text(f"… {len(rest)} more: see --json"))
    return [grid]


def _share(share: float | None) -> str:
    return "–" if share is None else f"{share:.2%}"


def _change(certificate: Certificate) -> Text:
    totals, change = certificate.totals, certificate.change
    lines = [
        f"{len(certificate.unchanged)} tensors did not change",
        _pair("changed matrices", totals.targeted_parameters, "parameters"),
        _pair("tensors on disk", totals.tensor_bytes, "bytes"),
    ]
    if change:
        lines.append(
            f"{1 - change.relative_error**2:.2%} of the change is carried: error "
            f"{change.relative_error:.3g} of ‖tuned − base‖, {change.lost:.2%} lost"
        )
    return Text("\n".join([*lines, *_loss(certificate.loss)]))


def applied_table(certificate: Certificate) -> Group:
    """Returns the sums of a certificate, and what became of the other tensors."""
    names = [row.name for row in certificate.matrices]
    table = _table(names, ("shape", "rank", "rounded away"))
    for row, short in zip(certificate.matrices, _short(names), strict=True):
        table.add_row(short, _shape(row.shape), str(row.rank), f"{row.relative_error:.3g}")
    others = f"{len(certificate.copied)} tensors copied, {len(certificate.refitted)} replaced"
    return Group(
        table,
        Text(others, "dim"),
        Text(_pair("tensors on disk", certificate.totals.tensor_bytes, "bytes")),
    )


def merged_table(certificate: Certificate) -> Group:
    """Returns the rows of a resized or merged adapter, and its totals."""
    names = [row.name for row in certificate.matrices]
    columns = ("shape", "rank", "parameters", "error", "optimum")
    table = _table(names, columns)
    for row, short in zip(certificate.matrices, _short(names), strict=True):
        cells = _record(row)
        table.add_row(short, *(cells[column] for column in columns))
    totals = certificate.totals
    return Group(
        table,
        Text(_pair("parameters", totals.targeted_parameters, "in all modules")),
        Text(_pair("tensors on disk", totals.tensor_bytes, "bytes")),
    )


def statistics_table(found: Statistics) -> Group:
    """Returns what there is of each matrix, and what it was taken from."""
    document, names = found.document, found.names
    table = _table(names, ("shape", "inputs", "shares C with", "G"))
    for name, short in zip(names, _short(names), strict=True):
        entry = document.matrices[name]
        rows = {document.groups[group].rows for group in entry.groups}
        shared = "" if entry.groups[0] in (name, f"{name}[0]") else entry.groups[0]
        inputs = str(min(rows)) if len(rows) == 1 else f"{min(rows)}–{max(rows)}"
        shape = _shape(entry.shape) + (f" ×{entry.count}" if entry.count > 1 else "")
        cells = shape, inputs, printable(shared).removesuffix(".weight"), entry.curvature
        table.add_row(short, *cells)
    loss = "" if document.loss is None else f", the model's own loss {document.loss:.4f} nats each"
    lines = [f"{document.tokens:,} tokens{loss}", f"{sum(document.files.values()):,} bytes"]
    left = [f"left out: {printable(row.name)}: {row.reason}" for row in document.left_out]
    return Group(table, *map(Text, [*left[:SHOWN], *lines]))


def passes_table(plan: CalibrationPlan) -> Group:
    """Returns what `calibrate --dry-run` shows."""
    said = plan.summary()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("pass", "C", "G", "bytes of sums"):
        table.add_column(column, justify="right")
    for number, one in enumerate(said["passes"], 1):
        table.add_row(str(number), str(one["C"]), str(one["G"]), f"{one['bytes']:,}")
    left = [f"left out: {printable(k)}: {why}" for k, why in said["left_out"].items()]
    lines = [
        f"{len(said['matrices'])} matrices, {said['tokens']:,} tokens a pass",
        f"{said['output_bytes']:,} bytes to write",
    ]
    return Group(table, *map(Text, [*left[:SHOWN], *lines]))


def check_table(checks: list[Check]) -> Table:
    """Returns one line per check."""
    table = Table.grid(padding=(0, 2))
    for check in checks:
        mark = Text("✓", "green") if check.held else Text("✗", "bold red")
        name = printable(check.name).removesuffix(".weight")
        table.add_row(mark, Text(name), Text(printable(check.detail)))
    return table


def fit_table(fits: list[Fit]) -> Table:
    """Returns one line per consumer: whether it loads the adapter as it stands, and what to set."""
    table = Table.grid(padding=(0, 2))
    for fit in fits:
        title = CONSUMERS[fit.consumer].title
        words = Text("loads in" if fit.loads else "does not load in", "" if fit.loads else "dim")
        table.add_row(words, Text(title), Text(printable(fit.detail)))
    return table


def _record(row: MatrixRecord) -> dict[str, str]:
    """What is shown of a matrix, by the head of its column."""
    before, after = row.parameters
    return {
        "shape": _shape(row.shape),
        "rank": str(row.rank),
        "of the change": _share(row.energy_share),
        "form": row.form,
        "parameters": f"{before:,} → {after:,}",
        "error": f"{row.relative_error:.3g}",
        "in the metric": "–" if row.metric_error is None else f"{row.metric_error:.3g}",
        "optimum": "–" if row.optimum is None else f"{row.optimum:.3g}",
        "|Wx−BAx|": "–" if row.output_error is None else f"{row.output_error.max:.2g}",
    }


def _totals(certificate: Certificate) -> Text:
    totals = certificate.totals
    lines = [
        _pair("targeted matrices", totals.targeted_parameters, "parameters"),
        _pair("whole model", totals.model_parameters, "parameters"),
        _pair("tensors on disk", totals.tensor_bytes, "bytes"),
    ]
    return Text("\n".join([*lines, *_loss(certificate.loss)]))


def _loss(loss: Loss) -> list[str]:
    """What the model loses, predicted and measured, and how the budget was best spent."""
    lines: list[str] = []
    if loss.predicted is not None:
        lines.append(f"predicted loss     {loss.predicted:+.4f} nats per token, to second order")
    if loss.measured is not None:
        lines.append(
            f"measured loss      {loss.measured:+.4f} nats per token, on {loss.tokens:,} held out"
        )
    if loss.allocation is not None:
        others = (
            f"{name} {value:.4f}"
            for name, value in sorted(loss.candidates.items(), key=lambda one: one[1])
        )
        lines.append(f"best allocation    {loss.allocation}: KL to the model {', '.join(others)}")
    if (drift := loss.drift) is not None:
        taken = "factors are fitted to it" if drift.written else "factors of the matrices are kept"
        lines.append(
            f"drift of inputs    {taken}: KL to the model {drift.divergence:.4f} fitted, "
            f"{drift.unfitted:.4f} not, on {drift.tokens:,} tokens"
        )
    return lines


def _pair(what: str, pair: tuple[int, int], unit: str) -> str:
    before, after = pair
    share = f" ({100 * after / before:.1f} %)" if before else ""
    return f"{what:18} {before:>14,} → {after:>14,} {unit}{share}"


def _table(names: Sequence[str], columns: Iterable[str]) -> Table:
    """A table whose first column is the matrices' names, their common beginning in its head.

    Where a terminal is too narrow, names go on in the next line: no figure loses its digits.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    prefix = _prefix(names)
    head = f"matrix ({printable(prefix)}…)" if prefix else "matrix"
    table.add_column(Text(head), overflow="fold")
    for column in columns:
        justify = "left" if column in LEFT else "right"
        table.add_column(column, justify=justify, no_wrap=column not in ("verdict", "why"))
    return table


def _prefix(names: Sequence[str]) -> str:
    """The whole parts that all names begin with: "model.layers."."""
    columns = zip(*(name.split(".")[:-1] for name in names), strict=False)
    shared = takewhile(lambda parts: len(set(parts)) == 1, columns)
    return "".join(f"{parts[0]}." for parts in shared) if len(names) > 1 else ""


def _short(names: Sequence[str]) -> list[Text]:
    prefix = _prefix(names)
    return [Text(printable(name.removeprefix(prefix).removesuffix(".weight"))) for name in names]


def _shape(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def _or_more(rank: int | None, row: Inspection) -> str:
    """A rank, or that it is beyond the values computed."""
    return f"> {len(row.values)}" if rank is None else str(rank)
