"""Training Medusa heads on a frozen target (Cai et al. 2024: Medusa-1), and measuring their tree.

Shapes: B rows, T tokens, N scored tokens, D hidden, V vocabulary, R ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import AdamW

from specstream.divergences import (
    CrossEntropy,
    Divergence,
    chunked_divergence,
)
from specstream.drafters import Drafter, Medusa
from specstream.drafters.medusa import sparse_paths
from specstream.models.pretrained_lm import PretrainedLM
from specstream.structures import MAX_DRAFT
from specstream.training.base import Batch, LossSum
from specstream.training.decoding import HeldOutDecoding
from specstream.training.draft_module import DraftModule, check_single_places
from specstream.training.language_modeling import layout, scored_ahead
from specstream.training.optimization import Schedule

RANKS = 8  # guesses of each head whose accuracy validation measures
TREE = "medusa_paths"  # key in checkpoints


class MedusaModule(DraftModule):
    """Trains heads that say tokens further ahead, from the states of the frozen target.

    The loss is the sum over heads k of `head_decay`^k times a divergence: `CrossEntropy` learns
    the data's token k + 1 places ahead, as in the paper; others, `ForwardKL` for one, learn the
    target's own law there.  A head is scored on every scored token that has a place of its
    document so far before it; sums are divided by the tokens that head 1 is scored on.

    Validation logs val/head_k_top_r, how often the right token is among the r best of head k,
    over the same tokens.  With `tree_nodes` the drafter then drafts the tree of so many nodes that
    these accuracies make likeliest (section 2.3.3); else its tree stays as it was given.

    Raises ValueError for a decay outside (0, 1], for a divergence that weighs consecutive places
    against each other, and for another drafter than `Medusa`.
    """

    def __init__(
        self,
        drafter: Callable[[nn.Module], Drafter],
        target: Callable[[], PretrainedLM],
        divergence: Divergence | None = None,
        head_decay: float = 0.8,
        tree_nodes: int | None = None,
        optimizer: OptimizerCallable = AdamW,
        schedule: Schedule | None = None,
        decoding: HeldOutDecoding | None = None,
        chunk_tokens: int = 1024,
    ) -> None:
        super().__init__(drafter, target, optimizer, schedule, decoding, chunk_tokens)
        if not 0 < head_decay <= 1:
            raise ValueError(f"head_decay must be in (0, 1], got {head_decay}")
        self.divergence = divergence if divergence is not None else CrossEntropy()
        check_single_places(self.divergence, "heads are weighed by head_decay")
        self.head_decay = head_decay
        self.tree_nodes = tree_nodes

    def configure_model(self) -> None:
        super().configure_model()
        if not isinstance(self.drafter, Medusa):
            raise ValueError(
                f"{type(self).__name__} trains Medusa heads, not {type(self.drafter).__name__}"
            )
        heads = len(self.drafter.heads)
        if self.tree_nodes is not None and not heads <= self.tree_nodes <= MAX_DRAFT:
            raise ValueError(f"tree_nodes must lie in {heads}..{MAX_DRAFT}, got {self.tree_nodes}")

    def loss(self, batch: Batch) -> LossSum:
        assert isinstance(self.drafter, Medusa) and self.target is not None
        tokens = batch["input_ids"]
        with torch.no_grad():
            hidden = self.target.hidden(tokens, *layout(batch))  # (B, T, D)
        total, count = hidden.new_zeros((), dtype=torch.float32), scored_ahead(batch, 2).sum()
        metrics: dict[str, Tensor] = {}
        for k, head in enumerate(self.drafter.heads, 1):
            ahead = k + 1  # from the place whose state the head reads to the token that it says
            scored = scored_ahead(batch, ahead)[:, :-ahead]
            states, labels = hidden[:, :-ahead][scored], tokens[:, ahead:][scored]  # (N, D), (N,)
            taught = None
            if self.divergence.needs_target:  # by the state one place before that token
                taught = hidden[:, ahead - 1 : -1][scored]
            value = chunked_divergence(
                self.divergence, states, head, taught, self.target.head, labels, self.chunk_tokens
            ).sum()
            total = total + self.head_decay**k * value
            metrics[f"head_{k}_loss"] = value.detach()
            if not self.training:
                found = self._hits(head, states, labels)
                metrics |= {f"head_{k}_top_{r}": hit for r, hit in enumerate(found, 1)}
        return LossSum(total, count, metrics)

    @torch.no_grad()
    def _hits(self, head: nn.Module, states: Tensor, labels: Tensor) -> Tensor:
        """Return how many labels (N,) are among the head's best 1, 2, .. tokens, (R,)."""
        ranks, size = self.num_ranks, self.chunk_tokens
        hits = torch.zeros(ranks, device=states.device)
        for some, wanted in zip(states.split(size), labels.split(size), strict=True):
            best = head(some).topk(ranks, -1).indices  # (n, R)
            hits += (best == wanted[:, None]).sum(0)
        return hits.cumsum(0)

    @property
    def num_ranks(self) -> int:
        """R, the guesses of each head whose accuracy is measured."""
        assert self.target is not None
        return min(RANKS, self.target.vocab_size)

    def calibrated_paths(self, num_nodes: int) -> list[tuple[int, ...]]:
        """Return the likeliest tree under what the running validation has measured so far."""
        assert isinstance(self.drafter, Medusa)
        accuracies = []
        for k in range(1, len(self.drafter.heads) + 1):
            means = [self.val_means[f"head_{k}_top_{r}"] for r in range(1, self.num_ranks + 1)]
            top = [0.0, *(float(mean.compute()) for mean in means)]  # over all processes
            accuracies.append([after - before for before, after in itertools.pairwise(top)])
        return sparse_paths(accuracies, num_nodes)

    def on_validation_epoch_end(self) -> None:
        if self.tree_nodes is not None and not self.trainer.sanity_checking:
            assert isinstance(self.drafter, Medusa)
            self.drafter.hang(self.calibrated_paths(self.tree_nodes))
        super().on_validation_epoch_end()  # which decodes with the new tree

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        assert isinstance(self.drafter, Medusa)
        checkpoint[TREE] = [list(path) for path in self.drafter.tree.paths]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if self.tree_nodes is not None and TREE in checkpoint:
            assert isinstance(self.drafter, Medusa)
            self.drafter.hang(checkpoint[TREE])
