"""Training the causal layer of self-speculation on a frozen trunk (Campbell et al. 2025, SSMD).

Of a document with n scored tokens a number m, uniform in 1..n, is masked; the trunk reads what is
left, and the causal layer says the masked tokens in a random order, each given the true ones before
it.  With i = n - m tokens known, D = n, the published weight of each masked token is D / (D - i) =
n / m: a document weighs n times the mean of its masked cross-entropies.

For the trunk's own laws q that is an unbiased estimate of the bound on the NLL of an any-order
model, of one token a pass.  For the layer's laws p, which know more than i tokens, it is the
published loss and equals that bound where p = q, but is no bound elsewhere: the last tokens of an
order, which are easier, count more than once and the first ones less.  What does estimate a bound
on the NLL under p, without bias and whatever p, gives place k = 0..m-1 the weight n / (i + k + 1):
each token of an order counts once, and its trunk pass is any of those that can have come before
it, with equal chances.  Validation reports that as `nll_bound`; for training its weights, of 1 to
n, are too uneven, and the largest lie where p has nothing to add to q.

Shapes: B rows, T positions, G documents, K masked positions of a document, N scored positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.optim import AdamW

from specstream.divergences import CrossEntropy, acceptance, chunked_divergence
from specstream.drafters.self_speculative import save_head
from specstream.generation.loading import check_data_tokenizer
from specstream.models.fingerprint import fingerprint
from specstream.models.pretrained_masked import PretrainedMaskedLM
from specstream.models.self_speculative import SelfSpeculativeHead
from specstream.processors import TextProcessor
from specstream.sampling import Noise, Role
from specstream.training.base import Batch, LossSum, SummedLossModule
from specstream.training.canvas import padded
from specstream.training.language_modeling import check_row_length, row_keys
from specstream.training.masked_diffusion import (
    check_masked,
    full_states,
    take_mask_token,
)
from specstream.training.optimization import Schedule
from specstream.training.run_folder import check_apart
from specstream.training.sharding import train_in_float32


class SelfSpeculativeModule(SummedLossModule):
    """Trains a `SelfSpeculativeHead` on the data, on the states of the frozen `target`.

    `pad_canvas` is to be what the target was trained with: rows are filled with ends of text that
    are learned too.  Validation logs, over the masked places of true texts, val/acceptance (the sum
    over v of min(p, q)), val/draft_loss (the same loss of q) and val/nll_bound.

    Raises ValueError for a target that is no bidirectional masked model.
    """

    def __init__(
        self,
        target: Callable[[], PretrainedMaskedLM],
        pad_canvas: bool = False,
        optimizer: OptimizerCallable = AdamW,
        schedule: Schedule | None = None,
        chunk_tokens: int = 1024,
    ) -> None:
        super().__init__(optimizer, schedule, chunk_tokens)
        self.build_target = target
        self.pad_canvas = pad_canvas
        self.target: PretrainedMaskedLM | None = None
        self.head: SelfSpeculativeHead | None = None

    def configure_model(self) -> None:
        if self.head is not None:
            return
        target = self.build_target()
        check_masked(target, "target")
        if target.block_length is not None:
            raise ValueError("the target must be bidirectional, without a block_length")
        self.target = target.eval().requires_grad_(False)
        self.head = SelfSpeculativeHead(target).train()
        train_in_float32(self.head)

    def on_fit_start(self) -> None:
        assert self.target is not None
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        take_mask_token(self.target, data.tokenizer, "target")
        check_data_tokenizer(self.target, TextProcessor(data.tokenizer))
        check_row_length(data, {"target": self.target})
        check_apart(self.target.path, Path(self.trainer.default_root_dir))
        if self.pad_canvas and data.layout.pack:
            raise ValueError("pad_canvas needs one document a row: set data.init_args.pack false")

    def loss(self, batch: Batch) -> LossSum:
        target, head = self.target, self.head
        assert target is not None and head is not None
        if self.pad_canvas:
            eos = self.trainer.datamodule.tokenizer.eos_token_id  # type: ignore[attr-defined]
            batch = padded(batch, eos)
        tokens, count = batch["input_ids"], batch["loss_mask"].sum()
        masks = sample_masks(batch, self.epoch_noise())
        if not len(masks.scored):
            return LossSum(sum(p.sum() for p in head.parameters()) * torch.zeros_like(count), count)
        real = masks.real
        with torch.no_grad():
            hidden = full_states(target, masks.hide(tokens, target.mask_id), batch)[masks.places]
        states = head.read(hidden, batch["positions"][masks.places], tokens[masks.places])
        measures = chunked_divergence(
            CrossEntropy() if self.training else _Judged(),
            states[real],
            target.head,
            hidden[real],
            target.head,
            tokens[masks.places][real],
            self.chunk_tokens,
        )
        weights = masks.weights()[real]
        total = (weights * measures[:, 0]).sum()
        if self.training:
            return LossSum(total, count)
        metrics = {
            "acceptance": (weights * measures[:, 1]).sum(),
            "draft_loss": (weights * measures[:, 2]).sum(),
            "nll_bound": (masks.bound_weights()[real] * measures[:, 0]).sum(),
        }
        return LossSum(total, count, metrics)

    def export(self, run: Path, processor: TextProcessor) -> Path:
        """Write `draft/`: the head and the name of its trunk."""
        assert self.target is not None and self.head is not None
        save_head(run / "draft", self.head, self.target.path, fingerprint(self.target.model))
        return run / "draft"


@dataclass(frozen=True, slots=True)
class OrderedMasks:
    """The masked positions of each document with scored tokens, in a random order."""

    rows: Tensor  # (G, K) where they are in the batch
    columns: Tensor  # (G, K)
    real: Tensor  # (G, K) bool, a prefix; the rest is padding
    scored: Tensor  # (G,) scored tokens n of the document

    @property
    def places(self) -> tuple[Tensor, Tensor]:
        """The index of (B, T, ..) that gives (G, K, ..)."""
        return self.rows, self.columns

    def hide(self, tokens: Tensor, mask_id: int) -> Tensor:
        """Return tokens (B, T) with the mask token at the masked positions."""
        masked = torch.zeros_like(tokens, dtype=torch.bool)
        masked[self.rows[self.real], self.columns[self.real]] = True
        return tokens.masked_fill(masked, mask_id)

    def weights(self) -> Tensor:
        """Return n / m for each place (G, K): the published weights D / (D - i)."""
        return (self.scored / self.real.sum(1))[:, None].expand_as(self.real)

    def bound_weights(self) -> Tensor:
        """Return n / (n - m + k + 1) for place k, (G, K)."""
        known = (self.scored - self.real.sum(1))[:, None]
        steps = torch.arange(self.real.shape[1], device=known.device)
        return self.scored[:, None] / (known + steps + 1)


@dataclass(frozen=True)
class _Judged(CrossEntropy):
    """-log p(label), the acceptance of q's drafts, and -log q(label): (N, 3)."""

    @property
    def needs_target(self) -> bool:
        return True

    def measure(
        self, target_logits: Tensor | None, draft_logits: Tensor, labels: Tensor | None
    ) -> Tensor:
        assert target_logits is not None
        stands = acceptance(target_logits, draft_logits, self.temperature)
        surprises = (self(None, logits, labels) for logits in (draft_logits, target_logits))
        learned, drafted = surprises
        return torch.stack([learned, stands, drafted], -1)


