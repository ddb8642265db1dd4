"""What masked diffusion models are given to fill, and how the answers can be judged."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from specstream.benchmark.questions import QuestionFile
from specstream.data import TextSource
from specstream.data.planning import PuzzleSource, planning_prompts, problem_key
from specstream.processors import TextProcessor

MOST_SAMPLES = 100_000  # that share one prompt: more is a slip of the pen


@dataclass(frozen=True, slots=True)
class CanvasQuestion:
    """The tokens before the masks, the same as text, and good answers where any are known."""

    tokens: list[int]
    text: str
    references: tuple[str, ...] = ()


class CanvasPrompts(ABC):
    """Gives what a model of a task continues, the same at every call."""

    has_references = False

    @abstractmethod
    def check(self) -> None:
        """Raise ValueError when a file is missing or an option is wrong; reads no data."""

    @abstractmethod
    def read(self, count: int, target: str, processor: TextProcessor) -> list[CanvasQuestion]:
        """Return `count` of them, evenly over what there is, for the target in folder `target`.

        Raises ValueError when there are fewer.
        """


@dataclass(frozen=True)
class PublishedPuzzles(CanvasPrompts):
    """The sudoku or countdown puzzles of a published file (see `data.planning`).

    Args:
        path: the file.
        unseen_by: the sources of training; puzzles that they have made are left out.
    """

    path: str
    unseen_by: list[PuzzleSource] = field(default_factory=list)

    def check(self) -> None:
        if not Path(self.path).is_file():
            raise ValueError(f"there is no file of puzzles '{self.path}'")
        for source in self.unseen_by:
            source.check()

    def read(self, count: int, target: str, processor: TextProcessor) -> list[CanvasQuestion]:
        seen = {document.key for source in self.unseen_by for document in source.documents(None)}
        texts = list(dict.fromkeys(planning_prompts(self.path)))
        texts = [text for text in texts if problem_key(text) not in seen]
        if len(texts) < count:
            raise ValueError(
                f"'{self.path}' holds {len(texts)} different puzzles that training has not seen, "
                f"not {count}"
            )
        chosen = [texts[i * len(texts) // count] for i in range(count)]
        return [CanvasQuestion(processor.encode(text), text) for text in chosen]


@dataclass(frozen=True)
class HeldOutCanvases(CanvasPrompts):
    """What training held out of a source: the prompts of puzzles, the first tokens of raw text.

    Documents are dealt by their keys, so with training's own fractions the split is training's
    own, whatever other sources stood beside this one.

    Args:
        source: as in training, with the same options.
        split: validation or test.
        validation_fraction, test_fraction: as in training.
        sequence_length: of the rows that are prepared; a longer puzzle is left out.
        prompt_tokens: of raw text, how many tokens are given.
        cache_dir: where prepared data is kept; None is the user's cache folder.
    """

    source: TextSource
    split: Literal["validation", "test"] = "test"
    validation_fraction: float = 0.05
    test_fraction: float = 0.05
    sequence_length: int = 256
    prompt_tokens: int = 64
    cache_dir: str | None = None

    def check(self) -> None:
        self.source.check()

    def read(self, count: int, target: str, processor: TextProcessor) -> list[CanvasQuestion]:
        from specstream.data import TextDataModule

        data = TextDataModule(
            [self.source],
            tokenizer=target,
            sequence_length=self.sequence_length,
            pack=not self.source.masked,
            validation_fraction=self.validation_fraction,
            test_fraction=self.test_fraction,
            prompt_tokens=self.prompt_tokens,
            cache_dir=self.cache_dir,
            show_sample=False,
        )
        prompts = data.prompts(count, self.split)
        return [CanvasQuestion(tokens, processor.decode(tokens)) for tokens in prompts]


@dataclass(frozen=True)
class ReferencedPrompts(CanvasPrompts):
    """The questions of a file with the answers that are known to be good (see `QuestionFile`).

    Args:
        path: the file.
        prompt: template of a prompt, with the fields of a record in braces, as in training.
        references: templates of the references that a record holds, one or several.
    """

    path: str
    prompt: str = "{prompt}"
    references: list[str] = field(default_factory=lambda: ["{completion}"])

    has_references = True

    @property
    def file(self) -> QuestionFile:
        """The file of questions."""
        return QuestionFile(self.path, self.prompt, self.references)

    def check(self) -> None:
        self.file.check()

    def read(self, count: int, target: str, processor: TextProcessor) -> list[CanvasQuestion]:
        return [
            CanvasQuestion(processor.encode(q.prompt), q.prompt, q.references)
            for q in self.file.read(count)
        ]


@dataclass(frozen=True)
class NoPrompt(CanvasPrompts):
    """Nothing but what a text starts with: unconditional samples, which differ by their noise."""

    def check(self) -> None:
        """Nothing can be missing."""

    def read(self, count: int, target: str, processor: TextProcessor) -> list[CanvasQuestion]:
        if count > MOST_SAMPLES:
            raise ValueError(f"num_prompts must be at most {MOST_SAMPLES}, not {count}")
        start = processor.encode("")
        if not start:
            raise ValueError(f"the tokenizer of '{target}' starts a text with no token")
        return [CanvasQuestion(start, "")] * count
