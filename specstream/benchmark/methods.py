"""Who decodes: one row of the table each, ours and the peers, as records of their options."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch import nn

from specstream.benchmark.counted_lookup import CountedLookupFirst
from specstream.benchmark.pair import DraftKind, Pair, draft_folder, is_model
from specstream.benchmark.runners import Decoding, PipelineRunner, Runner, TransformersRunner
from specstream.drafters import Drafter, PromptLookup
from specstream.drafters.loading import RECORD, read_record
from specstream.generation import (
    AutoregressivePipeline,
    CostModelLength,
    DraftLength,
    FixedLength,
    SpeculativePipeline,
)
from specstream.generation.loading import build_pipeline, check_compilable
from specstream.structures import MAX_DRAFT
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
        quantize: int8 for the drafter, int8_weight_only or int8_dynamic; the target stays as it is,
            and so does its law.
    """

    name: str
    draft: DraftKind | None = "trained"
    lookup: bool = False
    verifier: TokenVerifier = field(default_factory=TokenRejection)
    lengths: DraftLength = field(default_factory=CostModelLength)
    batch_size: int = 1
    quantize: Literal["none", "int8_weight_only", "int8_dynamic"] = "none"

    def __post_init__(self) -> None:
        check_batch_size(self.batch_size)
        if self.draft is None and not self.lookup:
            raise ValueError(f"method '{self.name}' has neither a draft nor lookup")
        if self.draft is None and self.quantize != "none":
            raise ValueError(f"method '{self.name}' has no draft whose weights could be int8")

    @property
    def label(self) -> str:
        return with_batch(self.name, self.batch_size)

    def runners(self, pair: Pair, decoding: Decoding) -> list[Runner]:
        check_compilable(self.quantize, decoding.compile, pair.place)
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
        drafter = pair.drafter(self.draft, self.quantize)
        return CountedLookupFirst(pair.target, lambda _: drafter) if self.lookup else drafter


@dataclass(frozen=True)
class Drafted(Method):
    """Our speculative pipeline with a drafter of its own, at batch 1, in the table of drafters.

    Args:
        name: what the table calls it.
        run: a run folder, its draft/, or the folder or hub id of a causal LM.
        drafter: instead of a run, the drafter spelled out; prompt lookup, say.
        target: whose text is decoded; null is the task's target, or the run's own if it tuned one.
        baseline: whose plain decoding it is compared with, where that is not the task's target's.
        lengths: how many tokens are drafted, of a tree how deep; null is all that the drafter was
            made for, and 5 of one that can go on for ever.
        verifier: which guesses stand; null is the drafter's usual rule.
        tasks: names of the tasks it is for; null for all.
    """

    name: str
    run: str | None = None
    drafter: Callable[[nn.Module], Drafter] | None = None
    target: str | None = None
    baseline: str | None = None
    lengths: DraftLength | None = None
    verifier: TokenVerifier | None = None
    tasks: list[str] | None = None
    batch_size = 1

    def __post_init__(self) -> None:
        if (self.run is None) == (self.drafter is None):
            raise ValueError(f"method '{self.name}' needs a run or a drafter, and not both")

    @property
    def label(self) -> str:
        return self.name

    def missing(self) -> str | None:
        """Say what this method needs and is not there yet; None when all is."""
        for path in (self.run, self.target, self.baseline):
            if path is not None and not is_model(path):
                return f"method '{self.name}': there is no folder '{path}'"
        if self.run is None or not Path(self.run).is_dir():
            return None
        folder = draft_folder(self.run)
        if not any((folder / name).is_file() for name in (RECORD, "config.json")):
            return f"method '{self.name}': '{self.run}' holds no finished drafter"
        return None

    def own_target(self, target: str) -> str:
        """Return whose text it decodes on a task with `target`: that of a run which tuned its own.

        Raises ValueError when the run was trained for another target than it is to decode.
        """
        if self.run is None or not (draft_folder(self.run) / RECORD).is_file():
            return self.target or target
        trained_for = str(read_record(draft_folder(self.run))["target"]["path"])
        tuned = (
            self.target is None and Path(self.run).resolve() in Path(trained_for).resolve().parents
        )
        own = trained_for if tuned else self.target or target
        if Path(trained_for).resolve() != Path(own).resolve():
            raise ValueError(
                f"method '{self.name}': '{self.run}' was trained for the target '{trained_for}', "
                f"not for '{own}'; name it as the method's target"
            )
        return own

    def runners(self, pair: Pair, decoding: Decoding) -> list[Runner]:
        drafter = self.drafter(pair.target) if self.drafter else pair.load_drafter(str(self.run))
        endless = drafter.max_tokens == MAX_DRAFT
        pipeline = build_pipeline(
            pair.target,
            lambda _: drafter,
            sampling=decoding.sampling,
            limits=decoding.limits,
            verifier=self.verifier,
            lengths=self.lengths or (FixedLength() if endless else FixedLength(drafter.max_tokens)),
            compile=decoding.compile,
            device=pair.place,
        )
        return [PipelineRunner(pipeline, "compiled" if decoding.compile else "eager")]
