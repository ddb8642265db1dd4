"""Masked diffusion language models: targets, and block-diffusion drafters with or without a target.

A bidirectional model learns MDLM's objective (Sahoo et al. 2024, eq. 10; Nie et al. 2025, eq. 3):
cross-entropy of hidden tokens, weighted 1 / t.  A block model sees a noised copy of the row beside
the clean one, so that every block is noised after clean predecessors in one pass (BD3-LM, Arriola
et al. 2025).  With a target the drafter learns the target's law instead of the data.

Shapes: B rows, T positions, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.optim import AdamW

from specstream.divergences import CrossEntropy, Divergence, ForwardKL, Head, chunked_divergence
from specstream.drafters.loading import save_drafter
from specstream.drafters.masked import MaskedDraftModel
from specstream.generation.loading import check_data_tokenizer
from specstream.models.pretrained_masked import (
    MaskedFromCausal,
    PretrainedMaskedLM,
    noised_and_clean_mask,
)
from specstream.processors import TextProcessor
from specstream.sampling import Role
from specstream.training.base import Batch, LossSum, SummedLossModule
from specstream.training.canvas import (
    HiddenRows,
    corrupt,
    hide,
    hide_in_turn,
    one_block,
    padded,
    position_times,
    spread_times,
)
from specstream.training.draft_module import check_single_places
from specstream.training.filling import HeldOutFilling
from specstream.training.language_modeling import check_row_length
from specstream.training.model_blocks import check_named
from specstream.training.optimization import Schedule
from specstream.training.run_folder import check_apart
from specstream.training.sharding import train_in_float32

LOWEST = -1e30  # of a logit: none at any temperature, and finite over the lowest one


class MaskedDiffusionModule(SummedLossModule):
    """Trains a masked diffusion LM: a target, or a drafter beside its frozen `target`.

    `model` makes the network: `UntrainedMaskedLM` from scratch, `MaskedFromCausal` from a causal
    LM, `PretrainedMaskedLM` to go on.  With a `target` the run is a drafter's: `divergence` says
    what it learns, `ForwardKL` the target's law (for a block model, of one block of each row, with
    what the target sees while drafting: clean blocks before it and masks after it), `CrossEntropy`
    the data.  `complementary` shows each row twice, hidden where it was visible.  `corruption`
    replaces so large a share of the visible tokens by random ones and asks for all of them, so that
    the model can score a draft it sees.  `pad_canvas` fills rows with ends of text that are learned
    too, so that a canvas may be longer than its text.
    """

    def __init__(
        self,
        model: Callable[[], PretrainedMaskedLM],
        target: Callable[[], PretrainedMaskedLM] | None = None,
        divergence: Divergence | None = None,
        complementary: bool = False,
        corruption: float = 0.0,
        pad_canvas: bool = False,
        decoding: HeldOutFilling | None = None,
        optimizer: OptimizerCallable = AdamW,
        schedule: Schedule | None = None,
        chunk_tokens: int = 1024,
    ) -> None:
        super().__init__(optimizer, schedule, chunk_tokens)
        if not 0 <= corruption < 1:
            raise ValueError(f"corruption must be in [0, 1), got {corruption}")
        if divergence is not None and divergence.needs_target and target is None:
            raise ValueError(f"{type(divergence).__name__} is to a target, and there is none")
        self.build_model, self.build_target = model, target
        default = CrossEntropy() if target is None else ForwardKL()
        self.divergence = divergence if divergence is not None else default
        check_single_places(self.divergence, "positions of a canvas are weighed by their times")
        self.complementary = complementary
        self.corruption = corruption
        self.pad_canvas = pad_canvas
        self.decoding = decoding
        self.batch_number = 0
        self.model: PretrainedMaskedLM | None = None
        self.target: PretrainedMaskedLM | None = None

    def configure_model(self) -> None:
        if self.model is not None:
            return
        if self.device_mesh is not None:
            raise ValueError("masked diffusion models are not sharded; use strategy ddp")
        model = self.build_model()
        if self.build_target is not None:
            target = self.build_target()
            check_masked(target, "target")
            if target.block_length is not None:
                raise ValueError("the target must be bidirectional, without a block_length")
            self.target = target.eval().requires_grad_(False)
        check_masked(model, "model")
        tokenizer = self.trainer.datamodule.tokenizer  # type: ignore[attr-defined]
        take_mask_token(model, tokenizer, "model")
        if self.target is not None:
            take_mask_token(self.target, tokenizer, "target")
        model.form = replace(model.form, corruption=self.corruption)
        train_in_float32(model)
        self.model = model.train()

    @property
    def processor(self) -> TextProcessor:
        """The text boundary of the trainer's data."""
        return TextProcessor(self.trainer.datamodule.tokenizer)  # type: ignore[attr-defined]

    def on_fit_start(self) -> None:
        assert self.model is not None
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        model, target = self.model, self.target
        if target is not None:
            check_apart(target.path, Path(self.trainer.default_root_dir))
            self.drafter().check_target(target, self.processor)
        models = {"model": model} | ({} if target is None else {"target": target})
        for name, network in models.items():
            check_data_tokenizer(network, self.processor, name)
        check_row_length(data, models)
        length, block = data.layout.sequence_length, model.block_length
        if block is not None and length % block:
            raise ValueError(
                f"data: sequence_length {length} is not a multiple of block_length {block}"
            )
        if self.pad_canvas and data.layout.pack:
            raise ValueError("pad_canvas needs one document a row: set data.init_args.pack false")
        if target is not None:
            check_named(type(target).__name__, target.path)
        if self.decoding is not None:
            self.decoding.check(self)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self.batch_number = batch_idx

    def on_validation_batch_start(
        self, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.batch_number = batch_idx

    def loss(self, batch: Batch) -> LossSum:
        assert self.model is not None
        if self.pad_canvas:
            eos = self.trainer.datamodule.tokenizer.eos_token_id  # type: ignore[attr-defined]
            batch = padded(batch, eos)
        rows = self.hidden_rows(batch)
        teacher = None
        if self.target is not None and self.divergence.needs_target:
            rows, seen = self._beside_target(rows, batch)
            with torch.no_grad():
                teacher = full_states(self.target, seen, batch)[rows.asked]
        copies = len(rows.tokens) // len(batch["input_ids"])
        measures = chunked_divergence(
            self.divergence,
            states(self.model, rows.tokens, batch)[rows.asked],
            finite_head(self.model),
            teacher,
            None if self.target is None else finite_head(self.target),
            batch["input_ids"].repeat(copies, 1)[rows.asked],
            self.chunk_tokens,
        )
        values = measures[:, 0]
        hidden = rows.masked[rows.asked]
        share = batch["loss_mask"].sum() / hidden.sum().clamp(min=1)  # to a mean over hidden tokens
        metrics = {"surprise": (values.detach() * hidden).sum() * share}
        return LossSum((rows.weights[rows.asked] * values).sum(), batch["loss_mask"].sum(), metrics)

    def hidden_rows(self, batch: Batch) -> HiddenRows:
        """Return the batch as the model is shown it in this step."""
        assert self.model is not None
        noise = self.epoch_noise()
        number = torch.full((1,), self.batch_number, device=self.device)
        start = noise.uniform(number, number, Role.ORDER)[0].float()
        world, rank = (self.trainer.world_size, self.trainer.global_rank)
        row_times = spread_times(len(batch["input_ids"]), rank, world, start)
        times = position_times(row_times, batch["positions"], self.model.block_length)
        build = hide_in_turn if self.complementary else hide
        rows = build(batch, times, self.model.mask_id, noise)
        if self.corruption and self.training:  # validation measures the bound itself
            sizes = (self.model.vocab_size, self.model.mask_id)
            rows = corrupt(rows, batch, self.corruption, *sizes, noise)
        return rows

    def _beside_target(self, rows: HiddenRows, batch: Batch) -> tuple[HiddenRows, Tensor]:
        """Return what is asked where the target is the teacher, and the canvases it is shown."""
        assert self.model is not None and self.target is not None
        block = self.model.block_length
        if block is None:
            return rows, rows.tokens
        here, num_blocks = one_block(batch, block, self.epoch_noise())
        copies = len(rows.tokens) // len(here)
        here, num_blocks = here.repeat(copies, 1), num_blocks.repeat(copies)
        blocks = (batch["positions"] // block).repeat(copies, 1)
        chosen = torch.where(here, blocks, -1).amax(1, keepdim=True)
        clean = batch["input_ids"].repeat(copies, 1)
        later = (blocks > chosen) & batch["loss_mask"].repeat(copies, 1)
        seen = torch.where(here, rows.tokens, clean).masked_fill(later, self.target.mask_id)
        weights = rows.weights * num_blocks[:, None]  # as if every block had been asked
        return replace(rows, asked=rows.asked & here, weights=weights), seen

    def drafter(self) -> MaskedDraftModel:
        """Return the model, as it is trained now, as the drafter of its target."""
        assert self.model is not None and self.target is not None
        model = self.model
        return MaskedDraftModel(self.target, lambda: model)

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        if self.decoding is not None and not self.trainer.sanity_checking:
            self.decoding.run(self)

    def export(self, run: Path, processor: TextProcessor) -> Path:
        """Write `model/`, or beside a target `draft/`, with the name of the target."""
        assert self.model is not None
        if self.target is None:
            self.model.save(run / "model", processor.tokenizer)
            return run / "model"
        save_drafter(run / "draft", self.drafter(), processor, self.target.path)
        return run / "draft"


def states(model: PretrainedMaskedLM, tokens: Tensor, batch: Batch) -> Tensor:
    """Return the states (B', T, D) of noised rows (B', T), which are B or, in turn, 2 B."""
    copies = len(tokens) // len(batch["input_ids"])
    if model.block_length is None:
        return full_states(model, tokens, batch)
    clean, positions, documents = (
        batch[name].repeat(copies, 1) for name in ("input_ids", "positions", "documents")
    )
    mask = noised_and_clean_mask(documents, positions, model.block_length)
    both = torch.cat([tokens, clean], 1)
    hidden = model.hidden(both, mask, positions.repeat(1, 2))
    return hidden[:, : tokens.shape[1]]


def full_states(model: PretrainedMaskedLM, tokens: Tensor, batch: Batch) -> Tensor:
    """Return the states (B', T, D) of a bidirectional model over noised rows (B', T)."""
    copies = len(tokens) // len(batch["input_ids"])
    positions, documents = (batch[n].repeat(copies, 1) for n in ("positions", "documents"))
    return model.hidden(tokens, model.mask(documents, positions), positions)


def finite_head(model: PretrainedMaskedLM) -> Head:
    """Return a model's head with logits that stay finite when a temperature divides them.

    The mask token's are the lowest number there is; at infinity, 0 log 0 would be no number.
    """

    def finite(hidden: Tensor) -> Tensor:
        logits = model.head(hidden)
        return logits.clamp(min=max(LOWEST, torch.finfo(logits.dtype).min))

    return finite


def check_masked(network: object, name: str) -> None:
    """Raise ValueError for a network that is no masked diffusion LM."""
    if not isinstance(network, PretrainedMaskedLM):
        raise ValueError(
            f"{name} must be a masked diffusion language model, not {type(network).__name__}"
        )


def take_mask_token(model: PretrainedMaskedLM, tokenizer: Any, name: str) -> None:
    """Give a fresh model the tokenizer's mask token, and room for it; check that of another.

    Raises ValueError for a tokenizer without one, and for a model with another.
    """
    mask_id = tokenizer.mask_token_id
    if mask_id is None:
        raise ValueError(
            "the data's tokenizer has no mask token; set data.init_args.mask_token true"
        )
    if mask_id == tokenizer.eos_token_id:
        raise ValueError(
            f"the data's tokenizer has one token, {mask_id}, for the mask and the end of text; a "
            "masked model needs a mask token of its own"
        )
    if model.form.mask_id is None:
        if isinstance(model, MaskedFromCausal):
            model.grow(len(tokenizer))
        model.form = replace(model.form, mask_id=mask_id)
    if model.form.mask_id != mask_id:
        raise ValueError(
            f"the {name}'s mask token is {model.form.mask_id}, the data's tokenizer's {mask_id}"
        )
    if len(tokenizer) > model.vocab_size:
        raise ValueError(
            f"the data's tokenizer has {len(tokenizer)} tokens, the {name} a vocabulary of "
            f"{model.vocab_size}"
        )
