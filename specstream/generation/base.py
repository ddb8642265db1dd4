"""What a text pipeline is: prompts in, committed steps out, counts kept.

A subclass writes one method, `_decode`: the loop of its paper over one batch.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from specstream.drafters.draft_model import prefill_width
from specstream.generation.batch import Batch, Limits
from specstream.generation.target_pass import target_pass
from specstream.models.cache import SlotCache, bucket
from specstream.models.compilation import compile_shapes
from specstream.models.pretrained_lm import PretrainedLM
from specstream.models.quantization import quantization_report, quantized_law
from specstream.models.walk import walk
from specstream.processors import TextProcessor
from specstream.sampling import Noise, Sampling
from specstream.structures import CanvasStep, Completion, Guarantee, Origin, Stats, Step

Prompt = str | Sequence[int]


class Pipeline(ABC):
    """Generates from prompts; `stats` holds the counts of the last run."""

    stats: Stats

    @abstractmethod
    def generate(
        self, prompts: Sequence[Prompt], *, seed: int | None = None
    ) -> Iterator[Step] | Iterator[CanvasStep]:
        """Yield what each round commits, in the order it is committed."""


class TextPipeline(Pipeline):
    """What plain and speculative decoding of text share.

    `compile` compiles the passes with `torch.compile` at their first use (minutes for a large
    model); `chat` puts prompts into the tokenizer's chat template.
    """

    guarantee = Guarantee.EXACT_LAW
    headroom = 1  # slots beyond a row's last token that a pass may write

    def __init__(
        self,
        target: PretrainedLM,
        processor: TextProcessor,
        sampling: Sampling | None = None,
        limits: Limits | None = None,
        batch_size: int = 1,
        compile: bool = False,
        chat: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        self.target = target
        self.processor = processor
        self.sampling = sampling or Sampling()
        self.limits = limits or Limits()
        self.batch_size = batch_size
        self.chat = chat
        self.compiled = compile
        self._pass = compile_shapes(target_pass) if compile else target_pass
        self.stats = self._new_stats()

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        seed: int | None = None,
        indices: Sequence[int] | None = None,
    ) -> Iterator[Step]:
        """Decode `prompts`, `batch_size` at a time, and yield each row's steps.

        The output of a prompt depends on `seed` (default 0) and on its index, 0, 1, ... unless
        `indices` are given, and on nothing else of the batch.  Raises ValueError for an empty
        prompt, or one that leaves no room in the model's context.
        """
        encoded = [self.encode(prompt) for prompt in prompts]
        numbers = numbered(len(encoded), indices)
        self.stats = self._new_stats()
        self.stats.prompts = len(encoded)
        self.prepare()
        noise = Noise(0 if seed is None else seed, self.target.device)
        for first in range(0, len(encoded), self.batch_size):
            chosen = slice(first, first + self.batch_size)
            yield from self._timed(encoded[chosen], numbers[chosen], noise)

    def complete(
        self,
        prompts: Sequence[Prompt],
        *,
        seed: int | None = None,
        indices: Sequence[int] | None = None,
    ) -> list[Completion]:
        """Decode `prompts` to their ends and return the completions in the order of `prompts`."""
        numbers = list(range(len(prompts))) if indices is None else list(indices)
        texts: dict[int, list[str]] = {number: [] for number in numbers}
        tokens: dict[int, list[int]] = {number: [] for number in numbers}
        origins: dict[int, list[Origin]] = {number: [] for number in numbers}
        for step in self.generate(prompts, seed=seed, indices=numbers):
            texts[step.prompt].append(step.text)
            tokens[step.prompt] += step.tokens
            origins[step.prompt] += step.origins
        return [Completion(n, "".join(texts[n]), tokens[n], origins[n]) for n in numbers]

    def encode(self, prompt: Prompt) -> list[int]:
        """Return a prompt's token ids; ValueError for one that this pipeline cannot decode."""
        tokens = self.processor.encode(prompt, self.chat)
        if not tokens:
            raise ValueError("a prompt is empty, and the tokenizer starts a text with no token")
        check_vocabulary(tokens, self.target.vocab_size)
        room = self.target.max_positions
        if room is not None and len(tokens) + self.limits.max_new_tokens > room:
            raise ValueError(
                f"a prompt of {len(tokens)} tokens and {self.limits.max_new_tokens} new ones "
                f"exceed the target's context of {room}"
            )
        return tokens

    def prepare(self) -> None:
        """Do what has to be done once before the first run, off the clock."""

    @abstractmethod
    def _decode(self, batch: Batch, cache: SlotCache, noise: Noise) -> Iterator[list[Step]]:
        """Read the prompts and run one batch to its end, yielding the steps of each round."""

    def _new_stats(self) -> Stats:
        quantized = self._quantized()
        law = quantized_law("the target's", quantized)
        return Stats("text", self.guarantee, quantized=quantized, law=law)

    def _quantized(self) -> dict[str, Any]:
        report = quantization_report(self.target)
        return {} if report is None else {"target": report}

    def _timed(self, prompts: list[list[int]], indices: list[int], noise: Noise) -> Iterator[Step]:
        """Decode one batch; the clock runs while we work and stands while the caller does."""
        started = time.perf_counter()
        rounds = self._start(prompts, indices, noise)
        while True:
            with torch.inference_mode():  # not across a yield: the caller may train
                steps = next(rounds, None)
            self.stats.seconds += time.perf_counter() - started
            if steps is None:
                return
            yield from steps
            started = time.perf_counter()

    def _start(
        self, prompts: list[list[int]], indices: list[int], noise: Noise
    ) -> Iterator[list[Step]]:
        longest = max(len(prompt) for prompt in prompts)
        needed = longest + self.limits.max_new_tokens + self.headroom
        capacity = bucket(needed, needed + 10**9)  # a whole number of views
        batch = Batch(
            prompts,
            indices,
            capacity,
            self.limits,
            self.processor,
            self.stats,
            self.target.device,
            self.target.vocab_size if self.sampling.needs_history else None,
            self.compiled,
        )
        cache = self.target.new_cache(len(prompts), capacity)
        yield from self._decode(batch, cache, noise)


