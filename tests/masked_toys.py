"""Tiny masked models with peaked laws, scripted ones, and drafters that guess as they are told."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specstream.data.tokenizer import train_character_tokenizer
from specstream.drafters import CanvasDrafter
from specstream.generation import MaskedPipeline
from specstream.generation.lengths import DraftLength, RowLength, StepCosts
from specstream.models.pretrained_masked import (
    MaskedForm,
    PretrainedMaskedLM,
    UntrainedMaskedLM,
)
from specstream.processors import TextProcessor
from specstream.sampling import Noise, Sampling, probabilities
from specstream.structures import Canvas, CanvasDraft, CanvasVerdict
from specstream.verification import CanvasVerifier

EOS, MASK, UNKNOWN = range(3)  # of a tokenizer of characters
VOCABULARY = 8  # these and "abcde"


@functools.cache
def characters(text: str = "abcde") -> TextProcessor:
    """Return a processor whose token 3 + i is the i-th character; prompts start with EOS."""
    return TextProcessor(train_character_tokenizer([text]))


def spelled(text: str) -> list[int]:
    """Return the tokens of letters, without the start of a text."""
    return [3 + ord(letter) - ord("a") for letter in text]


@functools.cache
@torch.no_grad()
def masked_lm(
    seed: int = 0,
    block_length: int | None = None,
    vocab_size: int = VOCABULARY,
    sharpness: float = 20.0,
    max_positions: int = 128,
    mask_id: int = MASK,
    corruption: float = 0.1,
) -> PretrainedMaskedLM:
    """Return an untrained masked model whose laws are peaked and depend on all of the canvas.

    Tests share it: who hooks it takes a copy.
    """
    lm = UntrainedMaskedLM(
        vocab_size, 16, 24, 2, 2, 1, max_positions, False, seed=seed,
        block_length=block_length, mask_id=mask_id,
    )  # fmt: skip
    for weight in lm.parameters():
        if weight.dim() > 1:
            weight.mul_(15)
    lm.model.get_output_embeddings().weight.mul_(sharpness / 15)
    lm.form = replace(lm.form, corruption=corruption)
    return lm.eval().requires_grad_(False)


class ScriptedMasked(PretrainedMaskedLM):
    """A fake that says script[i] at place i, whatever the canvas; the surer, the further left.

    It has no weights; `calls` holds the canvases of all of its passes.
    """

    def __init__(self, script: Sequence[int], vocab_size: int = VOCABULARY) -> None:
        torch.nn.Module.__init__(self)
        self.script = torch.tensor(script)
        self.form = MaskedForm(MASK, corruption=0.1)
        self.vocab_size, self.max_positions, self.path = vocab_size, None, ""
        self.calls: list[Tensor] = []

    device = property(lambda self: torch.device("cpu"))  # type: ignore[assignment]

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        self.calls.append(tokens.clone())
        places = torch.arange(tokens.shape[1]).clamp(max=len(self.script) - 1)
        sure = 10.0 - 0.01 * torch.arange(tokens.shape[1])
        said = torch.nn.functional.one_hot(self.script[places], self.vocab_size) * sure[:, None]
        return self.without_mask(said.expand(len(tokens), -1, -1))


class Guesser(CanvasDrafter):
    """Drafts one position a step, from the left or by `choose`, with the tokens it is told.

    `guess` is given the number of the prompt and the place; q is one-hot.
    """

    def __init__(
        self,
        guess: Callable[[int, int], int],
        choose: Callable[[list[int]], int] = min,
        vocab_size: int = VOCABULARY,
    ) -> None:
        super().__init__()
        self.guess, self.choose, self.vocab_size = guess, choose, vocab_size

    def new_cache(self, batch_size: int, capacity: int) -> None:
        return None

    def propose(
        self,
        canvas: Canvas,
        cache: None,
        num_steps: Sequence[int],
        sampling: Sampling,
        noise: Noise,
    ) -> CanvasDraft:
        tokens, steps = canvas.tokens.clone(), torch.full_like(canvas.tokens, -1)
        probs = torch.zeros(*tokens.shape, self.vocab_size)
        for row, number in enumerate(num_steps):
            masked = canvas.masked[row].nonzero()[:, 0].tolist()
            for step in range(min(number, len(masked))):
                place = self.choose(masked)
                masked.remove(place)
                token = self.guess(int(canvas.prompts[row]), place)
                tokens[row, place], steps[row, place] = token, step
                probs[row, place, token] = 1.0
        canvas.drawn = canvas.drawn + (steps.amax(1) + 1)
        return CanvasDraft(tokens, steps >= 0, steps, probs)

    def check_target(self, target: torch.nn.Module, processor: TextProcessor) -> None:
        """Any target will do."""

    def save(self, folder: Path, processor: TextProcessor) -> dict[str, Any]:
        raise NotImplementedError


@dataclass(frozen=True)
class Never(CanvasVerifier):
    """Masks every drafted position again."""

    def __call__(self, draft: CanvasDraft, p: Tensor | None) -> CanvasVerdict:
        return CanvasVerdict(torch.zeros_like(draft.drafted), draft.tokens)


@dataclass(frozen=True)
class Recorded(CanvasVerifier):
    """Judges as another rule, and keeps the drafts and laws it is shown."""

    rule: CanvasVerifier
    drafts: list[CanvasDraft] = field(default_factory=list)
    laws: list[Tensor] = field(default_factory=list)

    def __call__(self, draft: CanvasDraft, p: Tensor | None) -> CanvasVerdict:
        assert p is not None
        self.drafts.append(draft)
        self.laws.append(p)
        return self.rule(draft, p)


@dataclass(frozen=True)
class Told(DraftLength, RowLength):
    """A fixed length for every row that keeps what it is told of the outcomes."""

    max_tokens: int
    outcomes: list[tuple[int, int]] = field(default_factory=list)

    def for_row(self, costs: StepCosts | None) -> RowLength:
        return self

    def choose(self) -> int:
        return self.max_tokens

    def record(self, tested: int, accepted: int) -> None:
        self.outcomes.append((tested, accepted))


def any_order_law(lm: PretrainedMaskedLM, canvas: Sequence[int], sampling: Sampling) -> Tensor:
    """Return the joint law of a canvas's masks, one axis each, filled one by one at random.

    float64, over all orders and all fillings, from forwards without a sampler.
    """
    places = [i for i, token in enumerate(canvas) if token == lm.mask_id]
    vocab = lm.vocab_size
    law = torch.zeros([vocab] * len(places), dtype=torch.float64)
    orders = list(itertools.permutations(range(len(places))))
    for order in orders:
        texts, mass = torch.tensor([list(canvas)]), torch.ones(1, dtype=torch.float64)
        for i in order:  # every filling of the places before, and its probability
            p = probabilities(lm(texts)[:, places[i]].double(), sampling)  # (N, V)
            texts = texts.repeat_interleave(vocab, 0)
            texts[:, places[i]] = torch.arange(vocab).repeat(len(p))
            mass = (mass[:, None] * p).flatten()
        law.index_put_(tuple(texts[:, places].T), mass / len(orders), accumulate=True)
    return law


def texts(pipeline: MaskedPipeline, prompts: Sequence[Any], seed: int = 0) -> list[list[int]]:
    """Return the filled canvases of prompts, in their order."""
    found: dict[int, list[int]] = {}
    for step in pipeline.generate(prompts, seed=seed):
        found[step.prompt] = step.tokens
    return [found[i] for i in range(len(prompts))]


def texts_alone(pipeline: MaskedPipeline, prompts: Sequence[Any], seed: int = 0) -> list[list[int]]:
    """Return the same with every prompt in a run of its own."""
    found = []
    for i, prompt in enumerate(prompts):
        *_, last = pipeline.generate([prompt], seed=seed, indices=[i])
        found.append(last.tokens)
    return found
