"""Models and tokenizers of folders: whole, by classes of the installed transformers, or not."""

import json
import shutil

import pytest
import torch
from architectures import logits, model_of, transformers
from safetensors.torch import load_file, save_file

from eckart import compress
from eckart.errors import CheckpointError
from eckart.hf import load_dense, load_model, load_tokenizer


@pytest.fixture
def folder(tmp_path):
    model_of("gpt2").save_pretrained(tmp_path / "src")
    return tmp_path / "src"


def rewrite(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_class_is_the_one_that_the_config_names(folder):
    """In evaluation mode, in float32 or as asked."""
    model = load_model(folder)

    assert type(model).__name__ == "GPT2LMHeadModel"
    assert not model.training
    assert torch.equal(logits(model), logits(model_of("gpt2")))
    assert load_model(folder, dtype=torch.bfloat16).dtype == torch.bfloat16
    rewrite(folder, architectures=None)
    assert type(load_model(folder)).__name__ == "GPT2LMHeadModel"


def test_code_of_a_checkpoint_is_never_run(folder):
    """A class that transformers does not have, and one that the folder brings along."""
    (folder / "mine.py").write_text("raise SystemExit('run!')")
    rewrite(folder, architectures=["MineForCausalLM"], auto_map={"AutoModel": "mine.Mine"})
    with pytest.raises(CheckpointError, match="MineForCausalLM, which the installed transformers"):
        load_model(folder)
    rewrite(folder, architectures=["AutoTokenizer"])
    with pytest.raises(CheckpointError, match="AutoTokenizer, which the installed transformers"):
        load_model(folder)


def test_a_weight_that_is_missing_is_not_filled_at_random(folder):
    """transformers only warns of it."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors.pop("transformer.h.1.mlp.c_fc.weight")
    save_file(tensors, path, metadata={"format": "pt"})

    with pytest.raises(CheckpointError, match=r"lacks 1 weights of GPT2LMHeadModel.*c_fc.weight"):
        load_model(folder)


def test_folders_that_transformers_cannot_load_are_a_sentence(folder, tmp_path):
    """Its own first line, and no traceback; a pickle only if it is allowed."""
    with pytest.raises(CheckpointError, match="is not a folder"):
        load_model(tmp_path / "none")
    shutil.copytree(folder, tmp_path / "pickled")
    (tmp_path / "pickled/model.safetensors").unlink()
    torch.save(model_of("gpt2").state_dict(), tmp_path / "pickled/pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"transformers cannot load .*pickled"):
        load_model(tmp_path / "pickled")
    model = load_model(tmp_path / "pickled", allow_pickle=True)
    assert torch.equal(logits(model), logits(model_of("gpt2")))
    rewrite(folder, n_embd=36)
    with pytest.raises(CheckpointError, match=r"transformers cannot load .*src"):
        load_model(folder)


@pytest.mark.parametrize("kind", ["gpt2", "bert", "llama", "t5"])
def test_a_folder_without_a_tokenizer_has_none(kind, tmp_path):
    """transformers would make one that knows no word, and says so of none."""
    model_of(kind).save_pretrained(tmp_path / "src")

    with pytest.raises(CheckpointError, match=r"has no tokenizer that .* --tokens"):
        load_tokenizer(tmp_path / "src")


def test_where_a_dense_model_is_wanted_a_factored_one_is_refused(folder, tmp_path):
    """It would be calibrated, or evaluated, as what it is not."""
    compress(folder, tmp_path / "out", rank=4, workers=1)

    assert load_model(tmp_path / "out").quantization_method == "eckart"
    with pytest.raises(CheckpointError, match="out is factored: give the model"):
        load_dense(tmp_path / "out")


def test_progress_bars_are_off_while_a_model_loads_and_back_again(folder, capsys):
    """Nothing is printed."""
    transformers.utils.logging.enable_progress_bar()
    load_model(folder)

    assert transformers.utils.logging.is_progress_bar_enabled()
    assert "Loading" not in capsys.readouterr().err
