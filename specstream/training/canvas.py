"""What a masked diffusion model is shown in training: canvases with some of their tokens hidden.

Noising of MDLM (Sahoo et al. 2024) and LLaDA (Nie et al. 2025): at time t in (0, 1] each scored
token is replaced by the mask token with probability t.  Every coin is keyed by what a row holds, so
a row is hidden alike whichever batch, device or process it is in; the times of a global batch are
spread evenly over (0, 1], which keeps the variance of the loss low.

Shapes: B rows, T positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specstream.sampling import Noise, Role
from specstream.training.base import Batch
from specstream.training.language_modeling import row_keys

SMALLEST_TIME = 1e-3  # a loss weighs 1 / t
GOLDEN = 0.6180339887498949  # multiples of it are spread evenly over (0, 1)


@dataclass(frozen=True, slots=True)
class HiddenRows:
    """Rows as the model sees them, and what it is asked about."""

    tokens: Tensor  # (B, T) with the mask token where `masked`, and perhaps some wrong ones
    masked: Tensor  # (B, T) bool: scored tokens that are hidden
    asked: Tensor  # (B, T) bool: positions in the loss, the masked ones among them
    weights: Tensor  # (B, T) of each position in the loss


def padded(batch: Batch, eos_id: int) -> Batch:
    """Return a batch whose padding is ends of text that are scored, as part of the row's document.

    So a canvas that is longer than its text can be filled (LLaDA's fine-tuning).  Rows without a
    scored token stay so: they only fill up a batch.  Raises ValueError for rows of several
    documents, which have no canvas of their own.
    """
    documents = batch["documents"]
    if int(documents.max()) > 0:
        raise ValueError("pad_canvas needs one document a row: set data.init_args.pack false")
    padding = documents < 0
    steps = torch.arange(documents.shape[1], device=documents.device)
    return {
        **batch,
        "input_ids": batch["input_ids"].masked_fill(padding, eos_id),
        "loss_mask": batch["loss_mask"] | (padding & batch["loss_mask"].any(1, keepdim=True)),
        "positions": steps.expand_as(documents),
        "documents": torch.zeros_like(documents),
    }


def spread_times(num_rows: int, rank: int, world_size: int, start: Tensor) -> Tensor:
    """Return times (B,) in [0, 1) of this process's rows, evenly spread over the global batch.

    MDLM's antithetic sampler: (start + i / n) mod 1 for row i of n, with `start` () uniform.
    """
    rows = rank + world_size * torch.arange(num_rows, device=start.device)
    return (start + rows / (num_rows * world_size)) % 1.0


def position_times(times: Tensor, positions: Tensor, block_length: int | None) -> Tensor:
    """Return the time (B, T) of each position, above 0: its row's (B,), or its block's own."""
    blocks = torch.zeros_like(positions) if block_length is None else positions // block_length
    spread = (times[:, None] + GOLDEN * blocks) % 1.0
    return SMALLEST_TIME + (1 - SMALLEST_TIME) * spread


def hide(batch: Batch, times: Tensor, mask_id: int, noise: Noise) -> HiddenRows:
    """Hide each scored token with the probability of its position's time (B, T).

    A hidden token weighs 1 / t, so that the loss is MDLM's bound on the NLL (linear schedule).
    """
    tokens, scored = batch["input_ids"], batch["loss_mask"]
    masked = scored & (_coins(tokens, noise, Role.MASK) < times)
    return HiddenRows(tokens.masked_fill(masked, mask_id), masked, masked, 1 / times)


def hide_in_turn(batch: Batch, times: Tensor, mask_id: int, noise: Noise) -> HiddenRows:
    """Return 2 B rows: each with some tokens hidden, and again with exactly the others.

    Complementary masks (Fast-dLLM v2): every scored token is learned once in a pair, with weight 1.
    """
    first = hide(batch, times, mask_id, noise)
    tokens, scored = batch["input_ids"], batch["loss_mask"]
    masked = torch.cat([first.masked, scored & ~first.masked])
    hidden = tokens.repeat(2, 1).masked_fill(masked, mask_id)
    return HiddenRows(hidden, masked, masked, torch.ones_like(masked, dtype=torch.float32))


def corrupt(
    hidden: HiddenRows, batch: Batch, share: float, vocab_size: int, mask_id: int, noise: Noise
) -> HiddenRows:
    """Replace a `share` of the visible scored tokens by random ones, and ask for all visible ones.

    A model that was asked for visible tokens can score a draft that it sees, in one pass.  The mask
    token, which no draft holds, is not among the random ones.
    """
    copies = len(hidden.tokens) // len(batch["input_ids"])
    tokens = batch["input_ids"].repeat(copies, 1)
    visible = batch["loss_mask"].repeat(copies, 1) & ~hidden.masked
    wrong = visible & (_coins(hidden.tokens, noise, Role.CORRECT) < share)
    drawn = (_coins(hidden.tokens, noise, Role.DRAFT) * (vocab_size - 1)).long()
    drawn = drawn + (drawn >= mask_id)
    weights = torch.where(visible, 1.0, hidden.weights)
    shown = torch.where(wrong, drawn, torch.where(hidden.masked, hidden.tokens, tokens))
    return HiddenRows(shown, hidden.masked, hidden.asked | visible, weights)


def one_block(batch: Batch, block_length: int, noise: Noise) -> tuple[Tensor, Tensor]:
    """Choose a block of each row with scored tokens: (which (B, T), of how many (B,))."""
    blocks, scored = batch["positions"] // block_length, batch["loss_mask"]
    num_blocks = int(blocks.max()) + 1
    holds = torch.zeros(len(blocks), num_blocks, dtype=torch.bool, device=blocks.device)
    holds = holds.scatter_reduce(1, blocks, scored, "amax")  # (B, N)
    steps = torch.arange(num_blocks, device=blocks.device).expand_as(holds)
    coins = noise.uniform(row_keys(batch["input_ids"]), steps, Role.ORDER)
    chosen = torch.where(holds, coins, -1.0).argmax(1)
    return blocks == chosen[:, None], holds.sum(1)


def _coins(tokens: Tensor, noise: Noise, role: Role) -> Tensor:
    steps = torch.arange(tokens.shape[1], device=tokens.device)
    return noise.uniform(row_keys(tokens), steps.expand_as(tokens), role)
