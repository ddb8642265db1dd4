"""Training of block drafters (Chen et al. 2026, DFlash; Cheng et al. 2026, DSpark).

Decoding starts a block at whatever token was committed last, so training samples places of the
packed rows as anchors, and starts a block at each.  A block sees the features of the places before
its anchor in its own document, and itself: with n committed tokens decoding knows the features of
n - 1 places, and the anchor is the token without.  The target runs once and gives features and,
through its head, the laws to learn; its law at place t is that of token t + 1.

Shapes: B rows, T tokens, A blocks a row, K positions of a block, N scored positions of all blocks,
D hidden, V vocabulary, r rank of the Markov bias.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import AdamW

from specstream.divergences import (
    Divergence,
    ForwardKL,
    acceptance,
    chunked_divergence,
)
from specstream.drafters import BlockDrafter, Drafter
from specstream.drafters.sequential import with_previous
from specstream.models.pretrained_lm import PretrainedLM
from specstream.models.walk import read
from specstream.sampling import Noise, Role
from specstream.training.base import Batch, LossSum
from specstream.training.decoding import HeldOutDecoding
from specstream.training.draft_module import DraftModule, check_single_places
from specstream.training.language_modeling import layout, row_keys
from specstream.training.optimization import Schedule


class PositionWeights(ABC):
    """How much each position of a block counts: an error hides all that comes after it."""

    @abstractmethod
    def __call__(self, accepted: Tensor, inside: Tensor) -> Tensor:
        """Return weights (..., K) of positions accepted with chances (..., K), inside (..., K).

        Both are without gradient; a position that is not inside is not scored.
        """


@dataclass(frozen=True)
class ExponentialDecay(PositionWeights):
    """exp(-(k - 1) / gamma) at position k = 1..K (DFlash): the same for every block.

    Published for DFlash are gamma 7, 5 and 4 for blocks of 16, 10 and 8, for DSpark 4 for one of 7.
    Raises ValueError for a gamma that is not positive.
    """

    gamma: float = 4.0

    def __post_init__(self) -> None:
        if not self.gamma > 0:
            raise ValueError(f"gamma must be positive, got {self.gamma}")

    def __call__(self, accepted: Tensor, inside: Tensor) -> Tensor:
        steps = torch.arange(inside.shape[-1], device=inside.device)
        return (-steps / self.gamma).exp() * inside


@dataclass(frozen=True)
class AcceptedLengthWeights(PositionWeights):
    """D-PACE (2026): position k weighs the sum over j >= k of P_j = a'_1 .. a'_j.

    a' = (1 - smoothing) a + smoothing of the acceptance a.  Without smoothing and with
    `NegativeLogAcceptance` as divergence the gradient is exactly that of minus the expected
    accepted length; smoothing keeps far positions learning while the near ones are still wrong.
    Raises ValueError for a smoothing outside [0, 1].
    """

    smoothing: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing <= 1:
            raise ValueError(f"smoothing must be in [0, 1], got {self.smoothing}")

    def __call__(self, accepted: Tensor, inside: Tensor) -> Tensor:
        smoothed = accepted + self.smoothing * (1.0 - accepted)
        prefixes = (smoothed * inside).cumprod(-1)
        return prefixes.flip(-1).cumsum(-1).flip(-1)


@dataclass(frozen=True, slots=True)
class Blocks:
    """Where the blocks of a batch start, and which of their positions are scored."""

    anchors: Tensor  # (B, A) places in the row
    places: Tensor  # (B, A, K) the place of each position, at most T - 2: it speaks of the next
    inside: Tensor  # (B, A, K) bool; False from the end of the run of scored tokens on


@dataclass(frozen=True)
class _WithAcceptance(Divergence):
    """A divergence that also measures the acceptance at its own temperature: (N, 2)."""

    divergence: Divergence

    def __call__(
        self, target_logits: Tensor | None, draft_logits: Tensor, labels: Tensor | None
    ) -> Tensor:
        return self.divergence(target_logits, draft_logits, labels)

    def measure(
        self, target_logits: Tensor | None, draft_logits: Tensor, labels: Tensor | None
    ) -> Tensor:
        assert target_logits is not None
        value = self(target_logits, draft_logits, labels)
        with torch.no_grad():
            stands = acceptance(target_logits, draft_logits, self.divergence.temperature)
        return torch.stack([value, stands], -1)


class BlockModule(DraftModule):
    """Trains a `BlockDrafter` beside its frozen target.

    `num_anchors` blocks are sampled from each row, anew in each epoch, where the next token is
    scored.  The loss of a position is `divergence` to the target's law there, weighted by
    `weights`.  A Markov head is taught with the data's own previous token, and a confidence head
    to say the acceptance, sum of min(p, q), by cross-entropy times `confidence_weight`.  Logits
    exist for `chunk_tokens` positions at once.

    Metrics: the acceptance of each position, and tau as decoding would find it if these acceptances
    were those of its rounds (blocks cut short by the end of a text included).
    Raises ValueError for a divergence of whole blocks: `weights` is its place here.
    """

    def __init__(
        self,
        drafter: Callable[[nn.Module], Drafter],
        target: Callable[[], PretrainedLM],
        divergence: Divergence | None = None,
        weights: PositionWeights | None = None,
        num_anchors: int = 32,
        confidence_weight: float = 1.0,
        optimizer: OptimizerCallable = AdamW,
        schedule: Schedule | None = None,
        decoding: HeldOutDecoding | None = None,
        chunk_tokens: int = 1024,
    ) -> None:
        super().__init__(drafter, target, optimizer, schedule, decoding, chunk_tokens)
        self.divergence = divergence if divergence is not None else ForwardKL()
        check_single_places(self.divergence, "positions are weighed by weights")
        if num_anchors < 1:
            raise ValueError(f"num_anchors must be at least 1, got {num_anchors}")
        if not 0 <= confidence_weight < math.inf:
            raise ValueError(
                f"confidence_weight must not be negative or infinite, got {confidence_weight}"
            )
        self.weights = weights if weights is not None else ExponentialDecay()
        self.num_anchors = num_anchors
        self.confidence_weight = confidence_weight

    def configure_model(self) -> None:
        super().configure_model()
        if not isinstance(self.drafter, BlockDrafter):
            raise ValueError(
                f"{type(self).__name__} trains a BlockDrafter, not {type(self.drafter).__name__}"
            )

    def loss(self, batch: Batch) -> LossSum:
        drafter, target = self.drafter, self.target
        assert isinstance(drafter, BlockDrafter) and target is not None
        tokens = batch["input_ids"]
        with torch.no_grad():
            hidden, features = read(target, tokens, *layout(batch), drafter.feature_layers)
        blocks = sample_blocks(batch, self.num_anchors, drafter.max_tokens, self.epoch_noise())
        inside, places = blocks.inside, blocks.places[blocks.inside]  # (B, A, K), (N,)
        rows = torch.arange(len(tokens), device=tokens.device)[:, None, None]
        rows = rows.expand_as(inside)[inside]
        states = block_states(drafter, batch, features, blocks)[inside]
        states = with_previous(states, drafter.markov, tokens[rows, places])  # (N, D + r)
        measures = chunked_divergence(
            _WithAcceptance(self.divergence),
            states,
            drafter.logits,
            hidden[rows, places],
            target.head,
            tokens[rows, places + 1],
            self.chunk_tokens,
        )
        values, stands = measures[:, 0], measures[:, 1].detach()
        accepted = torch.zeros_like(inside, dtype=stands.dtype)
        accepted[inside] = stands
        total = (self.weights(accepted, inside)[inside] * values).sum()
        metrics = block_metrics(accepted, inside)
        if drafter.confidence is not None:
            said = drafter.confidence(states).float()  # (N,)
            surprise = functional.binary_cross_entropy_with_logits(said, stands, reduction="sum")
            total = total + self.confidence_weight * surprise
            metrics["confidence_error"] = (said.detach().sigmoid() - stands).abs().sum()
        return LossSum(total, inside.sum(), metrics)


def block_states(drafter: BlockDrafter, batch: Batch, features: Tensor, blocks: Blocks) -> Tensor:
    """Return the states (B, A, K, D) of blocks in packed rows whose features (B, T, F) are known.

    The same parts run as in decoding; only what a block may see is given by a mask.
    """
    tokens, positions, documents = (batch[n] for n in ("input_ids", "positions", "documents"))
    anchors = blocks.anchors
    steps = torch.arange(tokens.shape[1], device=tokens.device)
    seen = documents[:, None] == documents.gather(1, anchors)[:, :, None]  # (B, A, T)
    seen = seen & (steps < anchors[:, :, None])
    context = drafter.network.inject(features, positions)
    return drafter.states(tokens.gather(1, anchors), positions.gather(1, anchors), context, seen)


def sample_blocks(batch: Batch, num_anchors: int, block_size: int, noise: Noise) -> Blocks:
    """Sample up to `num_anchors` places of each row whose next token is scored, without repetition.

    A row's coins are keyed by what the row holds, so its blocks are the same whichever batch,
    device or process it is in: runs repeat, resume, and are split over processes, to the bit.
    """
    tokens, documents = batch["input_ids"], batch["documents"]
    length = tokens.shape[1]
    steps = torch.arange(length, device=tokens.device)
    follows = batch["loss_mask"][:, 1:] & (documents[:, 1:] == documents[:, :-1])
    follows = functional.pad(follows, (0, 1))  # (B, T) the next token is scored
    coins = noise.uniform(row_keys(tokens), steps.expand_as(tokens), Role.DRAFT)
    best = torch.where(follows, coins, -1.0).topk(min(num_anchors, length), 1)
    places = best.indices[:, :, None] + torch.arange(block_size, device=tokens.device)
    scored = follows[:, None].expand(-1, places.shape[1], -1)
    inside = scored.gather(2, places.clamp(max=length - 1)) & (places < length - 1)
    inside = inside.to(torch.uint8).cumprod(-1).bool() & (best.values >= 0)[:, :, None]
    return Blocks(best.indices, places.clamp(max=length - 2), inside)


def block_metrics(accepted: Tensor, inside: Tensor) -> dict[str, Tensor]:
    """Return metrics of the acceptances (B, A, K) as sums that divided by the count are means.

    What is a mean over blocks, or over the blocks that have a k-th position, is taken within the
    batch and weighs as many positions as the batch has.
    """
    count = inside.sum()
    metrics: dict[str, Any] = {}
    for k in range(inside.shape[-1]):
        there = inside[..., k].sum().clamp(min=1)
        metrics[f"acceptance_{k + 1}"] = accepted[..., k].sum() / there * count
    num_blocks = inside[..., 0].sum().clamp(min=1)
    prefixes = (accepted * inside).cumprod(-1).sum()
    metrics["tau_expected"] = (1 + prefixes / num_blocks) * count
    return metrics
