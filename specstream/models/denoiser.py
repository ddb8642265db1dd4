"""A diffusion model as every pipeline and drafter sees it: states in, estimates of the data out.

Shapes: R rows, S the shape of a state (channels first).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from specstream.files import one_line
from specstream.models.first_block import FirstBlock, first_block
from specstream.models.noise_schedule import (
    DiscreteSchedule,
    FlowSchedule,
    NoiseSchedule,
    SigmaSchedule,
)
from specstream.models.patch_transformer import PatchTransformer
from specstream.models.spread_network import SpreadNetwork
from specstream.models.text_conditions import short_condition
from specstream.transitions import Prediction, StepGrid, data_estimate

FORM = "denoiser.json"
WEIGHTS = "denoiser.safetensors"
STUDENT = "student.json"  # beside them: what they say are ends, which is `consistency`'s to read
LARGEST_STATE = 100_000_000  # numbers: more is a slip of the pen
SCHEDULES: dict[str, type[NoiseSchedule]] = {
    kind.__name__: kind for kind in (FlowSchedule, DiscreteSchedule, SigmaSchedule)
}


class Reads(Enum):
    """What of a target's thoughts a drafter reads.

    HIDDEN: its last hidden states, (R, P, D); of a guided model, those that were told the
        condition.
    REST: what its blocks after the first added, (R, T, D); of a guided model also without the
        condition, (R, 2 T, D).
    """

    HIDDEN = "hidden"
    REST = "rest"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a diffusion model says of states, and what it thought on the way."""

    estimates: Tensor  # (R, *S) of the data
    features: Tensor | None = None  # what was asked for of its thoughts
    first: Tensor | None = None  # (R, T, D) what the first block added, where REST was asked for


