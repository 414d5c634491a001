"""A compression that is tried out on a text: measured there, and the best way to spend chosen."""

from pathlib import Path

import pytest
import torch
from architectures import write_llama
from builders import eckart, read_document, read_tensors, snapshot, write_moments
from safetensors.torch import save_file

from eckart import calibrate, compress, densify, probing, verify
from eckart.checkpoint.opening import open_source
from eckart.errors import CheckpointError, InputError, UsageError
from eckart.hf import load_dense
from eckart.texts import Text, open_text
from eckart.trial import Trial, held_out

transformers = pytest.importorskip("transformers")

VOCABULARY = 40
Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A Llama of two layers whose weights decide what it says."""
    return write_llama(tmp_path_factory.mktemp("model") / "llama", VOCABULARY)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    """Forty sequences, of which four are held out."""
    path = tmp_path_factory.mktemp("text") / "tokens.safetensors"
    drawn = torch.randint(VOCABULARY, (40, 12), generator=torch.Generator().manual_seed(1))
    save_file({"t": drawn}, path)
    return path


@pytest.fixture(scope="module")
def statistics(model: Path, tmp_path_factory) -> Path:
    return write_moments(tmp_path_factory.mktemp("statistics") / "S", model).folder


def text_of(path: Path) -> Text:
    found = open_text(path, tokens=path)
    assert found is not None
    return found


def test_the_last_tenth_is_held_out(tokens):
    """At least one sequence of ten, and no more than 32; fewer than ten are too few."""
    text = text_of(tokens)
    long = Text({"input_ids": text.inputs["input_ids"].repeat(20, 1)})

    assert torch.equal(held_out(text).inputs["input_ids"], text.inputs["input_ids"][36:])
    assert held_out(long).sequences == 32
    assert held_out(text.split(10)[0]).sequences == 1
    with pytest.raises(InputError, match="the text has 9 sequences of 12 tokens"):
        held_out(text.split(9)[0])
    with pytest.raises(InputError, match="40 sequences of 1 tokens"):
        held_out(Text({"input_ids": text.inputs["input_ids"][:, :1]}))


def test_a_trial_measures_what_the_model_becomes_and_puts_it_back(model, tokens):
    """Loss by torch's cross-entropy, divergence by torch's own; afterwards all is as it was."""
    text = held_out(text_of(tokens))
    trial, other = Trial(open_source(model), text, names=[Q]), load_dense(model)
    changed, ids = torch.zeros(32, 32), text.inputs["input_ids"]
    before = {name: tensor.clone() for name, tensor in trial.model.state_dict().items()}
    found = trial.outcome([(Q, changed)])

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return other(input_ids=ids).logits[:, :-1].flatten(0, 1)

    dense = logits()
    other.get_parameter(Q).data.zero_()
    labels, ours = ids[:, 1:].flatten(), logits()
    kl = torch.nn.functional.kl_div(
        ours.log_softmax(-1), dense.log_softmax(-1), reduction="batchmean", log_target=True
    )
    assert found.divergence == pytest.approx(float(kl), rel=1e-4)
    assert found.loss == pytest.approx(float(torch.nn.functional.cross_entropy(ours, labels)))
    assert trial.dense.loss == pytest.approx(
        float(torch.nn.functional.cross_entropy(dense, labels))
    )
    assert trial.dense.divergence == pytest.approx(0.0, abs=1e-9)
    assert trial.tokens == labels.numel()
    after = trial.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_a_tensor_that_is_not_in_the_model_is_refused(model, tokens, tmp_path):
    """Before any work: it cannot be tried out."""
    stored = read_tensors(model)
    folder = tmp_path / "strange"
    folder.mkdir()
    (folder / "config.json").write_bytes((model / "config.json").read_bytes())
    save_file(stored | {"x.weight": torch.ones(3, 3)}, folder / "model.safetensors")

    with pytest.raises(CheckpointError, match=r"x\.weight of .* cannot be tried out in LlamaFor"):
        Trial(open_source(folder), held_out(text_of(tokens)), names=["x.weight"])


@pytest.mark.parametrize("form", ["ba", "auto"])
def test_the_best_candidate_is_written_named_and_measured(
    form, model, tokens, statistics, tmp_path
):
    """On the tokens held out; what is written says what the dense checkpoint made of it says."""
    options = {"keep": 0.5, "form": form, "statistics": statistics, "tokens": tokens}
    certificate = compress(model, tmp_path / "out", **options)
    loss = certificate.loss
    densify(tmp_path / "out", tmp_path / "dense")
    text = held_out(text_of(tokens))
    dense, changed = (
        Trial(open_source(path), text, names=[]) for path in (model, tmp_path / "dense")
    )

    assert set(loss.candidates) == {"global", "floor", "uniform", "measured"}
    assert loss.allocation == min(loss.candidates, key=loss.candidates.__getitem__)
    assert loss.drift is not None
    assert loss.drift.unfitted == loss.candidates[loss.allocation]
    best = min(loss.drift.unfitted, loss.drift.divergence)
    assert loss.divergence == pytest.approx(best, rel=1e-4)
    assert loss.measured == pytest.approx(changed.dense.loss - dense.dense.loss, rel=1e-4, abs=1e-6)
    assert loss.tokens == 4 * 11
    assert certificate.totals.keep <= 0.5
    assert all(check.held for check in verify(tmp_path / "out", model, statistics=statistics))


def test_a_promise_is_measured_too_but_nothing_competes(model, tokens, statistics, tmp_path):
    """An error asked of each matrix leaves nothing to choose."""
    asked = {"error": 0.5, "statistics": statistics, "tokens": tokens}
    loss = compress(model, tmp_path / "out", **asked).loss

    assert loss.measured is not None
    assert (loss.allocation, loss.candidates) == (None, {})


def test_the_same_run_gives_the_same_bytes(model, tokens, statistics, tmp_path):
    """Whatever torch's threads were: the choice depends on measured numbers, these on threads."""
    options = {"keep": 0.6, "statistics": statistics, "tokens": tokens}
    compress(model, tmp_path / "a", **options)
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        compress(model, tmp_path / "b", **options)
    finally:
        torch.set_num_threads(before)

    a, b = read_tensors(tmp_path / "a"), read_tensors(tmp_path / "b")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_text_needs_statistics_and_enough_of_it(model, tokens, statistics, tmp_path):
    """Exit 2 and 3, and nothing is left behind."""
    few, foreign = tmp_path / "few.safetensors", tmp_path / "foreign.safetensors"
    save_file({"t": torch.ones(9, 5, dtype=torch.int64)}, few)
    save_file({"t": torch.full((10, 5), VOCABULARY)}, foreign)
    before = snapshot(tmp_path)
    line = ("compress", model, "-o", tmp_path / "out", "--keep", 0.5)

    plain = eckart(*line, "--tokens", tokens)
    short = eckart(*line, "--statistics", statistics, "--tokens", few)
    strange = eckart(*line, "--statistics", statistics, "--tokens", foreign)
    assert (plain.code, short.code, strange.code) == (2, 3, 3)
    assert "measured on together with --statistics" in plain.message
    assert "the text has 9 sequences" in short.message
    assert "the token 40, but the model's vocabulary has 40" in strange.message
    assert snapshot(tmp_path) == before


