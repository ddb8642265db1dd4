"""Training diffusion models: targets on data, and independent drafters on what a target says.

A target learns what its network predicts at a random noise level (Ho et al. 2020; for flows
Lipman et al. 2023); a drafter learns the target's own output there, which is less noisy than the
data and is what its drafts are compared with.

Shapes: B rows, S the shape of a state.
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
from specstream.models.denoiser import Denoiser, load_denoiser
from specstream.models.noise_schedule import FlowSchedule, NoiseSchedule
from specstream.models.patch_transformer import PatchTransformer
from specstream.sampling import Noise, Role
from specstream.training.base import Batch, LossSum, SummedLossModule
from specstream.training.optimization import Schedule
from specstream.training.sampling import HeldOutSampling
from specstream.transitions import Prediction, data_estimate, network_output


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
        network: the network; its channels are those of the data.
        noise_schedule: noise levels; a drafter takes its target's.
        prediction: what the network predicts.
        target: folder of a trained diffusion model; the run is then that of a drafter.
        class_dropout: share of rows whose class or text is hidden, so that guidance can be used.
        decoding: what validation samples; None: nothing.
    """

    def __init__(
        self,
        network: PatchTransformer,
        noise_schedule: NoiseSchedule | None = None,
        prediction: Prediction = Prediction.FLOW,
        target: str | None = None,
        class_dropout: float = 0.1,
        decoding: HeldOutSampling | None = None,
        optimizer: OptimizerCallable = AdamW,
        schedule: Schedule | None = None,
    ) -> None:
        super().__init__(optimizer, schedule)
        if not 0 <= class_dropout <= 1:
            raise ValueError(f"class_dropout must be in [0, 1], got {class_dropout}")
        self.class_dropout = class_dropout
        self.decoding = decoding
        self.target = None if target is None else load_denoiser(target)
        if self.target is not None:
            self.target.eval().requires_grad_(False)
            if noise_schedule not in (None, self.target.schedule):
                raise ValueError("a drafter takes its target's levels: leave out noise_schedule")
            noise_schedule = self.target.schedule
        self.denoiser = Denoiser(network, noise_schedule or FlowSchedule(), (), prediction)

    def on_fit_start(self) -> None:
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
            processor = self.trainer.datamodule.processor  # type: ignore[attr-defined]
            guidance = self.decoding.guidance
            drafter = None if self.target is None else IndependentDenoiser(self.denoiser, guidance)
            found = self.decoding.run(self, self.target or self.denoiser, drafter, processor)
            self.log_dict(found, rank_zero_only=True)

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
    processor, colours = data.processor, data.shape[0]
    channels = {"in_channels": colours, "out_channels": colours, "num_times": 1, "feature_size": 0}
    for shape in data.shapes:
        told = len(processor.classes), processor.text_size
        check_sizes(network, channels, shape[1:], *told, name)


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
