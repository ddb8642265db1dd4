"""One decoder, built and warm, that turns a block of prompts into tokens: ours or a peer's."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from specstream.benchmark.counted_lookup import CountedLookupFirst
from specstream.generation import Limits, SpeculativePipeline, StepCosts, TextPipeline
from specstream.generation.costs import measure_costs
from specstream.models import PretrainedLM
from specstream.sampling import Sampling
from specstream.structures import Stats

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel


@dataclass(frozen=True, slots=True)
class Decoding:
    """What every method of a setting decodes alike."""

    sampling: Sampling
    limits: Limits
    compile: bool


class Runner(ABC):
    """Decodes blocks of prompts; `variant` says how, where a method may run in several ways."""

    variant: str

    @abstractmethod
    def run(
        self, prompts: Sequence[list[int]], indices: Sequence[int], seed: int
    ) -> list[list[int]]:
        """Return the new tokens of each prompt."""

    def warm(self, prompts: Sequence[list[int]], indices: Sequence[int], seed: int) -> None:
        """Decode off the clock, so that nothing is met for the first time on it."""
        self.run(prompts, indices, seed)

    def take_stats(self) -> Stats | None:
        """Return the counts of the last run; None for a decoder that does not count."""
        return None

    def measure(self) -> StepCosts | None:
        """Time the passes of the decoder now; None where there is nothing to draft with."""
        return None

    def restart_counts(self) -> None:  # noqa: B027
        """Forget what `share_model` has counted."""

    def share_model(self) -> float:
        """Return in which share of the drafting rounds the draft model ran."""
        return 1.0


class PipelineRunner(Runner):
    """One of our pipelines."""

    def __init__(self, pipeline: TextPipeline, variant: str) -> None:
        self.pipeline = pipeline
        self.variant = variant

    def run(
        self, prompts: Sequence[list[int]], indices: Sequence[int], seed: int
    ) -> list[list[int]]:
        done = self.pipeline.complete(prompts, seed=seed, indices=indices)
        return [completion.tokens for completion in done]

    def warm(self, prompts: Sequence[list[int]], indices: Sequence[int], seed: int) -> None:
        if isinstance(self.pipeline, SpeculativePipeline) and self.pipeline.compiled:
            self.pipeline.meet_shapes(prompts)
        self.run(prompts, indices, seed)

    def take_stats(self) -> Stats | None:
        return replace(self.pipeline.stats)

    def measure(self) -> StepCosts | None:
        if not isinstance(self.pipeline, SpeculativePipeline):
            return None
        costs = measure_costs(self.pipeline)
        if self.pipeline.costs is None:  # a policy that needs costs decodes by this table
            self.pipeline.costs = costs
        return costs

    def restart_counts(self) -> None:
        drafter = getattr(self.pipeline, "drafter", None)
        if isinstance(drafter, CountedLookupFirst):
            drafter.rounds = drafter.model_rounds = 0

    def share_model(self) -> float:
        drafter = getattr(self.pipeline, "drafter", None)
        return drafter.share_model if isinstance(drafter, CountedLookupFirst) else 1.0


class TransformersRunner(Runner):
    """`transformers`' `generate` on the same modules, alone or with the draft LM as assistant.

    `options` are the assistant's: transformers reads the number of assistant tokens, its schedule
    and the confidence threshold from the assistant's own configuration.
    """

    def __init__(
        self,
        target: PretrainedLM,
        eos_ids: Collection[int],
        decoding: Decoding,
        batch_size: int,
        variant: str,
        assistant: PretrainedLM | None = None,
        options: GenerationConfig | None = None,
    ) -> None:
        self.model: PreTrainedModel = target.model
        self.assistant = None if assistant is None else assistant.model
        self.options = options
        self.batch_size = batch_size
        self.variant = variant
        self.eos_ids = frozenset() if decoding.limits.ignore_eos else frozenset(eos_ids)
        self.config = generation_config(decoding, sorted(self.eos_ids))

    def run(
        self, prompts: Sequence[list[int]], indices: Sequence[int], seed: int
    ) -> list[list[int]]:
        found: list[list[int]] = []
        for first in range(0, len(prompts), self.batch_size):
            rows = prompts[first : first + self.batch_size]
            found += self._batch(rows, seed * 1_000_003 + indices[first])
        return found

    def _batch(self, rows: Sequence[list[int]], seed: int) -> list[list[int]]:
        width = max(map(len, rows))
        tokens = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for i, row in enumerate(rows):  # padded on the left, as decoder-only models need it there
            tokens[i, width - len(row) :] = torch.tensor(row)
            mask[i, width - len(row) :] = 1
        if self.assistant is not None:  # a copy: transformers changes it while it decodes
            self.assistant.generation_config = copy.deepcopy(self.options)
        device = self.model.device
        with torch.inference_mode(), torch.random.fork_rng():
            torch.manual_seed(seed)
            output = self.model.generate(
                tokens.to(device),
                attention_mask=mask.to(device),
                generation_config=self.config,
                **({} if self.assistant is None else {"assistant_model": self.assistant}),
            )
        return [self._up_to_end(row[width:]) for row in output.tolist()]

    def _up_to_end(self, row: list[int]) -> list[int]:
        """Cut the padding behind the first end of sequence."""
        ends = (i + 1 for i, token in enumerate(row) if token in self.eos_ids)
        return row[: next(ends, len(row))]


def generation_config(decoding: Decoding, eos_ids: list[int]) -> GenerationConfig:
    """Say in `transformers`' terms what our pipelines decode: the same law, the same ends."""
    from transformers import GenerationConfig

    sampling = decoding.sampling
    drawn = {
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p or None,
    }
    return GenerationConfig(
        max_new_tokens=decoding.limits.max_new_tokens,
        do_sample=not sampling.greedy,
        repetition_penalty=sampling.repetition_penalty,
        eos_token_id=eos_ids or None,
        pad_token_id=0,
        **({} if sampling.greedy else drawn),
    )
