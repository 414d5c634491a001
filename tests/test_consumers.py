"""Adapters for whom `--for` names: what each consumer holds, and how it reads what we write.

The laws run over every entry of the table; each consumer's rule for the scale is written here
again, and the products are computed by numpy.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import WEIGHTS, decaying, eckart, forge, read_document, undetected, vector
from safetensors.torch import load_file, save_file
from test_merging import SIDES, products, with_tensors, write_adapter

from eckart import convert, extract, lint, merge, resize, verify
from eckart.allocate import Item, Keep, RelativeError, Size, Terms, one_rank
from eckart.certificate import Certificate
from eckart.consumers import CONSUMERS, WORDS
from eckart.errors import LossError, UsageError

RANKS = {"layers.0.q": 6, "layers.0.up": 4, "layers.1.q": 1}
UNIFORM = [name for name, one in CONSUMERS.items() if one.uniform]
PIPELINES = [name for name, one in CONSUMERS.items() if one.components]


def options_for(consumer: str) -> dict[str, str]:
    """What it needs to be told, because the names here do not tell."""
    return {"component": "unet"} if consumer in PIPELINES else {}


def loaded(out: Path, consumer: str) -> dict[str, np.ndarray]:
    """What a consumer would add to each module, by its own rule, in float64."""
    (file,) = out.glob("*.safetensors")
    tensors = load_file(file)
    config = out / "adapter_config.json"
    stated = json.loads(config.read_text()) if config.exists() else {}
    found = {}
    for name in tensors:
        down = name.endswith((".lora_A.weight", ".lora_down.weight"))
        if not down:
            continue
        up = name.replace("lora_A", "lora_B").replace("lora_down", "lora_up")
        A, B = (tensors[part].double().numpy() for part in (name, up))
        X = name.rpartition(".lora_")[0].removeprefix("base_model.model.")
        match consumer:
            case "peft":
                alphas = stated["alpha_pattern"]
                pattern = "^" + X.replace(".", "\\.")
                scale = alphas.get(pattern, stated["lora_alpha"]) / len(A)
            case "vllm":
                scale = stated["lora_alpha"] / stated["r"]
            case "llama.cpp":
                scale = stated["lora_alpha"] / len(A)
            case "diffusers":
                scale = 1.0
            case "kohya":
                scale = float(tensors[f"{X}.alpha"]) / len(A)
        plain = X.removeprefix("unet.").removeprefix("lora_unet_")
        found[plain.replace("_", ".")] = scale * (B @ A)
    return found


@pytest.mark.parametrize("consumer", CONSUMERS)
def test_a_converted_adapter_is_the_same_by_the_consumers_own_rule(consumer, tmp_path):
    """Three ranks, a scale of 2: no digit changes, and it is verified and loads there."""
    given = write_adapter(tmp_path / "given", RANKS, 1, {"alpha_pattern": {"up": 8, "1.q": 2}})
    out = tmp_path / "out"
    certificate = convert(given, out, consumer=consumer, **options_for(consumer))
    expected, found = products(given, lambda X, r: 2.0), loaded(out, consumer)

    assert found.keys() == expected.keys()
    for X, product in expected.items():
        assert np.abs(found[X] - product).max() <= 1e-15 * np.abs(product).max()
    assert {row.relative_error for row in certificate.matrices} == {0.0}
    assert [row.rank for row in certificate.matrices] == [6, 4, 1]
    assert certificate.kind == "converted"
    for checks in (verify(out), verify(out, given)):
        assert [check for check in checks if not check.held] == []
    assert next(fit for fit in lint(out) if fit.consumer == consumer).loads


@pytest.mark.parametrize("consumer", CONSUMERS)
def test_a_merge_for_a_consumer_is_the_exact_sum_by_its_own_rule(consumer, tmp_path):
    """Different ranks and targets, a negative weight; what is counted is what is stored."""
    one = write_adapter(tmp_path / "one", {"layers.0.q": 4, "layers.1.q": 4}, 1)
    two = write_adapter(tmp_path / "two", {"layers.0.q": 2, "layers.0.up": 5}, 2)
    out, weights = tmp_path / "out", [0.75, -1.5]
    options = {"consumer": consumer, **options_for(consumer)}
    certificate = merge([one, two], out, weights=weights, error=0, **options)
    first, second = products(one, lambda X, r: 2.0), products(two, lambda X, r: 4 / r)
    found = loaded(out, consumer)

    assert found.keys() == first.keys() | second.keys()
    for X, product in found.items():
        expected = 0.75 * first.get(X, 0) - 1.5 * second.get(X, 0)
        assert np.linalg.norm(product - expected) < 1e-6 * np.linalg.norm(expected)
    assert all(check.held for check in verify(out, [one, two]))
    (file,) = out.glob("*.safetensors")
    stored = [t.numel() for name, t in load_file(file).items() if not name.endswith(".alpha")]
    assert sum(row.parameters[1] for row in certificate.matrices) == sum(stored)


def change(name: str, m: int, n: int, rank: int) -> torch.Tensor:
    """A change of a rank, the same one for the same name."""
    generator = torch.Generator().manual_seed(len(name) + rank)
    B, A = (torch.randn(*s, generator=generator) for s in ((m, rank), (rank, n)))
    return 0.1 * B @ A


KINDS = {
    "linear": "down_blocks.0.q.weight",
    "transposed": "down_blocks.0.c_attn.weight",
    "embedding": "down_blocks.0.embed_tokens.weight",
    "convolution": "down_blocks.0.conv.weight",
    "experts": "down_blocks.0.mlp.experts.0.up_proj.weight",
    "router": "down_blocks.0.mlp.gate.weight",
}
OTHERS = ["down_blocks.0.q.bias", "down_blocks.0.norm.weight"]


@pytest.fixture
def every_kind(tmp_path):
    """A base and a tuned model that differ in every kind of layer, a bias and a norm."""
    base = {
        KINDS["linear"]: decaying("q", 12, 8),
        "down_blocks.0.q.bias": vector("b", 12),
        KINDS["transposed"]: decaying("c", 8, 24),
        "down_blocks.0.c_attn.bias": vector("c", 24),
        KINDS["embedding"]: decaying("e", 20, 8),
        KINDS["convolution"]: decaying("k", 6, 36).reshape(6, 4, 3, 3),
        KINDS["experts"]: decaying("x", 16, 8),
        KINDS["router"]: decaying("r", 4, 8),
        "down_blocks.0.norm.weight": vector("n", 8),
    }
    tuned = dict(base)
    for name in [*KINDS.values(), *OTHERS]:
        m, n = len(base[name]), base[name][0].numel()
        tuned[name] = base[name] + change(name, m, n, 2).reshape(base[name].shape)
    for folder, tensors in (("base", base), ("tuned", tuned)):
        (tmp_path / folder).mkdir()
        save_file(tensors, tmp_path / folder / WEIGHTS, {"format": "pt"})
    return tmp_path / "tuned", tmp_path / "base"


@pytest.mark.parametrize("consumer", CONSUMERS)
def test_what_a_consumer_cannot_hold_is_lost_for_it_by_name(consumer, every_kind, tmp_path):
    """Exactly the kinds outside its entry, each with the reason; the rest is there, and proved."""
    tuned, base = every_kind
    one, out = CONSUMERS[consumer], tmp_path / "out"
    with pytest.raises(LossError):
        extract(tuned, base, out, rank=2, consumer=consumer)
    assert not out.exists()
    certificate = extract(tuned, base, out, rank=2, consumer=consumer, accept_loss=True)
    lost = {row.name: row.reason for row in certificate.lost}
    refused = {name for kind, name in KINDS.items() if kind not in one.holds}
    refused.add(KINDS["experts"])  # of PEFT too: half an expert is nothing that loaders stack

    assert {*KINDS} == {*WORDS}
    assert lost.keys() == refused | {*OTHERS}
    for name in refused - {KINDS["experts"]}:
        assert one.title in lost[name], lost[name]
    assert {row.name for row in certificate.matrices} == {*KINDS.values()} - refused
    assert max(row.relative_error for row in certificate.matrices) < 1e-5
    assert [check for check in verify(out, tuned, base=base) if not check.held] == []


MIXTURE = {
    "experts": ["layers.0.mlp.experts.gate_up_proj", "layers.0.mlp.experts.down_proj"],
    "router": ["layers.0.mlp.gate.weight"],
    "tied": ["embed_tokens.weight"],
}


@pytest.fixture
def mixture(tmp_path):
    """A mixture of experts, its head tied to its embedding, and one that differs in all of it."""
    config = json.dumps({"architectures": ["Qwen2MoeForCausalLM"], "tie_word_embeddings": True})
    shapes = {
        "embed_tokens.weight": (20, 8),
        "layers.0.self_attn.q_proj.weight": (8, 8),
        "layers.0.mlp.gate.weight": (2, 8),
        "layers.0.mlp.shared_expert.up_proj.weight": (12, 8),
    }
    for e in range(2):
        X = f"layers.0.mlp.experts.{e}"
        shapes |= {f"{X}.{side}_proj.weight": (12, 8) for side in ("gate", "up")}
        shapes[f"{X}.down_proj.weight"] = (8, 12)
    base = {name: decaying(name, *shape) for name, shape in shapes.items()}
    tuned = {name: W + change(name, *W.shape, 2) for name, W in base.items()}
    for folder, tensors in (("base", base), ("tuned", tuned)):
        (tmp_path / folder).mkdir()
        save_file(tensors, tmp_path / folder / WEIGHTS, {"format": "pt"})
        (tmp_path / folder / "config.json").write_text(config)
    return tmp_path / "tuned", tmp_path / "base"


@pytest.mark.parametrize("consumer", [name for name in CONSUMERS if name != "peft"])
def test_experts_routers_and_tied_wholes_are_held_by_peft_alone(consumer, mixture, tmp_path):
    """Extracted for PEFT all of it is there; the others lose it by name, and refuse to convert."""
    tuned, base = mixture
    of = ["--component", "transformer"] if consumer in PIPELINES else []
    complete = extract(tuned, base, tmp_path / "peft", rank=4, store_whole=["embeddings"])
    line = ("extract", tuned, "--base", base, "-o", tmp_path / "made", "--rank", 4, "--accept-loss")
    made = eckart(*line, "--for", consumer, *of)
    converted = eckart(
        "convert", tmp_path / "peft", "-o", tmp_path / "converted", "--for", consumer, *of
    )
    lost = {row["name"]: row["reason"] for row in read_document(tmp_path / "made")["lost"]}
    (fit,) = (fit for fit in lint(tmp_path / "peft") if fit.consumer == consumer)
    none = f"and {CONSUMERS[consumer].title} holds none"

    assert not complete.lost
    assert [row.name for row in complete.stored_whole] == MIXTURE["tied"]
    assert made.code == 0
    assert {*lost} == {name for names in MIXTURE.values() for name in names}
    assert all(f"routed experts, {none}" in lost[X] for X in MIXTURE["experts"])
    assert all(f"a router of experts, {none}" in lost[X] for X in MIXTURE["router"])
    assert "tied to the output head: " in lost["embed_tokens.weight"]
    assert [check for check in verify(tmp_path / "made", tuned, base=base) if not check.held] == []
    assert converted.code == 2
    assert f"{none}. Choose another --for." in converted.message
    assert not (tmp_path / "converted").exists()
    assert not fit.loads
    assert none in fit.detail


def test_a_mixture_is_copied_as_it_is_for_peft(mixture, tmp_path):
    """convert of stacks, a router and a tied whole: the same tensors, the same configuration."""
    tuned, base = mixture
    extract(tuned, base, tmp_path / "peft", rank=4, store_whole=["embeddings"])
    certificate = convert(tmp_path / "peft", tmp_path / "copy", consumer="peft")
    ours, theirs = (load_file(tmp_path / X / "adapter_model.safetensors") for X in ("peft", "copy"))
    configs = [
        json.loads((tmp_path / X / "adapter_config.json").read_text()) for X in ("peft", "copy")
    ]

    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert configs[0] == configs[1]
    assert configs[0]["target_parameters"]
    assert {row.relative_error for row in certificate.matrices} == {0.0}
    assert all(check.held for check in verify(tmp_path / "copy", tmp_path / "peft"))


def test_a_remedy_is_named_that_works(every_kind, tmp_path):
    """A norm for vLLM: PEFT holds it, and storing whole for vLLM is refused before any work."""
    tuned, base = every_kind
    done = eckart(
        "extract", tuned, "--base", base, "-o", tmp_path / "o", "--rank", 2, "--for", "vllm"
    )
    whole = ("--store-whole", "norms")
    line = ("extract", tuned, "--base", base, "-o", tmp_path / "o", "--rank", 2, "--accept-loss")
    refused = eckart(*line, "--for", "vllm", *whole)
    stored = eckart(*line, *whole)

    assert done.code == 6
    assert "a norm: vLLM holds none, PEFT does: --store-whole norms" in done.message
    assert refused.code == 2
    assert "vLLM loads nothing but products" in refused.message
    assert stored.code == 0
    assert [row["name"] for row in read_document(tmp_path / "o")["stored_whole"]] == [OTHERS[1]]


@pytest.mark.parametrize("consumer", UNIFORM)
@pytest.mark.parametrize("policy", [{"size": 1200}, {"keep": 0.3}], ids=str)
def test_a_budget_of_one_rank_is_the_largest_within_it(policy, consumer, every_kind, tmp_path):
    """All modules have it, zeros cost nothing more, and one rank more would exceed the budget."""
    tuned, base = every_kind
    options = {"consumer": consumer, "accept_loss": True, **policy}
    certificate = extract(tuned, base, tmp_path / "out", **options)
    ranks = {entry.rank for entry in certificate.factored.values()}
    spent, asked = spent_of(certificate, policy)
    (rank,) = ranks

    assert spent <= asked < spent * (rank + 1) / rank
    assert any("is the largest within --" in remark for remark in certificate.remarks)
    with pytest.raises(UsageError, match="cannot be reached"):
        extract(tuned, base, tmp_path / "no", consumer=consumer, accept_loss=True, size=100)


def spent_of(certificate: Certificate, policy: dict[str, float]) -> tuple[float, float]:
    """What an adapter takes of a budget, and the budget."""
    if "size" in policy:
        return certificate.totals.tensor_bytes[1], policy["size"]
    return certificate.totals.keep, policy["keep"]


def test_one_rank_is_found_to_the_last_parameter():
    """Exactly at the budget, one below it, in steps of `align`, never above the matrices."""
    items, terms = {"a": Item((8, 6)), "b": Item((4, 10))}, Terms(additive=True)
    each = 14 + 14

    def rank(parameters: int, align: int = 1) -> object:
        policy = Keep(parameters / 88)
        return one_rank(policy, items, Terms(additive=True, align=align)).value

    assert [rank(3 * each), rank(3 * each - 1), rank(each)] == [3, 2, 1]
    assert [rank(88, 2), rank(2 * each + 1, 2)] == [2, 2]
    assert one_rank(Size(10**6), items, terms).value == 6
    assert one_rank(RelativeError(0.1), items, terms) == RelativeError(0.1)
    assert one_rank(Keep(0.5), {}, terms) == Keep(0.5)
    with pytest.raises(UsageError, match="cannot be reached"):
        rank(each - 1)


def test_ranks_that_differ_are_padded_and_counted(tmp_path):
    """resize --error for vLLM: what was cut is the optimum, what is stored is the largest rank."""
    given = write_adapter(tmp_path / "given", RANKS, 1)
    certificate = resize(given, tmp_path / "out", error=0.4, consumer="vllm")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    ranks = {row.name: row.rank for row in certificate.matrices}
    largest = max(ranks.values())

    assert len({*ranks.values()}) > 1
    assert config["r"] == config["lora_alpha"] == largest
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    for name, tensor in tensors.items():
        X = name.removeprefix("base_model.model.").rpartition(".lora_")[0]
        padded = tensor if "lora_A" in name else tensor.mT
        assert len(padded) == largest
        assert not padded[ranks[f"{X}.weight"] :].any()
        assert padded[ranks[f"{X}.weight"] - 1].any()
    for row in certificate.matrices:
        assert row.parameters[1] == largest * sum(row.shape)
        assert row.relative_error == pytest.approx(row.optimum, abs=1e-6)
    assert "padded with zeros" in certificate.remarks[0]


def adapter_with(folder: Path, what: str) -> Path:
    """An adapter with something that not every consumer holds."""
    q = "base_model.model.layers.0.q"
    given = write_adapter(folder, {"layers.0.q": 4, "layers.1.q": 4}, 1, {"bias": "none"})
    extra = {
        "an embedding": {
            "base_model.model.embed_tokens.lora_embedding_A": torch.ones(4, 20),
            "base_model.model.embed_tokens.lora_embedding_B": torch.ones(8, 4),
        },
        "a convolution": {
            "base_model.model.conv.lora_A.weight": torch.ones(4, 3, 3, 3),
            "base_model.model.conv.lora_B.weight": torch.ones(5, 4, 1, 1),
        },
        "routed experts": {
            "base_model.model.mlp.experts.0.up_proj.lora_A.weight": torch.ones(4, 3),
            "base_model.model.mlp.experts.0.up_proj.lora_B.weight": torch.ones(5, 4),
        },
        "a bias": {f"{q}.lora_B.bias": torch.ones(24)},
        "a whole tensor": {"base_model.model.norm.weight": torch.ones(8)},
        "two names in one": {
            "base_model.model.layers_0.q.lora_A.weight": torch.ones(4, 16),
            "base_model.model.layers_0.q.lora_B.weight": torch.ones(24, 4),
        },
    }
    return with_tensors(given, extra[what])


REFUSED = {
    "an embedding": PIPELINES,
    "a convolution": ["vllm", "llama.cpp"],
    "routed experts": ["vllm", "llama.cpp", "diffusers", "kohya"],
    "a bias": ["vllm", "llama.cpp", "diffusers", "kohya"],
    "a whole tensor": ["vllm", "llama.cpp", "diffusers", "kohya"],
    "two names in one": ["kohya"],
}


@pytest.mark.parametrize("command", ["convert", "resize"])
@pytest.mark.parametrize("what", REFUSED)
def test_what_headers_show_is_refused_before_any_work(what, command, tmp_path):
    """Exit 2, the tensor and the reason, nothing written; everybody else gets the adapter."""
    given = adapter_with(tmp_path / "given", what)
    policy = ["--rank", 2] if command == "resize" else []
    for consumer in CONSUMERS:
        out = tmp_path / consumer
        component = ["--component", "unet"] if consumer in PIPELINES else []
        done = eckart(command, given, "-o", out, "--for", consumer, *policy, *component)

        assert done.code == (2 if consumer in REFUSED[what] else 0), (consumer, done.err)
        assert out.exists() == (consumer not in REFUSED[what])
        assert done.code == 0 or CONSUMERS[consumer].title in done.message or "--for" in done.err


@pytest.mark.parametrize(("rank", "needed"), [(8, 8), (16, 16), (17, 32), (257, 320), (512, 512)])
def test_vllm_is_told_its_largest_rank(rank, needed, tmp_path):
    """The next of the values that it takes; up to its default there is nothing to say."""
    given = with_rank(tmp_path / "given", rank)
    (found,) = (fit for fit in lint(given) if fit.consumer == "vllm")

    assert found.loads
    flag = f"start it with --max-lora-rank {needed} (default 16)"
    assert (flag in found.detail) == (rank > 16)
    assert found.detail.endswith("by rule, not run")


def with_rank(folder: Path, rank: int) -> Path:
    """An adapter of one module of a rank."""
    folder.mkdir()
    q = "base_model.model.layers.0.q.lora"
    tensors = {f"{q}_A.weight": torch.ones(rank, 2), f"{q}_B.weight": torch.ones(2, rank)}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_a_rank_that_vllm_does_not_take_is_refused(tmp_path):
    """513, in lint and in convert; and in extract, from the option alone."""
    given = with_rank(tmp_path / "given", 513)
    (found,) = (fit for fit in lint(given) if fit.consumer == "vllm")
    done = eckart("convert", given, "-o", tmp_path / "out", "--for", "vllm")

    assert not found.loads
    assert "rank 513, above 512" in found.detail
    assert done.code == 2
    assert "takes 512 at most" in done.message
    wide = {"q.weight": torch.zeros(600, 600)}
    for number in (0, 1):
        (tmp_path / str(number)).mkdir()
        wide["q.weight"] = wide["q.weight"] + number
        save_file(wide, tmp_path / str(number) / WEIGHTS)
    with pytest.raises(UsageError, match=r"q\.weight has rank 513, and vLLM takes 512"):
        extract(tmp_path / "1", tmp_path / "0", tmp_path / "out", rank=513, consumer="vllm")


LINTED = {
    "alpha twice the rank": ({}, {"layers.0.q": 4, "layers.1.q": 4}, "peft vllm llama.cpp"),
    "rsLoRA": ({"use_rslora": True}, {"layers.0.q": 4, "layers.1.q": 4}, "peft vllm"),
    "compact, scale 1": (
        {"r": 4, "lora_alpha": 4, "alpha_pattern": {"layers.1.q": 2}},
        {"layers.0.q": 4, "layers.1.q": 2},
        "peft vllm",
    ),
    "two ranks, one alpha": (
        {"lora_alpha": 4},
        {"layers.0.q": 4, "layers.1.q": 2},
        "peft llama.cpp",
    ),
    "ranks above r": (
        {"r": 1, "lora_alpha": 1, "rank_pattern": {"q": 4}, "alpha_pattern": {"q": 4}},
        {"layers.0.q": 4, "layers.1.q": 4},
        "peft",
    ),
}


@pytest.mark.parametrize("case", LINTED)
def test_an_adapter_that_others_wrote_is_judged_by_each_rule(case, tmp_path):
    """Where scale and rank are read as something else it does not load; converted, it does."""
    config, ranks, expected = LINTED[case]
    given = write_adapter(tmp_path / "given", ranks, 1, config)
    loads = [fit.consumer for fit in lint(given) if fit.loads]

    assert loads == expected.split()
    for consumer in CONSUMERS:
        out = tmp_path / consumer
        convert(given, out, consumer=consumer, **options_for(consumer))
        assert next(fit for fit in lint(out) if fit.consumer == consumer).loads


def test_verify_of_an_adapter_without_a_certificate(tmp_path):
    """It says who loads it and ends with 6; asked of one consumer, with what is true of it."""
    given = write_adapter(tmp_path / "given", RANKS, 1)
    plain = eckart("verify", given)
    document = eckart("verify", given, "--json")
    asked = {name: eckart("verify", given, "--for", name) for name in ("peft", "vllm")}

    assert plain.code == document.code == 6
    assert "an adapter without eckart.json" in plain.message
    assert "loads in" in plain.out
    assert "PEFT" in plain.out
    stated = json.loads(document.out)
    assert stated["held"] is False
    assert {fit["consumer"]: fit["loads"] for fit in stated["loads"]} == {
        "peft": True,
        "vllm": False,
        "llama.cpp": True,
        "diffusers": False,
        "kohya": False,
    }
    assert asked["peft"].code == 0
    assert asked["vllm"].code == 6
    assert "does not load there" in asked["vllm"].message
    dora = write_adapter(tmp_path / "dora", RANKS, 1, {"use_dora": True})
    assert eckart("verify", dora).code == 3
    assert eckart("verify", tmp_path / "nowhere").code == 3


def test_an_output_must_load_where_it_was_made_for(tmp_path):
    """A configuration and a certificate that agree on the wrong scale are found by the rule."""
    given = write_adapter(tmp_path / "given", RANKS, 1)
    convert(given, tmp_path / "peft", consumer="peft")
    forge(tmp_path / "peft", lambda document: document["options"].update({"for": "llama.cpp"}))
    failed = [check.name for check in verify(tmp_path / "peft") if not check.held]
    done = eckart("verify", given, "--for", "nobody")

    assert failed == ["config"]
    assert done.code == 2
    resize(given, tmp_path / "mixed", rank=4)
    asked = verify(tmp_path / "mixed", consumers=["llama.cpp"])
    assert [check.name for check in asked if not check.held] == ["loads in llama.cpp"]


def test_numbers_in_the_padding_are_found(tmp_path):
    """By verify against what it was made from, even where every digest was made to hold again."""
    given = write_adapter(tmp_path / "given", RANKS, 1)
    out, name = tmp_path / "out", "base_model.model.layers.1.q.lora"
    convert(given, out, consumer="vllm")
    tensors = load_file(out / "adapter_model.safetensors")
    tensors[f"{name}_A.weight"][-1] = tensors[f"{name}_B.weight"][:, -1] = 0.01
    save_file(tensors, out / "adapter_model.safetensors", {"format": "pt"})
    forge(out, lambda document: None)

    assert [check.name for check in verify(out, given) if not check.held] == ["layers.1.q.weight"]


def test_an_alpha_that_was_changed_is_found(tmp_path):
    """kohya's alpha is part of what is measured."""
    given = write_adapter(tmp_path / "given", {"layers.0.q": 4}, 1)
    out = tmp_path / "out"
    convert(given, out, consumer="kohya", component="unet")
    tensors = load_file(out / "lora.safetensors")
    tensors["lora_unet_layers_0_q.alpha"] *= 2
    save_file(tensors, out / "lora.safetensors", {"format": "pt"})
    forge(out, lambda document: None)
    failed = [check.name for check in verify(out, given) if not check.held]

    assert failed == ["unet.layers.0.q.weight"]


