"""From files of pictures, videos and sounds to tensors: numbers in -1..1, masks of what is white.

Every file that cannot be read is a ValueError in one line that names it.

Shapes: a picture is (C, H, W), a video (C, F, H, W), a sound (C, T); C is 1 or 3, of a sound its
channels.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from specstream.files import one_line, sound_package, video_package

VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif")


@dataclass(frozen=True, slots=True)
class Sound:
    """A sound and how many numbers a second it has."""

    wave: Tensor  # (C, T) float32 in -1..1
    sample_rate: int


def read_picture(path: str, channels: int) -> Tensor:
    """Return a picture (C, H, W), grey where there is one channel."""
    from PIL import Image

    with one_line(f"cannot read the picture '{path}'"), warnings.catch_warnings():
        warnings.simplefilter(
            "error", Image.DecompressionBombWarning
        )  # larger than any model makes
        with Image.open(path) as opened:
            pixels = np.array(opened.convert("L" if channels == 1 else "RGB"))
    return to_numbers(torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).movedim(-1, 0))


def read_video(path: str, channels: int) -> Tensor:
    """Return a video (C, F, H, W), grey where there is one channel."""
    ffmpeg = video_package()
    with one_line(f"cannot read the video '{path}'"):
        frames = ffmpeg.read_frames(path)
        width, height = next(frames)["size"]
        pixels = np.stack([np.frombuffer(f, np.uint8).reshape(height, width, 3) for f in frames])
    moved = to_numbers(torch.from_numpy(pixels).movedim(-1, 0))
    return moved if channels == 3 else moved.mean(0, keepdim=True)


def read_sound(path: str) -> Sound:
    """Return a sound with its sample rate."""
    package = sound_package()
    with one_line(f"cannot read the sound '{path}'"):
        wave, rate = package.read(path, dtype="float32", always_2d=True)
    return Sound(torch.from_numpy(wave.T.copy()), rate)


def read_mask(path: str) -> Tensor:
    """Return where a picture (1, 1, H, W) or a video (1, F, H, W) is white rather than black."""
    if Path(path).suffix.lower() in VIDEOS:
        return read_video(path, 1) > 0
    return read_picture(path, 1)[:, None] > 0


def to_numbers(pixels: Tensor) -> Tensor:
    """Return bytes as numbers in -1..1: what `MediaProcessor.pictures` wrote."""
    return pixels.float() / 127.5 - 1
