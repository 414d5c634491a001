"""Models and texts that cannot be calibrated: one sentence each, the right exit code, no trace."""

import json
from pathlib import Path

import pytest
import torch
from builders import Outcome, eckart, snapshot
from safetensors.torch import load_file, save_file
from torch import Tensor

pytest.importorskip("transformers")
import transformers as tf
from models import SIZES, ids, saved

from eckart import api

NAMES = "abcdefghij"


@pytest.fixture
def llama(tmp_path) -> Path:
    """A tiny Llama as MODEL, with a batch beside it."""
    saved("llama", tmp_path)
    (tmp_path / "llama").rename(tmp_path / "MODEL")
    return tmp_path


def refused(place: Path, *options: object, model: str = "MODEL") -> Outcome:
    """The command's outcome, when it has left nothing behind."""
    before = snapshot(place)
    outcome = eckart("calibrate", place / model, "-o", place / "S", *options)

    assert snapshot(place) == before
    assert outcome.code != 0
    assert outcome.out == ""
    return outcome


def batch(place: Path, **tensors: Tensor) -> Path:
    path = place / "given.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def test_a_text_must_be_named_once(llama):
    """None, and two."""
    none = refused(llama)
    file = batch(llama, x=ids(2, 5))
    two = refused(llama, "--tokens", file, "--batch", file)

    assert (none.code, two.code) == (2, 2)
    assert "a text is needed: --text FILE, --tokens FILE or --batch FILE" in none.message
    assert "--tokens and --batch name two texts" in two.message


def test_an_output_that_exists_is_refused_before_the_model_is_read(llama):
    """Statistics of ours are replaced with --force; nothing else is."""
    file = batch(llama, x=ids(2, 5))
    (llama / "S").mkdir()
    plain, forced = refused(llama, "--tokens", file), refused(llama, "--tokens", file, "--force")
    (llama / "S").rmdir()
    eckart("calibrate", llama / "MODEL", "-o", llama / "S", "--tokens", file)
    again = refused(llama, "--tokens", file)
    replaced = eckart("calibrate", llama / "MODEL", "-o", llama / "S", "--tokens", file, "--force")
    inside = eckart("calibrate", llama / "MODEL", "-o", llama / "MODEL" / "S", "--tokens", file)

    assert [o.code for o in (plain, forced, again, replaced, inside)] == [2, 2, 2, 0, 2]
    assert "exists already" in again.message
    assert "was not written by eckart" in forced.message
    assert "is inside the input" in inside.message


def test_a_factored_checkpoint_is_no_model(llama):
    """Its statistics would be those of a model that is approximated already."""
    api.compress(llama / "MODEL", llama / "FACTORED", rank=4)
    file = batch(llama, x=ids(2, 5))
    outcome = refused(llama, "--tokens", file, model="FACTORED")

    assert outcome.code == 3
    assert "is factored already: give its source, or densify it first" in outcome.message


def test_a_model_that_is_not_there_or_unknown_is_told(llama):
    """No code of a checkpoint is ever run."""
    file = batch(llama, x=ids(2, 5))
    missing = refused(llama, "--tokens", file, model="NOWHERE")
    path = llama / "MODEL" / "config.json"
    config = json.loads(path.read_text()) | {"architectures": ["OwnForCausalLM"]}
    path.write_text(json.dumps(config))
    unknown = refused(llama, "--tokens", file)

    assert (missing.code, unknown.code) == (3, 3)
    assert "does not exist" in missing.message
    assert "is a OwnForCausalLM, which the installed transformers" in unknown.message


def test_a_model_without_a_head_has_no_loss(tmp_path):
    """Without curvature it can be calibrated."""
    tf.BertModel(tf.BertConfig(**SIZES)).save_pretrained(tmp_path / "MODEL")
    file = batch(tmp_path, input_ids=ids(4, 8))
    outcome = refused(tmp_path, "--batch", file)
    none = eckart(
        "calibrate",
        tmp_path / "MODEL",
        "-o",
        tmp_path / "S",
        "--batch",
        file,
        "--curvature",
        "none",
    )

    assert outcome.code == 3
    assert "BertModel gives no logits, so there is no loss" in outcome.message
    assert "or take --curvature none" in outcome.message
    assert none.code == 0