ROUNDED = {
    "a power of two": ({"lora_alpha": 1}, torch.bfloat16, None, 0.0, 0.0),
    "three halves in bfloat16": ({"lora_alpha": 6}, torch.bfloat16, None, 1e-4, 4e-3),
    "three halves in float32": ({"lora_alpha": 6}, torch.float32, None, 1e-9, 1e-7),
    "three halves, made wider": ({"lora_alpha": 6}, torch.bfloat16, "float32", 0.0, 1e-7),
    "rsLoRA": ({"lora_alpha": 6, "use_rslora": True, "r": 3}, torch.float32, None, 1e-9, 1e-7),
    "made narrower": ({"lora_alpha": 8}, torch.float32, "bfloat16", 1e-4, 6e-3),
    "below the smallest half": ({"lora_alpha": 2**-16}, torch.float16, None, 1e-3, 1.0),
}


@pytest.mark.parametrize("case", ROUNDED)
def test_the_error_of_a_conversion_is_measured_from_what_was_written(case, tmp_path):
    """0 for a power of two; else what numpy finds, and the certificate says so."""
    config, dtype, to, low, high = ROUNDED[case]
    rank = config.get("r", 4)
    given = write_adapter(tmp_path / "given", {"layers.0.q": rank}, 1, config, dtype=dtype)
    certificate = convert(given, tmp_path / "out", consumer="llama.cpp", dtype=to)
    scale = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
    (exact,) = products(given, lambda X, r: scale).values()
    (found,) = loaded(tmp_path / "out", "llama.cpp").values()
    (row,) = certificate.matrices
    error = np.linalg.norm(exact - found) / np.linalg.norm(exact)

    assert low <= row.relative_error <= high
    assert row.relative_error == pytest.approx(error, rel=1e-6, abs=1e-12)
    assert ("nothing was rounded" in certificate.remarks[0]) == (row.relative_error == 0)
    assert all(check.held for check in verify(tmp_path / "out", given))


