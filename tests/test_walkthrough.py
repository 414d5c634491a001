"""The walkthrough runs, and its figures are those of the worked example."""

import ast
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "examples" / "walkthrough.ipynb"

pytestmark = pytest.mark.filterwarnings("default")  # Jupyter's own deprecations are not ours


@pytest.fixture(scope="module")
def outputs() -> list[str]:
    """What each code cell shows when the notebook is run afresh."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    return shown(notebook)


def shown(notebook: nbformat.NotebookNode) -> list[str]:
    cells = (cell for cell in notebook.cells if cell.cell_type == "code")
    return [
        "".join(out.get("text") or out["data"]["text/plain"] for out in cell.outputs)
        for cell in cells
    ]


def test_the_figures_of_the_worked_example_hold(outputs):
    """Ranks 2; 10, 1, 10; 2, 2, 2; equal outputs; 100 parameters against 40."""
    results = {index: ast.literal_eval(outputs[index]) for index in (1, 2, 4, 5, 6, 7, 8)}

    assert results[1] == 2
    assert results[2] == {"U": ((10, 10), 10), "S": ((10,), 1), "V": ((10, 10), 10)}
    assert results[4] == {"U_r": ((10, 2), 2), "S_r": ((2, 2), 2), "V_r": ((2, 10), 2)}
    assert results[5] == ((10, 2), (2, 10), True)
    assert results[6][0] is True
    assert results[7] == {"dense": 100, "factored": 40, "break-even rank": 4}
    assert results[8] == (36, True)


def test_the_trained_weight_is_not_worth_factoring(outputs):
    """The demo model's matrix has full rank, and 99 % of its energy lies beyond break-even."""
    found = ast.literal_eval(outputs[9])
    table = [line.split() for line in outputs[11].strip().splitlines()[1:]]
    errors = [float(row[3]) for row in table]

    assert found["shape"] == (384, 128)
    assert found["rank"] == 128
    assert found["break-even rank"] == 95
    assert found["rank of 99 % of the energy"] > 95
    assert errors == sorted(errors, reverse=True)
    assert [row[3] for row in table] == [row[4] for row in table]


def test_the_notebook_as_committed_shows_what_it_computes(outputs):
    """The exact figures stored in the file are those of a fresh run."""
    stored = shown(nbformat.read(NOTEBOOK, as_version=4))

    for index in (1, 2, 4, 5, 7, 8, 9):
        assert stored[index] == outputs[index]
