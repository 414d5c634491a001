"""The house's own rules, which no other tool checks."""

import ast
import importlib
from pathlib import Path

import pytest

import eckart

ROOT = Path(__file__).parents[1]
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))
PUBLIC = """
inspect compress compress_module calibrate refine extract resize merge apply convert densify verify
report load
"""


def functions_of(path: Path) -> list[ast.FunctionDef]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test")
    ]


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_test_says_in_a_sentence_what_must_hold(path):
    """Each test function has a docstring, and it is a sentence."""
    found = {node.name: ast.get_docstring(node) or "" for node in functions_of(path)}

    assert [name for name, text in found.items() if not text.rstrip().endswith(".")] == []


def test_test_files_have_names_of_their_own():
    """pytest imports them by base name, so two of the same name would shadow each other."""
    names = [path.name for path in TESTS]

    assert sorted(set(names)) == sorted(names)


def test_test_folders_mirror_the_source():
    """A folder of tests is a folder of the package."""
    for path in TESTS:
        folder = path.parent.relative_to(ROOT / "tests")

        assert (ROOT / "src" / "eckart" / folder).is_dir(), path


def test_no_module_bears_the_name_of_a_public_function():
    """`import eckart.verify` would replace the function `eckart.verify`."""
    modules = {path.stem for path in (ROOT / "src" / "eckart").iterdir() if path.name[0] != "_"}

    assert modules & set(PUBLIC.split()) == set()
    assert modules & set(eckart.__all__) == set()


def test_every_public_name_resolves():
    """`eckart.__all__` and `dir(eckart)` promise only what is there."""
    for name in eckart.__all__:
        assert getattr(eckart, name) is not None
    assert dir(eckart) == eckart.__all__
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = eckart.nonsense


def test_public_names_keep_standing_for_themselves_after_every_module_is_imported():
    """No submodule, once imported, takes the place of a public name."""
    before = {name: getattr(eckart, name) for name in eckart.__all__}
    for path in sorted((ROOT / "src" / "eckart").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT / "src").with_suffix("").parts)
        importlib.import_module(module.removesuffix(".__init__"))

    assert {name: getattr(eckart, name) for name in eckart.__all__} == before


def test_every_module_says_what_it_knows():
    """A docstring at the head of every file of the package."""
    for path in sorted((ROOT / "src" / "eckart").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))

        assert ast.get_docstring(tree), path


def test_the_readme_names_the_two_commands():
    """`make demo` and `make test`."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")

    assert "make demo" in readme
    assert "make test" in readme
