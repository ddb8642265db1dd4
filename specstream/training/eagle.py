"""Training EAGLE-3 by its training-time test (Li et al. 2025, arXiv 2503.01840, section 3).

Step 1 reads the target's features at every place.  Step s + 1 reads the outputs of step s in their
stead, one token on: what drafting does once it is past the features, from every place at once.
Everything is indexed by the place where a draft starts, its base, so outputs stay where they are
and only tokens and positions shift.

Shapes: B rows, T tokens, H heads, E size of a head, D hidden, F features of a place, S steps,
N scored tokens, V vocabulary, U tokens that can be drafted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.checkpoint import checkpoint

from specstream.data.packing import PackedRows
from specstream.divergences import Divergence, chunked_divergence
from specstream.drafters import Drafter, Eagle3
from specstream.models.pretrained_lm import PretrainedLM, document_mask
from specstream.models.walk import read
from specstream.training.base import Batch, LossSum
from specstream.training.decoding import HeldOutDecoding
from specstream.training.draft_module import DraftModule
from specstream.training.language_modeling import layout
from specstream.training.optimization import Schedule

COUNTED_ROWS = 4096  # rows of the data whose tokens are counted at once
VOCABULARY = "eagle_vocabulary"  # key in checkpoints


class Eagle3Module(DraftModule):
    """Trains `Eagle3` to say what its target says, `num_steps` tokens ahead.

    The loss is KL(p || q) at each step, weighted by `step_weight` to the power of the step, from 0.
    A scored token counts at every step for which its document holds a base; the loss is divided by
    those of the first step.  Validation measures for each step the acceptance, the sum over
    min(p, q), and how often the two laws agree on the likeliest token; a token too near to its
    document's beginning to be drafted at a step counts as refused there.

    Where the drafter's vocabulary is reduced, the most frequent scored tokens of the training data
    are chosen.  Logits exist for `chunk_tokens` laws at once; `gradient_checkpointing` recomputes
    the attention of each step in the backward pass, so that only one step's weights (T x T for each
    head) exist at once.
    """

    def __init__(
        self,
        drafter: Callable[[nn.Module], Drafter],
        target: Callable[[], PretrainedLM],
        num_steps: int = 4,
        step_weight: float = 0.8,
        optimizer: OptimizerCallable = AdamW,
        schedule: Schedule | None = None,
        decoding: HeldOutDecoding | None = None,
        chunk_tokens: int = 1024,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__(
            drafter, target, optimizer, schedule, decoding, chunk_tokens, gradient_checkpointing
        )
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps}")
        if not 0 < step_weight <= 1:
            raise ValueError(f"step_weight must be in (0, 1], got {step_weight}")
        self.num_steps = num_steps
        self.step_weight = step_weight

    def configure_model(self) -> None:
        if self.drafter is not None:
            return
        super().configure_model()
        if not isinstance(self.drafter, Eagle3):
            raise ValueError(
                f"{type(self).__name__} trains Eagle3, not {type(self.drafter).__name__}"
            )
        if self.drafter.draft_vocab_size is not None:
            assert self.target is not None
            rows = self.trainer.datamodule.rows("train")  # type: ignore[attr-defined]
            self.drafter.restrict(count_scored(rows, self.target.vocab_size))

    def loss(self, batch: Batch) -> LossSum:
        assert isinstance(self.drafter, Eagle3) and self.target is not None
        tokens, (positions, documents) = batch["input_ids"], layout(batch)
        with torch.no_grad():
            hidden, features = read(
                self.target, tokens, positions, documents, self.drafter.feature_layers
            )
        outputs = unroll(
            self.drafter,
            tokens,
            features,
            positions,
            documents,
            self.num_steps,
            self.gradient_checkpointing,
        )
        ahead = torch.arange(2, self.num_steps + 2, device=tokens.device)  # from base to token
        scored = batch["loss_mask"] & (positions >= 2)
        drafted = positions[scored][:, None] >= ahead  # (N, S) the base is in the document
        shifted = [_later(output, 2 + step)[scored] for step, output in enumerate(outputs)]
        measures = chunked_divergence(
            DraftedLaws(self.drafter.network.draft_vocabulary, with_metrics=not self.training),
            torch.stack(shifted, 1),  # (N, S, D)
            self.drafter.network.logits,
            _later(hidden, 1)[scored],
            self.target.head,
            None,
            max(self.chunk_tokens // self.num_steps, 1),
        ).unflatten(1, (-1, self.num_steps))  # (N, 1 or 3, S)
        sums = (measures * drafted[:, None]).sum(0)
        weights = self.step_weight ** torch.arange(self.num_steps, device=sums.device)
        metrics = {
            f"{name}_{step + 1}": value.detach()
            for name, values in zip(("acceptance", "agreement"), sums[1:], strict=False)
            for step, value in enumerate(values)
        }
        return LossSum((sums[0] * weights).sum(), scored.sum(), metrics)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        assert isinstance(self.drafter, Eagle3)
        if self.drafter.draft_vocab_size is not None:
            checkpoint[VOCABULARY] = self.drafter.network.draft_vocabulary.cpu()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        assert isinstance(self.drafter, Eagle3)
        tokens = self.drafter.network.draft_vocabulary.cpu()
        if not torch.equal(checkpoint.get(VOCABULARY, tokens), tokens):
            raise ValueError(
                "the checkpoint drafts other tokens: resume with the data that the run began with"
            )


def unroll(
    drafter: Eagle3,
    tokens: Tensor,
    features: Tensor,
    positions: Tensor,
    documents: Tensor | None,
    num_steps: int,
    recompute: bool = False,
) -> list[Tensor]:
    """Return the outputs (B, T, D) of each step, by base: step s, from 0, says token t + 2 + s.

    tokens, positions and documents (B, T) as for `PretrainedLM.hidden`, features (B, T, F).  Where
    no token is left to read, or it is another document's, outputs mean nothing.
    """
    attend = UnrolledAttention(documents, recompute)
    hidden = drafter.network.fuse(features)
    outputs = []
    for step in range(num_steps):
        following = F.pad(tokens[:, step + 1 :], (0, min(step + 1, tokens.shape[1])))
        hidden = drafter.network(drafter.embed(following), hidden, positions + step, attend)
        outputs.append(hidden)
    return outputs


class UnrolledAttention:
    """What each step attends to: the features up to its base, and its own earlier steps there.

    At step s the query of a base sees the keys of step 0 at all bases of its document up to its
    own, and those of the steps 1..s at its own base alone.  The first are one triangle whatever s
    is, the others a diagonal for each step, so memory grows by a diagonal a step.
    """

    def __init__(self, documents: Tensor | None, recompute: bool = False) -> None:
        self.mask = None if documents is None else document_mask(documents)[1]  # (B, 1, T, T)
        self.recompute = recompute
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return (B, H, T, E) for the queries of the next step, and keep its keys and values."""
        groups = queries.shape[1] // keys.shape[1]
        self.keys.append(keys.repeat_interleave(groups, 1))
        self.values.append(values.repeat_interleave(groups, 1))
        if len(self.keys) == 1:
            causal = self.mask is None
            return F.scaled_dot_product_attention(
                queries, self.keys[0], self.values[0], self.mask, is_causal=causal
            )
        states = (queries, *self.keys, *self.values)
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._mix, *states, use_reentrant=False)
        return self._mix(*states)

    def _mix(self, queries: Tensor, *states: Tensor) -> Tensor:
        """Attend to the keys of all steps, then their values, in `states` (B, H, T, E) each."""
        size, half = queries.shape[2], len(states) // 2
        keys, values = states[:half], states[half:]
        mask = self.mask
        if mask is None:
            mask = torch.ones(size, size, dtype=torch.bool, device=queries.device).tril()
        base = (queries @ keys[0].transpose(-1, -2)).masked_fill(~mask, -torch.inf)
        steps = torch.stack([(queries * key).sum(-1) for key in keys[1:]], -1)  # (B, H, T, s)
        scores = torch.cat([base, steps], -1).float() * queries.shape[-1] ** -0.5
        weights = scores.softmax(-1).to(queries.dtype)
        mixed = weights[..., :size] @ values[0]
        for step, value in enumerate(values[1:]):
            mixed = mixed + weights[..., size + step, None] * value
        return mixed


