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
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from specstream.data.records import Location, Template, require_field

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of text; `scored` says whether the model is to predict it."""

    text: str
    scored: bool


@dataclass(frozen=True, slots=True)
class Document:
    """Text that belongs together.

    Attributes:
        key: documents with one key always land in the same split.
        segments: the text, in order.
        rendered: a chat template made the text: special tokens in it are meant as such, and its
            own beginning and end are kept.
    """

    key: str
    segments: tuple[Segment, ...]
    rendered: bool = False

    @property
    def text(self) -> str:
        return "".join(segment.text for segment in self.segments)


class TextSource(ABC):
    """Yields documents in a fixed order; subclasses are frozen dataclasses of their options."""

    masked: ClassVar[bool] = False  # True: only a part of each document is scored

    @property
    @abstractmethod
    def name(self) -> str:
        """What to call the source on the screen."""

    @abstractmethod
    def check(self) -> None:
        """Raise ValueError when the options are wrong or a local file is missing; reads no data."""

    @abstractmethod
    def documents(self, tokenizer: PreTrainedTokenizerFast | None) -> Iterator[Document]:
        """Yield every document, in an order that never changes.

        `tokenizer` is for its chat template; None where a tokenizer is yet to be trained.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Identify options and content (not only the name) of the source: a cache key."""


def held_out_position(key: str) -> float:
    """Return a stable number in [0, 1) for a key: below the held-out fraction means held out."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2.0**64


def check_limit(source: str, limit: int | None) -> None:
    """Raise ValueError unless the limit is None or positive."""
    if limit is not None and limit < 1:
        raise ValueError(f"{source}: limit must be at least 1 (or null for all), not {limit}")


@dataclass(frozen=True)
class StdlibSource(TextSource):
    """The Python standard library's own source files: real text that is on every machine.

    One file is one document, its key the path relative to the library, so that the held-out files
    are the same for everyone.  Tests, generated tables and vendored packages are left out.

    Args:
        limit: read only the first `limit` files (in sorted order); None reads all.
        min_bytes: smaller files (an empty `__init__.py`) are left out.
    """

    limit: int | None = None
    min_bytes: int = 200

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

    @property
    def name(self) -> str:
        return "the standard library"

    def files(self) -> list[Path]:
        """Return the source files in sorted order of their relative paths."""
        root = self._root()
        found = []
        for folder, names, files in os.walk(root):
            names[:] = sorted(n for n in names if n not in self.EXCLUDED and "config-" not in n)
            found += [Path(folder, name) for name in files if name.endswith(".py")]
        found = [path for path in found if path.stat().st_size >= self.min_bytes]
        found.sort(key=lambda path: path.relative_to(root).as_posix())
        return found[: self.limit]

    def check(self) -> None:
        check_limit("StdlibSource", self.limit)
        if not self.files():
            raise ValueError(f"no .py files of the standard library found under '{self._root()}'")

    def documents(self, tokenizer: PreTrainedTokenizerFast | None) -> Iterator[Document]:
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


@dataclass(frozen=True)
class RawText(TextSource):
    """Plain text, every token scored: one document for each record, or for each text file.

    Args:
        path: local .jsonl(.gz), .parquet or .txt(.gz) file or pattern, or a hub data set id.
        field: the field of a record that holds the text (`text` for text files).
        split, subset: of a hub data set.
        limit: only the first `limit` documents.
    """

    path: str
    field: str = "text"
    split: str | None = None
    subset: str | None = None
    limit: int | None = None

    @property
    def name(self) -> str:
        return self.path

    @property
    def location(self) -> Location:
        return Location(self.path, self.split, self.subset)

    def check(self) -> None:
        check_limit(f"RawText '{self.path}'", self.limit)
        self.location.check()

    def documents(self, tokenizer: PreTrainedTokenizerFast | None) -> Iterator[Document]:
        for place, record in islice(self.location.records(), self.limit):
            text = str(require_field(place, record, self.field))
            if text:
                yield Document(key=text, segments=(Segment(text, scored=True),))

    def fingerprint(self) -> str:
        return repr(self) + self.location.fingerprint()


@dataclass(frozen=True)
class PromptCompletion(TextSource):
    """A given prompt and a completion to be predicted, both made from the fields of a record.

    Documents are held out by their prompt, so that no prompt is in two splits.

    Args:
        path: local .jsonl(.gz) or .parquet file or pattern, or a hub data set id.
        prompt, completion: templates such as `"{question}\\n"`, with the fields in braces.  End
            the prompt where a token ends: after a line break, say, rather than after a blank.
        split, subset: of a hub data set.
        limit: only the first `limit` documents.
    """

    path: str
    prompt: str = "{prompt}"
    completion: str = "{completion}"
    split: str | None = None
    subset: str | None = None
    limit: int | None = None

    masked: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return self.path

    @property
    def location(self) -> Location:
        return Location(self.path, self.split, self.subset)

    def check(self) -> None:
        check_limit(f"PromptCompletion '{self.path}'", self.limit)
        for option, template in (("prompt", self.prompt), ("completion", self.completion)):
            if not Template(template).fields():
                raise ValueError(
                    f"PromptCompletion '{self.path}': {option} {template!r} names no field; "
                    "write it as a template, such as '{question}'"
                )
        self.location.check()

    def documents(self, tokenizer: PreTrainedTokenizerFast | None) -> Iterator[Document]:
        prompt, completion = Template(self.prompt), Template(self.completion)
        for place, record in islice(self.location.records(), self.limit):
            given = prompt.fill(place, record)
            segments = (Segment(given, False), Segment(completion.fill(place, record), True))
            yield Document(key=given, segments=segments)

    def fingerprint(self) -> str:
        return repr(self) + self.location.fingerprint()
