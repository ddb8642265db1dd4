"""Plain sampling of masked diffusion models, and what every pipeline of theirs shares.

Each step the target looks at the whole canvas, a token is drawn for every masked position, and an
`Unmasking` says which of them are filled (LLaDA, Nie et al. 2025; Dream; Fast-dLLM, Wu et al. 2025;
EB-sampler, Ben-Hamu et al. 2025).  A subclass writes one method, `_fill`.

`sampling` shapes the law that tokens are drawn from and nothing else.  How sure the target is, of
which the rules of unmasking and of acceptance speak, is read from its own law, as LLaDA and
Fast-dLLM do it: the law of temperature 0 is sure of everything.

Shapes: B rows, C positions, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from specstream.generation.base import Pipeline, Prompt, check_vocabulary, numbered
from specstream.generation.batch import Limits
from specstream.generation.canvases import (
    CanvasPrompt,
    OpenRows,
    complete_canvas,
    encode_canvas,
    make_canvas,
    mask_blocks,
)
from specstream.generation.masked_costs import TargetPass
from specstream.models.compilation import compile_shapes
from specstream.models.pretrained_masked import PretrainedMaskedLM
from specstream.models.quantization import quantization_report, quantized_law
from specstream.processors import TextProcessor
from specstream.sampling import Noise, Role, Sampling, draw, probabilities
from specstream.structures import Canvas, CanvasStep, Completion, Guarantee, Origin, Stats
from specstream.unmasking import StaticSchedule, Unmasking


@dataclass(slots=True)
class Blocks:
    """Which block of its canvas each row fills, and how many steps it has made there."""

    numbers: Tensor  # (B, C) the block of each position
    totals: Tensor  # (B, N) masks of each block at the start
    current: Tensor  # (B,)
    steps: Tensor  # (B,)

    @classmethod
    def of(cls, masked: Tensor, block_tokens: int | None) -> Blocks:
        numbers, totals = mask_blocks(masked, block_tokens)
        start = torch.zeros(len(masked), dtype=torch.long, device=masked.device)
        return cls(numbers, totals, start, start.clone())

    def open(self, masked: Tensor) -> Tensor:
        """Go to the lowest block with masks; return its masked positions (B, C)."""
        last = self.totals.shape[1]
        lowest = torch.where(masked, self.numbers, last).amin(1)
        current = torch.where(lowest < last, lowest, self.current)
        self.steps = torch.where(current == self.current, self.steps, 0)
        self.current = current
        return masked & (self.numbers == current[:, None])

    def total(self) -> Tensor:
        """Return how many masks each row's block held, (B,)."""
        return self.totals.gather(1, self.current[:, None])[:, 0]


@dataclass(frozen=True, slots=True)
class Round:
    """What one round does, (B, C) bool each; None: nothing of the kind."""

    filled: Tensor  # positions that hold a token from this round on
    drafted: Tensor | None = None  # positions that were guessed
    replaced: Tensor | None = None  # of these, those that hold the target's token instead


@dataclass(frozen=True)
class Sampler:
    """How a target fills canvases: which positions a step fills, and with what.

    A static schedule's steps are those of each block.  `block_tokens` fills a continuation from
    left to right in blocks of that many positions, None the whole canvas at once.  `guidance` w > 0
    is classifier-free: logits (1 + w) l - w l', with l' of a canvas whose prompt is masked, for
    twice the rows.  Raises ValueError for an option that has no meaning here.
    """

    unmasking: Unmasking = field(default_factory=lambda: StaticSchedule(32))
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=0.0))
    limits: Limits = field(default_factory=Limits)
    block_tokens: int | None = None
    guidance: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.guidance < math.inf:
            raise ValueError(f"guidance must be 0 (off) or positive, got {self.guidance}")
        if self.block_tokens is not None and self.block_tokens < 1:
            raise ValueError(f"block_tokens must be at least 1, not {self.block_tokens}")
        if self.sampling.needs_history:
            raise ValueError("a repetition penalty has no meaning where text is not left to right")
        if self.limits.stop:
            raise ValueError("stop strings have no meaning where text is not left to right")