def numbered(num_prompts: int, indices: Sequence[int] | None) -> list[int]:
    """Return the numbers that key the noise of prompts; ValueError where two are the same."""
    numbers = list(range(num_prompts)) if indices is None else list(indices)
    if len(set(numbers)) != num_prompts:
        raise ValueError(f"{num_prompts} prompts need as many different indices: {numbers}")
    return numbers


def check_vocabulary(tokens: Sequence[int], vocab_size: int) -> None:
    """Raise ValueError for a prompt with a token that the target does not know."""
    outside = [token for token in tokens if not 0 <= token < vocab_size]
    if outside:
        raise ValueError(
            f"a prompt holds token {outside[0]}, outside the target's vocabulary of {vocab_size}"
        )


def prefill(
    target: PretrainedLM,
    batch: Batch,
    cache: SlotCache,
    feature_layers: Sequence[int] = (),
    show: Callable[[Tensor, int], None] | None = None,
) -> None:
    """Read all prompt tokens but the last into `cache`; rows end where their prompts end.

    A shorter row reads padding too; its slots lie beyond the row's length and are written anew
    before anything attends to them.  `show` is given the features (B, T, F) of `feature_layers`
    and the place of the first.
    """
    missing, position = batch.longest - 1, 0
    while position < missing:
        width = min(prefill_width(missing - position), cache.capacity - position)
        start = torch.full_like(batch.context.lengths, position)
        chunk = batch.context.tokens[:, position : position + width]
        view = bucket(position + width, cache.capacity)
        if show is None:
            target.extend(chunk, start, cache, view, num_logits=1)
        else:
            found = walk(target, chunk, start, cache, view, None, feature_layers, num_logits=1)
            assert found.features is not None
            show(found.features, position)
        position += width
