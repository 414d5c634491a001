"""A factored checkpoint loads in transformers, stays factored, and saves again."""

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, ENCODER, IDS, logits, model_of, transformers
from safetensors.torch import load_file, save_file

import eckart.hf
from eckart import compress, densify
from eckart.errors import CheckpointError
from eckart.nn import FactoredLayer, LowRankLinear, PivotedLinear

FORMS = ("ba", "pivoted")

DENSE = {
    "qwen3-moe": ("experts.", "mlp.gate"),
    "mixtral": ("experts.", "gate"),
    "gpt-oss": ("experts.", "router"),
}
"""Layers that transformers stacks, or that are no linear layers: multiplied out as they load."""

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded:UserWarning"),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Each family's checkpoint, factored in each form and multiplied out: made once."""
    root = tmp_path_factory.mktemp("saved")

    def folder(kind: str, form: str, **options: object) -> Path:
        key = "-".join([kind.replace(", ", "-"), form, *map(str, options.values())])
        if not (root / key).exists():
            model_of(kind).save_pretrained(root / key / "src")
            settings = {"rank": 6, "form": form, "workers": 1, **options}
            compress(root / key / "src", root / key / "factored", **settings)
            densify(root / key / "factored", root / key / "dense", workers=1)
        return root / key

    return folder


def factored_layers(model) -> dict[str, FactoredLayer]:
    return {n: layer for n, layer in model.named_modules() if isinstance(layer, FactoredLayer)}


def manifest(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]["factored"]


def loaded(kind: str, folder: Path, **options):
    """By the class of the family; nothing may be missing, unexpected or of another shape."""
    kinds = type(model_of(kind))
    model, report = kinds.from_pretrained(folder, output_loading_info=True, **options)

    assert not any(report.values()), report
    return model


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return float((found - expected).abs().max()) <= 1e-6 * max(1, float(expected.abs().max()))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_factored_checkpoint_computes_what_it_does_multiplied_out(kind, form, saved, tmp_path):
    """Loaded, saved and loaded again, and dequantized: always the logits of the dense one."""
    folder = saved(kind, form)
    model = loaded(kind, folder / "factored")
    expected, layers = logits(loaded(kind, folder / "dense")), factored_layers(model)
    dense = DENSE.get(kind, ())
    stays = [X for X in manifest(folder / "factored") if not any(part in X for part in dense)]

    assert len(layers) == len(stays) > 0
    assert close(logits(model), expected)
    assert not close(logits(model_of(kind)), expected)

    model.save_pretrained(tmp_path / "again")
    again = loaded(kind, tmp_path / "again")

    assert sorted(manifest(tmp_path / "again")) == sorted(stays)
    assert factored_layers(again).keys() == layers.keys()
    assert torch.equal(logits(again), logits(model))

    plain = model.dequantize()
    plain.save_pretrained(tmp_path / "plain")

    assert not factored_layers(plain)
    assert close(logits(plain), expected)
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())
    assert torch.equal(logits(loaded(kind, tmp_path / "plain")), logits(plain))


@pytest.mark.parametrize("form", FORMS)
def test_what_is_multiplied_out_is_equal_to_densify_to_the_bit(form, saved):
    """Every tensor of a mixture of experts, whether it was factored or not."""
    folder = saved("qwen3-moe", form)
    ours = loaded("qwen3-moe", folder / "factored").dequantize().state_dict()
    theirs = loaded("qwen3-moe", folder / "dense").state_dict()

    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_is_as_asked(dtype, saved):
    """Both sides cast by from_pretrained: equal within the dtype's own rounding."""
    folder = saved("llama", "pivoted")
    model = loaded("llama", folder / "factored", dtype=dtype)
    expected = logits(loaded("llama", folder / "dense", dtype=dtype))

    assert {p.dtype for p in model.parameters()} == {dtype}
    assert all(layer.perm.dtype == torch.int64 for layer in factored_layers(model).values())
    assert float((logits(model) - expected).norm() / expected.norm()) < 2e-2


