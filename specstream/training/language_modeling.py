"""Plain language modelling: how the targets in `checkpoints/` were made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.optim import AdamW

from specstream.divergences import CrossEntropy, chunked_divergence
from specstream.models.pretrained_lm import PretrainedLM
from specstream.models.pretrained_masked import PretrainedMaskedLM
from specstream.processors import TextProcessor
from specstream.training.base import Batch, LossSum, SummedLossModule
from specstream.training.optimization import Schedule
from specstream.training.sharding import shard_layers, train_in_float32

_ROW = (0x2545F491, 0x5851F42D)  # odd multipliers of the rows' hash, below 2^31


class LanguageModelingModule(SummedLossModule):
    """Trains a causal language model on the next token.

    `model` makes the network: `UntrainedLM` from scratch, `PretrainedLM` to fine-tune.  Logits
    exist for `chunk_tokens` tokens at once; `gradient_checkpointing` recomputes each layer in the
    backward pass, for memory.
    """

    def __init__(
        self,
        model: Callable[[], PretrainedLM],
        optimizer: OptimizerCallable = AdamW,
        schedule: Schedule | None = None,
        chunk_tokens: int = 1024,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__(optimizer, schedule, chunk_tokens)
        self.build_model = model
        self.gradient_checkpointing = gradient_checkpointing
        self.model: PretrainedLM | None = None

    def configure_model(self) -> None:
        if self.model is not None:
            return
        model = self.build_model()
        if not isinstance(model, PretrainedLM):
            raise ValueError(f"model must be a causal language model, not {type(model).__name__}")
        train_in_float32(model)
        if self.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        shard_layers(model, self.device_mesh)
        self.model = model.train()

    def on_fit_start(self) -> None:
        assert self.model is not None
        size = len(self.trainer.datamodule.tokenizer)  # type: ignore[attr-defined]
        if size > self.model.vocab_size:
            raise ValueError(
                f"the data's tokenizer has {size} tokens, the model a vocabulary of "
                f"{self.model.vocab_size}"
            )
        check_row_length(self.trainer.datamodule, {"model": self.model})  # type: ignore[attr-defined]

    def loss(self, batch: Batch) -> LossSum:
        assert self.model is not None
        tokens, mask = batch["input_ids"], batch["loss_mask"][:, 1:]
        hidden = self.model.hidden(tokens, *layout(batch))[:, :-1][mask]  # (N, D)
        measures = chunked_divergence(
            CrossEntropy(),
            hidden,
            self.model.head,
            None,
            None,
            tokens[:, 1:][mask],
            self.chunk_tokens,
        )
        return LossSum(measures.sum(), mask.sum())

    def export(self, run: Path, processor: TextProcessor) -> Path:
        """Write `model/`: a transformers folder in bf16 that loads anywhere."""
        assert self.model is not None
        folder = run / "model"
        self.model.save(folder, processor.tokenizer)
        return folder


def check_row_length(data: Any, models: Mapping[str, PretrainedLM | PretrainedMaskedLM]) -> None:
    """Raise ValueError where rows of the data have more tokens than a model has positions."""
    length = data.layout.sequence_length
    for name, model in models.items():
        if model.max_positions is not None and length > model.max_positions:
            raise ValueError(
                f"data: sequence_length {length} is longer than the {model.max_positions} "
                f"positions of the {name}"
            )


def scored_ahead(batch: Batch, ahead: int) -> Tensor:
    """Return which places (B, T) have a scored token of their own document `ahead` places on."""
    documents, scored = batch["documents"], batch["loss_mask"]
    ahead = min(ahead, documents.shape[1])  # beyond the row there is nothing to score
    later = F.pad(documents[:, ahead:], (0, ahead), value=-2)
    return (later == documents) & F.pad(scored[:, ahead:], (0, ahead), value=False)


def row_keys(tokens: Tensor) -> Tensor:
    """Return a number (B,) below 2^31 for what each row (B, T) holds, to key its noise."""
    steps = torch.arange(tokens.shape[1], device=tokens.device)
    return ((tokens + 1) * (steps * _ROW[0] + _ROW[1])).sum(1) % 2**31


def layout(batch: Batch) -> tuple[Tensor, Tensor | None]:
    """Return positions and documents of a batch; no documents where every row is a whole one.

    On a CPU attention without a mask takes half the time; elsewhere looking would mean waiting.
    """
    documents = batch["documents"]
    if documents.device.type == "cpu" and bool((documents == documents[:, :1]).all()):
        return batch["positions"], None
    return batch["positions"], documents
