"""Distilling a diffusion model into a student of few steps.

Consistency distillation (Song et al. 2023, algorithm 2; with guidance as in latent consistency
models, Luo et al. 2023).  Data are noised to a level of the target's sampler, the target goes one
deterministic step from there, and the student must say of both states that they end at the same
data.  What holds it to the target's own ends is the last level, where it returns the state itself.
The nearer state is answered by the same weights, without gradient, not by an averaged copy of them
as in the published algorithm: Song and Dhariwal (2023) left it out where students learn from data
alone, and it is left out here.  What is exported is `WeightAveraging`'s, where that is on.

Shapes: B rows, R rows of states, N steps, S the shape of a state.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.optim import AdamW

from specstream.drafters.denoising import IndependentDenoiser
from specstream.drafters.state_loading import save_state_drafter
from specstream.generation.consistency import ConsistencyPipeline
from specstream.media_processor import MediaProcessor
from specstream.models.consistency import ConsistencyModel
from specstream.models.denoiser import load_denoiser
from specstream.models.noise_schedule import Levels
from specstream.models.patch_transformer import PatchTransformer
from specstream.sampling import Role
from specstream.training.base import Batch, LossSum, SummedLossModule
from specstream.training.denoising import check_network, hidden_condition, media_data
from specstream.training.optimization import Schedule
from specstream.training.sampling import HeldOutSampling
from specstream.transitions import Prediction, StepGrid, transition


class ConsistencyModule(SummedLossModule):
    """Distils a frozen target into a `ConsistencyModel`.

    Args:
        target: folder of the trained diffusion model.
        network: the student's; None: a copy of the target's, which begins with its weights.
        num_steps: N, of the deterministic sampler whose trajectories are learned.
        guidance: of these trajectories; other than 1 it costs the target twice the rows.
        prediction: what the network predicts, FLOW or VELOCITY; None: the target's.
        class_dropout: share of rows whose class or text is hidden, for samples without a prompt.
        huber: errors below it cost their square, larger ones themselves (Song and Dhariwal 2023).
        decoding: what validation samples, with the student as drafter; None: nothing.
        sample_steps: of the student's own samples, which validation shows then.
    """

    def __init__(
        self,
        target: str,
        network: PatchTransformer | None = None,
        num_steps: int = 50,
        guidance: float = 1.0,
        prediction: Prediction | None = None,
        class_dropout: float = 0.1,
        huber: float = 0.03,
        decoding: HeldOutSampling | None = None,
        sample_steps: int = 4,
        optimizer: OptimizerCallable = AdamW,
        schedule: Schedule | None = None,
    ) -> None:
        super().__init__(optimizer, schedule)
        check_distillation(num_steps, guidance, huber, decoding)
        if not 0 <= class_dropout <= 1:
            raise ValueError(f"class_dropout must be in [0, 1], got {class_dropout}")
        self.target = load_denoiser(target).eval().requires_grad_(False)
        own = self.target.prediction
        if network is None and prediction not in (None, own):
            raise ValueError(f"a copy of the target predicts {own.value}: leave out prediction")
        if network is None:
            assert isinstance(self.target.network, PatchTransformer)
            network = copy.deepcopy(self.target.network).requires_grad_(True)
        schedule_ = self.target.schedule
        self.student = ConsistencyModel(
            network, schedule_, self.target.shape, prediction or own, num_steps, guidance
        )
        self.student.few(sample_steps)  # what it refuses is refused here
        self.grid = schedule_.grid(num_steps)
        self.class_dropout, self.huber = class_dropout, huber
        self.sample_steps, self.decoding = sample_steps, decoding

    def on_fit_start(self) -> None:
        data = media_data(self.trainer)
        shape = data.shape
        if self.decoding is not None:
            self.decoding.check(data.processor)
        if self.target.shape != shape:
            raise ValueError(
                f"the target's states are {list(self.target.shape)}, the data's {list(shape)}"
            )
        check_network(self.target.network, data, "model.target")
        check_network(self.student.network, data)
        if self.student.guidance != 1 and not (data.processor.classes or data.processor.text_size):
            raise ValueError("guidance is the weight of a prompt, and this target takes none")
        self.student.other_shapes = tuple(data.shapes[1:])

    def loss(self, batch: Batch) -> LossSum:
        grid, noise = self.grid.to(self.device), self.epoch_noise()
        states, keys = batch["states"], batch["keys"]
        zeros = torch.zeros_like(keys)
        uniforms = noise.uniform(keys, zeros[:, None], Role.MASK)[:, 0]
        steps = (uniforms * grid.num_steps).long()
        normals = noise.normal(keys, zeros, states.shape[1:], Role.START).to(states)
        levels = Levels(grid.times[steps], grid.alphas[steps], grid.sigmas[steps])
        noisy = levels.add_noise(states, normals)
        hidden = self.class_dropout if self.training else 0.0
        condition = hidden_condition(batch, self.target, hidden, noise)
        with torch.no_grad():
            estimates = self.target(noisy, steps, grid, condition, self.student.guidance)
        errors = end_errors(self.student, noisy, estimates, steps, grid, condition)
        return error_sum(errors, batch["real"], self.huber)

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        if self.decoding is None:
            return
        processor = self.trainer.datamodule.processor  # type: ignore[attr-defined]
        drafter = IndependentDenoiser(self.student)
        samples = self.decoding.num_samples
        shown = ConsistencyPipeline(self.target, self.student, self.sample_steps, samples)
        found = self.decoding.run(self, self.target, drafter, processor, shown=shown)
        self.log_dict(found, rank_zero_only=True)

    def export(self, run: Path, processor: MediaProcessor) -> Path:  # type: ignore[override]
        folder = run / "draft"
        save_state_drafter(folder, IndependentDenoiser(self.student), self.target)
        return folder


def check_distillation(
    num_steps: int, guidance: float, huber: float, decoding: HeldOutSampling | None
) -> None:
    """Raise ValueError for numbers that distil nothing, or a validation of something else."""
    if num_steps < 2:
        raise ValueError(f"num_steps must be at least 2 for steps to save, got {num_steps}")
    if not math.isfinite(guidance):
        raise ValueError(f"guidance must be a finite number, got {guidance}")
    if not 0 < huber < math.inf:
        raise ValueError(f"huber must be above 0 and finite, got {huber}")
    if decoding is not None and decoding.guidance != guidance:
        raise ValueError(
            f"decoding samples with guidance {decoding.guidance}, but the student learns {guidance}"
        )


def end_errors(
    student: ConsistencyModel,
    states: Tensor,
    estimates: Tensor,
    steps: Tensor,
    grid: StepGrid,
    condition: Mapping[str, Tensor],
) -> Tensor:
    """Return the mean squared distance (R,) of the ends that the student names for two states.

    states (R, *S) stand at `steps` (R,); what the target says there, estimates (R, *S), makes the
    nearer states, whose ends are what is wanted and carry no gradient.
    """
    said = student(states, steps, grid, condition)
    with torch.no_grad():
        nearer = transition(estimates, states, steps, grid, 0.0).means
        wanted = student(nearer, steps + 1, grid, condition)
    return (said - wanted).square().flatten(1).mean(1)


def error_sum(errors: Tensor, real: Tensor, huber: float) -> LossSum:
    """Return the loss of errors (R,) of which `real` (R,) count: sqrt(e + huber^2) - huber."""
    real = real.to(errors)
    losses = (errors + huber**2).sqrt() - huber
    return LossSum((losses * real).sum(), real.sum(), {"error": (errors.detach() * real).sum()})