def test_a_bfloat16_checkpoint_in_shards_loads(saved, tmp_path):
    """Factors, guards and permutations lie in different files."""
    model = model_of("llama").bfloat16()
    model.save_pretrained(tmp_path / "src")
    compress(tmp_path / "src", tmp_path / "out", rank=6, shard_bytes=6000, workers=1)
    densify(tmp_path / "out", tmp_path / "dense", workers=1)
    found = loaded("llama", tmp_path / "out")
    expected = logits(loaded("llama", tmp_path / "dense"))

    assert len([*(tmp_path / "out").glob("*.safetensors")]) > 4
    assert found.dtype == torch.bfloat16
    assert float((logits(found) - expected).norm() / expected.norm()) < 2e-2


def test_a_tied_embedding_that_was_factored_is_multiplied_out(tmp_path):
    """Head and embedding stay one tensor, as the model wants it."""
    model_of("llama, tied").save_pretrained(tmp_path / "src")
    compress(tmp_path / "src", tmp_path / "out", rank=6, include=["*embed*", "*q_proj"], workers=1)
    densify(tmp_path / "out", tmp_path / "dense", workers=1)
    model = loaded("llama, tied", tmp_path / "out")
    model.save_pretrained(tmp_path / "again")

    assert {name.rpartition(".")[2] for name in factored_layers(model)} == {"q_proj"}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert close(logits(model), logits(loaded("llama, tied", tmp_path / "dense")))
    assert close(logits(loaded("llama, tied", tmp_path / "again")), logits(model))


def test_an_untied_head_that_was_factored_stays_so(tmp_path):
    """It is a linear layer as any other."""
    model_of("llama").save_pretrained(tmp_path / "src")
    compress(tmp_path / "src", tmp_path / "out", rank=6, include=["lm_head"], workers=1)
    model = loaded("llama", tmp_path / "out")

    assert [*factored_layers(model)] == ["lm_head"]
    assert logits(model).shape[-1] == 96


def test_other_classes_take_what_they_have_a_place_for(saved, tmp_path):
    """AutoModel from a causal LM: the prefix goes, the head is left; and saved again it loads."""
    folder = saved("llama", "ba")
    model = transformers.AutoModel.from_pretrained(folder / "factored")
    dense = transformers.AutoModel.from_pretrained(folder / "dense")
    model.save_pretrained(tmp_path / "again")
    again = transformers.AutoModel.from_pretrained(tmp_path / "again")
    with torch.no_grad():
        found, expected, twice = (one(IDS).last_hidden_state for one in (model, dense, again))

    assert len(factored_layers(model)) == len(factored_layers(again)) == 14
    assert all(not name.startswith("model.") for name in factored_layers(model))
    assert close(found, expected)
    assert torch.equal(found, twice)


def test_a_map_of_devices_places_factored_layers(saved, tmp_path):
    """On the CPU by name, automatically, and offloaded to disk."""
    folder = saved("llama", "pivoted")
    expected = logits(loaded("llama", folder / "dense"))
    placed = {"": "cpu"}
    spread = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    rest = {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for device_map in (placed, "auto", {**spread, **rest}):
            model = transformers.AutoModelForCausalLM.from_pretrained(
                folder / "factored", device_map=device_map, offload_folder=tmp_path / "offloaded"
            )

            assert len(factored_layers(model)) == 14
            assert close(logits(model), expected)


def test_a_mixture_of_experts_is_offloaded_dense(saved, tmp_path):
    """What is multiplied out as it loads is what the disk holds."""
    folder = saved("qwen3-moe", "ba")
    parts = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    device_map = {**dict.fromkeys(parts, "cpu"), "model.layers.1": "disk"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder / "factored", device_map=device_map, offload_folder=tmp_path / "offloaded"
        )

    assert close(logits(model), logits(loaded("qwen3-moe", folder / "dense")))


def test_without_this_package_the_load_stops(saved):
    """Stock transformers, in a process of its own, ends with an error, not with random layers."""
    code = (
        "import sys, transformers\n"
        "transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print('loaded')"
    )
    for kind in ("llama", "qwen3-moe", "gpt2"):
        argv = [sys.executable, "-c", code, str(saved(kind, "ba") / "factored")]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)

        assert done.returncode != 0, kind
        assert "loaded" not in done.stdout
        assert "RuntimeError" in done.stderr
        assert "size mismatch" in done.stderr or "mismatched" in done.stderr


