"""What a target of `diffusers` is told in training: captions, encoded once before it begins.

P captions; B rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specstream.models.pretrained_denoiser import PretrainedDenoiser
from specstream.models.text_conditions import short_condition


@dataclass(frozen=True, slots=True)
class EncodedCaptions:
    """What the target is told of each caption, kept in the computer's memory.

    `text_size` and `num_classes` are what a small network may be told of them; 0: nothing.
    """

    told: dict[str, Tensor]  # (P, ...) by name
    text_size: int
    num_classes: int

    def of(self, numbers: Tensor) -> dict[str, Tensor]:
        """Return what the target is told of captions by their numbers (B,), on their device."""
        picked = numbers.cpu()
        return {name: value[picked].to(numbers.device) for name, value in self.told.items()}

    def first(self, num_samples: int, device: torch.device) -> dict[str, Tensor]:
        """Return what the target is told of so many samples, the captions taking turns."""
        numbers = torch.arange(num_samples, device=device)
        most = min((len(value) for value in self.told.values()), default=1)
        return self.of(numbers % most)


def encode_captions(target: PretrainedDenoiser, prompts: Sequence[str]) -> EncodedCaptions:
    """Have a target's text encoders read the captions; ValueError for those it cannot take."""
    said = target.condition(prompts)
    if not said and any(prompts):
        raise ValueError('this target takes no prompts: give data prompts [""]')
    # encoders work in inference mode, whose tensors no gradient may pass by
    told = {name: value.cpu().clone() for name, value in said.items()}
    text = short_condition(told).get("text")
    return EncodedCaptions(told, 0 if text is None else text.shape[1], target.num_classes)


def check_guidance(target: PretrainedDenoiser, guidance: float, told: Mapping[str, Tensor]) -> None:
    """Raise ValueError for a guidance of a target that is told nothing, or knows no nothing."""
    if guidance == 1:
        return
    if not told:
        raise ValueError("guidance is the weight of a prompt, and this target takes none")
    for name, value in told.items():
        target.unconditional(name, value)  # where nothing is known of it, refused here


def check_whole(target: PretrainedDenoiser) -> None:
    """Raise ValueError for a target that is not as it is stored, or needs more than captions."""
    if target.network.wants is not None:
        raise ValueError("this target is shown a picture, and captions hold none")
    if target.offloaded or target.memory["target"]["method"] != "none":
        raise ValueError(
            "a drafter is trained for a target as it is stored: leave out quantize and offload, "
            "which generation may add"
        )
