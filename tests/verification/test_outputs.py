"""`eckart verify` with a text: both models run on the same inputs, and told in rows."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from architectures import IDS, logits, model_of, transformers
from builders import eckart, forge
from safetensors.torch import load_file, save_file

from eckart import compress, densify, extract, merge, verify
from eckart.errors import CheckpointError, InputError, PromiseError, UsageError
from eckart.verification.check import Check


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """A Llama, factored and multiplied out; a tuned one, its adapter; tokens and batches."""
    root = tmp_path_factory.mktemp("folders")
    model = model_of("llama")
    model.save_pretrained(root / "src")
    compress(root / "src", root / "out", rank=10, workers=1)
    densify(root / "out", root / "dense", workers=1)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "self_attn" in name and parameter.ndim == 2:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(root / "tuned")
    extract(root / "tuned", root / "src", root / "lora", rank=8, workers=1)
    save_file({"anything": IDS.int()}, root / "tokens.safetensors")
    save_file({"input_ids": IDS, "labels": IDS.clone()}, root / "batch.safetensors")
    return root


def rows(checks: list[Check]) -> dict[str, Check]:
    """Those of a text."""
    return {check.name: check for check in checks if check.figures}


def loss(folder: Path) -> float:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return float(model(input_ids=IDS, labels=IDS).loss)


def test_a_factored_checkpoint_is_told_in_perplexity_and_divergence(folders):
    """Each figure is that of the formulas, on models that transformers loaded."""
    checks = verify(folders / "out", folders / "src", tokens=folders / "tokens.safetensors")
    found = rows(checks)
    before, after = (
        logits(transformers.AutoModelForCausalLM.from_pretrained(folders / name))[:, :-1]
        for name in ("src", "dense")
    )
    p, q = before.log_softmax(-1), after.log_softmax(-1)
    outputs, losses = found["outputs"].figures, found["perplexity"].figures

    assert all(check.held for check in checks)
    assert outputs["divergence"] == pytest.approx(
        float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3
    )
    assert outputs["agreement"] == float((p.argmax(-1) == q.argmax(-1)).double().mean())
    assert outputs["largest_difference"] == pytest.approx(float((before - after).abs().max()), 1e-3)
    assert outputs["predictions"] == 22
    assert losses["reference_perplexity"] == pytest.approx(math.exp(loss(folders / "src")), 1e-5)
    assert losses["perplexity"] == pytest.approx(math.exp(loss(folders / "dense")), 1e-5)


def test_a_dense_output_is_held_against_the_factors_it_was_made_from(folders):
    """densify changes next to nothing; a batch says the same as tokens."""
    same = verify(folders / "dense", folders / "out", batch=folders / "batch.safetensors")
    outputs = rows(same)["outputs"].figures

    assert outputs["divergence"] < 1e-6
    assert outputs["agreement"] == 1


def test_both_sides_are_loaded_in_the_dtype_that_was_asked(folders):
    """bfloat16 is coarser than float32, for the one as for the other."""
    options = {"tokens": folders / "tokens.safetensors"}
    fine = rows(verify(folders / "dense", folders / "out", **options))
    coarse = rows(verify(folders / "dense", folders / "out", dtype="bfloat16", **options))

    assert coarse["outputs"].figures["largest_difference"] > 1e-4
    assert fine["outputs"].figures["largest_difference"] < 1e-5
    with pytest.raises(UsageError, match="--dtype int7 is unknown"):
        verify(folders / "dense", folders / "out", dtype="int7", **options)


def test_an_adapter_is_told_by_the_share_of_the_change_that_it_misses(folders):
    """base + adapter by PEFT against tuned, and the base beside it."""
    pytest.importorskip("peft")
    checks = verify(
        folders / "lora",
        folders / "tuned",
        base=folders / "src",
        tokens=folders / "tokens.safetensors",
    )
    found = rows(checks)
    outputs = found["outputs"].figures

    assert all(check.held for check in checks)
    assert 0.01 < found["logits"].figures["relative_logit_error"] < 1
    assert outputs["divergence"] < outputs["base_divergence"]
    assert found["perplexity"].figures["base_perplexity"] == pytest.approx(
        math.exp(loss(folders / "src")), 1e-5
    )
    assert "of what was changed" in found["logits"].detail


def test_a_change_that_no_logit_shows_is_said_to_be_one(folders, tmp_path):
    """Nothing is divided by nothing: of a row of the embedding that the text does not have."""
    pytest.importorskip("peft")
    model = model_of("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[90].add_(1)
    model.save_pretrained(tmp_path / "tuned")
    extract(tmp_path / "tuned", folders / "src", tmp_path / "lora", rank=1, workers=1)
    checks = verify(
        tmp_path / "lora",
        tmp_path / "tuned",
        base=folders / "src",
        tokens=folders / "tokens.safetensors",
    )
    (change,) = (check for check in checks if check.name == "logits")

    assert change.held
    assert "no logit" in change.detail


def test_logits_that_are_not_finite_break_the_promise(folders, tmp_path):
    """Finite weights can overflow where they are used; the row fails, and says whose they are."""
    model = model_of("llama")
    model.save_pretrained(tmp_path / "src")
    compress(tmp_path / "src", tmp_path / "out", rank=10, workers=1)
    weights = tmp_path / "out/model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.0.mlp.up_proj.B.weight"] *= 1e30
    tensors["model.layers.0.mlp.up_proj.A.weight"] *= 1e30
    save_file(tensors, weights, metadata={"format": "pt"})
    from eckart.evaluation import compare
    from eckart.hf import load_model
    from eckart.texts import Text
    from eckart.verification.outputs import rows_of

    models = {"the output": load_model(tmp_path / "out")}
    text = Text({"input_ids": IDS})
    found = compare(load_model(tmp_path / "src"), models, text)
    (row,) = rows_of(found, "the output", None)

    assert not row.held
    assert row.detail == "the logits of the output are not finite"


def test_weights_that_do_not_hold_are_not_run(folders, tmp_path):
    """A forged claim fails as before, and no model is loaded for it."""
    compress(folders / "src", tmp_path / "out", rank=10, workers=1)
    forge(tmp_path / "out", lambda document: document["matrices"][0].update(relative_error=0.5))
    checks = verify(tmp_path / "out", folders / "src", tokens=folders / "tokens.safetensors")

    assert not all(check.held for check in checks)
    assert not rows(checks)


def test_the_command_prints_the_rows_and_their_figures(folders):
    """In the table, and as numbers with --json."""
    argv = ["verify", folders / "out", "--against", folders / "src"]
    tokens = ["--tokens", folders / "tokens.safetensors"]
    shown = eckart(*argv, *tokens)
    document = json.loads(eckart(*argv, *tokens, "--json").out)
    figures = {check["name"]: check["figures"] for check in document["checks"]}

    assert shown.code == 0
    assert "nats per token" in shown.out
    assert "the likeliest is the same in" in shown.out
    assert 0 < figures["outputs"]["agreement"] <= 1
    assert figures["files"] == {}


def test_a_text_is_encoded_by_the_sources_own_tokenizer(tmp_path):
    """The embedded model, whose tokenizer takes bytes."""
    from eckart.demonstration.scene import embedded

    source, text = embedded("models", "base"), tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x\n" * 4)
    compress(source, tmp_path / "out", rank=2, include=["*0.mlp.up_proj"], workers=1)
    found = rows(verify(tmp_path / "out", source, text=text))

    assert found["outputs"].figures["predictions"] == 23 * 4 - 1
    assert found["perplexity"].figures["perplexity"] > 1


def test_requests_that_make_no_sense_are_refused_before_any_work(folders, tmp_path):
    """No source, two texts, an adapter without a base, or with one taken out again."""
    tokens = folders / "tokens.safetensors"
    merge([folders / "lora"], tmp_path / "merged", error=0, workers=1)
    cases = {
        "give --against": {"out": folders / "out"},
        "--tokens and --batch name two texts": {
            "out": folders / "out",
            "against": folders / "src",
            "batch": tokens,
        },
        r"has no base \(merged\): leave the text out": {
            "out": tmp_path / "merged",
            "against": folders / "lora",
        },
    }
    for message, given in cases.items():
        with pytest.raises(UsageError, match=message):
            verify(**given, tokens=tokens)


def test_an_adapter_that_peft_does_not_load_is_refused(folders, tmp_path):
    """In the keys of another consumer, or written by somebody else."""
    pytest.importorskip("peft")
    options = {"tokens": folders / "tokens.safetensors", "base": folders / "src"}
    settings = {
        "rank": 2,
        "consumer": "kohya",
        "component": "text_encoder",
        "include": ["*q_proj"],
        "accept_loss": True,
    }
    extract(folders / "tuned", folders / "src", tmp_path / "kohya", **settings)
    with pytest.raises(UsageError, match=r"kohya is no folder that PEFT loads.*--for peft"):
        verify(tmp_path / "kohya", folders / "tuned", **options)
    (tmp_path / "foreign").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "foreign" / name).symlink_to(folders / "lora" / name)
    with pytest.raises(UsageError, match=r"did not write .*foreign: leave the text out"):
        verify(tmp_path / "foreign", folders / "tuned", consumers=["peft"], **options)


def test_texts_and_folders_that_cannot_be_run_are_a_sentence(folders, tmp_path):
    """Another vocabulary, a bare file, no config.json, no tokenizer: exit 3."""
    save_file({"ids": IDS + 90}, tmp_path / "large.safetensors")
    (tmp_path / "text.txt").write_text("some words")
    out, src = folders / "out", folders / "src"
    bare = src / "model.safetensors"
    with pytest.raises(InputError, match="the token 113, but the model's vocabulary has 96"):
        verify(out, src, tokens=tmp_path / "large.safetensors")
    with pytest.raises(CheckpointError, match="is not a folder"):
        verify(out, bare, tokens=folders / "tokens.safetensors")
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy/model.safetensors").symlink_to(bare)
    with pytest.raises(CheckpointError, match=r"has no config.json that says which model"):
        verify(out, tmp_path / "copy", tokens=folders / "tokens.safetensors")
    with pytest.raises(CheckpointError, match=r"src has no tokenizer.*--tokens"):
        verify(out, src, text=tmp_path / "text.txt")
    code = eckart("verify", out, "--against", src, "--text", tmp_path / "text.txt").code
    assert code == 3


@pytest.mark.parametrize(
    ("package", "name", "message"),
    [("transformers", "out", "'eckart[hf]'"), ("peft", "lora", "'eckart[hf,peft]'")],
)
def test_a_package_that_is_missing_is_named(package, name, message, folders):
    """Exit 2, before any work, with the command that installs it."""
    code = (
        "import sys\n"
        f"sys.modules[{package!r}] = None\n"  # as if it were not installed
        "from eckart.cli import run\n"
        "run()\n"
    )
    against = ["--against", "src"] if name == "out" else ["--against", "tuned", "--base", "src"]
    argv = [sys.executable, "-c", code, "verify", name, *against, "--tokens", "tokens.safetensors"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=folders)

    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())


def test_an_adapter_that_peft_does_not_take_whole_breaks_the_promise(folders, tmp_path):
    """PEFT passes over a tensor without a place, and only warns of one that it misses."""
    pytest.importorskip("peft")
    from eckart.hf import load_adapted

    (tmp_path / "lora").mkdir()
    config = (folders / "lora/adapter_config.json").read_text()
    (tmp_path / "lora/adapter_config.json").write_text(config)
    tensors = load_file(folders / "lora/adapter_model.safetensors")
    first = sorted(tensors)[0]
    for change, message in (
        ({first: None}, f"PEFT finds no {first}"),
        ({f"{first}.more": tensors[first].clone()}, f"PEFT has no place for {first}.more"),
    ):
        kept = {k: t for k, t in {**tensors, **change}.items() if t is not None}
        save_file(kept, tmp_path / "lora/adapter_model.safetensors")
        with pytest.raises(PromiseError, match=message):
            load_adapted(folders / "src", tmp_path / "lora")