def test_a_loaded_model_is_as_any_other(saved):
    """It can be cast, generates, trains, and compiles to the same numbers."""
    model = loaded("llama", saved("llama", "pivoted") / "factored")
    grown = model.generate(IDS[:, :4], max_new_tokens=3, do_sample=False, pad_token_id=0)
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()

    assert grown.shape == (2, 7)
    assert all(
        p.grad is not None for layer in factored_layers(model).values() for p in layer.parameters()
    )
    assert model.half().dtype == torch.float16
    assert model.hf_quantizer.is_trainable
    assert model.hf_quantizer.is_qat_trainable
    assert model.hf_quantizer.is_compileable


def test_gpt2_and_t5_read_the_dtype_of_a_factored_weight(saved):
    """The guard of the file stands in the layer too: a dtype and a device, and no entries."""
    for kind in ("gpt2", "t5"):
        for layer in factored_layers(loaded(kind, saved(kind, "ba") / "factored")).values():
            assert layer.weight.shape == (0,)
            assert layer.weight.dtype == torch.float32
            with pytest.raises(RuntimeError):
                torch.nn.functional.linear(torch.ones(1, 32), layer.weight)


def test_t5_keeps_in_float32_what_it_always_does(saved):
    """`wo` of a half-precision T5: the factors and the guard that it asks for the dtype."""
    model = loaded("t5", saved("t5", "ba") / "factored", dtype=torch.float16)
    wo = model.encoder.block[0].layer[1].DenseReluDense.wo

    assert isinstance(wo, LowRankLinear)
    assert {wo.A.weight.dtype, wo.B.weight.dtype, wo.weight.dtype} == {torch.float32}


DAMAGE = {
    "missing entry": (lambda m: m.pop("model.layers.0.self_attn.q_proj"), "does not name"),
    "entry too many": (
        lambda m: m.update({"model.norm": m["model.layers.0.self_attn.q_proj"]}),
        "has no guard of it",
    ),
    "wrong rank": (
        lambda m: m["model.layers.1.mlp.up_proj"].update(rank=5),
        r"up_proj.A.weight is F32 \[6, 32\], but config.json says F32 \[5, 32\]",
    ),
    "wrong form": (
        lambda m: m["model.layers.1.mlp.up_proj"].update(form="pivoted"),
        "up_proj.K.weight is missing",
    ),
    "no form": (lambda m: m["model.layers.1.mlp.up_proj"].pop("form"), "is damaged.*form"),
    "wrong shape": (
        lambda m: m["model.layers.1.mlp.up_proj"].update(shape=[65, 32]),
        r"up_proj.B.weight is F32 \[64, 6\], but config.json says F32 \[65, 6\]",
    ),
}


@pytest.fixture
def damaged(saved, tmp_path):
    """A copy of the factored Llama whose quantization_config was changed."""

    def change(how) -> Path:
        shutil.copytree(saved("llama", "ba") / "factored", tmp_path / "damaged")
        path = tmp_path / "damaged/config.json"
        config = json.loads(path.read_text())
        how(config["quantization_config"])
        path.write_text(json.dumps(config))
        return tmp_path / "damaged"

    return change