def test_labels_are_drawn_of_classes_only(tmp_path):
    """A number has no distribution to draw from."""
    tf.BertForSequenceClassification(tf.BertConfig(**SIZES, num_labels=1)).save_pretrained(
        tmp_path / "MODEL"
    )
    file = batch(tmp_path, input_ids=ids(4, 8))
    outcome = refused(tmp_path, "--batch", file)

    none = eckart(
        "calibrate",
        tmp_path / "MODEL",
        "-o",
        tmp_path / "S",
        "--batch",
        file,
        "--curvature",
        "none",
    )

    assert (outcome.code, none.code) == (3, 0)
    assert "predicts a number, not a class" in outcome.message


def test_a_loss_that_only_the_model_knows_is_its_mean_for_each_example(tmp_path):
    """Regression: floating labels."""
    tf.BertForSequenceClassification(tf.BertConfig(**SIZES, num_labels=1)).save_pretrained(
        tmp_path / "MODEL"
    )
    file = batch(tmp_path, input_ids=ids(4, 8), labels=torch.randn(4))
    outcome = eckart("calibrate", tmp_path / "MODEL", "-o", tmp_path / "S", "--batch", file)

    assert outcome.code == 0


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"input_ids": ids(2, 5), "nonsense": ids(2, 5)}, "takes no argument nonsense: it takes"),
        ({"input_ids": ids(2, 5) + 40}, "the model's vocabulary has 40"),
        ({"input_ids": ids(2, 5), "labels": ids(2, 5) + 40}, "the labels hold the class"),
        (
            {"input_ids": ids(2, 5), "attention_mask": torch.zeros(2, 5).long()},
            "nothing to predict, or nothing but padding",
        ),
        (
            {"input_ids": ids(2, 5), "labels": torch.full((2, 5), -100)},
            "nothing to predict, or nothing but padding",
        ),
        ({"input_ids": torch.randn(2, 5)}, "cannot be run on this text"),
        ({"inputs_embeds": torch.full((2, 5, 16), torch.nan)}, "holds"),
    ],
)
def test_a_batch_that_does_not_fit_is_told(llama, tensors, message):
    """What is wrong, and with which tensor."""
    outcome = refused(llama, "--batch", batch(llama, **tensors))

    assert outcome.code == 3
    assert message in outcome.message


def test_activations_that_overflow_name_the_layer(llama):
    """The first one whose inputs are not finite."""
    path = llama / "MODEL" / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.1.mlp.up_proj.weight"] *= 1e38
    save_file(weights, path, metadata={"format": "pt"})
    outcome = refused(llama, "--tokens", batch(llama, x=ids(2, 5)))

    assert outcome.code == 3
    assert "inputs of model.layers.1.mlp.down_proj.weight hold NaN or Inf" in outcome.message


def test_too_few_tokens_are_said_with_the_number(llama):
    """It works all the same: a singular C is no error."""
    file = batch(llama, x=ids(2, 5))
    outcome = eckart("calibrate", llama / "MODEL", "-o", llama / "S", "--tokens", file)

    assert outcome.code == 0
    assert "8 of 8 groups saw fewer inputs than these have entries (10 of 24 for" in outcome.message
    assert "give at least 24 tokens" in outcome.message


def test_a_dry_run_shows_passes_and_bytes_and_writes_nothing(llama):
    """As a table, and as JSON."""
    file, before = batch(llama, x=ids(2, 5)), snapshot(llama)
    line = ["calibrate", llama / "MODEL", "-o", llama / "S", "--tokens", file, "--dry-run"]
    table, document = eckart(*line, "--memory", "14000"), eckart(*line, "--json")
    said = json.loads(document.out)

    assert (table.code, document.code) == (0, 0)
    assert "bytes of sums" in table.out
    assert table.out.count("\n") >= 4
    assert len(said["passes"]) == 1
    C, G = 3 * 16**2 + 24**2, 3 * 16**2 + 2 * 24**2 + 2 * 8**2  # of each layer
    assert said["output_bytes"] == 4 * 2 * (C + G)
    assert snapshot(llama) == before


def test_json_is_the_document(llama):
    """On stdout, and nothing on stderr."""
    file = batch(llama, x=ids(2, 5))
    outcome = eckart("calibrate", llama / "MODEL", "-o", llama / "S", "--tokens", file, "--json")

    assert json.loads(outcome.out) == json.loads((llama / "S" / "statistics.json").read_bytes())
    assert outcome.err == ""
