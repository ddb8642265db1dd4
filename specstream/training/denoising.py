"""Training diffusion models: targets on data, and independent drafters on what a target says.

A target learns what its network predicts at a random noise level (Ho et al. 2020; for flows
Lipman et al. 2023); a drafter learns the target's own output there, which is less noisy than the
data and is what its drafts are compared with.  For a target of `diffusers` there are no data but
captions: its drafter learns what the guided target says on its own trajectories, and holds that
guidance in its weights.

Shapes: B rows, N steps, W states of a row, S the shape of a state.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import AdamW

from specstream.drafters.denoising import IndependentDenoiser
from specstream.drafters.state_loading import save_state_drafter
from specstream.files import replaced_folder
from specstream.media_processor import MediaProcessor
from specstream.models.denoiser import Denoiser
from specstream.models.noise_schedule import FlowSchedule, NoiseSchedule
from specstream.models.patch_transformer import PatchTransformer
from specstream.models.pretrained_denoiser import PretrainedDenoiser
from specstream.models.text_conditions import short_condition
from specstream.sampling import Noise, Role
from specstream.training.base import Batch, LossSum, SummedLossModule
from specstream.training.captions import (
    EncodedCaptions,
    frozen_target,
    log_samples,
    read_captions,
)
from specstream.training.optimization import Schedule
from specstream.training.sampling import HeldOutSampling
from specstream.training.step_losses import step_distances
from specstream.training.trajectories import TargetTrajectories, TrajectorySource
from specstream.transitions import Prediction, data_estimate, network_output
from specstream.verification.gaussian import step_acceptance


def condition_of(batch: Batch) -> dict[str, Tensor]:
    """Return what a batch says of its rows, by the name a network knows it by."""
    return {name: batch[name] for name in ("classes", "text") if name in batch}


def hidden_condition(
    batch: Batch, denoiser: Denoiser, share: float, noise: Noise
) -> dict[str, Tensor]:
    """Return what a batch says of its rows, of a `share` of them that nothing is known."""
    condition, keys = condition_of(batch), batch["keys"]
    coins = noise.uniform(keys, torch.zeros_like(keys)[:, None], Role.ORDER)[:, 0]
    hidden = coins < share
    for name, value in condition.items():
        nothing = denoiser.unconditional(name, value)
        rows = hidden.view(-1, *[1] * (value.dim() - 1))
        condition[name] = torch.where(rows, nothing, value)
    return condition


class DenoisingModule(SummedLossModule):
    """Trains a `PatchTransformer` as a diffusion model, from data or from a `target`.

    Args:
        network: the network; its channels are those of the data, or of the target's latents.
        noise_schedule: noise levels; a drafter takes its target's.
        prediction: what the network predicts.
        target: a trained diffusion model: its folder, also of a pipeline of `diffusers`, or a
            `PretrainedDenoiser` with options; the run is then that of a drafter.  For a model of
            `diffusers` the data are captions.
        class_dropout: share of rows whose class or text is hidden, so that guidance can be used;
            None: 0.1, of captions, where guidance is learned, none.
        trajectories: of a target of `diffusers`, which the drafter learns on; None: the defaults.
        decoding: what validation samples; None: nothing.
    """

    def __init__(
        self,
        network: PatchTransformer,
        noise_schedule: NoiseSchedule | None = None,
        prediction: Prediction = Prediction.FLOW,
        target: str | Denoiser | None = None,
        class_dropout: float | None = None,
        trajectories: TargetTrajectories | None = None,
        decoding: HeldOutSampling | None = None,
        optimizer: OptimizerCallable = AdamW,
        schedule: Schedule | None = None,
    ) -> None:
        super().__init__(optimizer, schedule)
        self.class_dropout = 0.1 if class_dropout is None else class_dropout
        if not 0 <= self.class_dropout <= 1:
            raise ValueError(f"class_dropout must be in [0, 1], got {class_dropout}")
        self.decoding = decoding
        self.target = None if target is None else frozen_target(target)
        if self.target is not None:
            if noise_schedule not in (None, self.target.schedule):
                raise ValueError("a drafter takes its target's levels: leave out noise_schedule")
            noise_schedule = self.target.schedule
        self.denoiser = Denoiser(network, noise_schedule or FlowSchedule(), (), prediction)
        self.captions: EncodedCaptions | None = None
        self.trajectories: TrajectorySource | None = None
        if isinstance(self.target, PretrainedDenoiser):
            if class_dropout:
                raise ValueError("class_dropout: a drafter of captions learns guidance itself")
            self._learn_from(self.target, trajectories or TargetTrajectories())
        elif trajectories is not None:
            raise ValueError("trajectories: these are drawn of a diffusers target only")

    def _learn_from(self, target: PretrainedDenoiser, use: TargetTrajectories) -> None:
        if self.decoding is not None:
            self.decoding.check_drafts(use.num_steps, use.eta, use.guidance)
        sampler = (use.num_steps, use.eta, use.guidance)
        self.trajectories = TrajectorySource(target, *sampler, use.keep)
        self.states_per_row, self.denoiser.guidance = use.states_per_row, use.guidance

    def on_fit_start(self) -> None:
        if self.target is not None:
            data = self.trainer.datamodule  # type: ignore[attr-defined]
            guidance = 1.0 if self.trajectories is None else self.trajectories.guidance
            self.captions = read_captions(self.target, data, guidance, self.decoding)
        if self.captions is not None:
            assert self.target is not None
            told = (self.captions.num_classes, self.captions.text_size)
            check_states(self.denoiser.network, self.target.shape, *told)
            self.denoiser.shape = self.target.shape
        else:
            self._check_media()

    def _check_media(self) -> None:
        data = media_data(self.trainer)
        shape = data.shape
        if self.decoding is not None:
            self.decoding.check(data.processor)
        check_network(self.denoiser.network, data)
        self.denoiser.shape, self.denoiser.other_shapes = shape, tuple(data.shapes[1:])
        if self.target is not None and self.target.shape != shape:
            raise ValueError(
                f"the target's states are {list(self.target.shape)}, the data's {list(shape)}"
            )
        if self.target is not None:
            check_network(self.target.network, data, "model.target")

    def loss(self, batch: Batch) -> LossSum:
        if self.trajectories is None:
            return self._media_loss(batch)
        return self._trajectory_loss(batch, self.trajectories)

    def _trajectory_loss(self, batch: Batch, source: TrajectorySource) -> LossSum:
        assert self.captions is not None
        keys, grid = batch["keys"], source.grid.to(self.device)
        condition = self.captions.of(batch["prompts"])
        seen = source.of(keys, condition, self)
        steps, rows = self._places(keys, grid.num_steps)
        states, wanted = seen.states[steps, rows], seen.estimates[steps, rows]
        told = {name: value[rows] for name, value in short_condition(condition).items()}
        levels = grid.alphas[steps], grid.sigmas[steps]
        said = self.denoiser.output(states, grid.times[steps].float(), told)
        aim = network_output(wanted, states, *levels, self.denoiser.prediction)
        losses = (said - aim).square().flatten(1).mean(1)
        guess = data_estimate(said.detach(), states, *levels, self.denoiser.prediction)
        delta = step_distances(guess - wanted, steps, grid, source.eta)
        real = batch["real"][rows].to(losses)
        metrics = {"acceptance": step_acceptance(delta), "delta": delta}
        sums = {name: (value * real).sum() for name, value in metrics.items()}
        return LossSum((losses * real).sum(), real.sum(), sums)

    def _places(self, keys: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
        """Return the steps (W * B,) that are learned and their rows, no step of a row twice.

        The last step has no law, and so no draft.
        """
        numbers = torch.arange(num_steps - 1, device=keys.device).expand(len(keys), -1)
        order = self.epoch_noise().uniform(keys, numbers, Role.ORDER).argsort(1)
        steps = order[:, : self.states_per_row].T  # (W, B)
        rows = torch.arange(len(keys), device=keys.device).expand_as(steps)
        return steps.flatten(), rows.flatten()

    def _media_loss(self, batch: Batch) -> LossSum:
        states, noise = batch["states"], self.epoch_noise()
        keys = batch["keys"]
        element = torch.zeros_like(keys)[:, None]
        uniforms = noise.uniform(keys, element, Role.MASK)[:, 0]
        levels = self.denoiser.schedule.levels(uniforms)
        normals = noise.normal(keys, element[:, 0], states.shape[1:], Role.START).to(states)
        noisy = levels.add_noise(states, normals)
        hidden = self.class_dropout if self.training else 0.0
        condition = hidden_condition(batch, self.denoiser, hidden, noise)
        said = self.denoiser.output(noisy, levels.times.float(), condition)
        wanted = states
        if self.target is not None:
            with torch.no_grad():
                taught = self.target.output(noisy, levels.times.float(), condition)
            wanted = data_estimate(
                taught, noisy, levels.alphas, levels.sigmas, self.target.prediction
            )
        aim = network_output(wanted, noisy, levels.alphas, levels.sigmas, self.denoiser.prediction)
        errors = (said - aim).square().flatten(1).mean(1)
        real = batch["real"].to(errors)
        return LossSum((errors * real).sum(), real.sum())

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        if self.decoding is not None:
            guidance = self.decoding.guidance
            drafter = None if self.target is None else IndependentDenoiser(self.denoiser, guidance)
            target = self.target or self.denoiser
            log_samples(self, self.decoding, target, drafter, self.captions)

    def export(self, run: Path, processor: MediaProcessor) -> Path:  # type: ignore[override]
        if self.target is None:
            folder = run / "model"
            with replaced_folder(folder) as new:
                self.denoiser.save(new)
                processor.save(new)
            return folder
        assert self.target.path is not None
        folder = run / "draft"
        save_state_drafter(folder, IndependentDenoiser(self.denoiser), self.target)
        return folder


def media_data(trainer: L.Trainer) -> Any:
    """Return the data of a training; ValueError for data that is no media."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not hasattr(data, "shapes"):
        raise ValueError(
            "data: this trains with media, specstream.data.MediaDataModule, not with "
            f"{type(data).__name__}"
        )
    return data


