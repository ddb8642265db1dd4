"""A student of few steps: from any state of a target's trajectory to the data at its end.

Consistency Models (Song et al. 2023).  The deterministic sampler carries every state to one sample;
a consistency function says at once which.  Where nothing is noise it must return the state itself,
and does so whatever its network says: of a flow the estimate of the data is x - sigma * output, of
a velocity alpha * x - sigma * output, so that output counts for nothing at sigma 0 (their c_skip
and c_out).

Shapes: R rows, S the shape of a state, N levels of the trajectory it was distilled on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from specstream.files import one_line, read_table
from specstream.models.denoiser import STUDENT, Denoiser, read_denoiser
from specstream.models.noise_schedule import NoiseSchedule, check_steps
from specstream.transitions import Prediction, StepGrid

BOUNDED = (Prediction.FLOW, Prediction.VELOCITY)  # return the state itself at sigma 0


class ConsistencyModel(Denoiser):
    """A denoiser whose estimate of the data is where the deterministic sampler would end.

    Raises ValueError for a prediction that does not return the state where nothing is noise, and
    for numbers that are none of a sampler's.

    Args:
        network, schedule, shape, prediction: as for `Denoiser`.
        num_steps: N, of the sampler whose trajectories it was distilled on.
        guidance: of these trajectories; it is in the weights, so a caller's own is left out.
    """

    predictions: ClassVar[tuple[Prediction, ...]] = BOUNDED
    guidance: float

    def __init__(
        self,
        network: nn.Module,
        schedule: NoiseSchedule,
        shape: Sequence[int],
        prediction: Prediction = Prediction.FLOW,
        num_steps: int = 50,
        guidance: float = 1.0,
    ) -> None:
        if prediction not in self.predictions:
            raise ValueError(
                f"a student predicts {' or '.join(kind.value for kind in BOUNDED)}, which return "
                f"the state itself where nothing is noise, not {prediction.value}"
            )
        check_steps(num_steps)
        if not math.isfinite(guidance):
            raise ValueError(f"guidance must be a finite number, got {guidance}")
        super().__init__(network, schedule, shape, prediction, guidance=guidance)
        self.num_steps = num_steps

    def few(self, num_steps: int) -> StepGrid:
        """Return `num_steps` of the levels it was distilled on, evenly chosen, and data.

        Raises ValueError for more than there are.
        """
        if not 1 <= num_steps <= self.num_steps:
            raise ValueError(
                f"this student knows {self.num_steps} noise levels: the number of steps must be in "
                f"1..{self.num_steps}, got {num_steps}"
            )
        whole = self.schedule.grid(self.num_steps)
        places = torch.arange(num_steps + 1) * self.num_steps // num_steps
        return StepGrid(whole.times[places], whole.alphas[places], whole.sigmas[places])

    def save(self, folder: Path) -> None:
        super().save(folder)
        said = {"num_steps": self.num_steps, "guidance": self.guidance}
        (folder / STUDENT).write_text(json.dumps(said, indent=2) + "\n")


def load_student(folder: Path, device: str | torch.device = "cpu") -> ConsistencyModel:
    """Load what `ConsistencyModel.save` wrote; ValueError in one line for what is no student."""
    model = read_denoiser(folder, device)
    said = read_table(folder / STUDENT)
    with one_line(f"'{folder}' holds a damaged student"):
        student = ConsistencyModel(
            model.network,
            model.schedule,
            model.shape,
            model.prediction,
            int(said["num_steps"]),
            float(said["guidance"]),
        )
    student.path, student.other_shapes = model.path, model.other_shapes
    return student