def sample_masks(batch: Batch, noise: Noise) -> OrderedMasks:
    """Mask a uniform number of the scored positions of each document, any of them, in any order.

    Coins are keyed by what a row holds and by position, so a row is masked alike whichever batch,
    device or process it is in.
    """
    tokens, scored = batch["input_ids"], batch["loss_mask"]
    length = tokens.shape[1]
    keys, steps = row_keys(tokens), torch.arange(length, device=tokens.device)
    rows, columns = scored.nonzero(as_tuple=True)  # (N,)
    names, group = (rows * length + batch["documents"][rows, columns]).unique(return_inverse=True)
    counts = group.bincount(minlength=len(names))  # (G,)
    share = noise.uniform(keys[names // length], length + names % length, Role.MASK)
    num_masked = (share * counts).long() + 1  # 1..n
    chosen, order = (
        noise.uniform(keys, steps.expand_as(tokens), role)[scored]
        for role in (Role.MASK, Role.ORDER)
    )
    masked = _ranks(group, chosen) < num_masked[group]
    rows, columns, group = rows[masked], columns[masked], group[masked]
    ranks = _ranks(group, order[masked])
    widest = int(num_masked.max()) if len(names) else 0
    real = torch.arange(widest, device=tokens.device) < num_masked[:, None]
    placed = torch.zeros(2, *real.shape, dtype=torch.long, device=tokens.device)
    placed[:, group, ranks] = torch.stack([rows, columns])
    return OrderedMasks(placed[0], placed[1], real, counts)


def _ranks(group: Tensor, coins: Tensor) -> Tensor:
    """Return the rank (N,) of each element by its coin (N,) among those of its group (N,)."""
    by = coins.argsort(stable=True)
    by = by[group[by].argsort(stable=True)]
    sizes = group.bincount()
    starts = (sizes.cumsum(0) - sizes)[group[by]]
    ranks = torch.empty_like(by)
    ranks[by] = torch.arange(len(by), device=by.device) - starts
    return ranks
