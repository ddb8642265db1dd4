"""How good drawn media are, by measures that not all media, and not all machines, can be given.

Each returns None where it has no meaning for a state, or where weights that it needs are not here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specstream.metrics import (
    FeatureDistances,
    clip_score,
    feature_distances,
    lpips,
    missing_clip,
    missing_lpips,
    ssim,
)
from specstream.metrics.media import SMALLEST_SSIM, frames

FEWEST = 4  # samples of a kernel distance
SMALLEST_LPIPS = 32  # pixels a side, of which the networks leave some


def random_feature_distances(samples: Tensor, data: Tensor) -> FeatureDistances | None:
    """Return FID and KID with random features of samples (n, *S) to data (m, *S).

    None for states that are no grid, such as waveforms (n, C, T), for few, and where one is not
    finite.
    """
    is_grid = samples.dim() in (4, 5)
    if not is_grid or min(len(samples), len(data)) < FEWEST or not samples.isfinite().all():
        return None
    return feature_distances(samples, data)


def structural_similarity(kind: str, samples: Tensor, reference: Tensor) -> float | None:
    """Return the SSIM of pictures or videos (n, *S) to their references."""
    if kind not in ("image", "video") or min(samples.shape[-2:]) < SMALLEST_SSIM:
        return None
    return ssim(samples, reference)


def perceptual_distance(kind: str, samples: Tensor, reference: Tensor) -> float | None:
    """Return the LPIPS of pictures or videos (n, *S), grey or of three colours."""
    if kind not in ("image", "video") or samples.shape[1] not in (1, 3):
        return None
    if min(samples.shape[-2:]) < SMALLEST_LPIPS or missing_lpips() is not None:
        return None
    return lpips(coloured(samples), coloured(reference))


def prompt_score(
    kind: str, samples: Tensor, texts: Sequence[str], model: str | None
) -> float | None:
    """Return the CLIP score of pictures (n, C, H, W), grey or of three colours, and their texts."""
    if (
        model is None
        or missing_clip(model) is not None
        or kind != "image"
        or not texts
        or samples.shape[1] not in (1, 3)
    ):
        return None
    return clip_score(coloured(samples), texts, model)


def coloured(states: Tensor) -> Tensor:
    """Return states (n, C, ..., H, W) as images of three channels (N, 3, H, W)."""
    images = frames(states)
    return torch.cat([images] * 3, 1) if images.shape[1] == 1 else images
