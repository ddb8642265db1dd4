"""On-policy data: documents whose completions are written by a model while it is trained.

Training on what the drafter itself writes closes the gap between training and decoding, where it
reads its own tokens (Agarwal et al. 2024, GKD; Zhou et al. 2024, DistillSpec, which also tries the
target's own continuations).  The continuations come from the pipelines that decode.

Which batches are replaced is a pure function of (seed, epoch, batch), so that all processes agree
and a resumed run goes on alike.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from specstream.generation import TextPipeline
from specstream.training.base import Batch

Source = Literal["drafter", "target"]


@dataclass(frozen=True)
class OnPolicy:
    """How much of the data a model writes itself.

    `fraction` of the batches are replaced; `source` writes them, at `temperature`.  Completions
    get at most `max_new_tokens` tokens and never more room than the document had; a document
    without a prompt (raw text) gives its first half as one.
    Raises ValueError for a fraction outside [0, 1] or an unknown source.
    """

    fraction: float = 0.25
    source: Source = "drafter"
    max_new_tokens: int = 64
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.fraction <= 1:
            raise ValueError(f"on_policy fraction must be in [0, 1], got {self.fraction}")
        if self.source not in ("drafter", "target"):
            raise ValueError(f"on_policy source must be drafter or target, got {self.source!r}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")

    def chooses(self, seed: int, epoch: int, batch_idx: int) -> bool:
        """Return whether this batch of the run of this seed is to be rewritten."""
        coin = random.Random(f"{seed} {epoch} {batch_idx}").random()
        return coin < self.fraction


@dataclass(frozen=True)
class Slot:
    """A document of a packed row: its prompt stays, `room` tokens after it are written anew."""

    row: int
    start: int
    prompt: int  # tokens of the prompt
    room: int


def find_slots(batch: Batch, max_new_tokens: int) -> list[Slot]:
    """Return the documents of a batch that have a scored token, in order."""
    documents, scored = batch["documents"].cpu(), batch["loss_mask"].cpu()
    slots = []
    for row in range(documents.shape[0]):
        numbers, lengths = documents[row].unique_consecutive(return_counts=True)
        start = 0
        for number, length in zip(numbers.tolist(), lengths.tolist(), strict=True):
            where = scored[row, start : start + length].nonzero()
            if number >= 0 and len(where):
                first = int(where[0])
                prompt = first if first > 1 else max(length // 2, 1)
                if room := min(length - prompt, max_new_tokens):
                    slots.append(Slot(row, start, prompt, room))
            start += length
    return slots


def rewrite(batch: Batch, pipeline: TextPipeline, slots: list[Slot], seed: int) -> Batch:
    """Return the batch with the slots' completions written by `pipeline`, and only those scored.

    `pipeline` is limited to at least the largest room.  What a document held beyond its new
    completion becomes padding.
    """
    prompts = [
        batch["input_ids"][slot.row, slot.start : slot.start + slot.prompt].tolist()
        for slot in slots
    ]
    written = pipeline.complete(prompts, seed=seed)
    tokens: Tensor = batch["input_ids"].clone()
    documents: Tensor = batch["documents"].clone()
    mask = torch.zeros_like(batch["loss_mask"])
    for slot, completion in zip(slots, written, strict=True):
        new = completion.tokens[: slot.room]
        begin = slot.start + slot.prompt
        end = begin + len(new)
        tokens[slot.row, begin:end] = torch.tensor(new, dtype=tokens.dtype, device=tokens.device)
        mask[slot.row, begin:end] = True
        own = batch["documents"][slot.row, slot.start]
        rest = batch["documents"][slot.row] == own
        rest[:end] = False
        documents[slot.row, rest] = -1
    positions = torch.where(documents < 0, 0, batch["positions"])
    return {"input_ids": tokens, "loss_mask": mask, "positions": positions, "documents": documents}
