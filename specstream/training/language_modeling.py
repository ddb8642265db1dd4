"""Plain language modelling: how the targets in `checkpoints/` were made."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.checkpoint import checkpoint

from specstream.models.pretrained_lm import PretrainedLM
from specstream.training.base import Batch, LossSum, SummedLossModule
from specstream.training.optimization import Schedule


class LanguageModelingModule(SummedLossModule):
    """Trains a causal language model on the next token.

    model: makes the network: `UntrainedLM` from scratch, `PretrainedLM` to fine-tune.
    chunk_tokens: tokens whose logits exist at once; (B, T, V) is never materialised in float32.
    gradient_checkpointing: recompute each layer in the backward pass, for memory.
    """

    def __init__(
        self,
        model: Callable[[], nn.Module],
        optimizer: OptimizerCallable = AdamW,
        schedule: Schedule | None = None,
        chunk_tokens: int = 1024,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__(optimizer, schedule)
        self.build_model = model
        self.chunk_tokens = chunk_tokens
        self.gradient_checkpointing = gradient_checkpointing
        self.model: PretrainedLM | None = None

    def configure_model(self) -> None:
        if self.model is not None:
            return
        model = self.build_model()
        if not isinstance(model, PretrainedLM):
            raise ValueError(f"model must be a PretrainedLM or UntrainedLM, got {type(model).__name__}")
        if self.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        self.model = model.train()

    def loss(self, batch: Batch) -> LossSum:
        assert self.model is not None
        tokens, mask = batch["input_ids"], batch["loss_mask"][:, 1:]
        hidden = self.model.hidden(tokens, *layout(batch))[:, :-1]
        total = summed_cross_entropy(hidden[mask], self.model.head, tokens[:, 1:][mask], self.chunk_tokens)
        return LossSum(total, mask.sum())

    def export(self, run: Path, tokenizer: object) -> Path:
        """Write `model/`: a transformers folder in bf16 that loads anywhere."""
        assert self.model is not None
        folder = run / "model"
        self.model.save(folder, tokenizer)
        return folder


def layout(batch: Batch) -> tuple[Tensor, Tensor | None]:
    """Positions and documents of a batch; no documents where every row is a whole one.

    Attention without a mask takes half the time on a CPU.  On other devices looking would mean waiting.
    """
    documents = batch["documents"]
    if documents.device.type == "cpu" and bool((documents == documents[:, :1]).all()):
        return batch["positions"], None
    return batch["positions"], documents


def summed_cross_entropy(hidden: Tensor, head: nn.Module, labels: Tensor, chunk: int) -> Tensor:
    """Sum of -log q(label), logits made for `chunk` tokens at a time and again in the backward pass.

    hidden: (N, D).  labels: (N,).  Returns () float32.
    """

    def of_chunk(hidden: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(head(hidden).float(), labels, reduction="sum")

    total = hidden.new_zeros((), dtype=torch.float32)
    for part, part_labels in zip(hidden.split(chunk), labels.split(chunk), strict=True):
        total = total + checkpoint(of_chunk, part, part_labels, use_reentrant=False)
    return total
