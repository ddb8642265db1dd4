"""Masked diffusion models as drafters of masked diffusion models.

A block model reads finished blocks once and keeps their keys and values, so a denoising step costs
it one block, whatever the canvas's length; that is what makes it cheap beside a bidirectional
target, which reads the whole canvas each time.  It guesses from the left: the lowest block with
masks first.  What is filled already further right stays, for the target to see.

Shapes: B rows, C positions of a canvas, L positions of a block, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from specstream.drafters.base import CanvasDrafter
from specstream.models.cache import SlotCache
from specstream.models.pretrained_masked import PretrainedMaskedLM
from specstream.processors import TextProcessor
from specstream.sampling import Noise, Role, Sampling, draw, probabilities
from specstream.structures import Canvas, CanvasDraft
from specstream.unmasking import StaticSchedule, Threshold, Unmasking


@dataclass(slots=True)
class BlockCache:
    """Keys and values of finished blocks, and what they were read from."""

    slots: SlotCache
    read: Tensor  # (B, C) tokens as they were when their keys and values were made; -1: not yet


class MaskedDraftModel(CanvasDrafter):
    """A masked diffusion LM, smaller than its target, that makes several steps a round.

    `unmasking` says which positions a step fills: `Threshold` all that it is sure of.  A block
    model keeps finished blocks in a cache; a bidirectional one reads the whole canvas each step.
    A canvas beyond the model's context gets no draft.
    """

    def __init__(
        self,
        target: nn.Module,
        model: Callable[[], PretrainedMaskedLM],
        unmasking: Unmasking | None = None,
    ) -> None:
        super().__init__()
        self.model = model()
        self.unmasking = unmasking if unmasking is not None else Threshold(0.9)
        if isinstance(self.unmasking, StaticSchedule):
            raise ValueError(
                "a drafter's steps have no schedule: give Threshold, Factor or EntropyBound"
            )

    def new_cache(self, batch_size: int, capacity: int) -> BlockCache | None:
        length = self.model.block_length
        if length is None:
            return None
        slots = (-(-capacity // length) + 1) * length  # whole blocks
        read = torch.full((batch_size, slots), -1, device=self.model.device)
        return BlockCache(self.model.new_cache(batch_size, slots), read)

    @torch.inference_mode()
    def propose(
        self,
        canvas: Canvas,
        cache: BlockCache | None,
        num_steps: Sequence[int],
        sampling: Sampling,
        noise: Noise,
    ) -> CanvasDraft:
        tokens, masked = canvas.tokens.clone(), canvas.masked.clone()
        steps = torch.full_like(tokens, -1)
        probs = torch.zeros(*tokens.shape, self.model.vocab_size, device=tokens.device)
        budget = torch.tensor(list(num_steps), device=tokens.device)
        room = self.model.max_positions
        if room is not None:
            budget = budget.where(canvas.lengths <= room, 0)
        for step in range(max(num_steps)):
            active = (budget > step) & masked.any(1)
            if not bool(active.any()):
                break
            logits, eligible = self._look(tokens, masked & active[:, None], canvas.lengths, cache)
            coins = noise.uniform(canvas.prompts, canvas.elements(), Role.DRAFT)
            drawn = draw(probabilities(logits, sampling), coins)
            law = probabilities(logits, Sampling())  # its own: how sure it is, at any temperature
            none = torch.zeros_like(canvas.drawn)
            chosen = self.unmasking.choose(law, drawn, eligible, none, none, coins)
            canvas.drawn = canvas.drawn + active
            tokens = torch.where(chosen, drawn, tokens)
            steps = torch.where(chosen, step, steps)
            probs = torch.where(chosen[:, :, None], law.to(probs.dtype), probs)
            masked = masked & ~chosen
        return CanvasDraft(tokens, steps >= 0, steps, probs)

    def _look(
        self, tokens: Tensor, masked: Tensor, lengths: Tensor, cache: BlockCache | None
    ) -> tuple[Tensor, Tensor]:
        """Return logits (B, C, V) and the positions (B, C) that they are about."""
        if cache is None:
            return self.model(tokens, lengths), masked
        return look_at_block(self.model, tokens, masked, lengths, cache)

    def check_target(self, target: nn.Module, processor: TextProcessor) -> None:
        assert isinstance(target, PretrainedMaskedLM)
        if self.model.mask_id != target.mask_id:
            raise ValueError(
                f"the drafter's mask token is {self.model.mask_id}, the target's {target.mask_id}"
            )
        if self.model.vocab_size != target.vocab_size:
            raise ValueError(
                f"the drafter has a vocabulary of {self.model.vocab_size}, the target one of "
                f"{target.vocab_size}"
            )

    def save(self, folder: Path, processor: TextProcessor) -> dict[str, Any]:
        self.model.save(folder, processor.tokenizer)
        return {"class_path": "specstream.drafters.MaskedDraftModel", "init_args": {"model": "."}}


def look_at_block(
    model: PretrainedMaskedLM, tokens: Tensor, masked: Tensor, lengths: Tensor, cache: BlockCache
) -> tuple[Tensor, Tensor]:
    """Read each row up to the end of its lowest block with masks; return what it says there.

    Logits (B, C, V), zero where nothing was read, and the masked positions (B, C) of those blocks.
    Blocks before it that have changed since they were read, or were never read, go along in the
    same pass.  A block that is read counts as unread while it, or one before it, may still change:
    no later block is trusted before it has been read again.  Rows without masks read no more than
    the others need.
    """
    assert model.block_length is not None
    size, width = model.block_length, tokens.shape[1]
    places = torch.arange(width, device=tokens.device)
    first = torch.where(masked, places, width).amin(1)  # (B,) C where nothing is masked
    changed = (cache.read[:, :width] != tokens) & (places < lengths[:, None])
    stale = torch.where(changed, places, lengths[:, None] - 1).amin(1) // size
    block = torch.where(first < width, first // size, stale)  # (B,) the last block to read
    start = torch.minimum(stale, block)  # (B,) the first block to read
    num_blocks = int((block - start).max()) + 1
    span = num_blocks * size
    capacity = cache.read.shape[1]
    starts = (start * size).clamp(max=capacity - span)
    slots = starts[:, None] + torch.arange(span, device=tokens.device)  # (B, S)
    shown = torch.where(slots < width, tokens.gather(1, slots.clamp(max=width - 1)), 0)
    said = model.extend(shown, starts, lengths, cache.slots, int(starts.max()) + span)  # (B, S, V)
    ends = (block + 1) * size
    finished = slots < (block * size)[:, None]  # read with all their tokens: they stay valid
    cache.read.scatter_(1, slots, torch.where(finished, shown, -1))
    logits = said.new_zeros(len(tokens), capacity, said.shape[-1])
    logits.scatter_(1, slots[:, :, None].expand_as(said), said)
    inside = (places >= (block * size)[:, None]) & (places < ends[:, None])
    return logits[:, :width], masked & inside
