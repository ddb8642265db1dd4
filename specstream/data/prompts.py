"""Prompts to decode, read from a file."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

from specstream.data.records import Location, Template
from specstream.data.sources import check_limit


@dataclass(frozen=True)
class PromptFile:
    """A file of prompts, one for each record (.jsonl, .jsonl.gz, .parquet).

    Args:
        path: the file.
        prompt: template of the prompt: `"{prompt}"`, `"{mr}\\n"`, `"{turns[0]}"`.
        limit: only the first `limit` prompts.
    """

    path: str
    prompt: str = "{prompt}"
    limit: int | None = None

    def read(self) -> list[str]:
        """Return the prompts in the order of the file.

        Raises ValueError with the line number when a line is not JSON or lacks the field, and when
        the file is missing or empty.
        """
        check_limit(f"prompts '{self.path}'", self.limit)
        location, template = Location(self.path), Template(self.prompt)
        location.files()  # a file is meant, even if the name would do for the hub
        records = islice(location.records(), self.limit)
        prompts = [template.fill(place, record) for place, record in records]
        if not prompts:
            raise ValueError(f"'{self.path}' holds no prompts")
        return prompts