def test_a_rank_above_a_layers_own_is_copied_as_it_is(tmp_path):
    """PEFT allows r = 20 on a layer with 16 columns; converted, it still has it."""
    given = write_adapter(tmp_path / "given", {"layers.0.q": 20, "layers.0.up": 2}, 1)
    certificate = convert(given, tmp_path / "out", consumer="vllm")

    assert [row.rank for row in certificate.matrices] == [20, 2]
    assert all(check.held for check in verify(tmp_path / "out", given))


def test_the_smallest_sufficient_rank_is_kept(tmp_path):
    """S = [1, 1, .01, .01, .01]: 99 % of the Frobenius norm needs 2, where kohya's own keeps 3."""
    generator = torch.Generator().manual_seed(0)
    Q = [torch.linalg.qr(torch.randn(n, 5, generator=generator))[0] for n in (24, 16)]
    values = torch.tensor([1, 1, 0.01, 0.01, 0.01])
    X = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {
        f"{X}.lora_up.weight": (Q[0] * values).contiguous(),
        f"{X}.lora_down.weight": Q[1].mT.contiguous(),
        f"{X}.alpha": torch.tensor(5.0),
    }
    save_file(tensors, tmp_path / "given.safetensors", {"format": "pt"})
    given, ranks = tmp_path / "given.safetensors", {}
    for fraction in (0.99, 0.4999, 0.5001, 0.99985, 0.9999):
        out = tmp_path / str(fraction)
        certificate = resize(given, out, energy=fraction, consumer="kohya")
        ranks[fraction] = certificate.matrices[0].rank
        assert load_file(out / "lora.safetensors")[f"{X}.alpha"] == ranks[fraction]

    assert ranks == {0.99: 2, 0.4999: 1, 0.5001: 2, 0.99985: 2, 0.9999: 3}
    assert all(check.held for check in verify(tmp_path / "0.99", given))


