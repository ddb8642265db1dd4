"""Held-out prompts whose good continuations are known, for the task metrics of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from specstream.data.records import Location, Template


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and what a good continuation of it says, in one or several ways."""

    prompt: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class QuestionFile:
    """The records of a file (.jsonl, .jsonl.gz, .parquet); those of equal prompts are one question.

    Args:
        path: the file.
        prompt: template of a prompt, with the fields of a record in braces, as in training.
        references: templates of the references that a record holds, one or several.
    """

    path: str
    prompt: str = "{prompt}"
    references: list[str] = field(default_factory=lambda: ["{completion}"])

    def check(self) -> None:
        """Raise ValueError when the file is missing or a template names no field."""
        if not Path(self.path).is_file():
            raise ValueError(f"there is no file of questions '{self.path}'")
        if not self.references:
            raise ValueError(f"questions '{self.path}': references names no template")
        for template in (self.prompt, *self.references):
            if not Template(template).fields():
                raise ValueError(f"questions '{self.path}': {template!r} names no field in braces")

    def read(self, count: int) -> list[Question]:
        """Return `count` questions, evenly over the file; ValueError when there are fewer."""
        return spread(self.read_all(), count, self.path)

    def read_all(self) -> list[Question]:
        """Return every question of the file."""
        prompt = Template(self.prompt)
        references = [Template(template) for template in self.references]
        found: dict[str, list[str]] = {}
        for place, record in Location(self.path).records():
            answers = found.setdefault(prompt.fill(place, record), [])
            answers += [template.fill(place, record) for template in references]
        return [Question(text, tuple(answers)) for text, answers in found.items()]


def spread(questions: Sequence[Question], count: int, path: str) -> list[Question]:
    """Return `count` of the questions of a file, evenly; ValueError when there are fewer."""
    if len(questions) < count:
        raise ValueError(f"'{path}' holds {len(questions)} different prompts, not {count}")
    return [questions[i * len(questions) // count] for i in range(count)]
