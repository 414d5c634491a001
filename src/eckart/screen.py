"""Documents as tables for a terminal. Every name from a file is escaped before it is shown."""

from rich.console import Group
from rich.table import Table
from rich.text import Text

from eckart.api import Plan
from eckart.certificate import Certificate, InspectionReport, MatrixRecord
from eckart.checkpoint.paths import printable
from eckart.verification import Check


def inspection_table(report: InspectionReport) -> Group:
    """Returns the table of `inspect`, and a line on what was not looked at."""
    table = _table(
        "matrix", "shape", "dtype", "rank", "signal", "effective", "90 %", "99 %", "pays to"
    )
    table.add_column("verdict", overflow="fold")
    for row in report.matrices:
        table.add_row(
            _name(row.name),
            _shape(row.shape),
            row.dtype,
            str(row.numerical_rank),
            "–" if row.signal_rank is None else str(row.signal_rank),
            f"{row.effective_rank:.1f}",
            str(row.rank_90),
            str(row.rank_99),
            str(row.break_even),
            row.verdict,
        )
    return Group(
        table, Text(f"{len(report.copied)} other tensors are not matrices to factor", "dim")
    )


def plan_table(plan: Plan) -> Group:
    """Returns what `compress --dry-run` shows."""
    table = _table("matrix", "shape", "rank", "parameters")
    table.add_column("why", overflow="fold")
    for row in plan.matrices:
        low, high = row.ranks
        ranks = "dense" if high == 0 else str(high) if low == high else f"{low}–{high}"
        before, after = row.parameters
        at_most = "≤ " if low != high else ""
        table.add_row(
            _name(row.name),
            _shape(row.shape),
            ranks,
            f"{before:,} → {at_most}{after:,}",
            row.reason,
        )
    return Group(table, Text(f"{len(plan.copied)} other tensors are copied as they are", "dim"))


def certificate_table(certificate: Certificate) -> Group:
    """Returns the rows of a certificate and its totals, before and after."""
    table = _table("matrix", "shape", "rank", "parameters", "error", "optimum", "|Wx−BAx|")
    for row in certificate.matrices:
        table.add_row(*_record(row))
    for row in certificate.copied:
        if row.reason.startswith("dense: "):
            why = printable(row.reason.removeprefix("dense: "))
            table.add_row(_name(row.name), "", "dense", Text(why, "dim"))
    return Group(table, _totals(certificate))


def check_table(checks: list[Check]) -> Table:
    """Returns one line per check."""
    table = _table("", "checked")
    table.add_column("found", overflow="fold")
    for check in checks:
        mark = Text("✓", "green") if check.held else Text("✗", "bold red")
        table.add_row(mark, _name(check.name), printable(check.detail))
    return table


def _record(row: MatrixRecord) -> tuple[Text | str, ...]:
    before, after = row.parameters
    return (
        _name(row.name),
        _shape(row.shape),
        str(row.rank),
        f"{before:,} → {after:,}",
        f"{row.relative_error:.3g}",
        "–" if row.optimum is None else f"{row.optimum:.3g}",
        f"{row.output_error.max:.2g}",
    )


def _totals(certificate: Certificate) -> Text:
    totals = certificate.totals
    lines = [
        _pair("targeted matrices", totals.targeted_parameters, "parameters"),
        _pair("whole model", totals.model_parameters, "parameters"),
        _pair("tensors on disk", totals.tensor_bytes, "bytes"),
    ]
    return Text("\n".join(lines))


def _pair(what: str, pair: tuple[int, int], unit: str) -> str:
    before, after = pair
    share = f" ({100 * after / before:.1f} %)" if before else ""
    return f"{what:18} {before:>14,} → {after:>14,} {unit}{share}"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        right = column not in ("matrix", "shape", "dtype", "parameters", "", "checked")
        table.add_column(
            column, justify="right" if right else "left", no_wrap=column != "parameters"
        )
    return table


def _name(name: str) -> Text:
    return Text(printable(name))


def _shape(shape: tuple[int, int]) -> str:
    return f"{shape[0]}×{shape[1]}"
