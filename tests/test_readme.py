"""What the README shows is what happens."""

import re
from pathlib import Path

import pytest
import torch
from builders import eckart
from test_cli import COMMANDS

from eckart.demonstration.scene import embedded

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)


def test_the_python_of_the_readme_runs_and_prints_its_comments(capsys):
    """The ten lines print the rank and the counts that stand beside them."""
    code, _ = (text for language, text in BLOCKS if language == "python")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exec(compile(code, "README.md", "exec"), {})

    assert capsys.readouterr().out.splitlines() == ["2", "100 → 40"]
    assert "print(eckart.matrix_rank(W))  # 2" in code
    assert 'print(W.numel(), "→", f.parameters)  # 100 → 40' in code


@pytest.fixture
def at_home(tmp_path, monkeypatch) -> Path:
    """An empty folder with the embedded models in it, as MODEL and TUNED, and a TEXT."""
    for name, model in (("MODEL", "base"), ("TUNED", "tuned")):
        (tmp_path / name).symlink_to(embedded("models", model))
    (tmp_path / "TEXT").symlink_to(embedded("texts", "base-calibration.txt"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_of_the_readme_run(at_home):
    """Every command of every use case, as it stands there, on the embedded models."""
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    blocks = [text for _, text in BLOCKS if text.startswith("eckart ")]
    lines = [line.partition("#")[0].split() for text in blocks for line in text.splitlines()]
    codes = [eckart(*line[1:]).code for line in lines]

    assert {line[1] for line in lines} == {*COMMANDS} - {"demo"}
    assert codes == [0] * len(lines)


def test_the_loading_of_the_readme_runs(at_home):
    """On what the first commands write: factored by transformers, then multiplied out."""
    pytest.importorskip("transformers")
    _, code = (text for language, text in BLOCKS if language == "python")
    names: dict[str, object] = {}
    assert eckart("compress", "MODEL", "-o", "SMALL", "--keep", "0.6").code == 0
    exec(compile(code, "README.md", "exec"), names)

    assert len(names["targets"]) == 2 * 2 * len(names["plain"].model.layers)
    assert type(names["plain"].model.layers[0].self_attn.q_proj).__name__ == "Linear"


def test_the_tree_of_the_readme_has_a_line_for_every_file():
    """Every module, and none that is gone."""
    (tree,) = (text for _, text in BLOCKS if text.startswith("src/eckart/"))
    named = re.findall(r"[├└]── (\w+\.py)", tree)
    folder = ROOT / "src" / "eckart"
    modules = [path.name for path in folder.rglob("*.py")]
    packages = [path.parent.name for path in folder.glob("*/__init__.py")]

    assert sorted(named) == sorted([*(m for m in modules if m != "__init__.py"), "__init__.py"])
    assert all(f"── {package}/" in tree for package in packages)
