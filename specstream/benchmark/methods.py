"""Who decodes: one row of the table each, ours and the peers, as records of their options."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Literal

from specstream.benchmark.counted_lookup import CountedLookupFirst
from specstream.benchmark.pair import DraftKind, Pair
from specstream.benchmark.runners import Decoding, PipelineRunner, Runner, TransformersRunner
from specstream.drafters import Drafter, PromptLookup
from specstream.generation import (
    AutoregressivePipeline,
    CostModelLength,
    DraftLength,
    SpeculativePipeline,
)
from specstream.verification import TokenRejection, TokenVerifier

Role = Literal["plain", "transformers", "transformers assisted", "ours"]


class Method(ABC):
    """A way to decode; where it may run in several variants, the fastest is the row's."""

    batch_size: int
    role: Role = "ours"
    draft: DraftKind | None = None  # the drafter it asks the pair for

    @property
    @abstractmethod
    def label(self) -> str:
        """What the table calls it."""

    @abstractmethod
    def runners(self, pair: Pair, decoding: Decoding) -> list[Runner]:
        """Return one decoder for each variant; ValueError when the pair lacks what is needed."""


def check_batch_size(batch_size: int) -> None:
    """Raise ValueError unless a batch holds a row."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")


def with_batch(label: str, batch_size: int) -> str:
    """Add the batch size to a label where it is not 1."""
    return label if batch_size == 1 else f"{label}, batch {batch_size}"


@dataclass(frozen=True)
class Plain(Method):
    """The target alone in our pipeline: eager, and compiled where the study compiles."""

    batch_size: int = 1
    role = "plain"

    def __post_init__(self) -> None:
        check_batch_size(self.batch_size)

    @property
    def label(self) -> str:
        return with_batch("plain", self.batch_size)

    def runners(self, pair: Pair, decoding: Decoding) -> list[Runner]:
        return [
            PipelineRunner(
                AutoregressivePipeline(
                    pair.target,
                    pair.processor,
                    decoding.sampling,
                    decoding.limits,
                    self.batch_size,
                    compiled,
                ),
                "compiled" if compiled else "eager",
            )
            for compiled in ([False, True] if decoding.compile else [False])
        ]


@dataclass(frozen=True)
class Transformers(Method):
    """The target alone in `transformers`' `generate`."""

    batch_size: int = 1
    role = "transformers"

    def __post_init__(self) -> None:
        check_batch_size(self.batch_size)

    @property
    def label(self) -> str:
        return with_batch("transformers generate", self.batch_size)

    def runners(self, pair: Pair, decoding: Decoding) -> list[Runner]:
        ids = pair.processor.eos_ids
        return [TransformersRunner(pair.target, ids, decoding, self.batch_size, "eager")]


@dataclass(frozen=True)
class TransformersAssisted(Method):
    """`generate(assistant_model=...)` with the very same two models, at batch 1 as it must be.

    Run with its default heuristics and with `constant` assistant tokens in every round.
    """

    draft: DraftKind = "trained"
    constant: int = 5
    batch_size = 1
    role = "transformers assisted"

    @property
    def label(self) -> str:
        return "transformers assisted"

    def runners(self, pair: Pair, decoding: Decoding) -> list[Runner]:
        from transformers import GenerationConfig

        fixed = GenerationConfig(
            num_assistant_tokens=self.constant,
            num_assistant_tokens_schedule="constant",
            assistant_confidence_threshold=0.0,
        )
        ways = {"defaults": GenerationConfig(), f"constant {self.constant}": fixed}
        model = pair.draft_lm(self.draft)
        ids = pair.processor.eos_ids
        return [
            TransformersRunner(pair.target, ids, decoding, 1, variant, model, options)
            for variant, options in ways.items()
        ]


@dataclass(frozen=True)
class Speculative(Method):
    """Our speculative pipeline.

    Args:
        name: what the table calls it.
        draft: which of the task's drafters; null with `lookup` is prompt lookup alone.  untrained
            is one of the trained drafter's architecture with fresh weights.
        lookup: also copy where a long n-gram recurs.
        verifier: which guesses stand.
        lengths: how many tokens are drafted.
        batch_size: prompts decoded at once.
    """

    name: str
    draft: DraftKind | None = "trained"
    lookup: bool = False
    verifier: TokenVerifier = field(default_factory=TokenRejection)
    lengths: DraftLength = field(default_factory=CostModelLength)
    batch_size: int = 1

    def __post_init__(self) -> None:
        check_batch_size(self.batch_size)
        if self.draft is None and not self.lookup:
            raise ValueError(f"method '{self.name}' has neither a draft nor lookup")

    @property
    def label(self) -> str:
        return with_batch(self.name, self.batch_size)

    def runners(self, pair: Pair, decoding: Decoding) -> list[Runner]:
        pipeline = SpeculativePipeline(
            pair.target,
            self._drafter(pair),
            pair.processor,
            self.verifier,
            self.lengths,
            decoding.sampling,
            decoding.limits,
            self.batch_size,
            decoding.compile,
        )
        return [PipelineRunner(pipeline, "compiled" if decoding.compile else "eager")]

    def _drafter(self, pair: Pair) -> Drafter:
        if self.draft is None:
            return PromptLookup(pair.target)
        drafter = pair.drafter(self.draft)
        return CountedLookupFirst(pair.target, lambda _: drafter) if self.lookup else drafter
