"""From a run folder of a diffusion model, or of a drafter for one, to a pipeline that samples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from specstream.data.text_vectors import text_vector
from specstream.drafters.denoising import (
    FrozenEstimate,
    FrozenVelocity,
    IndependentDenoiser,
    StateDrafter,
)
from specstream.drafters.state_loading import load_state_drafter, read_state_record
from specstream.generation.denoising import DenoisingPipeline
from specstream.generation.lengths import FixedLength
from specstream.generation.loading import find_device
from specstream.generation.refinement import RefinementPipeline
from specstream.generation.refinement_scores import (
    Appearance,
    Parts,
    TargetDisagreement,
    usual_parts,
)
from specstream.media_processor import MediaProcessor, load_media_processor
from specstream.models.denoiser import FORM, Denoiser, load_denoiser
from specstream.models.pretrained_denoiser import PretrainedDenoiser
from specstream.verification.quality import AdaptiveThreshold

WINDOW = 8  # drafted steps a round, unless said
FREE = ("estimate", "velocity")  # drafts that need no training


@dataclass(frozen=True, slots=True)
class Refinement:
    """How a draft of few steps is refined; see `RefinementPipeline`."""

    draft_steps: int = 8
    threshold: float = 0.7
    score: Literal["disagreement", "appearance"] = "disagreement"
    strength: float = 0.6


@dataclass(frozen=True, slots=True)
class MediaRun:
    """What samples media, and what turns its samples into files.

    `told` is a target of `diffusers`, which encodes prompts and decodes latents itself.
    """

    pipeline: DenoisingPipeline | RefinementPipeline
    processor: MediaProcessor
    told: PretrainedDenoiser | None = None

    def condition(self, prompt: str, num_samples: int) -> dict[str, Tensor]:
        """Return what the network is told: the prompt's text or class, nothing for no prompt.

        Raises ValueError for a prompt that the model does not know.
        """
        if self.told is not None:
            return self.told.condition([prompt] * num_samples)
        processor = self.processor
        if processor.text_size:
            return {"text": text_vector(prompt, processor.text_size).expand(num_samples, -1)}
        if not processor.classes:
            if prompt:
                raise ValueError('this model takes no prompt: give --prompt ""')
            return {}
        number = processor.class_number(prompt) if prompt else -1
        return {"classes": torch.full((num_samples,), number)}

    def media(self, states: Tensor) -> Tensor:
        """Return what samples (B, *S) are to be written as."""
        return states if self.told is None else self.told.decode(states)


def is_media_run(run: str | Path) -> bool:
    """Whether a run folder holds a diffusion model of media, or a drafter of one."""
    folder = Path(run)
    if (folder / "model" / FORM).is_file() or (folder / FORM).is_file():
        return True
    try:
        target = read_state_record(folder / "draft")["target"]["path"]
    except ValueError:
        return False
    return (Path(str(target)) / FORM).is_file()


def load_media_run(
    run: str | Path,
    *,
    num_steps: int = 50,
    eta: float | None = None,
    guidance: float = 1.0,
    free_draft: str | None = None,
    window: int | None = None,
    refinement: Refinement | None = None,
    batch_size: int = 16,
    device: str = "auto",
) -> MediaRun:
    """Load a run: its drafter with its target, or a trained model alone.

    `free_draft` drafts without a trained drafter, going on with the target's last "estimate" of the
    data or its last "velocity"; `window` is how many steps are drafted in a round, at most.  With a
    `refinement` a drafter is a smaller diffusion model that makes the drafts, and eta is 0 unless
    given, else 1.
    Raises ValueError for folders that are no such run, and for options without effect.
    """
    if free_draft not in (None, *FREE):
        raise ValueError(f"free_draft must be one of {', '.join(FREE)}, got '{free_draft}'")
    folder, place = Path(run), find_device(device)
    draft = folder / "draft"
    drafter: StateDrafter | None = None
    if draft.is_dir():
        if free_draft is not None:
            raise ValueError(f"'{run}' has a trained drafter: free_draft is for a target alone")
        path = str(read_state_record(draft)["target"]["path"])
        target = load_denoiser(path, place)
        drafter = load_state_drafter(draft, target)
    else:
        path = str(folder / "model" if (folder / "model").is_dir() else folder)
        target = load_denoiser(path, place)
        drafter = free_drafter(free_draft, target)
    if drafter is None and window is not None:
        raise ValueError("window is for drafts, and nothing drafts here: give a free_draft")
    target.eval().requires_grad_(False)
    processor = load_media_processor(path)
    if refinement is not None:
        refined = RefinementPipeline(
            target,
            rough_model(drafter),
            refinement.draft_steps,
            num_steps,
            Appearance() if refinement.score == "appearance" else TargetDisagreement(),
            AdaptiveThreshold(refinement.threshold),
            refinement.strength,
            guidance,
            batch_size,
            0.0 if eta is None else eta,
            refined_parts(target, processor),
        )
        return MediaRun(refined, processor)
    sampler = drafted_sampler(target, drafter, num_steps, eta, guidance, window, batch_size)
    return MediaRun(sampler, processor)


def media_of_target(
    target: PretrainedDenoiser,
    *,
    num_steps: int = 50,
    eta: float | None = None,
    guidance: float = 1.0,
    free_draft: str | None = None,
    window: int | None = None,
    refinement: Refinement | None = None,
    batch_size: int = 1,
) -> MediaRun:
    """Put a target of `diffusers` into a pipeline, with a drafter that needs no training or none.

    Raises ValueError for options without effect.
    """
    if refinement is not None:
        raise ValueError("refinement scores samples that are pixels; this target makes latents")
    drafter = free_drafter(free_draft, target)
    if drafter is None and window is not None:
        raise ValueError("window is for drafts, and nothing drafts here: give a free_draft")
    target.eval().requires_grad_(False)
    rate = target.codec.compression.sample_rate or MediaProcessor.sample_rate
    processor = MediaProcessor(target.kind, target.frame_rate, rate)
    sampler = drafted_sampler(target, drafter, num_steps, eta, guidance, window, batch_size)
    return MediaRun(sampler, processor, target)


def drafted_sampler(
    target: Denoiser,
    drafter: StateDrafter | None,
    num_steps: int,
    eta: float | None,
    guidance: float,
    window: int | None,
    batch_size: int,
) -> DenoisingPipeline:
    """Return the sampler with a window of `WINDOW` steps and eta 1, unless said."""
    return DenoisingPipeline(
        target,
        num_steps,
        1.0 if eta is None else eta,
        guidance,
        drafter,
        None if drafter is None else FixedLength(WINDOW if window is None else window),
        batch_size=batch_size,
    )


def rough_model(drafter: StateDrafter | None) -> Denoiser | None:
    """Return the diffusion model that drafts for a refinement; ValueError for other drafters."""
    if drafter is None:
        return None
    if not isinstance(drafter, IndependentDenoiser):
        raise ValueError(
            f"refinement drafts with the target or a smaller diffusion model; the drafter of this "
            f"run, a {type(drafter).__name__}, only guesses steps"
        )
    return drafter.denoiser


def refined_parts(target: Denoiser, processor: MediaProcessor) -> Parts:
    """Return what is kept or refined as a whole: of a spectrogram, 16 segments of time."""
    parts = usual_parts(target.shape)
    if processor.kind != "audio" or len(parts.sizes) != 2:
        return parts
    _, bands, frames = target.shape
    return Parts(target.shape, (bands, frames // math.gcd(frames, 16)))


def free_drafter(name: str | None, target: Denoiser) -> StateDrafter | None:
    """Return the drafter of that name that needs no training; None for none."""
    if name is None:
        return None
    return FrozenEstimate() if name == "estimate" else FrozenVelocity(target)
