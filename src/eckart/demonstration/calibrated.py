"""The calibrated half of the story: what a text says, what it buys, and what transformers reads.

Needs transformers, which is imported when it is needed.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eckart import api, statistics
from eckart.certificate import Certificate
from eckart.demonstration.scene import Scene, arrow
from eckart.evaluation import Likeness, compare
from eckart.texts import Text, tokenize

WINDOWS = 96
"""Of the held-out text: enough to see the damage, few enough to end within the minute."""

TRIAL_BYTES = 10_240
"""Of the calibration text: 40 windows, of which four are held out."""


def calibrate(scene: Scene, base: Path) -> Path:
    """Runs a text through the model, forward and backward; returns the statistics."""
    text, out = scene.text("base-calibration"), scene.folder / "statistics"
    scene.command(f"eckart calibrate {base} -o {out}", f"--text {text}")
    found = statistics.calibrate(base, out, text=text, force=scene.force).document
    scene.say("What each matrix is given (C), and what its outputs do to the loss (G).")
    scene.row("tokens, none of them held out", f"{found.tokens:,}")
    scene.row("matrices, and inputs they share", f"{len(found.matrices)}, {len(found.groups)}")
    scene.row("loss, nats per byte", f"{found.loss:.3f}")
    return out


def compress(scene: Scene, base: Path, known: Path, keep: float) -> Path:
    """Spends the same budget where the text says it is needed, and proves what was written."""
    return _compressed(scene, base, known, keep, None)


def compress_on(scene: Scene, base: Path, known: Path, keep: float) -> Path:
    """… and where the model itself says so: ways to spend it are tried, on part of the text."""
    text = scene.text("base-trial", "base-calibration", TRIAL_BYTES)
    return _compressed(scene, base, known, keep, text)


def _compressed(scene: Scene, base: Path, known: Path, keep: float, text: Path | None) -> Path:
    out = scene.folder / f"{'tried' if text else 'fit'}-{keep}"
    tried = "" if text is None else f" --text {text}"
    scene.command(
        f"eckart compress {base} -o {out} --keep {keep} --form auto", f"--statistics {known}{tried}"
    )
    certificate = api.compress(
        base, out, keep=keep, statistics=known, text=text, form="auto", force=scene.force
    )
    count = scene.check(out, api.verify(out, base, statistics=known))
    loss = certificate.loss
    assert loss is not None
    scene.row("matrices", _forms(certificate))
    scene.row("parameters of the matrices", arrow(certificate.totals.targeted_parameters))
    scene.row("predicted loss, nats per byte", f"{loss.predicted:+.3f}")
    if loss.measured is not None:
        best = f"best of {len(loss.candidates)} allocations: {loss.allocation}"
        scene.row("… measured on a part held out", f"{loss.measured:+.3f} ({best})")
    scene.row("eckart verify --statistics", f"{count} checks hold, from the written files")
    return out


@dataclass(frozen=True, slots=True)
class Line:
    """What stands in one line of the table: two outputs with the same budget, or the one."""

    label: str
    plain: Path | None
    calibrated: Path


def reload(scene: Scene, base: Path, lines: list[Line]) -> None:
    """Loads everything with transformers' own line, and prints what is left of the model."""
    scene.heading("Is it still the same model? Reloaded by transformers, with one line")
    scene.say(f'import eckart.hf; AutoModelForCausalLM.from_pretrained("{lines[0].calibrated}")')
    scene.say(f"Perplexity per byte on {scene.text('base-heldout')}, and the nats added:")
    text = heldout_text(scene, base)
    before = measured(base, text)
    table = scene.table("model", "plain SVD", "nats", "calibrated", "nats")
    table.add_row(" dense", f"{before.perplexity:.3f}")
    for line in lines:
        plain = ("", "") if line.plain is None else _cells(measured(line.plain, text), before)
        table.add_row(f" {line.label}", *plain, *_cells(measured(line.calibrated, text), before))
    scene.console.print(table)
    scene.say(
        "Plain SVD hurts: a trained weight has no small tail to cut, and an error small\n"
        "for the matrix need not be small for the model. The certificate proves the\n"
        "matrices, and what is predicted from them holds near the start only: what the\n"
        "model lost, only the model can tell."
    )


def densify(scene: Scene, base: Path, fit: Path) -> None:
    """Multiplies one of them out again, for loaders that know no factors."""
    out = fit.with_name(f"{fit.name}-dense")
    scene.heading(f"eckart densify {fit} -o {out}")
    api.densify(fit, out, force=scene.force)
    after = measured(out, heldout_text(scene, base))
    scene.row("its perplexity, by any loader", f"{after.perplexity:.3f}")


def heldout_text(scene: Scene, model: Path) -> Text:
    """Returns the start of an embedded model's held-out text, by the model's own tokenizer."""
    ids = tokenize(scene.text(f"{model.name}-heldout"), model)
    return Text({"input_ids": ids[:WINDOWS]})


def measured(folder: Path, text: Text) -> Likeness:
    """Returns how a checkpoint, loaded as anyone would load it, predicts the text; in float32."""
    from transformers import AutoModelForCausalLM

    import eckart.hf  # all that transformers needs to load factors

    with eckart.hf.quiet_transformers():
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return compare(model.eval(), {}, text)[""]


def _cells(found: Likeness, before: Likeness) -> tuple[str, str]:
    assert found.nats is not None
    assert before.nats is not None
    return f"{found.perplexity:.3f}", f"{found.nats - before.nats:+.3f}"


def _forms(certificate: Certificate) -> str:
    forms = [row.form for row in certificate.matrices]
    dense = sum(row.reason.startswith("dense") for row in certificate.copied)
    return f"{forms.count('ba')} as B·A, {forms.count('pivoted')} pivoted, {dense} left dense"
