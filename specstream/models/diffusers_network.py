"""The networks of `diffusers` under one call: network(states, times, **condition by name).

Each has its own names, its own order of axes and its own unit of time, and some see the state as a
sequence.  All of them are given a time for each row, so that a row may stand at a step of its own.
Times are those of the schedules, of about 0 to 1000.

Shapes: R rows, C channels, F frames, H height, W width, L length of a sound.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import ModelMixin

FIRST_FRAME = "first_frame"  # (R, C, 1, H, W) latents of the picture that a video begins with
BESIDE = "beside"  # (R, C', *A) a medium and its mask, in channels of their own beside the state
IMAGE_EMBEDS = "image_embeds"  # (R, T, D) what an image encoder says of that picture
SHOWN = (FIRST_FRAME, BESIDE, IMAGE_EMBEDS)  # what is made of files: the same without a prompt
TIMES = 1000.0  # what a network that counts in shares divides a time by


@dataclass(frozen=True, slots=True)
class StateForm:
    """What states a network takes: `patch` divides the axes; `size` is what it was trained at."""

    channels: int
    patch: tuple[int, ...]  # one for each axis: (L), (H, W) or (F, H, W)
    size: tuple[int, ...] | None = None
    square: bool = False
    fixed: bool = False  # whether it takes states of its own size only

    def num_tokens(self, shape: tuple[int, ...]) -> int:
        """Return how long a sequence the network makes of a state of `shape`, (C, ...)."""
        return prod(side // patch for side, patch in zip(shape[1:], self.patch, strict=True))


class DiffusersNetwork(nn.Module, ABC):
    """A network of `diffusers` as a `Denoiser` calls it.

    Args:
        model: the network.
        space, time: how many pixels and frames one place of a state stands for.
        frame_rate: frames a second of a video.
        guidance: the weight of the prompt that a distilled network is told of.
        expand_timesteps: whether a Wan network was trained to be told a time for each place.

    Raises ValueError for a network that wants more than a state, a time and a text or class.
    """

    needs: tuple[str, ...] = ()  # the conditions that a call names

    def __init__(
        self,
        model: ModelMixin,
        space: int = 1,
        time: int = 1,
        frame_rate: float = 25.0,
        guidance: float = 3.5,
        expand_timesteps: bool = False,
    ) -> None:
        super().__init__()
        self.form(model.config)
        self.model = model
        self.space = space
        self.time = time
        self.frame_rate = frame_rate
        self.guidance = guidance
        self.expand_timesteps = expand_timesteps

    @property
    def may_see(self) -> tuple[str, ...]:
        """The conditions that a call may name beside those it needs."""
        return ()

    @property
    def wants(self) -> Literal["first_frame", "image"] | None:
        """The file that it cannot do without: a video's first frame, or an image with its mask."""
        if not any(name in SHOWN for name in self.needs):
            return None
        return "first_frame" if len(self.form(self.model.config).patch) == 3 else "image"

    @property
    def models(self) -> tuple[ModelMixin, ...]:
        """The networks of `diffusers` that are asked."""
        return (self.model,)

    def beside(self, latents: Tensor, made: Tensor) -> Tensor:
        """Return what is shown beside a state, (1, C', *A), where that is needed.

        Of the latents (1, C, *A) of a medium, grey where it is to be `made`, (1, 1, ...) in pixels.
        """
        raise NotImplementedError(f"{type(self).__name__} is shown nothing beside its states")

    @staticmethod
    @abstractmethod
    def form(config: Mapping[str, Any]) -> StateForm:
        """Return what states a network of this config takes; ValueError where it needs more."""

    def check(self, condition: Mapping[str, Tensor]) -> None:
        """Raise ValueError for a condition that is missing, or that the network does not take."""
        missing = [name for name in self.needs if name not in condition]
        unknown = [name for name in condition if name not in (*self.needs, *self.may_see)]
        kind = type(self.model).__name__
        if missing:
            raise ValueError(f"{kind} needs {' and '.join(self.needs)}; {missing[0]} is missing")
        if unknown:
            known = ", ".join(self.needs) or "no condition"
            raise ValueError(f"{kind} takes {known}, not '{unknown[0]}'")

    def unconditional(self, name: str, value: Tensor) -> Tensor:
        """Return what an empty prompt says in place of `value` (R, ...), where that is known."""
        if name in SHOWN:
            return value
        raise ValueError(
            f"guidance needs the {name} of an empty prompt, which {type(self.model).__name__} "
            "does not know by itself"
        )


def plain_channels(kind: str, config: Mapping[str, Any]) -> int:
    """Return the channels of a network's states; ValueError where it takes in more than a state."""
    taken = config["in_channels"]
    given = config.get("out_channels") or taken
    if given not in (taken, 2 * taken):
        raise ValueError(
            f"{kind} takes {taken} channels and gives {given}: one that is shown an image or a "
            "mask beside the state is not supported"
        )
    return int(taken)
