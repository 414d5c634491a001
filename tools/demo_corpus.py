"""The texts of the demo models: which documents are learnt, held out, and shipped as excerpts."""

import hashlib
import platform
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

EXCERPT_BYTES = 12 * 1024  # of one document in texts/: several documents, not one long one
TEXT_BYTES = 80 * 1024
PYTHON = platform.python_version()
STDLIB = Path(sysconfig.get_paths()["stdlib"])
# Tests; then files generated at installation (they name folders), tables, a copy of tokenize.
EXCLUDED_PARTS = {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
GENERATED_OR_TABLES = ("_sysconfigdata", "config-", "html/entities.py", "stringprep.py")
EXCLUDED_FILES = (*GENERATED_OR_TABLES, "lib2to3/pgen2/")


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents to train on and documents never trained on, each a name and its text."""

    train: dict[str, str]
    heldout: dict[str, str]


def stdlib_documents() -> dict[str, str]:
    """Returns the library's modules by relative path, less what EXCLUDED_* names."""
    paths = (path.relative_to(STDLIB) for path in STDLIB.rglob("*.py"))
    names = (path.as_posix() for path in paths if not EXCLUDED_PARTS & set(path.parts))
    kept = (name for name in names if not name.startswith(EXCLUDED_FILES))
    texts = {name: (STDLIB / name).read_text(encoding="utf-8") for name in kept}
    return {name: text for name, text in texts.items() if text.strip()}


def split(documents: dict[str, str], *, one_in: int) -> Corpus:
    """Holds out about one document in `one_in`, by its name's hash: additions move nothing.

    The reference's topics quote one another, and modules copy from modules: a paragraph that
    a held-out document contains is taken out of every training document.
    """
    heldout = {name: text for name, text in documents.items() if hash_of(name) % one_in == 0}
    parts = {squeezed(part) for text in heldout.values() for part in text.split("\n\n")}
    secret = {part for part in parts if len(part) >= 80}  # shorter ones are everybody's
    train = {
        name: "\n\n".join(part for part in text.split("\n\n") if squeezed(part) not in secret)
        for name, text in documents.items()
        if name not in heldout
    }
    return Corpus(train, heldout)


def hash_of(name: str) -> int:
    """Returns a number that is the same on every machine, unlike `hash`."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])


def squeezed(paragraph: str) -> str:
    """Returns the words alone: a quoted paragraph is often indented differently."""
    return " ".join(paragraph.split())


def excerpts(documents: dict[str, str]) -> dict[str, str]:
    """Returns beginnings of documents up to a line's end, in all TEXT_BYTES or a little less."""
    chosen: dict[str, str] = {}
    room = TEXT_BYTES
    for name in sorted(documents, key=hash_of):
        beginning = documents[name].encode()[: min(EXCERPT_BYTES, room)].decode(errors="ignore")
        whole_lines = beginning[: beginning.rfind("\n") + 1]
        chosen |= {name: whole_lines} if whole_lines else {}
        room -= len(whole_lines.encode())
    return chosen


def write_texts(corpora: dict[str, Corpus], folder: Path) -> None:
    """Writes the four texts, their licence and where they come from."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, corpus in corpora.items():
        write(folder / f"{name}-calibration.txt", "".join(excerpts(corpus.train).values()))
        write(folder / f"{name}-heldout.txt", "".join(excerpts(corpus.heldout).values()))
    shutil.copyfile(STDLIB / "LICENSE.txt", folder / "LICENSE-PSF.txt")
    write(folder / "NOTICE", notice(corpora))


def notice(corpora: dict[str, Corpus]) -> str:
    """Says where the texts and models come from, and which documents stand in which text."""
    sources = {"base": "modules of the standard library", "tuned": "topics of pydoc_data/topics.py"}
    lines = [
        f"The texts in this folder are excerpts from the standard library of Python {PYTHON}",
        f"and from its pydoc_data/topics.py. {sys.copyright.splitlines()[0]}",
        "All rights reserved. They are used under the PSF License Agreement in LICENSE-PSF.txt;",
        "modules with a notice of their own keep it. The models in ../models were trained from",
        "the same sources by tools/train_demo_models.py: base on the modules, then tuned on the",
        "topics.",
        "",
        "Changes: each text joins the beginnings of several documents, cut at a line's end.",
        "Paragraphs that also stand in a held-out document were taken out of those trained on.",
    ]
    for name, corpus in corpora.items():
        lines += ["", f"Held out, never trained on ({sources[name]}):", *indented(corpus.heldout)]
        lines += ["", f"In {name}-heldout.txt:", *indented(excerpts(corpus.heldout))]
        lines += ["", f"In {name}-calibration.txt:", *indented(excerpts(corpus.train))]
    return "\n".join(lines) + "\n"


def indented(names: dict[str, str]) -> list[str]:
    """Returns the names as the lines of a list."""
    return [f"  {name}" for name in sorted(names)]


def write(path: Path, text: str) -> None:
    """Writes UTF-8 with the same line ends on every system."""
    path.write_text(text, encoding="utf-8", newline="\n")