@dataclass(frozen=True)
class DraftedLaws(Divergence):
    """KL(p || q) of several drafted laws with one law of the target's.

    p is cut to the tokens that can be drafted and keeps their mass as its weight: a place where the
    target wants a token that cannot be drafted teaches little.  With `with_metrics` the acceptance
    and the agreement of the likeliest tokens are measured too.
    """

    vocabulary: Tensor  # (U,) the target's ids of the tokens that can be drafted
    with_metrics: bool = False

    def __call__(
        self, target_logits: Tensor | None, draft_logits: Tensor, labels: Tensor | None
    ) -> Tensor:
        """Return the divergences (N, S) of drafted logits (N, S, U) from the target's (N, V)."""
        assert target_logits is not None
        log_p = self._draftable(self._log_law(target_logits))  # (N, 1, U)
        log_q = self._log_law(draft_logits)
        mass = log_p.logsumexp(-1, keepdim=True)
        return (log_p.exp() * (log_p - mass - log_q)).sum(-1)

    def measure(
        self, target_logits: Tensor | None, draft_logits: Tensor, labels: Tensor | None
    ) -> Tensor:
        """Return the divergences (N, S), then acceptances and agreements if wanted: (N, 3 S)."""
        divergence = self(target_logits, draft_logits, labels)
        if not self.with_metrics:
            return divergence
        assert target_logits is not None
        p, q = self._log_law(target_logits).exp(), self._log_law(draft_logits).exp()
        acceptance = torch.minimum(self._draftable(p), q).sum(-1)
        agreement = self.vocabulary[q.argmax(-1)] == p.argmax(-1, keepdim=True)
        return torch.cat([divergence, acceptance, agreement.to(divergence.dtype)], 1)

    def _log_law(self, logits: Tensor) -> Tensor:
        return (logits.float() / self.temperature).log_softmax(-1)

    def _draftable(self, values: Tensor) -> Tensor:
        """Return the entries (N, 1, U) of values (N, V) for the tokens that can be drafted."""
        return values[:, None].index_select(2, self.vocabulary)


def count_scored(rows: PackedRows, vocab_size: int) -> Tensor:
    """Return how often each token (V,) is to be predicted in `rows`."""
    counts = np.zeros(vocab_size, np.int64)
    for first in range(0, len(rows), COUNTED_ROWS):
        part = slice(first, first + COUNTED_ROWS)
        found = np.asarray(rows.tokens[part])[np.asarray(rows.scored[part])]
        counts += np.bincount(found, minlength=vocab_size)
    return torch.from_numpy(counts)


def _later(states: Tensor, steps: int) -> Tensor:
    """Move states (B, T, D) `steps` places on; zeros come in."""
    return F.pad(states, (0, 0, steps, 0))[:, : states.shape[1]]
