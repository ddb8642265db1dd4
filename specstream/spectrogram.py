"""Sounds as pictures of their pitches over time, and back: mel spectrograms of a fixed length.

A mel band is a sum of neighbouring frequencies as wide as the ear takes them for one (Stevens et
al. 1937, in O'Shaughnessy's form: 2595 log10(1 + f / 700)).  The way back finds frequencies that
fit the bands, then phases that fit the frequencies (Griffin and Lim 1984, with the momentum of
Perraudin et al. 2013).

Shapes: B sounds, T numbers, F frames, M mel bands, Q frequencies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

MOMENTUM = 0.99


@dataclass(frozen=True)
class LogMel:
    """Turns sounds into mel spectrograms in -1..1, in decibels, and back.

    Args:
        num_bands: M.
        num_frames: F, of every spectrogram: sounds are cut or filled with silence.
        window: numbers that one frame looks at.
        hop: numbers from one frame to the next.
        decibels: how far below a full-scale tone, 1, the faintest sound lies, -1.
        iterations: of the search for phases.
    """

    num_bands: int = 64
    num_frames: int = 64
    window: int = 512
    hop: int = 128
    decibels: float = 80.0
    iterations: int = 32

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if self.window < 2 * self.hop:
            raise ValueError(f"window must be at least two hops, {2 * self.hop}, got {self.window}")

    @property
    def length(self) -> int:
        """T: how many numbers of a sound fill the frames."""
        return (self.num_frames - 1) * self.hop

    def states(self, sounds: Tensor, sample_rate: int) -> Tensor:
        """Return spectrograms (B, 1, M, F) of sounds (B, T) in -1..1, of any length."""
        fitted = torch.nn.functional.pad(sounds, (0, max(0, self.length - sounds.shape[1])))
        power = self._transform(fitted[:, : self.length]).abs().square()
        bands = self.filters(sample_rate).to(power) @ power
        level = 10 * bands.clamp(min=10 ** (-self.decibels / 10)).log10()
        return (1 + 2 * level / self.decibels).clamp(-1, 1)[:, None]

    def sound(self, states: Tensor, sample_rate: int) -> Tensor:
        """Return sounds (B, 1, T) that have about the spectrograms (B, 1, M, F)."""
        level = (states[:, 0].float().clamp(-1, 1) - 1) * self.decibels / 2
        bands = 10 ** (level / 10) * (level > -self.decibels)
        magnitudes = self._frequencies(bands, sample_rate).sqrt()
        return self._phased(magnitudes)[:, None]

    def filters(self, sample_rate: int) -> Tensor:
        """Return the share of each frequency in each band, (M, Q): triangles that overlap by half.

        Raises ValueError where a band lies between two frequencies.
        """
        highest = 2595 * math.log10(1 + sample_rate / 2 / 700)
        marks = torch.linspace(0, highest, self.num_bands + 2, dtype=torch.float64)
        hertz = 700 * (10 ** (marks / 2595) - 1)
        heard = torch.linspace(0, sample_rate / 2, self.window // 2 + 1, dtype=torch.float64)
        left, middle, right = hertz[:-2, None], hertz[1:-1, None], hertz[2:, None]
        rising, falling = (heard - left) / (middle - left), (right - heard) / (right - middle)
        shares = torch.minimum(rising, falling).clamp(min=0)
        if not shares.any(1).all():
            raise ValueError(
                f"a window of {self.window} cannot tell {self.num_bands} bands apart at "
                f"{sample_rate} Hz: use fewer bands or a longer window"
            )
        return shares.float()

    def _transform(self, sounds: Tensor) -> Tensor:
        """Return the spectra (B, Q, F) of sounds (B, T): 1 for a full-scale tone."""
        shape = self._shape(sounds)
        spectra = torch.stft(
            sounds, self.window, self.hop, window=shape, pad_mode="constant", return_complex=True
        )
        return spectra * (2 / shape.sum())

    def _frequencies(self, bands: Tensor, sample_rate: int) -> Tensor:
        """Return powers (B, Q, F), none negative, whose bands are about `bands` (B, M, F).

        By the multiplicative updates of Lee and Seung (2001), which keep them positive.
        """
        filters = self.filters(sample_rate).to(bands)
        powers = filters.T @ bands
        for _ in range(self.iterations):
            found = filters.T @ (filters @ powers)
            powers = powers * (filters.T @ bands) / found.clamp(min=1e-20)
        return powers

    def _phased(self, magnitudes: Tensor) -> Tensor:
        """Return sounds (B, T) with about the `magnitudes` (B, Q, F) of their spectra."""
        shape = self._shape(magnitudes)
        # any phases will do to begin with, but not equal ones, which make a click of every frame
        start = torch.rand(magnitudes.shape[1:], generator=torch.Generator().manual_seed(0))
        phases = torch.polar(torch.ones_like(start), 2 * math.pi * start).to(magnitudes.device)
        phases, before = phases.expand(magnitudes.shape), torch.zeros_like(phases)
        scaled = magnitudes * (shape.sum() / 2)
        for _ in range(self.iterations):
            again = self._transform(self._inverse(scaled * phases, shape)) * (shape.sum() / 2)
            moved = again + MOMENTUM * (again - before)
            phases, before = moved / moved.abs().clamp(min=1e-12), again
        return self._inverse(scaled * phases, shape).clamp(-1, 1)

    def _inverse(self, spectra: Tensor, shape: Tensor) -> Tensor:
        return torch.istft(spectra, self.window, self.hop, window=shape, length=self.length)

    def _shape(self, like: Tensor) -> Tensor:
        return torch.hann_window(self.window, device=like.device)
