"""Prompts into canvases with masks to fill, and filled canvases into text.

A prompt that holds masks is filled where they are; any other is continued by as many masks as the
limit allows.  It does not know models.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specstream.generation.batch import Limits
from specstream.processors import TextProcessor
from specstream.structures import Canvas, Completion, Origin

MASKS = re.compile(r"\[MASK(?::([0-9]+))?\]")  # [MASK], or [MASK:12] for twelve
MOST_MASKS = 2**20  # of one canvas: more than any model has room for, few enough to hold


@dataclass(frozen=True, slots=True)
class CanvasPrompt:
    """A canvas before anything is filled: mask tokens where it is to be."""

    tokens: list[int]
    continued: (
        int | None
    )  # where a continuation begins; None: masks of the prompt itself are filled


@dataclass(frozen=True, slots=True)
class OpenRows:
    """The rows of a batch that have masks, as the host knows them from the last round's report.

    So a loop need not wait for the device to tell whether it goes on.
    """

    lengths: list[int]  # positions of every row
    masks: dict[int, int]  # masks of each row that is not full

    @classmethod
    def of(cls, prompts: Sequence[CanvasPrompt], mask_id: int) -> OpenRows:
        counts = [prompt.tokens.count(mask_id) for prompt in prompts]
        return cls([len(prompt.tokens) for prompt in prompts], dict(enumerate(counts)))


def encode_canvas(
    processor: TextProcessor, prompt: str | Sequence[int], mask_id: int, limits: Limits
) -> CanvasPrompt:
    """Return the canvas of a prompt; in a text `[MASK]` is a masked token and `[MASK:n]` are n.

    Raises ValueError for a prompt that is empty, or that says `[MASK:0]` and holds no mask, and for
    more than MOST_MASKS.
    """
    tokens = processor.encode(prompt)  # ValueError for what is no text
    if isinstance(prompt, str) and MASKS.search(prompt):
        tokens = _infilled(processor, prompt, mask_id)
        if mask_id not in tokens:
            raise ValueError(f"a prompt asks for no masked token at all: {prompt[:40]!r}")
    if not tokens:
        raise ValueError("a prompt is empty, and the tokenizer starts a text with no token")
    if mask_id in tokens:
        return CanvasPrompt(tokens, None)
    _check_number(limits.max_new_tokens)
    return CanvasPrompt([*tokens, *[mask_id] * limits.max_new_tokens], len(tokens))


def _infilled(processor: TextProcessor, prompt: str, mask_id: int) -> list[int]:
    counts = [_number(found) for found in MASKS.finditer(prompt)]
    _check_number(sum(counts))
    tokens: list[int] = []
    place = 0
    for found, count in zip(MASKS.finditer(prompt), counts, strict=True):
        tokens += _piece(processor, prompt[place : found.start()], first=place == 0)
        tokens += [mask_id] * count
        place = found.end()
    return tokens + _piece(processor, prompt[place:], first=place == 0)


def _number(found: re.Match[str]) -> int:
    """Return how many masks a `[MASK]` or `[MASK:n]` stands for; beyond MOST_MASKS any such n."""
    digits = (found[1] or "1").lstrip("0")
    return int(digits[: len(str(MOST_MASKS)) + 1] or 0)


def _check_number(masks: int) -> None:
    if masks > MOST_MASKS:
        raise ValueError(f"a prompt asks for more masked tokens than {MOST_MASKS}")


def _piece(processor: TextProcessor, text: str, first: bool) -> list[int]:
    """Return a piece's tokens; only the first piece starts as a text does."""
    unknown = processor.unknown(text)
    if unknown is not None:
        raise ValueError(f"the tokenizer has no token for {unknown!r}: it would leave the text")
    if first:
        return processor.encode(text)
    return list(processor.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def make_canvas(
    prompts: Sequence[CanvasPrompt], indices: Sequence[int], mask_id: int, device: torch.device
) -> Canvas:
    """Return the canvases of a batch, padded to the widest."""
    width = max(len(prompt.tokens) for prompt in prompts)
    tokens = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt.tokens)] = torch.tensor(prompt.tokens)
    lengths = torch.tensor([len(prompt.tokens) for prompt in prompts])
    masked = (tokens == mask_id) & (torch.arange(width) < lengths[:, None])
    drawn = torch.zeros_like(lengths)
    return Canvas(
        *(x.to(device) for x in (tokens, masked, lengths, torch.tensor(list(indices)), drawn))
    )


def complete_canvas(
    processor: TextProcessor,
    prompt: CanvasPrompt,
    number: int,
    tokens: Sequence[int],
    origins: dict[int, Origin],
    ignore_eos: bool = False,
) -> Completion:
    """Return what was filled, as text: a continuation up to the end of text, or all of a canvas."""
    first, end = 0, len(tokens)
    if prompt.continued is not None:
        first = prompt.continued
        ends = [i for i in range(first, end) if tokens[i] in processor.eos_ids]
        end = ends[0] if ends and not ignore_eos else end
    filled = sorted(place for place in origins if place <= end)
    return Completion(
        number,
        processor.decode(tokens[first:end]),
        [tokens[place] for place in filled],
        [origins[place] for place in filled],
    )


def mask_blocks(masked: Tensor, block_tokens: int | None) -> tuple[Tensor, Tensor]:
    """Return the block (B, C) of each position and how many masks each block holds (B, N).

    Blocks of `block_tokens` count from a row's first mask; None makes one of the whole canvas.
    """
    width = masked.shape[1]
    places = torch.arange(width, device=masked.device)
    if block_tokens is None:
        return torch.zeros_like(masked, dtype=torch.long), masked.sum(1, keepdim=True)
    first = torch.where(masked, places, width).amin(1, keepdim=True)
    blocks = ((places - first).clamp(min=0) // block_tokens).expand(masked.shape)
    totals = torch.zeros(len(masked), width // block_tokens + 1, dtype=torch.long)
    totals = totals.to(masked.device).scatter_add(1, blocks, masked.long())
    return blocks, totals
