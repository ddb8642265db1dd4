"""Training Speculative Streaming: next tokens and the tokens after them, in one forward.

One pass carries the main stream and, from the layer where streams join, the streams of every place
whose future is scored, side by side along the sequence.  The streams never meet those of another
place, so what is computed equals what decoding computes node by node.

Shapes: B rows, T tokens, M places with streams, R streams, D hidden.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import AdamW

from specstream.divergences import (
    CrossEntropy,
    Divergence,
    chunked_divergence,
)
from specstream.drafters import Drafter, SpeculativeStreaming
from specstream.drafters.loading import save_drafter
from specstream.files import replaced_folder
from specstream.models.fingerprint import fingerprint
from specstream.models.lora import add_adapters, fold, save_adapter
from specstream.models.pretrained_lm import PretrainedLM, document_mask
from specstream.models.stream_attention import register
from specstream.processors import TextProcessor
from specstream.training.base import Batch, LossSum
from specstream.training.decoding import HeldOutDecoding
from specstream.training.draft_module import DraftModule, check_single_places
from specstream.training.language_modeling import scored_ahead
from specstream.training.optimization import Schedule


@dataclass(frozen=True, slots=True)
class Streams:
    """The states of one forward, after the final norm."""

    main: Tensor  # (B, T, D)
    joining: Tensor  # (B, T, D) of the main stream where streams join
    riders: Tensor  # (B, M, R, D)
    places: Tensor  # (B, M) which places have streams
    real: Tensor  # (B, M) bool; the rest fills rows up


class StreamingModule(DraftModule):
    """Trains the streams of a target, alone (`lossless`) or together with it (`shared`).

    Loss (eq. 5): the main stream's next token, in mode shared, plus `future_weight` times the
    token of each stream, plus the early exit's next token.  `divergence` says what the streams
    learn: `CrossEntropy` the data, as in the paper; others the target's own law at the place ahead.
    In mode shared adapters of the drafter's `rank` are put on all of the target's layers, and the
    tuned target is the one that the drafter names: with `merge` an ordinary model, else the
    adapters alone, in peft's format, which need the base beside them.  `future_weight` 0 trains the
    target's adapters alone: the baseline of the paper.
    """

    def __init__(
        self,
        drafter: Callable[[nn.Module], Drafter],
        target: Callable[[], PretrainedLM],
        future_weight: float = 0.1,
        divergence: Divergence | None = None,
        optimizer: OptimizerCallable = AdamW,
        schedule: Schedule | None = None,
        decoding: HeldOutDecoding | None = None,
        chunk_tokens: int = 1024,
        merge: bool = True,
    ) -> None:
        super().__init__(drafter, target, optimizer, schedule, decoding, chunk_tokens)
        if not 0 <= future_weight < math.inf:
            raise ValueError(f"future_weight must not be negative or infinite, got {future_weight}")
        self.future_weight = future_weight
        self.divergence = divergence if divergence is not None else CrossEntropy()
        self.merge = merge
        check_single_places(self.divergence, "streams count alike")

    def configure_model(self) -> None:
        if self.drafter is not None:
            return
        if self.device_mesh is not None:
            raise ValueError("streams share the target's weights, which cannot be sharded; use ddp")
        super().configure_model()
        assert self.target is not None
        if not isinstance(self.drafter, SpeculativeStreaming):
            raise ValueError(
                f"{type(self).__name__} trains SpeculativeStreaming, "
                f"not {type(self.drafter).__name__}"
            )
        if self.target.config._attn_implementation != "sdpa":
            raise ValueError("streams are trained with attn_implementation sdpa only")
        self.target.model.set_attn_implementation(register())
        if self.drafter.mode == "shared":
            add_adapters(
                self.target.decoder.layers, self.drafter.rank, self.drafter.alpha, self.run_seed
            )
        if not self.future_weight:
            if self.drafter.mode == "lossless":
                raise ValueError("future_weight 0 leaves nothing to train in mode lossless")
            self.drafter.embeddings.requires_grad_(False)

    def on_validation_end(self) -> None:
        super().on_validation_end()
        assert isinstance(self.drafter, SpeculativeStreaming)
        self.drafter.unfold()  # validation has decoded; what it folded is of weights that move on

    def loss(self, batch: Batch) -> LossSum:
        assert isinstance(self.drafter, SpeculativeStreaming) and self.target is not None
        found = stream_states(self.target, self.drafter, batch, bool(self.future_weight))
        tokens, mask = batch["input_ids"], batch["loss_mask"][:, 1:]
        head, labels = self.target.head, tokens[:, 1:][mask]
        count = mask.sum()

        def cross_entropy(hidden: Tensor) -> Tensor:
            return chunked_divergence(
                CrossEntropy(), hidden[mask], head, None, None, labels, self.chunk_tokens
            ).sum()

        exits = self.target.decoder.norm(self.drafter.early_exit(found.joining.detach()))
        losses = {"early_exit": cross_entropy(exits[:, :-1])}
        total = losses["early_exit"]
        if self.drafter.mode == "shared":
            losses["next_token"] = cross_entropy(found.main[:, :-1])
            total = total + losses["next_token"]
        if self.future_weight:
            futures = self._future(found, batch)
            losses |= futures
            total = total + self.future_weight * torch.stack([*futures.values()]).sum()
        return LossSum(total, count, {name: value.detach() for name, value in losses.items()})

    def _future(self, found: Streams, batch: Batch) -> dict[str, Tensor]:
        """Return the loss sum of each stream over the scored tokens that it speaks of."""
        assert self.target is not None
        head, losses = self.target.head, {}
        for stream in range(found.riders.shape[2]):
            ahead = stream + 2  # stream j at place t speaks of token t + 1 + j
            scored = scored_ahead(batch, ahead).gather(1, found.places) & found.real  # (B, M)
            places = (found.places + ahead).clamp(max=batch["input_ids"].shape[1] - 1)
            labels = batch["input_ids"].gather(1, places)[scored]
            teacher = None
            if self.divergence.needs_target:  # the state that says the same token one place on
                teacher = found.main.detach().take_along_dim((places - 1)[:, :, None], 1)[scored]
            measures = chunked_divergence(
                self.divergence,
                found.riders[:, :, stream][scored],
                head,
                teacher,
                head,
                labels,
                self.chunk_tokens,
            )
            losses[f"stream_{stream + 1}"] = measures.sum()
        return losses

    def export(self, run: Path, processor: TextProcessor) -> Path:
        """Write `draft/`, and in mode shared the tuned target into `target/`."""
        assert isinstance(self.drafter, SpeculativeStreaming) and self.target is not None
        target = self.target
        if self.drafter.mode == "shared":
            target = self._export_target(run / "target", processor)
        save_drafter(run / "draft", self.drafter, processor, target.path, fingerprint(target.model))
        return run / "draft"

    def _export_target(self, folder: Path, processor: TextProcessor) -> PretrainedLM:
        """Write the tuned target, whole or as its adapters, and return it."""
        assert self.target is not None
        with replaced_folder(folder) as new:
            if self.merge:
                model = copy.deepcopy(self.target.model)
                fold(model)
                PretrainedLM.of(model).save(new, processor.tokenizer)
            else:
                save_adapter(new, self.target.model, self.target.path)
                processor.tokenizer.save_pretrained(new)
        return PretrainedLM(str(folder))


def stream_states(
    target: PretrainedLM, drafter: SpeculativeStreaming, batch: Batch, with_streams: bool = True
) -> Streams:
    """Run the main stream and the streams that are scored through the target, without a cache."""
    tokens, positions, documents = (batch[name] for name in ("input_ids", "positions", "documents"))
    decoder, size = target.decoder, tokens.shape[1]
    _, mask = document_mask(documents)  # (B, 1, T, T)
    masks = target.masks(documents, mask)
    hidden = decoder.embed(tokens, positions)
    told = decoder.told(hidden, positions)
    for index in range(drafter.first_layer):
        layer_mask = target.mask_of_layer(masks, index)
        hidden = decoder.run(decoder.layers[index], hidden, layer_mask, told)
    joining = hidden
    places, real = stream_places(batch, drafter.num_streams)
    if not with_streams:
        places, real = places[:, :0], real[:, :0]
    riders = drafter.board(joining.take_along_dim(places[:, :, None], 1))  # (B, M, R, D)
    hidden = torch.cat([joining, riders.flatten(1, 2)], 1)  # (B, T + M R, D)
    ahead = torch.arange(1, drafter.num_streams + 1, device=tokens.device)
    rides = positions.gather(1, places)[:, :, None] + ahead  # (B, M, R)
    told = decoder.told(hidden, target.places(torch.cat([positions, rides.flatten(1)], 1)))
    if with_streams:
        told["stream_mask"] = mask[:, 0].take_along_dim(places[:, :, None], 1)  # (B, M, T)
    drafter.seat(size)
    layers = drafter.upper_layers or list(decoder.layers)[drafter.first_layer :]
    for index, layer in enumerate(layers, drafter.first_layer):
        layer_mask = target.mask_of_layer(masks, index)
        hidden = decoder.run(layer, hidden, layer_mask, told)
    hidden = decoder.norm(hidden)
    return Streams(
        hidden[:, :size], joining, hidden[:, size:].unflatten(1, riders.shape[1:3]), places, real
    )


def stream_places(batch: Batch, num_streams: int) -> tuple[Tensor, Tensor]:
    """Return the places (B, M) of which some stream is scored, and which of the M are real."""
    wanted = scored_ahead(batch, 2)
    for ahead in range(3, num_streams + 2):
        wanted = wanted | scored_ahead(batch, ahead)
    most = max(int(wanted.sum(1).max()), 1)
    order = wanted.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :most]
    return order, wanted.gather(1, order)
