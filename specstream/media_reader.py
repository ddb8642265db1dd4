"""From files of pictures, videos and sounds to tensors: numbers in -1..1, masks of what is white.

Every file that cannot be read is a ValueError in one line that names it.

Shapes: a picture is (C, H, W), a video (C, F, H, W), a sound (C, T); C is 1 or 3, of a sound its
channels.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from specstream.files import one_line, sound_package, video_package

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

BYTES = ("1", "L", "P", "RGB", "CMYK", "YCbCr", "LA", "PA", "RGBA")  # modes of a byte a number
VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif")


@dataclass(frozen=True, slots=True)
class Sound:
    """A sound and how many numbers a second it has."""

    wave: Tensor  # (C, T) float32 in -1..1
    sample_rate: int


def read_picture(path: str, channels: int) -> Tensor:
    """Return a picture (C, H, W) the right way up, grey where there is one channel."""
    from PIL import Image, ImageOps

    with one_line(f"cannot read the picture '{path}'"), warnings.catch_warnings():
        warnings.simplefilter(
            "error", Image.DecompressionBombWarning
        )  # larger than any model makes
        with Image.open(path) as opened:
            check_picture(opened)
            upright = ImageOps.exif_transpose(opened)
            pixels = np.array(upright.convert("L" if channels == 1 else "RGB"))
    return to_numbers(torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).movedim(-1, 0))


def check_picture(opened: Picture) -> None:
    """Raise ValueError for what would be lost without a word: depth, transparency, more pictures.

    Greys of 16 bits, for one, would be cut at 255.
    """
    if opened.mode not in BYTES:
        raise ValueError(f"its numbers are of kind {opened.mode}; save it with 8 bits a channel")
    count = getattr(opened, "n_frames", 1)
    if count > 1 and opened.format != "MPO":  # a phone's picture, with a preview behind it
        raise ValueError(f"it holds {count} pictures, not one")
    if not opened.has_transparency_data:
        return
    if opened.convert("RGBA").getchannel("A").getextrema() != (255, 255):
        raise ValueError("parts of it are transparent; put it on a background")


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
        if not np.isfinite(wave).all():
            raise ValueError("it holds numbers that are not finite")
        if wave.size and np.abs(wave).max() > 1:
            raise ValueError(f"it goes up to {np.abs(wave).max():g}, and 1 is the loudest")
    return Sound(torch.from_numpy(wave.T.copy()), rate)


def read_mask(path: str) -> Tensor:
    """Return where a picture (1, 1, H, W) or a video (1, F, H, W) is white rather than black."""
    if Path(path).suffix.lower() in VIDEOS:
        return read_video(path, 1) > 0
    return read_picture(path, 1)[:, None] > 0


def to_numbers(pixels: Tensor) -> Tensor:
    """Return bytes as numbers in -1..1: what `MediaProcessor.pictures` wrote."""
    return pixels.float() / 127.5 - 1
