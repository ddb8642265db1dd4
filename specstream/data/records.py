"""Read records from local files (.jsonl, .jsonl.gz, .parquet, .txt, .txt.gz) or from the hub.

A record is a dictionary of fields; a text file is one record with the field `text`.  Every problem
with the input is a ValueError of one line that says what is missing and what is there instead.
"""

from __future__ import annotations

import glob
import gzip
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

Record = dict[str, Any]

FORMATS = (".jsonl", ".jsonl.gz", ".parquet", ".txt", ".txt.gz")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True, slots=True)
class Location:
    """Where records lie.

    Attributes:
        path: a local file, a pattern of local files (`data/x/*.jsonl.gz`) or a hub data set id.
        split, subset: of a hub data set ("train" unless said); None for local files.
    """

    path: str
    split: str | None = None
    subset: str | None = None

    @property
    def is_local(self) -> bool:
        named_as_file = self.path.endswith(FORMATS) or any(c in self.path for c in "*?[")
        return named_as_file or Path(self.path).exists() or not HUB_ID.fullmatch(self.path)

    def files(self) -> list[Path]:
        """Return the local files, sorted; raise ValueError when there are none."""
        files = [Path(name) for name in sorted(glob.glob(self.path))] or [Path(self.path)]
        for file in files:
            if not file.exists():
                raise ValueError(_missing(file))
            if not file.name.endswith(FORMATS):
                what = "a folder" if file.is_dir() else "not of a known format"
                raise ValueError(f"'{file}' is {what}; name {', '.join(FORMATS)} files")
        return files

    def check(self) -> None:
        """Raise ValueError when a local file is missing; does not ask the hub."""
        if not self.is_local:
            return
        self.files()
        if self.split is not None or self.subset is not None:
            raise ValueError(f"'{self.path}' is a local file: split and subset are for the hub")

    def records(self) -> Iterator[tuple[str, Record]]:
        """Yield (place, record); the place names file and line for error messages."""
        if not self.is_local:
            yield from self._hub_records()
            return
        for file in self.files():
            if file.name.endswith(".parquet"):
                yield from _parquet_records(file)
            elif file.name.endswith((".txt", ".txt.gz")):
                yield str(file), {"text": _read_text(file)}
            else:
                yield from _jsonl_records(file)

    def fingerprint(self) -> str:
        """Identify the content: names, sizes and times of local files, id and split of others."""
        if not self.is_local:
            return repr(self)
        stats = [(str(file), file.stat()) for file in self.files()]
        return repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])

    def _hub_records(self) -> Iterator[tuple[str, Record]]:
        from datasets import load_dataset

        split = self.split or "train"
        place = f"{self.path} ({split})"
        try:
            dataset = load_dataset(self.path, self.subset, split=split)
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise ValueError(f"the data set '{place}' could not be loaded: {reason}") from error
        for number, record in enumerate(dataset, start=1):
            yield f"{place}, record {number}", record


@dataclass(frozen=True, slots=True)
class Template:
    """A text with fields in braces, such as `{question}` or `{turns[0]}`; `{{` is a brace."""

    text: str

    def fields(self) -> list[str]:
        """Return the names of the fields; raise ValueError when the braces do not match."""
        try:
            names = [name for _, name, _, _ in Formatter().parse(self.text) if name is not None]
        except ValueError as error:
            raise ValueError(f"template {self.text!r}: {error}") from error
        return [re.split(r"[.\[]", name)[0] for name in names]

    def fill(self, place: str, record: Record) -> str:
        """Put the fields of a record into the text."""
        for name in self.fields():
            require_field(place, record, name)
        try:
            return self.text.format_map(record)
        except (IndexError, KeyError, AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{place}: template {self.text!r} does not fit: {error!r}") from error


def require_field(place: str, record: Record, name: str) -> Any:
    """Return a field; raise ValueError naming the fields that exist when it is not there."""
    if record.get(name) is None:
        has = ", ".join(sorted(record)) or "no fields"
        what = "is null" if name in record else "is missing"
        raise ValueError(f"{place}: field '{name}' {what}; the record has {has}")
    return record[name]


def _missing(file: Path) -> str:
    folder = file.parent
    if not folder.is_dir():
        return f"'{file}' does not exist, nor does the folder '{folder}' (docs/data.md)"
    names = sorted(f.name for f in folder.iterdir() if f.name.endswith(FORMATS))
    return f"'{file}' does not exist; '{folder}' has {', '.join(names[:8]) or 'no data files'}"


def _open_bytes(file: Path) -> Any:
    return gzip.open(file, "rb") if file.name.endswith(".gz") else file.open("rb")


def _read_text(file: Path) -> str:
    try:
        with _open_bytes(file) as stream:
            return stream.read().decode("utf-8").replace("\r\n", "\n")
    except (gzip.BadGzipFile, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"'{file}' cannot be read as text: {error}") from error


def _jsonl_records(file: Path) -> Iterator[tuple[str, Record]]:
    number = 0
    with _open_bytes(file) as stream:
        lines = enumerate(stream, start=1)
        while True:
            try:
                number, line = next(lines)
                record = json.loads(line) if line.strip() else None
            except StopIteration:
                return
            except (gzip.BadGzipFile, EOFError) as error:
                raise ValueError(f"'{file}' is damaged after line {number}: {error}") from error
            except ValueError as error:  # not JSON, or not UTF-8
                raise ValueError(f"'{file}' line {number} is not JSON: {error}") from error
            if record is None:
                continue
            if not isinstance(record, dict):
                kind = type(record).__name__
                raise ValueError(f"'{file}' line {number} holds a {kind}, not an object of fields")
            yield f"'{file}' line {number}", record


def _parquet_records(file: Path) -> Iterator[tuple[str, Record]]:
    from pyarrow import ArrowException, parquet

    number = 0
    try:
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=1024):
            for record in batch.to_pylist():
                number += 1
                yield f"'{file}' record {number}", record
    except (ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"'{file}' is damaged after record {number}: {reason}") from error
