"""Factors that are fitted to the drift: what is claimed of them, and the same after a stop."""

from pathlib import Path

import pytest
import torch
from architectures import write_llama
from builders import read_document, snapshot
from safetensors.torch import save_file

from eckart import calibrate, compress, drift, verify
from eckart.drift.relay import Relay
from eckart.texts import Text, open_text
from eckart.trial import FITTED, Trial, fitted_to, held_out

VOCABULARY = 40
FORMS = ("ba", "pivoted", "auto")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A Llama of two layers whose weights decide what it says."""
    return write_llama(tmp_path_factory.mktemp("model") / "llama", VOCABULARY)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    """Sixty sequences, of which six are held out."""
    path = tmp_path_factory.mktemp("text") / "tokens.safetensors"
    drawn = torch.randint(VOCABULARY, (60, 24), generator=torch.Generator().manual_seed(1))
    save_file({"t": drawn}, path)
    return path


@pytest.fixture(scope="module")
def statistics(model: Path, tokens: Path, tmp_path_factory) -> Path:
    return calibrate(model, tmp_path_factory.mktemp("statistics") / "S", tokens=tokens).folder


@pytest.fixture
def options(statistics: Path, tokens: Path) -> dict:
    return {"keep": 0.5, "statistics": statistics, "tokens": tokens}


def files(out: Path) -> dict:
    return {name: state for name, state in snapshot(out).items() if name != "eckart.json"}


def test_what_is_fitted_to_is_not_what_is_held_out(tokens):
    """All but the last tenth, and of a long text the beginning."""
    text = open_text(tokens, tokens=tokens)
    assert text is not None
    ids = text.inputs["input_ids"]
    long = Text({"input_ids": ids.repeat(1, 100)})

    assert torch.equal(fitted_to(text).inputs["input_ids"], ids[:54])
    assert torch.equal(held_out(text).inputs["input_ids"], ids[54:])
    assert fitted_to(long).inputs["input_ids"].numel() == FITTED // 2400 * 2400


@pytest.mark.parametrize("form", FORMS)
def test_fitted_factors_serve_the_model_and_are_named(form, model, options, statistics, tmp_path):
    """The text says they are better; every claim is of the files, and none below the optimum."""
    certificate = compress(model, tmp_path / "out", form=form, **options)
    found = certificate.loss.drift
    assert found is not None
    checks = verify(tmp_path / "out", model, statistics=statistics)

    assert found.written
    assert found.divergence < found.unfitted
    assert found.unfitted == min(certificate.loss.candidates.values())
    assert certificate.loss.divergence == pytest.approx(found.divergence, rel=1e-4)
    assert (found.tokens, found.left_out) == (54 * 24, {})
    assert certificate.totals.keep <= 0.5
    assert all(check.held for check in checks), checks
    for row in certificate.matrices:
        assert row.method.endswith(", drift")
        assert row.optimum is not None
        assert row.optimum - 1e-5 <= row.metric_error


def test_what_is_not_better_is_not_written(model, options, tmp_path, monkeypatch):
    """Then the certificate says so, and the factors are those of a run without fits."""
    spoiled = drift.fit_to_drift

    def spoil(W, *rest, **named):
        return spoiled(-W, *rest, **named)

    monkeypatch.setattr(drift, "fit_to_drift", spoil)
    certificate = compress(model, tmp_path / "out", **options)
    monkeypatch.setattr("eckart.decision.follow", lambda work, selection, *_: selection)
    compress(model, tmp_path / "plain", **options)
    found = certificate.loss.drift
    assert found is not None

    assert not found.written
    assert found.divergence > found.unfitted
    assert certificate.loss.divergence == pytest.approx(found.unfitted, rel=1e-4)
    assert files(tmp_path / "out") == files(tmp_path / "plain")
    assert not any(row.method.endswith("drift") for row in certificate.matrices)


def test_a_matrix_that_cannot_be_fitted_keeps_its_own_factors(
    model, options, tmp_path, monkeypatch
):
    """Where the changed model feeds it nothing but zeros: the certificate names it, and why."""
    fit, name = drift.fit_to_drift, "model.layers.1.mlp.down_proj.weight"

    def starved(W, cross, C, *rest, **named):
        return fit(W, cross, 0 * C if named["name"] == name else C, *rest, **named)

    monkeypatch.setattr(drift, "fit_to_drift", starved)
    certificate = compress(model, tmp_path / "out", **options)
    found = certificate.loss.drift

    assert found is not None
    assert found.left_out.keys() == {name}
    assert "zero" in found.left_out[name]
    assert {r.name: r.method.endswith("drift") for r in certificate.matrices}[name] is False
    assert all(check.held for check in verify(tmp_path / "out", model))


def test_a_promised_error_is_not_given_away(model, options, tmp_path):
    """A fit is no nearer to W: where an error of each matrix is asked nothing is fitted."""
    loss = compress(model, tmp_path / "out", **{**options, "keep": None, "error": 0.5}).loss

    assert loss.drift is None


def test_the_same_rank_everywhere_is_fitted_too(model, options, tmp_path):
    """No budget, so nothing competes; the fits are compared with the factors of W all the same."""
    loss = compress(model, tmp_path / "out", **{**options, "keep": None, "rank": 6}).loss
    assert loss.drift is not None

    assert loss.drift.written
    assert loss.candidates == {}


@pytest.mark.parametrize("stop", [1, 5, 8])
def test_a_stopped_run_goes_on_to_the_same_bytes(stop, model, options, tmp_path, monkeypatch):
    """Whatever was fitted stays, in the middle of a group too; nothing is fitted twice."""
    compress(model, tmp_path / "whole", **options)
    written, count = drift.write_fit, 0

    def stopping(*arguments):
        nonlocal count
        count += 1
        if count > stop:
            raise KeyboardInterrupt
        return written(*arguments)

    work = tmp_path / "work"
    monkeypatch.setattr(drift, "write_fit", stopping)
    with pytest.raises(KeyboardInterrupt):
        compress(model, tmp_path / "out", work=work, **options)
    fits = {path: path.stat().st_mtime_ns for path in (work / "fits").rglob("*.*")}
    monkeypatch.setattr(drift, "write_fit", written)
    compress(model, tmp_path / "out", work=work, **options)

    assert len(fits) == stop
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert {path: path.stat().st_mtime_ns for path in fits} == fits
    a, b = (read_document(tmp_path / name) for name in ("out", "whole"))
    assert {k: v for k, v in a.items() if k not in ("run", "digest")} == {
        k: v for k, v in b.items() if k not in ("run", "digest")
    }


def test_another_budget_is_fitted_anew(model, options, tmp_path):
    """A fit belongs to all the ranks that it follows on: one of another choice is never taken."""
    work = tmp_path / "work"
    compress(model, tmp_path / "first", work=work, **{**options, "keep": 0.7})
    compress(model, tmp_path / "out", work=work, **options)
    compress(model, tmp_path / "alone", **options)

    assert files(tmp_path / "out") == files(tmp_path / "alone")


def test_block_by_block_gives_the_bytes_of_whole_passes(model, options, tmp_path, monkeypatch):
    """The shortcut is no approximation: it only spares what is known."""
    compress(model, tmp_path / "blocks", **options)
    monkeypatch.setattr(Relay, "replays", lambda *_: False)
    compress(model, tmp_path / "whole", **options)

    assert files(tmp_path / "blocks") == files(tmp_path / "whole")


def test_the_model_is_as_it_was_afterwards(model, options, tmp_path, monkeypatch):
    """Every tensor of the trial's model, though the fits changed them one after the other."""
    trials = []
    first = Trial.__init__

    def remembered(self, *arguments, **named):
        first(self, *arguments, **named)
        trials.append((self, {k: v.clone() for k, v in self.model.state_dict().items()}))

    monkeypatch.setattr(Trial, "__init__", remembered)
    compress(model, tmp_path / "out", **options)
    ((trial, before),) = trials
    after = trial.model.state_dict()

    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
