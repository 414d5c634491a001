"""What `eckart demo` tells is measured, and fits a terminal."""

import importlib.util
import re
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from eckart.demonstration import calibrated, story
from eckart.demonstration.scene import Scene, embedded
from eckart.errors import PromiseError, UsageError
from eckart.evaluation import perplexity
from eckart.verification import Check

WINDOWS = 4


@pytest.fixture
def brief(monkeypatch) -> None:
    """The story, shortened: two budgets, one adapter, little text."""
    monkeypatch.setattr(story, "KEEPS", (0.8, 0.5))
    monkeypatch.setattr(story, "RANKS", (2,))
    monkeypatch.setattr(calibrated, "WINDOWS", WINDOWS)
    monkeypatch.setattr(calibrated, "TRIAL_BYTES", 2560)


def told(folder: Path, *, force: bool = False) -> str:
    """What the story prints, into a file."""
    page = StringIO()
    story.tell(folder, Console(file=page, width=80, highlight=False), force=force)
    return page.getvalue()


def row(text: str, name: str) -> list[str]:
    """The numbers of a row of a table."""
    (found,) = re.findall(rf"^ +{re.escape(name)} +([-+.\d ]+)$", text, re.MULTILINE)
    return found.split()


def test_the_story_prints_what_transformers_reads_from_its_outputs(brief, tmp_path, monkeypatch):
    """Perplexities of the dense, plain, calibrated and tried ones, and of one multiplied out."""
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    text = told(Path("here"))
    heldout = embedded("texts", "base-heldout.txt")

    def of(name: str) -> str:
        return f"{perplexity(Path('here', name), heldout, windows=WINDOWS).value:.3f}"

    assert row(text, "dense") == [of("base")]
    assert row(text, "keep 0.8")[::2] == [of("keep-0.8"), of("fit-0.8")]
    assert row(text, "keep 0.5")[::2] == [of("keep-0.5"), of("fit-0.5")]
    assert row(text, "… tried on a text")[0] == of("tried-0.5")
    assert row(text, "its perplexity, by any loader") == [of("fit-0.5")]
    assert float(of("tried-0.5")) < float(of("fit-0.5")) < float(of("keep-0.5"))
    prose = [line for line in text.splitlines() if "eckart" not in line]
    assert max(map(len, prose)) <= 80


def test_without_transformers_the_story_says_what_it_skips(brief, tmp_path, monkeypatch):
    """One sentence and how to install it; matrices and adapters are told of all the same."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name)
    )
    text = told(tmp_path)

    assert "They need transformers: pip install 'eckart[hf]'" in text
    assert "Perplexity" not in text
    assert (tmp_path / "with-lora-2" / "eckart.json").exists()
    with pytest.raises(UsageError, match="add --force"):
        told(tmp_path)


def test_no_window_of_the_evaluation_is_in_the_calibration_text():
    """They are cut from different files, and share no 256 bytes at any offset."""
    seen, unseen = (embedded("texts", f"base-{part}.txt") for part in ("calibration", "heldout"))
    text, other = seen.read_bytes(), unseen.read_bytes()

    assert not any(other[i : i + 256] in text for i in range(0, len(other) - 255, 256))


def test_a_promise_that_is_not_kept_ends_the_story(tmp_path):
    """With the check's own words."""
    scene = Scene(Console(file=StringIO()), tmp_path)

    assert scene.check(tmp_path, [Check("files", held=True, detail="fine")]) == 1
    with pytest.raises(PromiseError, match="does not hold its promise: a byte is wrong"):
        scene.check(tmp_path, [Check("files", held=False, detail="a byte is wrong")])
