"""Where images and videos come from: arrays in -1..1 with perhaps a class or a text for each.

The embedded ones need no download: the handwritten digits that ship inside scikit-learn and videos
of them composed by rule.  Which samples are held out follows from their numbers.

Shapes: n samples, S the shape of a state, F frames, H height, W width, C colours.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from specstream.data.media_arrays import (
    check_labels,
    check_pictures,
    check_room,
    check_speed,
    class_names,
    read_array,
)
from specstream.data.sources import check_limit
from specstream.media_processor import MediaProcessor


@dataclass(frozen=True, slots=True)
class Samples:
    """Media of one shape."""

    states: Tensor  # (n, *S) float32 in -1..1
    classes: Tensor | None = None  # (n,) int64
    text: Tensor | None = None  # (n, text_size) float32, see `text_vectors`

    @property
    def condition(self) -> dict[str, Tensor]:
        """What a network may be told of each sample, by name."""
        told = {"classes": self.classes, "text": self.text}
        return {name: value for name, value in told.items() if value is not None}


class MediaSource(ABC):
    """Gives media of one shape; subclasses are frozen dataclasses of their options."""

    @abstractmethod
    def check(self) -> None:
        """Raise ValueError when the options are wrong or a file is missing; reads no data."""

    @abstractmethod
    def samples(self) -> Samples:
        """Return all of them, in an order that never changes."""

    @property
    @abstractmethod
    def processor(self) -> MediaProcessor:
        """What they are, and how one is written to a file."""


DIGITS = tuple("0123456789")
IMAGES = {3: "images are (n, H, W)", 4: "images are (n, H, W, C)"}


@dataclass(frozen=True)
class Digits(MediaSource):
    """The 1,797 handwritten digits of 8 by 8 pixels inside scikit-learn: (1, 8, 8)."""

    def check(self) -> None:
        require_sklearn()

    def samples(self) -> Samples:
        from sklearn.datasets import load_digits

        found = load_digits()
        images = torch.from_numpy(found.images.astype(np.float32)) / 8 - 1
        return Samples(images[:, None], torch.from_numpy(found.target.astype(np.int64)))

    @property
    def processor(self) -> MediaProcessor:
        return MediaProcessor("image", enlarge=16, classes=DIGITS)


@dataclass(frozen=True)
class MovingDigits(MediaSource):
    """Videos of one digit that flies straight and bounces off the edges: (1, F, H, W).

    Args:
        num_clips: how many; each is drawn by its number.
        num_frames: F.
        size: height and width.
        speed: most pixels a frame along each axis.
    """

    num_clips: int = 4096
    num_frames: int = 8
    size: int = 16
    speed: float = 2.0

    def check(self) -> None:
        require_sklearn()
        if self.num_clips < 1 or self.num_frames < 1:
            raise ValueError("num_clips and num_frames must be at least 1")
        if self.size < 8:
            raise ValueError(f"size must be at least 8, a digit's, got {self.size}")
        check_speed(self.speed, self.size)
        check_room(self.num_clips, self.num_frames, self.size, self.size)

    def samples(self) -> Samples:
        still = Digits().samples()
        assert still.classes is not None
        noise = np.random.default_rng(0)
        chosen = torch.from_numpy(noise.integers(len(still.states), size=self.num_clips))
        corners = bounced_corners(noise, self.num_clips, self.num_frames, self.size - 8, self.speed)
        video = composed(still.states[chosen, 0], corners, self.size, -1.0)[:, None]
        return Samples(video, still.classes[chosen])

    @property
    def processor(self) -> MediaProcessor:
        return MediaProcessor("video", frame_rate=8, enlarge=8, classes=DIGITS)


@dataclass(frozen=True)
class ImageArrays(MediaSource):
    """Images of bytes in an .npz file, (n, H, W) or (n, H, W, C), padded evenly: (C, H, W).

    Args:
        path: the file.
        images, labels: names of its arrays; `labels` None: there are no classes.
        padded_size: height and width to pad to with the darkest value; None: as they are.
        enlarge: pixels are written so much larger.
        limit: only the first ones.
    """

    path: str
    images: str = "images"
    labels: str | None = "labels"
    padded_size: int | None = None
    enlarge: int = 4
    limit: int | None = None

    def check(self) -> None:
        check_limit(type(self).__name__, self.limit)
        shape = check_pictures(self.path, self.images, IMAGES)
        check_labels(self.path, self.labels, shape[0])
        least = max(shape[1:3])
        if self.padded_size is not None and self.padded_size < least:
            raise ValueError(
                f"padded_size must be at least {least}, the images' size, got {self.padded_size}"
            )

    def samples(self) -> Samples:
        images = torch.from_numpy(
            read_array(self.path, self.images)[: self.limit].astype(np.float32)
        )
        images = images[:, None] if images.dim() == 3 else images.movedim(-1, 1)
        states = images / 127.5 - 1
        if self.padded_size is not None:
            missing = [self.padded_size - size for size in states.shape[-2:]]
            (top, bottom), (left, right) = [(m // 2, m - m // 2) for m in missing]
            sides = (left, right, top, bottom)
            states = torch.nn.functional.pad(states, sides, value=-1.0)
        if self.labels is None:
            return Samples(states)
        labels = read_array(self.path, self.labels)[: self.limit]
        return Samples(states, torch.from_numpy(labels.astype(np.int64)))

    @property
    def processor(self) -> MediaProcessor:
        names: tuple[str, ...] = ()
        if self.labels is not None:
            names = class_names(read_array(self.path, self.labels))
        return MediaProcessor("image", enlarge=self.enlarge, classes=names)


def bounced_corners(
    noise: np.random.Generator, num_clips: int, num_frames: int, room: int, speed: float
) -> np.ndarray:
    """Return top and left of things that fly straight and bounce, (num_clips, num_frames, 2).

    They stay in 0..room and move at most `speed` a frame along each axis.
    """
    start = noise.uniform(0, max(room, 1e-9), (num_clips, 2))
    pace = noise.uniform(-speed, speed, (num_clips, 2))
    frames = np.arange(num_frames)[None, :, None]
    place = start[:, None] + pace[:, None] * frames  # on an endless line
    folded = np.abs((place + room) % (2 * max(room, 1e-9)) - room)
    return np.rint(folded).astype(np.int64)


def composed(images: Tensor, corners: np.ndarray, size: int, empty: float) -> Tensor:
    """Return videos (n, F, size, size) of images (n, H, W) at `corners` (n, F, 2)."""
    clips, frames = corners.shape[:2]
    height, width = images.shape[1:]
    video = images.new_full((clips, frames, size, size), empty)
    for clip in range(clips):
        for frame in range(frames):
            top, left = corners[clip, frame]
            video[clip, frame, top : top + height, left : left + width] = images[clip]
    return video


def require_sklearn() -> None:
    """Raise ValueError where the digits' package is missing."""
    from importlib.util import find_spec

    if find_spec("sklearn") is None:
        raise ValueError("the embedded digits are inside the package scikit-learn: install it")