class MaskedPipeline(Pipeline):
    """Fills canvases with the target alone; `stats` holds the counts of the last run.

    `full_passes` counts passes of the whole target over one canvas: copies and drafted canvases of
    one call count each.

    `compile` compiles the target's passes at their first use.
    """

    guarantee = Guarantee.EXACT_LAW  # the sampler is the law

    def __init__(
        self,
        target: PretrainedMaskedLM,
        processor: TextProcessor,
        sampler: Sampler | None = None,
        batch_size: int = 1,
        compile: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        if target.form.mask_id is None:
            raise ValueError("the target has no mask token: it was not trained yet")
        if target.block_length is not None:
            raise ValueError("the target must be bidirectional, without a block_length")
        self.target, self.processor = target, processor
        self.sampler = sampler if sampler is not None else Sampler()
        self.batch_size = batch_size
        self.compiled = compile
        self._pass = compile_shapes(target.forward) if compile else target.forward
        self.stats = self._new_stats()

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        seed: int | None = None,
        indices: Sequence[int] | None = None,
    ) -> Iterator[CanvasStep]:
        """Fill the canvases of `prompts`, `batch_size` at a time; yield what each round does.

        As for text, a prompt's output depends on `seed` and its index, not on its neighbours.
        Raises ValueError for a prompt without room in the model's context.
        """
        encoded = [self.encode(prompt) for prompt in prompts]
        yield from self._filled(encoded, numbered(len(encoded), indices), seed)

    def _filled(
        self, encoded: Sequence[CanvasPrompt], numbers: Sequence[int], seed: int | None
    ) -> Iterator[CanvasStep]:
        self.stats = self._new_stats()
        self.stats.prompts = len(encoded)
        self.prepare(max((len(canvas.tokens) for canvas in encoded), default=0))
        noise = Noise(0 if seed is None else seed, self.target.device)
        for first in range(0, len(encoded), self.batch_size):
            part = slice(first, first + self.batch_size)
            yield from self._timed(encoded[part], numbers[part], noise)

    def complete(
        self,
        prompts: Sequence[Prompt],
        *,
        seed: int | None = None,
        indices: Sequence[int] | None = None,
    ) -> list[Completion]:
        """Fill the canvases of `prompts` and return the texts in their order."""
        encoded = [self.encode(prompt) for prompt in prompts]
        numbers = numbered(len(encoded), indices)
        tokens: dict[int, list[int]] = {}
        origins: dict[int, dict[int, Origin]] = {number: {} for number in numbers}
        for step in self._filled(encoded, numbers, seed):
            tokens[step.prompt] = step.tokens
            for place in step.filled:
                origins[step.prompt][place] = origin_of(place, step)
        return [
            complete_canvas(
                self.processor,
                canvas,
                number,
                tokens[number],
                origins[number],
                self.sampler.limits.ignore_eos,
            )
            for number, canvas in zip(numbers, encoded, strict=True)
        ]

    def encode(self, prompt: Prompt) -> CanvasPrompt:
        """Return a prompt's canvas; ValueError for one that this pipeline cannot fill."""
        canvas = encode_canvas(self.processor, prompt, self.target.mask_id, self.sampler.limits)
        size, masks = self.sampler.block_tokens, self.sampler.limits.max_new_tokens
        if size is not None and canvas.continued is not None and masks % size:
            raise ValueError(f"block_tokens {size} does not divide max_new_tokens {masks}")
        check_vocabulary(canvas.tokens, self.target.vocab_size)
        room = self.target.max_positions
        if room is not None and len(canvas.tokens) > room:
            raise ValueError(
                f"a canvas of {len(canvas.tokens)} tokens, prompt and masks, exceeds the target's "
                f"context of {room}"
            )
        return canvas

    @property
    def way(self) -> TargetPass:
        """How the target runs here, for those who time it."""
        return TargetPass(
            self.target, self._pass, self.compiled, repr(self._quantized()), self.batch_size
        )

    def prepare(self, width: int) -> None:
        """Do what has to be done once before canvases of `width` are filled, off the clock."""

    def _fill(self, canvas: Canvas, given: Tensor, noise: Noise, rows: OpenRows) -> Iterator[Round]:
        """Fill `canvas` in place; yield what each round does, after which `rows` know of it.

        `given` (B, C) marks the prompt, which guidance leaves out.
        """
        blocks = Blocks.of(canvas.masked, self.sampler.block_tokens)
        while rows.masks:
            logits = self._look(canvas.tokens, canvas, given, rows)
            filled = self._step(canvas, blocks, logits, canvas.masked, noise)
            yield Round(filled)

    def _step(
        self, canvas: Canvas, blocks: Blocks, logits: Tensor, masked: Tensor, noise: Noise
    ) -> Tensor:
        """Make a step of the target in rows with `masked` (B, C); return what it fills (B, C)."""
        eligible = blocks.open(masked)
        drawn = self._draw(canvas, logits, noise)
        coins = noise.uniform(canvas.prompts, canvas.elements(), Role.ORDER)
        chosen = self.sampler.unmasking.choose(
            own_law(logits), drawn, eligible, blocks.steps, blocks.total(), coins
        )
        moved = chosen.any(1)
        canvas.drawn, blocks.steps = canvas.drawn + moved, blocks.steps + moved
        canvas.tokens = torch.where(chosen, drawn, canvas.tokens)
        canvas.masked = canvas.masked & ~chosen
        return chosen

    def _draw(self, canvas: Canvas, logits: Tensor, noise: Noise) -> Tensor:
        """Draw a token for each position (B, C) from the law that `sampling` makes of `logits`."""
        coins = noise.uniform(canvas.prompts, canvas.elements(), Role.CORRECT)
        return draw(probabilities(logits, self.sampler.sampling), coins)

    def _look(self, tokens: Tensor, canvas: Canvas, given: Tensor, rows: OpenRows) -> Tensor:
        """Return the target's logits (N, C, V) of canvases (N, C) from one pass, guided.

        N = B or copies of the B rows, all of the first copy before the second.
        """
        weight = self.sampler.guidance
        if weight:
            blind = given.repeat(len(tokens) // len(given), 1)
            tokens = torch.cat([tokens, tokens.masked_fill(blind, self.target.mask_id)])
        copies = len(tokens) // len(given)
        self.stats.target_calls += 1
        self.stats.target_rows += copies * sum(rows.lengths[row] for row in rows.masks)
        self.full_passes += copies * len(rows.masks)
        logits = self._pass(tokens, canvas.lengths.repeat(copies))
        if not weight:
            return logits
        seeing, blind = logits.chunk(2)
        return self.target.without_mask((1 + weight) * seeing - weight * blind)

    def _new_stats(self) -> Stats:
        quantized = self._quantized()
        return Stats(
            "masked text",
            self.guarantee,
            quantized=quantized,
            law=quantized_law(self.law, quantized),
            full_passes=0.0,
        )

    @property
    def law(self) -> str:
        """Name the law of the output, of which the guarantee speaks."""
        return f"the sampler {self.sampler.unmasking}"

    @property
    def models(self) -> list[nn.Module]:
        """The networks that a run needs, to be moved to its device."""
        return [self.target]

    @property
    def full_passes(self) -> float:
        """Passes of the whole target over one canvas that the last run took."""
        return self.stats.full_passes or 0.0

    @full_passes.setter
    def full_passes(self, passes: float) -> None:
        self.stats.full_passes = passes

    def _quantized(self) -> dict[str, Any]:
        report = quantization_report(self.target)
        return {} if report is None else {"target": report}

    def _timed(
        self, prompts: Sequence[CanvasPrompt], indices: Sequence[int], noise: Noise
    ) -> Iterator[CanvasStep]:
        """Fill one batch; the clock runs while we work and stands while the caller does."""
        started = time.perf_counter()
        canvas = make_canvas(prompts, indices, self.target.mask_id, self.target.device)
        given = ~canvas.masked
        rows = OpenRows.of(prompts, self.target.mask_id)
        rounds = self._fill(canvas, given, noise, rows)
        while True:
            with torch.inference_mode():
                found = next(rounds, None)
                steps = [] if found is None else self._steps(canvas, indices, found, rows)
            self.stats.seconds += time.perf_counter() - started
            if found is None:
                return
            yield from steps
            started = time.perf_counter()

    def _steps(
        self,
        canvas: Canvas,
        indices: Sequence[int],
        found: Round,
        rows: OpenRows,
    ) -> list[CanvasStep]:
        """Say what a round did to each row that was not finished before it, and tell `rows`."""
        nothing = torch.zeros_like(found.filled)
        drafted = nothing if found.drafted is None else found.drafted
        replaced = nothing if found.replaced is None else found.replaced
        fallen = drafted & canvas.masked
        sets = torch.stack([canvas.masked, drafted, found.filled, fallen, replaced])
        # All that the host is told of a round, in one copy.
        tokens, *sets_there = torch.cat([canvas.tokens[None], sets.long()]).tolist()
        steps = []
        for row in sorted(rows.masks):
            length = rows.lengths[row]
            masked, guessed, filled, remasked, others = (
                [i for i in range(length) if marks[row][i]] for marks in sets_there
            )
            step = CanvasStep(
                prompt=indices[row],
                tokens=tokens[row][:length],
                drafted=guessed,
                filled=filled,
                remasked=remasked,
                replaced=others,
                finished=not masked,
            )
            self.stats.elements += len(step.filled)
            rows.masks[row] = len(masked)
            if step.finished:
                del rows.masks[row]
            steps.append(step)
        if not any(step.filled or step.drafted for step in steps):
            raise ValueError("no position can be filled: the model's logits are no numbers")
        return steps


def own_law(logits: Tensor) -> Tensor:
    """Return the law (..., V) of `logits` as they are, which says how sure a model is."""
    return probabilities(logits, Sampling())


def origin_of(place: int, step: CanvasStep) -> Origin:
    """Say where the token that a round has filled in comes from."""
    if place in step.replaced:
        return Origin.CORRECTION
    return Origin.ACCEPTED if place in step.drafted else Origin.PLAIN
