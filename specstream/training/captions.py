"""What a target of `diffusers` is told in training: captions, encoded once before it begins.

P captions; B rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import lightning as L
import torch
from torch import Tensor

from specstream.data.captions import CaptionDataModule
from specstream.drafters.denoising import StateDrafter
from specstream.generation.media_loading import target_processor
from specstream.models.denoiser import Denoiser
from specstream.models.pretrained_denoiser import PretrainedDenoiser, find_denoiser
from specstream.models.text_conditions import short_condition
from specstream.training.sampling import HeldOutSampling


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


def frozen_target(target: str | Denoiser) -> Denoiser:
    """Return the target of a drafter, of either kind, as it is to stay in training."""
    found = find_denoiser(target).eval().requires_grad_(False)
    if isinstance(found, PretrainedDenoiser):
        check_whole(found)
    return found


def read_captions(
    target: Denoiser, data: object, guidance: float, decoding: HeldOutSampling | None
) -> EncodedCaptions | None:
    """Have a drafter's target read the captions of a training; None for a small target.

    Raises ValueError for data that are not for this target, and for what `encode_captions` refuses.
    """
    if isinstance(target, PretrainedDenoiser) != isinstance(data, CaptionDataModule):
        raise ValueError(
            "data: drafters of a diffusers target are trained with captions, "
            "specstream.data.CaptionDataModule, and others are not"
        )
    if not isinstance(target, PretrainedDenoiser):
        return None
    assert isinstance(data, CaptionDataModule)
    if decoding is not None:
        target_processor(target).check_writer()
    return encode_captions(target, data.prompts, guidance)


def encode_captions(
    target: PretrainedDenoiser, prompts: Sequence[str], guidance: float = 1.0
) -> EncodedCaptions:
    """Have a target's text encoders read the captions.

    Raises ValueError for captions that it cannot take, and for a guidance without captions.
    """
    said = target.condition(prompts)
    if not said and any(prompts):
        raise ValueError('this target takes no prompts: give data prompts [""]')
    # encoders work in inference mode, whose tensors no gradient may pass by
    told = {name: value.cpu().clone() for name, value in said.items()}
    check_guidance(target, guidance, told)
    text = short_condition(told).get("text")
    return EncodedCaptions(told, 0 if text is None else text.shape[1], target.num_classes)


def log_samples(
    module: L.LightningModule,
    decoding: HeldOutSampling,
    target: Denoiser,
    drafter: StateDrafter | None,
    captions: EncodedCaptions | None,
) -> None:
    """Sample as `decoding` says, of a target of `diffusers` by its captions, and log it."""
    if captions is None:
        processor, condition = module.trainer.datamodule.processor, None  # type: ignore[attr-defined]
    else:
        assert isinstance(target, PretrainedDenoiser)
        processor = target_processor(target)
        condition = captions.first(decoding.num_samples, module.device)
    found = decoding.run(module, target, drafter, processor, condition)
    module.log_dict(found, rank_zero_only=True)


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
