"""Metrics through torchmetrics: how decoding went, and how good what was decoded is.

`decoding` holds the counts of speculative decoding, `text` the task metrics of generated text,
`samples` what can be said of a text without references; `distances` whether two sets of samples
have one law, `media` and `sound` how good images, videos and sounds are.
"""

from specstream.metrics.decoding import Acceptance, AcceptedLength, Speedup
from specstream.metrics.distances import EnergyTest, energy_distance, energy_test
from specstream.metrics.media import (
    FeatureDistances,
    RandomFeatures,
    clip_score,
    feature_distances,
    lpips,
    missing_clip,
    missing_lpips,
    psnr,
    ssim,
    temporal_consistency,
)
from specstream.metrics.samples import DistinctN, JudgeNLL, Solved, TokenEntropy
from specstream.metrics.sound import (
    average_spectrum_distance,
    log_spectral_distance,
    spectral_distance,
)
from specstream.metrics.text import ExactMatch, Rouge, TextQuality

__all__ = [
    "Acceptance",
    "AcceptedLength",
    "DistinctN",
    "EnergyTest",
    "ExactMatch",
    "FeatureDistances",
    "JudgeNLL",
    "RandomFeatures",
    "Rouge",
    "Solved",
    "Speedup",
    "TextQuality",
    "TokenEntropy",
    "average_spectrum_distance",
    "clip_score",
    "energy_distance",
    "energy_test",
    "feature_distances",
    "log_spectral_distance",
    "lpips",
    "missing_clip",
    "missing_lpips",
    "psnr",
    "spectral_distance",
    "ssim",
    "temporal_consistency",
]
