"""Distilling a diffusion model of `diffusers` into a student of few steps, in its latents.

Latent consistency distillation (Luo et al. 2023, arXiv 2310.04378): the student learns where the
trajectories of the target's deterministic, guided sampler end.  That sampler's N steps skip most of
the levels that the target was trained at, which is their k.  The data are captions alone, and the
trajectories then the target's own, of which some states are used; or media, whose latents are
noised, and the target goes one step from there.

What is trained are all weights of a copy, or adapters on the target's own (LCM-LoRA, Luo et al.
2023, arXiv 2311.05556).  The nearer state is answered by the same weights, as in `consistency`.

Shapes: B rows, N steps, L levels of a row, R = B L states, S the shape of a state.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.optim import AdamW

from specstream.data.captions import CaptionDataModule
from specstream.drafters.denoising import IndependentDenoiser
from specstream.drafters.state_loading import save_state_drafter
from specstream.generation.consistency import ConsistencyPipeline
from specstream.generation.media_loading import target_processor
from specstream.media_processor import MediaProcessor
from specstream.models.denoiser import Denoiser
from specstream.models.diffusers_network import DiffusersNetwork
from specstream.models.latent_consistency import LatentConsistencyModel, own_network
from specstream.models.network_adapters import LowRankAdapters
from specstream.models.pretrained_denoiser import PretrainedDenoiser, find_denoiser
from specstream.sampling import Role
from specstream.training.base import Batch, LossSum, SummedLossModule
from specstream.training.captions import (
    EncodedCaptions,
    check_guidance,
    check_whole,
    encode_captions,
)
from specstream.training.consistency import check_distillation, end_errors, error_sum
from specstream.training.denoising import condition_of, media_data
from specstream.training.optimization import Schedule
from specstream.training.sampling import HeldOutSampling
from specstream.training.trajectories import draw_trajectories
from specstream.transitions import noised


class LatentConsistencyModule(SummedLossModule):
    """Distils a frozen target of `diffusers` into a `LatentConsistencyModel`.

    Args:
        target: a pipeline's folder, or a `PretrainedDenoiser` with options.
        num_steps: N, of the deterministic sampler whose trajectories are learned.
        guidance: of these trajectories; other than 1 it costs the target twice the rows.
        adapters: what is trained on the target's own weights; None: all weights, of a copy.
        levels_per_row: L, states of each row that the student is asked about.
        huber: errors below it cost their square, larger ones themselves (Song and Dhariwal 2023).
        gradient_checkpointing: compute the student's layers again for the gradient, instead of
            keeping what they said.
        decoding: what validation samples, with the student as drafter; None: nothing.
        sample_steps: of the student's own samples, which validation shows then.
    """

    def __init__(
        self,
        target: str | Denoiser,
        num_steps: int = 50,
        guidance: float = 1.0,
        adapters: LowRankAdapters | None = None,
        levels_per_row: int = 4,
        huber: float = 0.03,
        gradient_checkpointing: bool = False,
        decoding: HeldOutSampling | None = None,
        sample_steps: int = 4,
        optimizer: OptimizerCallable = AdamW,
        schedule: Schedule | None = None,
    ) -> None:
        super().__init__(optimizer, schedule)
        check_distillation(num_steps, guidance, huber, decoding)
        if levels_per_row < 1:
            raise ValueError(f"levels_per_row must be at least 1, got {levels_per_row}")
        found = find_denoiser(target)
        if not isinstance(found, PretrainedDenoiser):
            raise ValueError(
                "this distils models of diffusers; students of other targets are trained by "
                "ConsistencyModule"
            )
        check_whole(found)
        self.target = found.eval().requires_grad_(False)
        network = own_network(found, adapters)
        if gradient_checkpointing:
            for model in network.models:
                model.enable_gradient_checkpointing()
        self.student = LatentConsistencyModel(network, found, num_steps, guidance)
        self.student.few(sample_steps)  # what it refuses is refused here
        self.grid = found.schedule.grid(num_steps)
        self.captions: EncodedCaptions | None = None
        self.levels_per_row, self.huber = levels_per_row, huber
        self.sample_steps, self.decoding = sample_steps, decoding

    def on_fit_start(self) -> None:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if self.decoding is not None:
            target_processor(self.target).check_writer()
        if isinstance(data, CaptionDataModule):
            self.captions = encode_captions(self.target, data.prompts, self.student.guidance)
            return
        check_media(self.target, media_data(self.trainer))
        told = {name: value[:1] for name, value in data.samples.condition.items()}
        check_guidance(self.target, self.student.guidance, told)

    def loss(self, batch: Batch) -> LossSum:
        grid, noise, keys = self.grid.to(self.device), self.epoch_noise(), batch["keys"]
        numbers = torch.arange(self.levels_per_row, device=keys.device).expand(len(keys), -1)
        steps = (noise.uniform(keys, numbers, Role.MASK) * grid.num_steps).long().flatten()  # (R,)
        rows = torch.arange(len(keys), device=keys.device).repeat_interleave(self.levels_per_row)
        guidance = self.student.guidance
        if self.captions is None:
            told = {name: value[rows] for name, value in condition_of(batch).items()}
            normals = noise.normal(keys[rows], numbers.flatten(), self.target.shape, Role.START)
            states = noised(self._latents(batch["states"])[rows], normals, steps, grid)
            with torch.no_grad():
                estimates = self.target(states, steps, grid, told, guidance)
        else:
            condition = self.captions.of(batch["prompts"])
            told = {name: value[rows] for name, value in condition.items()}
            seen = draw_trajectories(self.target, keys, condition, grid, 0.0, guidance, noise)
            states, estimates = seen.states[steps, rows], seen.estimates[steps, rows]
        errors = end_errors(self.student, states, estimates, steps, grid, told)
        return error_sum(errors, batch["real"][rows], self.huber)

    def _latents(self, media: Tensor) -> Tensor:
        """Return the states (B, *S) of media, as tensors that gradients may pass by."""
        return self.target.encode(media).clone().to(media)

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        if self.decoding is None:
            return
        samples, condition = self.decoding.num_samples, None
        if self.captions is not None:
            condition = self.captions.first(samples, self.device)
        elif self.target.num_classes:
            numbers = torch.arange(samples, device=self.device) % self.target.num_classes
            condition = {"classes": numbers}
        drafter, processor = IndependentDenoiser(self.student), target_processor(self.target)
        shown = ConsistencyPipeline(self.target, self.student, self.sample_steps, samples)
        found = self.decoding.run(self, self.target, drafter, processor, condition, shown)
        self.log_dict(found, rank_zero_only=True)

    def export(self, run: Path, processor: MediaProcessor) -> Path:  # type: ignore[override]
        folder = run / "draft"
        save_state_drafter(folder, IndependentDenoiser(self.student), self.target)
        return folder


def check_media(target: PretrainedDenoiser, data: Any) -> None:
    """Raise ValueError for media that are not the target's, or that tell it too much or little."""
    network, shape, classes = target.network, target.media_shape, len(data.processor.classes)
    assert isinstance(network, DiffusersNetwork)
    needs = network.needs
    if needs not in ((), ("classes",)):
        raise ValueError(
            f"this target is told {needs[0]}, which media do not hold: train with captions, "
            "specstream.data.CaptionDataModule"
        )
    if data.shapes != [shape]:
        raise ValueError(
            f"the target makes media of {list(shape)}, the data's are of "
            f"{' and '.join(str(list(found)) for found in data.shapes)}"
        )
    if data.processor.text_size or bool(classes) != bool(needs) or classes > target.num_classes:
        found = "texts" if data.processor.text_size else f"{classes} classes"
        raise ValueError(f"the target knows {target.num_classes} classes, the data has {found}")
