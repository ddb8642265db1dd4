"""What a diffusion model is told of a prompt: made by its pipeline's text encoders, or stored.

The encoders are loaded for the prompts of a run and dropped again: they may be larger than the
network.

Shapes: B prompts, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specstream.files import one_line
from specstream.models.pretrained_parts import Parts, has_part, quiet_diffusers

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin

NEGATIVE = "negative_"  # of the names in a file
Told = dict[str, Tensor]
SMALLEST_SIZE = 1e-6  # of a text's vector: below it there is no text
AT_ONCE = 16  # prompts that are encoded together
LENGTHS = {  # tokens of a prompt, as they were trained
    "WanPipeline": 512,
    "CogVideoXPipeline": 226,
    "CogVideoXImageToVideoPipeline": 226,
}
READERS = {  # of the prompts of another, with the same encoders and none of what reads pictures
    "WanImageToVideoPipeline": "WanPipeline",
}


@dataclass(frozen=True, slots=True)
class TextConditions:
    """What prompts say, (B, ...) by name, and what the empty or negative prompt does, (1, ...)."""

    given: dict[str, Tensor]
    free: dict[str, Tensor]


def read_conditions(path: str) -> TextConditions:
    """Return the conditions of a safetensors file: prompt_embeds, negative_prompt_embeds, ...

    Raises ValueError in one line for a damaged file, and where a negative does not fit.
    """
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise ValueError(f"no file of conditions at {path!r}")
    with one_line(f"{path!r} holds no conditions"):
        found = load_file(path)
    given = {name: value for name, value in found.items() if not name.startswith(NEGATIVE)}
    free = {
        name.removeprefix(NEGATIVE): value
        for name, value in found.items()
        if name.startswith(NEGATIVE)
    }
    rows = {len(value) for value in given.values()}
    if len(rows) != 1:
        raise ValueError(f"{path!r} must hold conditions of equally many prompts, got {rows or 0}")
    for name, value in free.items():
        if name not in given or value.shape[1:] != given[name].shape[1:] or len(value) != 1:
            raise ValueError(
                f"{path!r}: {NEGATIVE}{name} must be one row of the shape of {name}, "
                f"got {list(value.shape)}"
            )
    return TextConditions(given, free)


def short_condition(condition: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return what a small network is told of a condition (R, ...): its class, or one vector.

    Of a text whose tokens are embedded, (R, T, D), that is their mean, its numbers about 1 large:
    `text`, float32 (R, D).
    """
    embeds = condition.get("prompt_embeds")
    if embeds is None:
        return condition
    mask = condition.get("prompt_mask")
    shares = torch.ones_like(embeds[..., 0]) if mask is None else mask.to(embeds)
    mean = (embeds * shares[..., None]).float().sum(1)  # of a length that is divided out
    size = mean.square().mean(1, keepdim=True).sqrt()
    return {"text": mean / size.clamp(min=SMALLEST_SIZE)}


def encode_prompts(
    parts: Parts,
    models: dict[str, ModelMixin],
    prompts: Sequence[str],
    negative: str,
    seconds: float,
    device: torch.device,
    dtype: torch.dtype,
) -> TextConditions:
    """Return what the text encoders of a pipeline say of prompts, and of one that says `negative`.

    `models` are the parts that are in memory already, by name.  Raises ValueError in one line
    where the pipeline's encoders cannot be loaded or are not known.
    """
    import diffusers

    if parts.pipeline not in ENCODERS:
        raise ValueError(
            f"prompts of a {parts.pipeline} are not supported, only of {', '.join(ENCODERS)}; "
            "give their embeddings in a file"
        )
    encode = ENCODERS[parts.pipeline]
    if not has_part(parts.path, "text_encoder"):
        raise ValueError(
            f"{parts.path!r} has no text encoder; give the embeddings of prompts in a file, as "
            "conditions"
        )
    with one_line(f"cannot encode prompts with {parts.path!r}"), quiet_diffusers():
        reader = READERS.get(parts.pipeline, parts.pipeline)
        pipeline = getattr(diffusers, reader).from_pretrained(
            parts.path, dtype=dtype, scheduler=None, **models
        )
        for name, part in pipeline.components.items():
            if isinstance(part, torch.nn.Module) and name not in models:
                part.to(device)
        with torch.inference_mode():
            said = [
                encode(pipeline, list(prompts[first : first + AT_ONCE]), seconds, device)
                for first in range(0, len(prompts), AT_ONCE)
            ]
            given = {name: torch.cat([one[name] for one in said]) for name in said[0]}
            free = None if negative else without_prompt(pipeline, given)
            if free is None:
                free = encode(pipeline, [negative], seconds, device)
    return TextConditions(given, free)


