"""The standard library's docstrings as plain text."""

from __future__ import annotations

from pathlib import Path

import pytest

from specstream.data import Docstrings, StdlibSource

MODULE = '''"""Module  caf\u00e9.

    Indented \u2014 text.
"""

def outer():
    """Outer.

    A\ttab.
    """
    def inner():
        "Inner \\d."

class Later:
    async def method(self):
        """Method."""

def silent():
    return "no docstring"
'''


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library of two files, one without docstrings."""
    (tmp_path / "one.py").write_text(MODULE, encoding="utf-8")
    (tmp_path / "two.py").write_text("x = 1\n" * 100)
    monkeypatch.setattr(StdlibSource, "_root", staticmethod(lambda: tmp_path))
    return tmp_path


def test_a_file_gives_its_docstrings_in_their_order(library: Path, recwarn) -> None:
    [document] = Docstrings().documents(None)
    assert document.key == "one.py"
    assert [segment.scored for segment in document.segments] == [True]
    assert document.text == (
        "Module  caf.\n\nIndented  text.\n\nOuter.\n\nA   tab.\n\nInner \\d.\n\nMethod."
    )
    assert not recwarn.list, "the library's own warnings stay off the screen"


def test_the_library_of_this_machine_has_few_characters_and_much_text() -> None:
    documents = list(Docstrings(limit=25).documents(None))
    text = "".join(document.text for document in documents)
    assert len(text) > 5_000
    assert set(text) <= {"\n", *map(chr, range(ord(" "), ord("~") + 1))}
    keys = [document.key for document in documents]
    of_files = [document.key for document in StdlibSource(limit=25).documents(None)]
    assert keys == [key for key in of_files if key in keys], "keys are held out as the files are"


def test_docstrings_and_files_are_different_content() -> None:
    assert Docstrings(limit=2).fingerprint() != StdlibSource(limit=2).fingerprint()
    with pytest.raises(ValueError, match="limit must be at least 1"):
        Docstrings(limit=0).check()