def check_network(network: nn.Module, data: Any, name: str = "model.network") -> None:
    """Raise ValueError where a diffusion model's network does not fit the data."""
    told = len(data.processor.classes), data.processor.text_size
    for shape in data.shapes:
        check_states(network, shape, *told, name)


def check_states(
    network: nn.Module,
    shape: Sequence[int],
    num_classes: int,
    text_size: int,
    name: str = "model.network",
) -> None:
    """Raise ValueError where a diffusion model's network does not fit states of a shape, S."""
    colours, *grid = shape
    channels = {"in_channels": colours, "out_channels": colours, "num_times": 1, "feature_size": 0}
    check_sizes(network, channels, grid, num_classes, text_size, name)


def check_sizes(
    network: nn.Module,
    channels: dict[str, int],
    grid: Sequence[int],
    num_classes: int,
    text_size: int,
    name: str = "model.network",
) -> None:
    """Raise ValueError where a network's options are others than it must have for a grid (*A)."""
    if not isinstance(network, PatchTransformer):
        return
    wanted = channels | {"num_classes": num_classes, "text_size": text_size}
    for option, value in wanted.items():
        found = network.options[option]
        if found != value and not (option in ("num_classes", "text_size") and found == 0):
            raise ValueError(f"{name}: {option} is {found}, but here it must be {value}")
    if num_classes and not network.options["num_classes"]:
        raise ValueError(f"{name}: num_classes is 0, but the data has {num_classes}")
    if len(network.patch) != len(grid):
        raise ValueError(f"{name}: patch has {len(network.patch)} sizes for {len(grid)} axes")
    if any(side % size for side, size in zip(grid, network.patch, strict=True)):
        raise ValueError(
            f"{name}: patches of {list(network.patch)} do not cut a grid of {list(grid)}"
        )
