"""Training residual drafters of denoising steps on the target's own trajectories.

The loss is what a drafted step costs (`step_losses`), over steps 1..L after the target's word
alike.  (In decoding a later step is reached only where those before it stood, so that more of them
stand.)

Every batch draws its trajectories from the frozen target, or each example's is drawn once and kept
(`trajectories`); either way a resumed run sees what an uninterrupted one sees.  Of each trajectory
some windows are used: a start, where the target has spoken, and a later step at which the drafter
is asked.

Shapes: B rows, N steps, W windows of a row, L the longest window, S the shape of a state.
"""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.optim import AdamW

from specstream.drafters.residual import ResidualDenoiser, WindowDenoiser
from specstream.drafters.state_loading import save_state_drafter
from specstream.media_processor import MediaProcessor
from specstream.models.denoiser import Denoiser
from specstream.models.patch_transformer import PatchTransformer
from specstream.sampling import Noise, Role
from specstream.structures import StateContext
from specstream.training.base import Batch, LossSum, SummedLossModule
from specstream.training.captions import (
    EncodedCaptions,
    frozen_target,
    log_samples,
    read_captions,
)
from specstream.training.denoising import check_sizes, condition_of, media_data
from specstream.training.optimization import Schedule
from specstream.training.sampling import HeldOutSampling
from specstream.training.step_losses import RejectionProbability, StepLoss, step_distances
from specstream.training.trajectories import TrajectorySource, check_sampler
from specstream.transitions import StepGrid
from specstream.verification.gaussian import step_acceptance


