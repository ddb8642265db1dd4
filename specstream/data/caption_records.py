"""A file with a text for each medium of an array: which of them take part, and what they are told.

Shapes: n media that take part.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specstream.data.records import Location, Template
from specstream.data.text_vectors import text_vector


@dataclass(frozen=True, slots=True)
class Told:
    """Which media are of the wanted split, and the text of each as a vector."""

    rows: list[int]
    text: Tensor  # (n, text_size)


@dataclass(frozen=True, slots=True)
class CaptionRecords:
    """Records (.jsonl, .jsonl.gz or .parquet), as many as media and in the same order.

    Args:
        path: the file.
        template: how a record becomes the text, such as "{caption}".
        split: only records whose field `split` is this; None: all.
        size: width of the vector that a text becomes.
    """

    path: str
    template: str
    split: str | None
    size: int

    def check(self) -> None:
        """Raise ValueError for a file that is missing, or options that make no sense."""
        if self.size < 1:
            raise ValueError(f"text_size must be at least 1, got {self.size}")
        Location(self.path).check()
        Template(self.template).fields()

    def told(self, count: int) -> Told:
        """Return the texts of `count` media; ValueError where the records are not as many."""
        records = list(Location(self.path).records())
        if len(records) != count:
            raise ValueError(f"'{self.path}' has {len(records)} records for {count} media")
        rows = [
            number
            for number, (_, record) in enumerate(records)
            if self.split is None or record.get("split") == self.split
        ]
        if not rows:
            raise ValueError(f"'{self.path}' has no record of the split '{self.split}'")
        template = Template(self.template)
        texts = [text_vector(template.fill(*records[row]), self.size) for row in rows]
        return Told(rows, torch.stack(texts))