def without_prompt(pipeline: DiffusionPipeline, given: Told) -> Told | None:
    """Return what stands for no prompt, (1, ...) by name; None: what an empty one says.

    {}: the network itself knows (Stable Audio).
    """
    kind = type(pipeline).__name__
    if kind == "StableAudioPipeline":
        return {}
    if kind.startswith("StableDiffusionXL") and pipeline.config.force_zeros_for_empty_prompt:
        return {name: torch.zeros_like(value[:1]) for name, value in given.items()}
    return None


def encode_plain(
    pipeline: DiffusionPipeline, prompts: list[str], seconds: float, device: torch.device
) -> Told:
    """Encode prompts for Wan and CogVideoX."""
    length = LENGTHS[type(pipeline).__name__]
    embeds, _ = pipeline.encode_prompt(
        prompts, do_classifier_free_guidance=False, max_sequence_length=length, device=device
    )
    return {"prompt_embeds": embeds}


def encode_masked(
    pipeline: DiffusionPipeline, prompts: list[str], seconds: float, device: torch.device
) -> Told:
    """Encode prompts for LTX."""
    embeds, mask, *_ = pipeline.encode_prompt(
        prompts, do_classifier_free_guidance=False, device=device
    )
    return {"prompt_embeds": embeds, "prompt_mask": mask}


def encode_pooled(
    pipeline: DiffusionPipeline, prompts: list[str], seconds: float, device: torch.device
) -> Told:
    """Encode prompts for Flux."""
    embeds, pooled, _ = pipeline.encode_prompt(prompts, None, device=device)
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


def encode_stable(
    pipeline: DiffusionPipeline, prompts: list[str], seconds: float, device: torch.device
) -> Told:
    """Encode prompts for Stable Diffusion 1 and 2."""
    embeds, _ = pipeline.encode_prompt(prompts, device, 1, False)
    return {"prompt_embeds": embeds}


def encode_stable_xl(
    pipeline: DiffusionPipeline, prompts: list[str], seconds: float, device: torch.device
) -> Told:
    """Encode prompts for Stable Diffusion XL."""
    embeds, _, pooled, _ = pipeline.encode_prompt(
        prompts, device=device, do_classifier_free_guidance=False
    )
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


def encode_sound(
    pipeline: DiffusionPipeline, prompts: list[str], seconds: float, device: torch.device
) -> Told:
    """Encode prompts and the duration for Stable Audio."""
    embeds = pipeline.encode_prompt(prompts, device, False)
    start, end = pipeline.encode_duration(0.0, seconds, device, False, len(prompts))
    return {
        "prompt_embeds": torch.cat([embeds, start, end], 1),
        "duration_embeds": torch.cat([start, end], 2),
    }


ENCODERS = {
    "WanPipeline": encode_plain,
    "WanImageToVideoPipeline": encode_plain,
    "CogVideoXPipeline": encode_plain,
    "CogVideoXImageToVideoPipeline": encode_plain,
    "LTXPipeline": encode_masked,
    "LTXImageToVideoPipeline": encode_masked,
    "FluxPipeline": encode_pooled,
    "FluxFillPipeline": encode_pooled,
    "StableDiffusionPipeline": encode_stable,
    "StableDiffusionInpaintPipeline": encode_stable,
    "StableDiffusionXLPipeline": encode_stable_xl,
    "StableDiffusionXLInpaintPipeline": encode_stable_xl,
    "StableAudioPipeline": encode_sound,
}