class ResidualModule(SummedLossModule):
    """Trains a `ResidualDenoiser`, or with `at_once` a `WindowDenoiser`, for a frozen target.

    Args:
        network: from 2 C or 3 C channels (`CorrectingDrafter`) to C (at once: L * C), told two
            times; with a feature_size, that of the target's hidden states, it reads these too.
        target: the diffusion model: its folder, also of a pipeline of `diffusers`, or a
            `PretrainedDenoiser` with options.  For a model of `diffusers` the data are captions.
        num_steps, eta, guidance: of the sampler to draft for.
        window: L, the most steps between the target's word and a drafted step.
        windows_per_row: W, windows that are used of each trajectory.
        step_loss: what is minimised.
        at_once: guess all steps of a window in one pass.
        keep_trajectories: draw the trajectory of each example in its first epoch only, and keep it
            in the memory of its process: 2 N states each, and N times the features that are read.
            Of several processes each comes to hold what it was ever given, in the end nearly all.
        decoding: what validation samples; None: nothing.
    """

    def __init__(
        self,
        network: PatchTransformer,
        target: str | Denoiser,
        num_steps: int = 50,
        eta: float = 1.0,
        guidance: float = 1.0,
        window: int = 8,
        windows_per_row: int = 8,
        step_loss: StepLoss = RejectionProbability(),
        at_once: bool = False,
        keep_trajectories: bool = False,
        decoding: HeldOutSampling | None = None,
        optimizer: OptimizerCallable = AdamW,
        schedule: Schedule | None = None,
    ) -> None:
        super().__init__(optimizer, schedule)
        check_sampler(num_steps, eta, guidance)
        if not 1 <= window < num_steps:
            raise ValueError(f"window must be in 1..{num_steps - 1}, got {window}")
        if not 1 <= windows_per_row <= window * num_steps:  # more would repeat themselves
            raise ValueError(
                f"windows_per_row must be in 1..{window * num_steps}, got {windows_per_row}"
            )
        self.target = frozen_target(target)
        self.captions: EncodedCaptions | None = None
        self.eta, self.guidance = eta, guidance
        self.window, self.windows_per_row = window, windows_per_row
        self.step_loss, self.decoding = step_loss, decoding
        if decoding is not None:
            decoding.check_drafts(num_steps, eta, guidance)
        if at_once and decoding is not None and decoding.window > window:
            raise ValueError(f"decoding.window {decoding.window} exceeds the window of {window}")
        self.drafter: ResidualDenoiser | WindowDenoiser
        if at_once:
            self.drafter = WindowDenoiser(network, window, guidance)
        else:
            self.drafter = ResidualDenoiser(network, guidance)
        self.drafter.check(self.target, guidance)
        how = (num_steps, eta, guidance, keep_trajectories, self.drafter.reads)
        self.trajectories = TrajectorySource(self.target, *how)
        self.grid = self.trajectories.grid

    def on_fit_start(self) -> None:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        self.captions = read_captions(self.target, data, self.guidance, self.decoding)
        if self.captions is not None:
            self._check(self.captions.num_classes, self.captions.text_size)
            return
        shape = media_data(self.trainer).shape
        if self.decoding is not None:
            self.decoding.check(data.processor)
        if self.target.shape != shape:
            raise ValueError(
                f"the target's states are {list(self.target.shape)}, the data's {list(shape)}"
            )
        self._check(len(data.processor.classes), data.processor.text_size)

    def _check(self, num_classes: int, text_size: int) -> None:
        """Raise ValueError for a network that does not fit, or a guidance without prompts."""
        if self.guidance != 1 and not (num_classes or text_size):
            raise ValueError("guidance is the weight of a prompt, and this target takes none")
        colours, *grid = self.target.shape
        at_once = self.window if isinstance(self.drafter, WindowDenoiser) else 1
        network = self.drafter.network
        assert isinstance(network, PatchTransformer)
        shown, known = network.options["in_channels"], (2 * colours, 3 * colours)
        if shown not in known:
            raise ValueError(
                f"model.network: in_channels is {shown}, but here it must be {known[0]}, for a "
                f"state and an estimate, or {known[1]}, for the noise that was drawn since as well"
            )
        channels = {"in_channels": shown, "out_channels": at_once * colours, "num_times": 2}
        check_sizes(network, channels, grid, num_classes, text_size)

    def _condition(self, batch: Batch) -> dict[str, Tensor]:
        return condition_of(batch) if self.captions is None else self.captions.of(batch["prompts"])

    def loss(self, batch: Batch) -> LossSum:
        grid = self.grid.to(self.device)
        noise = self.epoch_noise()
        keys = batch["keys"]
        condition = self._condition(batch)
        seen = self.trajectories.of(keys, condition, self)
        starts, steps = self._windows(keys, noise)  # (W, B) each
        pick = torch.arange(len(keys), device=keys.device).expand_as(starts)
        # the drafter is asked at `steps`; the target spoke last at `starts`, before them
        context = StateContext(
            states=seen.states[starts + 1, pick].flatten(0, 1),
            steps=(starts + 1).flatten(),
            samples=keys.expand_as(starts).flatten(),
            drawn=torch.zeros_like(starts).flatten(),
            condition={name: value[pick].flatten(0, 1) for name, value in condition.items()},
            seen=seen.states[starts, pick].flatten(0, 1),
            seen_steps=starts.flatten(),
            estimates=seen.estimates[starts, pick].flatten(0, 1),
            features=None if seen.features is None else seen.features[starts, pick].flatten(0, 1),
        )
        at, states = steps.flatten(), seen.states[steps, pick].flatten(0, 1)
        right = seen.estimates[steps, pick].flatten(0, 1)
        guess = self._guess(states, at, context, grid)
        errors = (guess - right).flatten(1)
        delta = step_distances(errors, at, grid, self.eta)
        free = step_distances(context.estimates - right, at, grid, self.eta)
        losses = self.step_loss(delta, errors.square().mean(1))
        real = batch["real"][pick.flatten()].to(losses)
        metrics = {
            "acceptance": step_acceptance(delta),
            "delta": delta,
            "free_acceptance": step_acceptance(free),
        }
        sums = {name: (value.detach() * real).sum() for name, value in metrics.items()}
        return LossSum((losses * real).sum(), real.sum(), sums)

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        if self.decoding is not None:
            log_samples(self, self.decoding, self.target, self.drafter, self.captions)

    def _guess(self, states: Tensor, at: Tensor, context: StateContext, grid: StepGrid) -> Tensor:
        if isinstance(self.drafter, ResidualDenoiser):
            return self.drafter.estimate(states, at, context, grid)
        ahead = self.drafter.window(context, grid, self.window)
        return ahead[torch.arange(len(at), device=at.device), at - context.steps]

    def _windows(self, keys: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
        """Return where the target spoke and where the drafter is asked, (W, B) each.

        The second lies 1..L after the first, and before the last step, which has no law.
        """
        last = self.grid.num_steps - 2
        numbers = torch.arange(2 * self.windows_per_row, device=keys.device).expand(len(keys), -1)
        first, second = noise.uniform(keys, numbers, Role.ORDER).chunk(2, dim=1)
        starts = (first * last).long().clamp(max=last - 1)
        longest = (last - starts).clamp(max=self.window)
        steps = starts + 1 + (second * longest).long().clamp(max=longest - 1)
        return starts.T, steps.T

    def export(self, run: Path, processor: MediaProcessor) -> Path:  # type: ignore[override]
        folder = run / "draft"
        save_state_drafter(folder, self.drafter, self.target)
        return folder