def test_the_command_says_which_was_best(model, tokens, statistics, tmp_path):
    """With what it lost, on stdout; the certificate has the same."""
    out = tmp_path / "out"
    asked = ("--keep", 0.5, "--statistics", statistics, "--tokens", tokens)
    done = eckart("compress", model, "-o", out, *asked)

    loss = read_document(out)["loss"]
    assert done.code == 0
    assert f"{loss['measured']:+.4f} nats per token" in done.out
    assert loss["allocation"] in done.out


def test_a_single_file_has_no_model_to_try(model, tokens, tmp_path):
    """Weights without config.json cannot run."""
    S = write_moments(tmp_path / "S", model / "model.safetensors").folder

    with pytest.raises(UsageError, match="is no model's folder"):
        compress(
            model / "model.safetensors", tmp_path / "out", keep=0.5, statistics=S, tokens=tokens
        )


def test_what_was_measured_of_a_matrix_is_not_measured_again(
    model, tokens, statistics, tmp_path, monkeypatch
):
    """After a stop, and for another budget; with another text it is."""
    asked = {"statistics": statistics, "tokens": tokens, "work": tmp_path / "work"}
    compress(model, tmp_path / "whole", keep=0.5, statistics=statistics, tokens=tokens)
    measured, names = probing.Tried._measured, []

    def counted(self, name, ranks):
        if len(names) == 5:
            raise KeyboardInterrupt
        names.append(name)
        return measured(self, name, ranks)

    monkeypatch.setattr(probing.Tried, "_measured", counted)
    with pytest.raises(KeyboardInterrupt):
        compress(model, tmp_path / "out", keep=0.5, **asked)
    first, names = names, []
    monkeypatch.setattr(probing.Tried, "_measured", lambda *a: names.append(a[1]) or measured(*a))
    compress(model, tmp_path / "out", keep=0.5, **asked)
    rest, names = names, []
    compress(model, tmp_path / "other", keep=0.6, **asked)
    again = [*names]
    other = tmp_path / "other.safetensors"
    save_file({"t": torch.ones(20, 12, dtype=torch.int64)}, other)
    compress(model, tmp_path / "third", keep=0.6, **{**asked, "tokens": other})

    assert len(first) == 5
    assert not {*first} & {*rest}
    assert again == []
    assert {*names} == {*first, *rest}
    a, b = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "whole")
    assert all(torch.equal(a[name], b[name]) for name in a.keys() | b.keys())
    loss, expected = (read_document(tmp_path / name)["loss"] for name in ("out", "whole"))
    assert loss == expected


def test_a_text_that_the_statistics_saw_is_remarked_upon(model, tokens, statistics, tmp_path):
    """In the log and in the certificate: what is held out of it is nothing new."""
    S = calibrate(model, tmp_path / "S", tokens=tokens).folder
    line = ("compress", model, "--keep", 0.5, "--tokens", tokens, "-o")
    words = "The text is the one that the statistics were taken of"
    seen = eckart(*line, tmp_path / "seen", "--statistics", S)
    unseen = eckart(*line, tmp_path / "unseen", "--statistics", statistics)

    assert (seen.code, unseen.code) == (0, 0)
    assert words in seen.err
    assert words not in unseen.err
    assert any(words in remark for remark in read_document(tmp_path / "seen")["remarks"])


def test_a_model_that_no_memory_holds_is_refused_before_it_is_loaded(
    model, tokens, statistics, tmp_path, monkeypatch
):
    """With both numbers: exit 5."""
    monkeypatch.setattr("eckart.tryout.free_memory", lambda: 1000)
    line = ("compress", model, "-o", tmp_path / "out", "--keep", 0.5, "--statistics", statistics)
    done = eckart(*line, "--tokens", tokens)

    assert done.code == 5
    assert "bytes of memory in float32" in done.message
