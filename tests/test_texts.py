"""Text, tokens and batches, as the tensors that a model is run on."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from eckart.demonstration.scene import embedded
from eckart.errors import CheckpointError, InputError, UsageError
from eckart.texts import Text, check_vocabulary, open_text, read_batch, read_tokens, tokenize


def _shorter(tmp_path: Path, model: Path) -> Path:
    """The same tokenizer, of a model that takes seven tokens."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).symlink_to(model / name)
    config = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": 7}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def saved(tmp_path: Path, **tensors: torch.Tensor) -> Path:
    path = tmp_path / "text.safetensors"
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_tokens_are_the_one_table_of_integers_of_any_name(dtype, tmp_path):
    """As int64, whatever their own dtype; other tensors do not matter."""
    ids = torch.arange(12).reshape(3, 4).to(dtype)
    path = saved(tmp_path, anything=ids, mask=torch.ones(3))

    assert torch.equal(read_tokens(path), ids.long())
    assert torch.equal(open_text(tmp_path, tokens=path).inputs["input_ids"], ids.long())


def test_several_tables_of_tokens_are_told_apart_by_name(tmp_path):
    """Without a name there is no guess."""
    ids = torch.arange(12).reshape(3, 4)
    path = saved(tmp_path, a=ids, b=ids + 1)

    assert torch.equal(read_tokens(path, "b"), ids + 1)
    with pytest.raises(InputError, match=r"one 2-D integer tensor.* it has 2 \(a, b\)"):
        read_tokens(path)
    with pytest.raises(InputError, match="no 2-D integer tensor c"):
        read_tokens(path, "c")


REFUSED = {
    "none": (torch.ones(3, 4), r"it has 0 \(none\)"),
    "one sequence, 1-D": (torch.arange(4), r"it has 0 \(none\)"),
    "empty": (torch.empty(0, 4, dtype=torch.int64), r"x in .* is empty: \[0, 4\]"),
    "negative": (torch.tensor([[0, -100]]), "holds the token -100.*--batch"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_are_no_tokens_is_refused_in_a_sentence(case, tmp_path):
    """Floats, one side, no sequences, padding."""
    tensor, message = REFUSED[case]
    path = saved(tmp_path, x=tensor)

    with pytest.raises(InputError, match=message):
        read_tokens(path)


def test_files_that_are_not_there_or_no_safetensors_are_named(tmp_path):
    """The path, and what to give instead."""
    (tmp_path / "notes.txt").write_text("hello")

    with pytest.raises(InputError, match=r"none.safetensors does not exist"):
        read_tokens(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match=r"notes.txt .*not a safetensors file"):
        read_tokens(tmp_path / "notes.txt")
    with pytest.raises(CheckpointError, match=r"none.txt"):
        tokenize(tmp_path / "none.txt", embedded("models", "base"))


def test_a_batch_is_every_tensor_by_its_name(tmp_path):
    """Their first side is the number of examples; floats must be finite."""
    inputs = {"pixel_values": torch.randn(2, 3, 8, 8), "labels": torch.tensor([1, 0])}
    found = read_batch(saved(tmp_path, **inputs))

    assert found.keys() == inputs.keys()
    assert all(torch.equal(found[name], inputs[name]) for name in inputs)
    with pytest.raises(InputError, match="first side"):
        read_batch(saved(tmp_path, a=torch.ones(2), b=torch.ones(3)))
    with pytest.raises(InputError, match="a scalar"):
        read_batch(saved(tmp_path, a=torch.tensor(2)))
    with pytest.raises(InputError, match=r"a in .*text.safetensors"):
        read_batch(saved(tmp_path, a=torch.tensor([1.0, torch.nan])))
    with pytest.raises(InputError, match="no tensor at all"):
        read_batch(saved(tmp_path))


def test_a_text_comes_in_batches_and_in_halves(tmp_path):
    """In order, the last batch shorter; the digest is of all that is in it."""
    text = Text({"input_ids": torch.arange(10).reshape(5, 2), "labels": torch.arange(5)})
    first, rest = text.split(2)

    assert [len(batch["labels"]) for batch in text.batches(2)] == [2, 2, 1]
    assert torch.equal(
        torch.cat([b["input_ids"] for b in text.batches(2)]), text.inputs["input_ids"]
    )
    assert (text.sequences, first.sequences, rest.sequences) == (5, 2, 3)
    assert len({text.digest, first.digest, rest.digest}) == 3
    assert text.digest == Text(dict(reversed(text.inputs.items()))).digest


def test_a_text_is_cut_into_windows_by_the_models_own_tokenizer(tmp_path):
    """As many tokens as were asked for and the model takes; what is left over is dropped."""
    pytest.importorskip("transformers")
    model, path = embedded("models", "base"), tmp_path / "text.txt"
    path.write_text("abcdefghij" * 5)
    ids = tokenize(path, model, 12)
    short = tokenize(path, model, 1000)

    assert ids.shape == (50 // 12, 12)
    assert ids.dtype == torch.int64
    assert torch.equal(ids.flatten(), short.flatten()[: ids.numel()])
    assert short.shape == (1, 50)
    assert tokenize(path, _shorter(tmp_path, model), 12).shape == (7, 7)
    assert torch.equal(open_text(model, text=path, length=12).inputs["input_ids"], ids)


@pytest.mark.parametrize(("content", "message"), [(b"", "0 tokens"), (b"\xff\xfe\x00", "no UTF-8")])
def test_a_text_of_nothing_is_refused(content, message, tmp_path):
    """Nothing to predict, or no text at all."""
    pytest.importorskip("transformers")
    path = tmp_path / "text.txt"
    path.write_bytes(content)

    with pytest.raises(InputError, match=message):
        tokenize(path, embedded("models", "base"))


def test_two_texts_are_one_too_many(tmp_path):
    """And none is none."""
    with pytest.raises(UsageError, match="--text and --tokens"):
        open_text(tmp_path, text=tmp_path, tokens=tmp_path)
    assert open_text(tmp_path) is None


def test_a_token_outside_the_vocabulary_is_named():
    """The last one inside is fine."""
    check_vocabulary(torch.tensor([[0, 4]]), 5)

    with pytest.raises(InputError, match="the token 5, but the model's vocabulary has 5"):
        check_vocabulary(torch.tensor([[0, 5]]), 5)
