"""Distillation of a draft LM from its target (DistillSpec, Zhou et al. 2024), or from data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import nn
from torch.optim import AdamW

from specstream.divergences import Divergence, ForwardKL, TotalVariation, chunked_divergence
from specstream.drafters import Drafter, DraftModel
from specstream.generation import AutoregressivePipeline, FixedLength, Limits, TextPipeline
from specstream.models.pretrained_lm import PretrainedLM
from specstream.sampling import Sampling
from specstream.training.base import Batch, LossSum
from specstream.training.decoding import HeldOutDecoding
from specstream.training.draft_module import DraftModule
from specstream.training.language_modeling import layout
from specstream.training.on_policy import OnPolicy, find_slots, rewrite
from specstream.training.optimization import Schedule

DRAFTED = 4  # tokens a round when the target writes on-policy data speculatively


class DistillationModule(DraftModule):
    """Trains a draft LM to agree with its target, position by position.

    `divergence` says on what to agree, at its own temperature; `CrossEntropy` learns from the data
    alone and runs no target.  A share `on_policy_fraction` of the batches has its completions
    written by `on_policy_source`, the drafter or the target; see `OnPolicy`.  Logits exist for
    `chunk_tokens` tokens at once.
    """

    def __init__(
        self,
        drafter: Callable[[nn.Module], Drafter],
        target: Callable[[], PretrainedLM],
        divergence: Divergence | None = None,
        on_policy_fraction: float = 0.0,
        on_policy_source: Literal["drafter", "target"] = "drafter",
        on_policy_tokens: int = 64,
        on_policy_temperature: float = 1.0,
        optimizer: OptimizerCallable = AdamW,
        schedule: Schedule | None = None,
        decoding: HeldOutDecoding | None = None,
        chunk_tokens: int = 1024,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__(
            drafter, target, optimizer, schedule, decoding, chunk_tokens, gradient_checkpointing
        )
        self.divergence = divergence if divergence is not None else ForwardKL()
        self.on_policy = OnPolicy(
            on_policy_fraction, on_policy_source, on_policy_tokens, on_policy_temperature
        )

    def configure_model(self) -> None:
        super().configure_model()
        if not isinstance(self.drafter, DraftModel):
            raise ValueError(
                f"{type(self).__name__} trains draft language models, "
                f"not {type(self.drafter).__name__}"
            )
        if self.on_policy.fraction and self.device_mesh is not None:
            raise ValueError(
                "on_policy_fraction needs whole models: processes that write different texts would "
                "wait for each other's shards; use strategy ddp"
            )

    def training_loss(self, batch: Batch, batch_idx: int) -> LossSum:
        if self.on_policy.chooses(self.run_seed, self.current_epoch, batch_idx):
            batch = self.on_policy_batch(batch, batch_idx)
        return self.loss(batch)

    def loss(self, batch: Batch) -> LossSum:
        assert isinstance(self.drafter, DraftModel) and self.target is not None
        tokens, mask = batch["input_ids"], batch["loss_mask"][:, 1:]
        place = layout(batch)
        draft_hidden = self.drafter.model.hidden(tokens, *place)[:, :-1][mask]  # (N, D)
        target_hidden = None
        if self.divergence.needs_target or not self.training:
            with torch.no_grad():
                target_hidden = self.target.hidden(tokens, *place)[:, :-1][mask]  # (N, Dt)
        heads = (self.drafter.model.head, target_hidden, self.target.head)
        labels = tokens[:, 1:][mask]
        measures = chunked_divergence(
            self.divergence, draft_hidden, *heads, labels, self.chunk_tokens
        )
        metrics = {}
        if not self.training:
            with torch.no_grad():
                rejected = chunked_divergence(
                    TotalVariation(), draft_hidden, *heads, labels, self.chunk_tokens
                )
            metrics["acceptance_expected"] = (1 - rejected).sum()
        return LossSum(self.divergence.total(measures, mask), mask.sum(), metrics)

    def on_policy_batch(self, batch: Batch, batch_idx: int) -> Batch:
        """Return the batch with its completions written by the drafter or the target as they are.

        Every process writes its own rows, with noise keyed by (seed, epoch, batch, process).
        """
        slots = find_slots(batch, self.on_policy.max_new_tokens)
        if not slots:
            return batch
        pipeline = self._writer(len(slots), max(slot.room for slot in slots))
        epoch = self.run_seed * 1_000_003 + self.current_epoch
        seed = (epoch * 1_000_003 + batch_idx) * 1009 + self.global_rank
        assert self.drafter is not None
        self.drafter.eval()  # a checkpointed layer in training mode would not fill the cache
        try:
            with (
                torch.autocast(self.device.type, enabled=False),
                torch.compiler.set_stance("force_eager"),  # a text that grows has many shapes
            ):
                return rewrite(batch, pipeline, slots, seed)
        finally:
            self.drafter.train()

    def _writer(self, batch_size: int, room: int) -> TextPipeline:
        assert isinstance(self.drafter, DraftModel)
        sampling = Sampling(temperature=self.on_policy.temperature)
        limits = Limits(room)
        if self.on_policy.source == "target":
            return self.pipeline(sampling, limits, FixedLength(DRAFTED), batch_size)
        return AutoregressivePipeline(
            self.drafter.model, self.processor, sampling, limits, batch_size
        )