BAD_REQUESTS = {
    "no such consumer": ({"consumer": "tgi"}, "--for tgi is unknown"),
    "no such component": ({"consumer": "kohya", "component": "vae"}, "--component vae is unknown"),
    "a component where there is none": (
        {"consumer": "vllm", "component": "unet"},
        "are of one model",
    ),
    "a component that must be told": ({"consumer": "diffusers"}, "do not tell which model"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_a_request_that_makes_no_sense_is_refused(case, tmp_path):
    """One sentence, nothing written."""
    options, words = BAD_REQUESTS[case]
    given = write_adapter(tmp_path / "given", {"layers.0.q": 4}, 1)

    with pytest.raises(UsageError, match=words):
        convert(given, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


NAMINGS = {
    "down_blocks.0.attentions.0.proj_in": "diffusers kohya",
    "input_blocks.1.1.proj_in": "kohya",
    "transformer_blocks.0.attn.to_q": "diffusers",
    "double_blocks.0.img_attn.qkv": "kohya",
}


@pytest.mark.parametrize("module", NAMINGS)
def test_layers_go_only_where_they_have_that_name(module, tmp_path):
    """diffusers' names to diffusers, the original's to kohya; refused, and lost in extract."""
    SIDES[module] = (12, 8)
    given = write_adapter(tmp_path / "given", {module: 2}, 1)
    weights = {f"{module}.weight": decaying("w", 12, 8)}
    for number, folder in enumerate(("base", "tuned")):
        (tmp_path / folder).mkdir()
        new = {name: W + change("w", 12, 8, 2) * number for name, W in weights.items()}
        save_file(new, tmp_path / folder / WEIGHTS)
    del SIDES[module]
    line = ("extract", tmp_path / "tuned", "--base", tmp_path / "base", "--rank", 2)
    for consumer in PIPELINES:
        done = eckart("convert", given, "-o", tmp_path / consumer, "--for", consumer)
        taken = eckart(*line, "-o", tmp_path / f"x{consumer}", "--for", consumer)
        fits = consumer in NAMINGS[module].split()

        assert done.code == (0 if fits else 2), done.err
        assert taken.code == (0 if fits else 6), taken.err
        assert fits or "named as in" in done.message
        assert fits or "named as in" in taken.message


def test_any_changed_byte_of_an_adapter_for_kohya_is_found(tmp_path):
    """Every 7th byte of every file."""
    given = write_adapter(tmp_path / "given", {"layers.0.q": 4}, 1)
    out = tmp_path / "out"
    convert(given, out, consumer="kohya", component="unet")

    assert undetected(out, 7) == []