class Denoiser(nn.Module):
    """A network, the noise schedule it was trained for, and what its output means.

    Args:
        network: called with states (R, *S), times (R, 1) and the row's condition by name.
        schedule: its noise levels.
        shape: of a state, S.
        prediction: what the network returns.
        clip: estimates of the data are cut to -clip..clip; None: they are left alone.
        guidance: of the target that it was trained to agree with; it is in the weights, so a
            caller's own is left out.  None: a caller's counts.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: NoiseSchedule,
        shape: Sequence[int],
        prediction: Prediction = Prediction.FLOW,
        clip: float | None = None,
        guidance: float | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.schedule = schedule
        self.shape = tuple(shape)
        self.prediction = prediction
        self.clip = clip
        self.guidance = guidance
        self.other_shapes: tuple[tuple[int, ...], ...] = ()  # that it was trained on too
        self.path: str | None = None
        self._spread: SpreadNetwork | None = None
        self._first_block: FirstBlock | None = None

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.network.parameters()).dtype

    @property
    def devices(self) -> list[torch.device]:
        """Where the rows of a call are evaluated, the model's own device first."""
        return [self.device] if self._spread is None else self._spread.devices

    def spread(self, devices: Sequence[torch.device]) -> None:
        """Split the rows of every call over copies of the network on `devices`.

        The first is the model's own.  What is said of a row is the same but for rounding.
        """
        self._spread = SpreadNetwork(self.network, devices)

    def output(
        self, states: Tensor, times: Tensor, condition: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Return what the network predicts, float32 (R, *S); times (R,)."""
        states, times, condition = states.to(self.dtype), times[:, None], condition or {}
        if self._spread is None:
            said = self.network(states, times, **condition)
        else:
            said = self._spread(states, times, condition)
        assert isinstance(said, Tensor)
        return said.float()

    def forward(
        self,
        states: Tensor,
        steps: Tensor,
        grid: StepGrid,
        condition: Mapping[str, Tensor] | None = None,
        guidance: float = 1.0,
    ) -> Tensor:
        """Return the estimate of the data, float32 (R, *S), at states that stand at `steps` (R,).

        With a `guidance` w other than 1 the output is that without a condition plus w times what
        the condition changes (Ho and Salimans 2022), at the cost of twice the rows.  Of what a
        target of `diffusers` is told, a network of this package hears the short form.
        """
        return self.evaluate(states, steps, grid, condition, guidance).estimates

    def evaluate(
        self,
        states: Tensor,
        steps: Tensor,
        grid: StepGrid,
        condition: Mapping[str, Tensor] | None = None,
        guidance: float = 1.0,
        reads: Reads | None = None,
        rest: Tensor | None = None,
    ) -> Evaluation:
        """Return what `forward` does and what `reads` names of the network's thoughts.

        rest: what was read so at other states; only the network's first block runs then, and this
        stands for what the others add.  ValueError for a network that has no first block.
        """
        assert rest is None or reads is Reads.REST
        times = grid.times[steps].float()
        if isinstance(self.network, PatchTransformer):
            condition = short_condition(condition or {})
        guided = guidance != 1 and bool(condition) and self.guidance is None
        if guided:
            assert condition is not None
            nothing = {name: self.unconditional(name, value) for name, value in condition.items()}
            condition = {n: torch.cat([value, nothing[n]]) for n, value in condition.items()}
            states, times = torch.cat([states, states]), torch.cat([times, times])
            rest = None if rest is None else torch.cat(rest.chunk(2, 1))
        output, features, first = self._ask(states, times, condition, reads, rest)
        if guided:
            given, free = output.chunk(2)
            output, states = free + guidance * (given - free), states[: len(given)]
            if features is not None and reads is Reads.HIDDEN:
                features = features[: len(given)]
            elif features is not None:
                features = torch.cat(features.chunk(2), 1)
            first = None if first is None else first[: len(given)]
        alphas, sigmas = grid.alphas[steps], grid.sigmas[steps]
        estimates = data_estimate(output, states.float(), alphas, sigmas, self.prediction)
        if self.clip is not None:
            estimates = estimates.clamp(-self.clip, self.clip)
        return Evaluation(estimates, features, first)

    def _ask(
        self,
        states: Tensor,
        times: Tensor,
        condition: Mapping[str, Tensor] | None,
        reads: Reads | None,
        rest: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if reads is None:
            return self.output(states, times, condition), None, None
        states, times = states.to(self.dtype), times[:, None]
        if reads is Reads.HIDDEN:
            assert isinstance(self.network, PatchTransformer) and self._spread is None
            said = self.network.spoken(states, times, **(condition or {}))
            return said.output.float(), said.hidden.float(), None
        word = self.first_block(states, times, condition or {}, rest)
        return word.output.float(), word.rest, word.first

    @property
    def first_block(self) -> FirstBlock:
        """The network by its first block; ValueError in one line where it cannot be run so."""
        if self._spread is not None:
            raise ValueError("first-block: a target that is cached is on one device")
        if self._first_block is None:
            self._first_block = first_block(self.network)
        return self._first_block

    def unconditional(self, name: str, value: Tensor) -> Tensor:
        """Return what stands for "no condition" in place of `value` (R, ...)."""
        return torch.full_like(value, -1) if name == "classes" else torch.zeros_like(value)

    def save(self, folder: Path) -> None:
        """Write weights and what builds the model again; only for networks of this package."""
        from safetensors.torch import save_file

        assert isinstance(self.network, PatchTransformer)
        folder.mkdir(parents=True, exist_ok=True)
        form = {
            "network": self.network.options,
            "schedule": {"class": type(self.schedule).__name__, **vars(self.schedule)},
            "shape": list(self.shape),
            "prediction": self.prediction.value,
            "clip": self.clip,
        }
        if self.guidance is not None:
            form["guidance"] = self.guidance
        if self.other_shapes:
            form["other_shapes"] = [list(shape) for shape in self.other_shapes]
        (folder / FORM).write_text(json.dumps(form, indent=2) + "\n")
        save_file(
            {name: value.contiguous() for name, value in self.network.state_dict().items()},
            folder / WEIGHTS,
        )


def check_shape(network: PatchTransformer, shape: Any) -> None:
    """Raise ValueError for what is no shape of a state, or one that the network does not make."""
    if not isinstance(shape, list) or any(type(size) is not int or size < 1 for size in shape):
        raise ValueError(f"a shape must be a list of whole numbers above 0, got {shape!r}")
    channels = network.options["out_channels"]
    if len(shape) < 2 or shape[0] != channels or math.prod(shape) > LARGEST_STATE:
        raise ValueError(
            f"a shape must be {channels} channels and a grid, at most {LARGEST_STATE} numbers in "
            f"all, got {shape}"
        )
    network.check_grid(shape[1:])


def check_clip(clip: Any) -> None:
    """Raise ValueError for what estimates cannot be cut to."""
    if clip is not None and (isinstance(clip, bool | str | list | dict) or not clip > 0):
        raise ValueError(f"clip must be a number above 0 or null, got {clip!r}")


def check_levels(schedule: NoiseSchedule) -> None:
    """Raise ValueError for a schedule whose noise levels are no numbers."""
    grid = schedule.grid(2)
    if not all(bool(x.isfinite().all()) for x in (grid.times, grid.alphas, grid.sigmas)):
        raise ValueError(f"the noise levels of {schedule} are not finite")


def load_denoiser(path: str | Path, device: str | torch.device = "cpu") -> Denoiser:
    """Load what `Denoiser.save` wrote; ValueError in one line for what is no such folder."""
    if (Path(path) / STUDENT).is_file():
        raise ValueError(
            f"'{path}' is no denoiser but a student of few steps: it says where a sampler ends, "
            "not what a target says on the way"
        )
    return read_denoiser(path, device)


def read_denoiser(path: str | Path, device: str | torch.device = "cpu") -> Denoiser:
    """Do what `load_denoiser` does, whatever the network was trained to say."""
    from safetensors.torch import load_file

    folder = Path(path)
    for name in (FORM, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"'{path}' is no denoiser: it has no {name}")
    with one_line(f"'{path}' holds a damaged denoiser"):
        form: dict[str, Any] = json.loads((folder / FORM).read_text())
        named = dict(form["schedule"])
        schedule = SCHEDULES[named.pop("class")](**named)
        network = PatchTransformer(**form["network"])
        network.load_state_dict(load_file(folder / WEIGHTS))
        prediction = Prediction(form["prediction"])
        check_levels(schedule)
        for shape in (form["shape"], *form.get("other_shapes", ())):
            check_shape(network, shape)
        check_clip(form.get("clip"))
        guidance = None if form.get("guidance") is None else float(form["guidance"])
        if guidance is not None and not math.isfinite(guidance):
            raise ValueError(f"guidance must be a finite number, got {guidance}")
        told = (form["shape"], prediction, form.get("clip"), guidance)
        denoiser = Denoiser(network, schedule, *told)
        denoiser.other_shapes = tuple(tuple(shape) for shape in form.get("other_shapes", ()))
    denoiser.path = str(path)
    return denoiser.to(device)
