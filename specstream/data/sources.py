"""Where text comes from: each source yields documents, and names what it would read.

A document is a few segments, scored (to be predicted) or given (a prompt).  Which documents are
held out is a pure function of their keys, so the split survives a new machine and a new order.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of text; `scored` says whether the model is to predict it."""

    text: str
    scored: bool


@dataclass(frozen=True, slots=True)
class Document:
    """Text that belongs together.  Documents with one key always land in the same split."""

    key: str
    segments: tuple[Segment, ...]

    @property
    def text(self) -> str:
        return "".join(segment.text for segment in self.segments)


class TextSource(ABC):
    """Yields documents in a fixed order; subclasses are frozen dataclasses of their options."""

    masked: ClassVar[bool] = False  # True: only a part of each document is scored

    @abstractmethod
    def check(self) -> None:
        """Raise ValueError when what the source names is not there; reads nothing large."""

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """Yield every document, in an order that never changes."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Identify the content (not only the name) of the source; part of the cache key."""


def held_out_position(key: str) -> float:
    """Return a stable number in [0, 1) for a key: below the held-out fraction means held out."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2.0**64


@dataclass(frozen=True)
class StdlibSource(TextSource):
    """The Python standard library's own source files: real text that is on every machine.

    One file is one document, its key the path relative to the library, so that the held-out files
    are the same for everyone.  Tests, generated tables and vendored packages are left out.

    Args:
        limit: read only the first `limit` files (in sorted order); None reads all.
        min_characters: shorter files (empty `__init__.py`) are left out.
    """

    limit: int | None = None
    min_characters: int = 200

    EXCLUDED: ClassVar[frozenset[str]] = frozenset(
        {
            "site-packages",
            "dist-packages",
            "__pycache__",
            "test",
            "tests",
            "idlelib",
            "lib2to3",
            "ensurepip",
            "encodings",  # generated tables
            "pydoc_data",
            "turtledemo",
            "lib-dynload",
            "_vendor",
        }
    )

    def files(self) -> list[Path]:
        """Return the source files in sorted order of their relative paths."""
        root = self._root()
        found = []
        for folder, names, files in os.walk(root):
            names[:] = sorted(n for n in names if n not in self.EXCLUDED and "config-" not in n)
            found += [Path(folder, name) for name in files if name.endswith(".py")]
        found = [path for path in found if path.stat().st_size >= self.min_characters]
        found.sort(key=lambda path: path.relative_to(root).as_posix())
        return found[: self.limit]

    def check(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"StdlibSource: limit must be at least 1, not {self.limit}")
        if not self.files():
            raise ValueError(f"no .py files of the standard library found under {self._root()}")

    def documents(self) -> Iterator[Document]:
        root = self._root()
        for path in self.files():
            text = path.read_text(encoding="utf-8", errors="replace").replace("\r\n", "\n")
            key = path.relative_to(root).as_posix()
            yield Document(key=key, segments=(Segment(text, scored=True),))

    def fingerprint(self) -> str:
        root, digest = self._root(), hashlib.sha256(repr(self).encode())
        for path in self.files():
            stat = path.stat()
            entry = f"{path.relative_to(root).as_posix()} {stat.st_size} {stat.st_mtime_ns}\n"
            digest.update(entry.encode())
        return digest.hexdigest()

    @staticmethod
    def _root() -> Path:
        return Path(sysconfig.get_paths()["stdlib"])
