"""How far a sound is from a reference, or sounds from data, by spectra; no weights, no models.

Shapes: B sounds of T numbers each; n sounds, M mel bands, F frames.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOOR = 1e-7  # magnitudes below it are as silent as one another
WINDOWS = (1024, 512, 256)  # resolutions: numbers of a window


def spectrum(sounds: Tensor, window: int) -> Tensor:
    """Return magnitudes (B, window // 2 + 1, frames) of sounds (B, T), a quarter window apart."""
    taper = torch.hann_window(window, device=sounds.device)
    found = torch.stft(sounds, window, window // 4, window=taper, return_complex=True)
    return found.abs().clamp(min=FLOOR)


def spectral_distance(sounds: Tensor, reference: Tensor, windows: Sequence[int] = WINDOWS) -> float:
    """Return the multi-resolution STFT distance of sounds (B, T) to references (B, T).

    Yamamoto et al. (2020), eq. 4-6: spectral convergence and the mean absolute difference of log
    magnitudes, summed, as a mean over the resolutions and sounds; 0 for equal sounds.  Raises
    ValueError for sounds that are no longer than half the longest window.
    """
    _check(sounds, reference, max(windows))
    parts = []
    for window in windows:
        ours, wanted = spectrum(sounds, window), spectrum(reference, window)
        gap = (wanted - ours).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)
        logarithms = (wanted.log() - ours.log()).abs().flatten(1).mean(1)
        parts.append(gap + logarithms)  # (B,)
    return float(torch.stack(parts).mean())


def log_spectral_distance(sounds: Tensor, reference: Tensor, window: int = 512) -> float:
    """Return the log-spectral distance in dB of sounds (B, T) to references (B, T).

    Gray and Markel (1976): the root mean square over frequencies of the difference of the log power
    spectra, as a mean over frames and sounds.  Raises ValueError as `spectral_distance` does.
    """
    _check(sounds, reference, window)
    ratio = spectrum(sounds, window).log10() - spectrum(reference, window).log10()
    return float((20 * ratio).square().mean(1).sqrt().mean())


def average_spectrum_distance(spectrograms: Tensor, data: Tensor, decibels: float) -> float:
    """Return how far, in dB, two sets of sounds are from each other in their average spectra.

    The root mean square over mel bands of the difference of the long-term average spectra (Byrne et
    al. 1994), levels averaged over sounds and frames: a model that hums or hisses is found out
    without a reference for each sound.  0 for equal ones; it sees no order in time.
    spectrograms (B, 1, M, F) and data (n, 1, M, F) in -1..1, which is `decibels` wide.
    """
    gap = (spectrograms.mean((0, 1, 3)) - data.mean((0, 1, 3))) * decibels / 2  # (M,)
    return float(gap.square().mean().sqrt())


def _check(sounds: Tensor, reference: Tensor, longest: int) -> None:
    if sounds.shape != reference.shape or sounds.dim() != 2:
        raise ValueError(
            f"sounds and references must both be (B, T), got {list(sounds.shape)} and "
            f"{list(reference.shape)}"
        )
    if sounds.shape[1] <= longest // 2:
        raise ValueError(f"a window of {longest} needs more than {longest // 2} numbers a sound")
