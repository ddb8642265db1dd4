"""Where the prompts of a benchmark come from: text that no model of it was trained on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from specstream.data import PromptFile, TextSource
from specstream.processors import TextProcessor


class PromptSource(ABC):
    """Gives prompts as token ids, the same at every call."""

    @abstractmethod
    def check(self) -> None:
        """Raise ValueError when a file is missing; reads no data."""

    @abstractmethod
    def tokens(self, count: int, target: str, processor: TextProcessor) -> list[list[int]]:
        """Return `count` prompts, evenly over what there is, for the target in folder `target`.

        Raises ValueError when there are fewer.
        """


@dataclass(frozen=True)
class HeldOutPrompts(PromptSource):
    """The first tokens of held-out text, cut from it exactly as training held it out.

    Args:
        source: the text; its documents are dealt by their keys, so the split is training's own.
        split: validation or test.
        prompt_tokens: length of a prompt.
        sequence_length: of the rows that prompts begin; that of training reuses its cache.
        cache_dir: where prepared data is kept; None is the user's cache folder.
    """

    source: TextSource
    split: Literal["validation", "test"] = "test"
    prompt_tokens: int = 64
    sequence_length: int = 256
    cache_dir: str | None = None

    def check(self) -> None:
        self.source.check()

    def tokens(self, count: int, target: str, processor: TextProcessor) -> list[list[int]]:
        from specstream.data import TextDataModule

        data = TextDataModule(
            [self.source],
            tokenizer=target,
            sequence_length=self.sequence_length,
            prompt_tokens=self.prompt_tokens,
            cache_dir=self.cache_dir,
            show_sample=False,
        )
        return data.prompts(count, self.split)


@dataclass(frozen=True)
class FilePrompts(PromptSource):
    """The records of a file (.jsonl, .jsonl.gz, .parquet); equal prompts count once.

    Args:
        path: the file.
        prompt: template of a prompt, with the fields of a record in braces.
    """

    path: str
    prompt: str = "{prompt}"

    def check(self) -> None:
        if not Path(self.path).is_file():
            raise ValueError(f"there is no file of prompts '{self.path}'")

    def tokens(self, count: int, target: str, processor: TextProcessor) -> list[list[int]]:
        texts = list(dict.fromkeys(PromptFile(self.path, self.prompt).read()))
        if len(texts) < count:
            raise ValueError(f"'{self.path}' holds {len(texts)} different prompts, not {count}")
        return [processor.encode(texts[i * len(texts) // count]) for i in range(count)]


def gather(
    sources: Sequence[PromptSource],
    count: int,
    target: str,
    processor: TextProcessor,
    ragged: bool = False,
) -> list[list[int]]:
    """Return `count` prompts, taken from the sources in turn.

    `ragged` cuts them to a quarter, a half, three quarters and the whole of their length in turn,
    so that the rows of a batch have lengths of their own.
    """
    shares = [count // len(sources) + (i < count % len(sources)) for i in range(len(sources))]
    pools = [s.tokens(n, target, processor) for s, n in zip(sources, shares, strict=True) if n]
    turns = [pool[i] for i in range(max(map(len, pools))) for pool in pools if i < len(pool)]
    if not ragged:
        return turns
    return [p[: max(2, len(p) * (1 + i % 4) // 4)] for i, p in enumerate(turns)]
