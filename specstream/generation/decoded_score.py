"""Scores of what latents stand for: a draft is decoded, and each part judged by its own media.

Contrast and sharpness mean nothing in latents.  The parts that are kept or refined are those of the
latents, so a part's score is that of the pixels, frames or samples that it becomes.

Shapes: B rows, S the shape of a state, G the grid of its parts, F frames of a state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from specstream.generation.refinement_scores import (
    Appearance,
    Ask,
    Parts,
    QualityScore,
    TargetDisagreement,
)
from specstream.models.codec import Codec, PixelCodec
from specstream.models.denoiser import Denoiser
from specstream.models.pretrained_denoiser import PretrainedDenoiser


@dataclass(frozen=True)
class DecodedScore(QualityScore):
    """Another score's opinion of the decoded draft, told of the parts of the latents.

    Frames of a video that lie in one part of the latents count equally.  A part that holds nothing
    but padding scores as the first that does not.

    Args:
        score: of media in -1..1; what it asks the target is about the latents.
        codec: decodes states.
        padding: frames in front of a state that stand for none.
    """

    score: QualityScore
    codec: Codec
    padding: int = 0

    def __call__(self, drafts: Tensor, parts: Parts, ask: Ask) -> Tensor:
        states = drafts[:, :, self.padding :] if self.padding else drafts
        with torch.no_grad():  # one by one: media are large
            media = torch.cat([self.codec.decode(state[None]) for state in states]).to(drafts)
        shape, axes = tuple(media.shape[1:]), states.shape[2:]
        scales = [now // before for now, before in zip(shape[1:], axes, strict=True)]
        sizes = [size * scale for size, scale in zip(parts.sizes, scales, strict=True)]
        if len(axes) < 3:
            return self.score(media, Parts(shape, tuple(sizes)), ask)
        scores = self.score(media, Parts(shape, (1, *sizes[1:])), ask)
        places = self._parts_of_frames(shape[1], axes[0], parts).to(scores.device)
        found = scores.reshape(len(drafts), shape[1], -1)
        totals = found.new_zeros(len(drafts), parts.counts[0], found.shape[2])
        counts = torch.bincount(places, minlength=parts.counts[0]).clamp(min=1)
        means = totals.index_add(1, places, found) / counts[:, None]
        means[:, : int(places[0])] = means[:, places[0], None]
        return means.view(-1, *parts.grid)

    def _parts_of_frames(self, num_decoded: int, num_frames: int, parts: Parts) -> Tensor:
        """Return the part along time that each decoded frame belongs to.

        Every frame of a state becomes as many frames, but for the first, which may stand alone.
        """
        each = self.codec.compression.time
        first = num_decoded - (num_frames - 1) * each
        ahead = torch.arange(num_decoded) - first
        frames = torch.where(ahead < 0, 0, 1 + ahead.div(each, rounding_mode="floor"))
        return (frames + self.padding) // parts.sizes[0]


def quality_score(name: Literal["disagreement", "appearance"], target: Denoiser) -> QualityScore:
    """Return the score of that name for drafts of a target, decoded where it makes latents."""
    if name == "disagreement":
        return TargetDisagreement()
    if not isinstance(target, PretrainedDenoiser) or isinstance(target.codec, PixelCodec):
        return Appearance()
    return DecodedScore(Appearance(), target.codec, target.padding)
