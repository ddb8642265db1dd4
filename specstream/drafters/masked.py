"""Masked diffusion models as drafters of masked diffusion models.

A block model reads finished blocks once and keeps their keys and values, so a denoising step costs
it one block, whatever the canvas's length; that is what makes it cheap beside a bidirectional
target, which reads the whole canvas each time.  It guesses from the left: the lowest block with
masks first.  What is filled already further right stays, for the target to see.

A step also draws and judges at the masked positions that it may fill and nowhere else: over a
canvas times a vocabulary, softmax and draws would cost more than the network.

Shapes: B rows, C positions of a canvas, N masked positions that a step is about, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from specstream.drafters.base import CanvasDrafter
from specstream.models.cache import SlotCache
from specstream.models.pretrained_masked import PretrainedMaskedLM
from specstream.processors import TextProcessor
from specstream.sampling import Noise, Role, Sampling, draw, probabilities
from specstream.structures import Canvas, CanvasDraft
from specstream.unmasking import StaticSchedule, Threshold, Unmasking

# A CPU multiplies up to three rows by a matrix with other code, which rounds otherwise: a step
# should not say other things for having few masks left.
FEWEST = 4


@dataclass(slots=True)
class BlockCache:
    """Keys and values of finished blocks, and what they were read from."""

    slots: SlotCache
    read: Tensor  # (B, C) tokens as they were when their keys and values were made; -1: not yet


@dataclass(frozen=True, slots=True)
class BlockLook:
    """What a pass says of the positions that a step may fill."""

    logits: Tensor  # (B, N, V)
    places: Tensor  # (B, N) the position in the canvas of each; the eligible first, ascending
    eligible: Tensor  # (B, N) bool; False fills up the rows that have fewer than N


class MaskedDraftModel(CanvasDrafter):
    """A masked diffusion LM, smaller than its target, that makes several steps a round.

    `unmasking` says which positions a step fills: `Threshold` all that it is sure of, and one at
    least.  A guess less probable than `sure` is left to the target all the same, and a row whose
    step has no surer one drafts no more in this round.  A block model keeps finished blocks in a
    cache; a bidirectional one reads the whole canvas each step.  A canvas beyond the model's
    context gets no draft.
    """

    def __init__(
        self,
        target: nn.Module,
        model: Callable[[], PretrainedMaskedLM],
        unmasking: Unmasking | None = None,
        sure: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= sure <= 1:
            raise ValueError(f"sure must be in [0, 1], got {sure}")
        self.sure = sure
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
        probs = _zeros((*tokens.shape, self.model.vocab_size), tokens.device)
        budget = torch.tensor(list(num_steps), device=tokens.device)
        room = self.model.max_positions
        if room is not None:
            budget = budget.where(canvas.lengths <= room, 0)
        for step in range(max(num_steps)):
            active = (budget > step) & masked.any(1)
            look = self._look(tokens, masked & active[:, None], canvas.lengths, cache)
            if look is None:
                break
            elements = canvas.elements().gather(1, look.places)
            coins = noise.uniform(canvas.prompts, elements, Role.DRAFT)  # (B, N)
            law = probabilities(look.logits, Sampling())  # its own: how sure it is (B, N, V)
            warped = law if sampling == Sampling() else probabilities(look.logits, sampling)
            drawn = draw(warped, coins)  # (B, N)
            none = torch.zeros_like(canvas.drawn)
            chosen = self.unmasking.choose(law, drawn, look.eligible, none, none, coins)
            chosen = chosen & (law.gather(-1, drawn[:, :, None])[:, :, 0] >= self.sure)
            budget = budget.where(chosen.any(1), 0)
            canvas.drawn = canvas.drawn + active
            # Waits for the device: laws are written for what is chosen alone, which may be few.
            rows, columns = chosen.nonzero(as_tuple=True)
            filled = rows, look.places[rows, columns]
            tokens[filled] = drawn[rows, columns]
            steps[filled] = step
            probs[filled] = law[rows, columns].to(probs.dtype)
            masked[filled] = False
        return CanvasDraft(tokens, steps >= 0, steps, probs)

    def _look(
        self, tokens: Tensor, masked: Tensor, lengths: Tensor, cache: BlockCache | None
    ) -> BlockLook | None:
        """Return what the model says of the masked positions (B, C) that it fills first.

        None where nothing is masked.
        """
        if cache is not None:
            return look_at_block(self.model, tokens, masked, lengths, cache)
        most = int(masked.sum(1).max())
        if not most:
            return None
        places, eligible = _packed(masked, most)
        logits = self.model(tokens, lengths).take_along_dim(places[:, :, None], 1)
        return BlockLook(logits, places, eligible)

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
        rule = type(self.unmasking)
        unmasking = {
            "class_path": f"{rule.__module__}.{rule.__name__}",
            "init_args": vars(self.unmasking),
        }
        return {
            "class_path": "specstream.drafters.MaskedDraftModel",
            "init_args": {"model": ".", "unmasking": unmasking, "sure": self.sure},
        }


def look_at_block(
    model: PretrainedMaskedLM, tokens: Tensor, masked: Tensor, lengths: Tensor, cache: BlockCache
) -> BlockLook | None:
    """Read each row up to the end of its lowest block with masks; return what it says of those.

    Blocks before it that have changed since they were read, or were never read, go along in the
    same pass.  A block that is read counts as unread while it, or one before it, may still change:
    no later block is trusted before it has been read again.  Rows without masks read no more than
    the others need; where no row has any, nothing is read: None.
    """
    assert model.block_length is not None
    size, width = model.block_length, tokens.shape[1]
    canvas = torch.arange(width, device=tokens.device)
    first = torch.where(masked, canvas, width).amin(1)  # (B,) C where nothing is masked
    changed = (cache.read[:, :width] != tokens) & (canvas < lengths[:, None])
    stale = torch.where(changed, canvas, lengths[:, None] - 1).amin(1) // size
    block = torch.where(first < width, first // size, stale)  # (B,) the last block to read
    start = torch.minimum(stale, block)  # (B,) the first block to read
    open_ = masked & (canvas < ((block + 1) * size)[:, None])  # of the row's block: none before
    sizes = torch.stack([(block - start).max(), start.max(), open_.sum(1).max()])
    more, latest, most = sizes.tolist()  # shapes of the pass: the host has to know them
    if not most:
        return None
    span = (more + 1) * size
    capacity = cache.read.shape[1]
    starts = (start * size).clamp(max=capacity - span)
    slots = starts[:, None] + torch.arange(span, device=tokens.device)  # (B, S)
    shown = torch.where(slots < width, tokens.gather(1, slots.clamp(max=width - 1)), 0)
    places, eligible = _packed(open_, most)
    asked = torch.where(eligible, places - starts[:, None], 0)  # (B, N)
    view = min(latest * size, capacity - span) + span
    logits = model.extend(shown, starts, lengths, cache.slots, view, asked)  # (B, N, V)
    finished = slots < (block * size)[:, None]  # read with all their tokens: they stay valid
    cache.read.scatter_(1, slots, torch.where(finished, shown, -1))
    return BlockLook(logits, places, eligible)


def _packed(masked: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return the positions (B, N) of the masks (B, C) of each row, and which (B, N) are such.

    N is the `most` that a row has, or `FEWEST`.
    """
    places = (~masked).to(torch.uint8).argsort(dim=1, stable=True)[:, : max(most, FEWEST)]
    return places, masked.gather(1, places)


def _zeros(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Return float32 zeros, most of which stay untouched.

    On a CPU numpy asks the system for blank pages, of which only those written to cost time; torch
    fills them all (512 positions of a vocabulary of 32 k: 0.1 against 30 ms).
    """
    if device.type == "cpu":
        return torch.from_numpy(np.zeros(shape, np.float32))
    return torch.zeros(shape, device=device)
