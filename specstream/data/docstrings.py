"""English of a small character set that is on every machine: the standard library's docstrings."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from specstream.data.sources import Document, Segment, StdlibSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Docstrings(StdlibSource):
    """The docstrings of the files that `StdlibSource` reads, every character of them scored.

    One file is one document, held out together with the file itself: its docstrings in their
    order, with blank lines between.  All characters are printable ASCII or line breaks: tabs
    become blanks and the few other characters are left out.

    Args:
        limit: read only the first `limit` files (in sorted order); None reads all.
        min_bytes: smaller files are left out; so are files without docstrings.
    """

    @property
    def name(self) -> str:
        return "the standard library's docstrings"

    def documents(self, tokenizer: PreTrainedTokenizerFast | None) -> Iterator[Document]:
        root = self._root()
        for path in self.files():
            text = "\n\n".join(_docstrings(path))
            if text:
                key = path.relative_to(root).as_posix()
                yield Document(key=key, segments=(Segment(text, scored=True),))


def _docstrings(path: Path) -> list[str]:
    """Return the docstrings of a file in the order of its lines."""
    source = path.read_text(encoding="utf-8", errors="replace")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of wrong escapes: the library's affair, not the user's
        tree = ast.parse(source, filename=str(path))
    nodes = [node for node in ast.walk(tree) if isinstance(node, DOCUMENTED)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))  # the module comes first
    found = (_plain(ast.get_docstring(node) or "") for node in nodes)
    return [text for text in found if text]


def _plain(text: str) -> str:
    return "".join(c for c in text if c == "\n" or " " <= c <= "~").strip()