@pytest.mark.parametrize("case", DAMAGE)
def test_a_manifest_that_does_not_fit_the_headers_is_refused(case, damaged):
    """Before anything is loaded, in one sentence; nothing is filled at random."""
    change, message = DAMAGE[case]
    folder = damaged(lambda config: change(config["factored"]))

    with pytest.raises(CheckpointError, match=message):
        transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_formats_and_methods_that_are_not_ours_are_refused(damaged):
    """A later format, and a second method beside ours in the config."""
    folder = damaged(lambda config: config.update(format_version=2))
    with pytest.raises(CheckpointError, match="format 2, this eckart reads format 1"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)
    shutil.rmtree(folder)
    folder = damaged(lambda config: config.update(bits=4))

    with pytest.raises(CheckpointError, match=r"field bits beside eckart's own.*second method"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_a_second_quantizer_is_refused(saved):
    """As an argument; and ours on a checkpoint that is not factored."""
    folder = saved("llama", "ba")
    other = transformers.QuantoConfig(weights="int8")

    with pytest.raises(ValueError, match="EckartConfig but you are passing a QuantoConfig"):
        transformers.AutoModelForCausalLM.from_pretrained(
            folder / "factored", quantization_config=other
        )
    with pytest.raises(ValueError, match="pre-quantized"):
        transformers.AutoModelForCausalLM.from_pretrained(
            folder / "dense", quantization_config=eckart.hf.EckartConfig(format_version=1)
        )


def test_a_permutation_that_is_none_is_refused(saved, tmp_path):
    """It would shuffle the outputs without a word."""
    shutil.copytree(saved("llama", "pivoted") / "factored", tmp_path / "damaged")
    path = tmp_path / "damaged/model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.self_attn.k_proj.perm"][0] = 1
    tensors["model.layers.0.self_attn.k_proj.perm"][1] = 1
    save_file(tensors, path, metadata={"format": "pt"})

    with pytest.raises(CheckpointError, match=r"k_proj\.perm is no permutation"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "damaged")


def test_a_second_quantizer_in_a_part_of_the_config_is_refused(saved, tmp_path):
    """transformers would pass over it."""
    shutil.copytree(saved("llava", "ba") / "factored", tmp_path / "damaged")
    path = tmp_path / "damaged/config.json"
    config = json.loads(path.read_text())
    config["text_config"]["quantization_config"] = {"quant_method": "quanto", "weights": "int8"}
    path.write_text(json.dumps(config))

    with pytest.raises(CheckpointError, match=r"second quantization_config.*quanto"):
        transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "damaged")


def test_attention_that_calls_no_layer_is_multiplied_out(tmp_path):
    """torch's own: it reads out_proj's weight, and the bias goes back to its own name."""
    config = transformers.SiglipVisionConfig(image_size=16, patch_size=4, **ENCODER)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.SiglipVisionModel(config).eval()
        torch.nn.init.normal_(model.head.attention.out_proj.bias)
    model.save_pretrained(tmp_path / "src")
    named = ["*head.attention.out_proj", "*q_proj"]
    compress(tmp_path / "src", tmp_path / "out", rank=6, include=named, workers=1)
    densify(tmp_path / "out", tmp_path / "dense", workers=1)
    kinds, images = transformers.SiglipVisionModel, torch.randn(2, 3, 16, 16)
    found, report = kinds.from_pretrained(tmp_path / "out", output_loading_info=True)
    dense = kinds.from_pretrained(tmp_path / "dense")
    (out_proj,) = (X for X in manifest(tmp_path / "out") if X.endswith("head.attention.out_proj"))
    with torch.no_grad():
        expected, ours = dense(images).pooler_output, found(images).pooler_output

    assert not any(report.values())
    assert "head.attention.out_proj" not in factored_layers(found)
    assert torch.equal(found.head.attention.out_proj.bias, model.head.attention.out_proj.bias)
    assert close(ours, expected)
    found.save_pretrained(tmp_path / "again")
    assert out_proj not in manifest(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(kinds.from_pretrained(tmp_path / "again")(images).pooler_output, ours)


def test_registering_twice_is_harmless():
    """The module may be imported again."""
    eckart.hf.quantizer.register()
    assert isinstance(PivotedLinear(4, 4, 2), FactoredLayer)
