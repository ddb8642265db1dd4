"""Where images, videos and sounds come from: arrays in -1..1 with perhaps a class for each.

The embedded ones need no download: the handwritten digits that ship inside scikit-learn, videos of
them composed by rule, and tones.  Which samples are held out follows from their numbers.
"""

from __future__ import annotations

import zipfile
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from specstream.media_processor import MediaProcessor


@dataclass(frozen=True, slots=True)
class Samples:
    """Media of one shape."""

    states: Tensor  # (n, *S) float32 in -1..1
    classes: Tensor | None  # (n,) int64


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

    def samples(self) -> Samples:
        still = Digits().samples()
        assert still.classes is not None
        noise = np.random.default_rng(0)
        chosen = torch.from_numpy(noise.integers(len(still.states), size=self.num_clips))
        room = self.size - 8
        start = noise.uniform(0, max(room, 1e-9), (self.num_clips, 2))
        pace = noise.uniform(-self.speed, self.speed, (self.num_clips, 2))
        frames = np.arange(self.num_frames)[None, :, None]
        place = start[:, None] + pace[:, None] * frames  # (n, F, 2), on an endless line
        folded = np.abs((place + room) % (2 * max(room, 1e-9)) - room)  # bounced into 0..room
        corners = np.rint(folded).astype(np.int64)
        video = torch.full((self.num_clips, 1, self.num_frames, self.size, self.size), -1.0)
        for clip in range(self.num_clips):
            for frame in range(self.num_frames):
                top, left = corners[clip, frame]
                video[clip, 0, frame, top : top + 8, left : left + 8] = still.states[chosen[clip]][
                    0
                ]
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
        self._read(self.images)
        if self.labels is not None:
            self._read(self.labels)

    def samples(self) -> Samples:
        images = torch.from_numpy(self._read(self.images)[: self.limit].astype(np.float32))
        images = images[:, None] if images.dim() == 3 else images.movedim(-1, 1)
        states = images / 127.5 - 1
        if self.padded_size is not None:
            missing = [self.padded_size - size for size in states.shape[-2:]]
            if min(missing) < 0:
                raise ValueError(f"padded_size {self.padded_size} is less than the images' size")
            (top, bottom), (left, right) = [(m // 2, m - m // 2) for m in missing]
            sides = (left, right, top, bottom)
            states = torch.nn.functional.pad(states, sides, value=-1.0)
        if self.labels is None:
            return Samples(states, None)
        labels = self._read(self.labels)[: self.limit]
        return Samples(states, torch.from_numpy(labels.astype(np.int64)))

    @property
    def processor(self) -> MediaProcessor:
        names: tuple[str, ...] = ()
        if self.labels is not None:
            names = tuple(str(n) for n in range(int(self._read(self.labels).max()) + 1))
        return MediaProcessor("image", enlarge=self.enlarge, classes=names)

    def _read(self, name: str) -> np.ndarray:
        try:
            with np.load(self.path, allow_pickle=False) as arrays:
                if name not in arrays.files:
                    raise ValueError(f"'{self.path}' has no array '{name}': {arrays.files}")
                return np.asarray(arrays[name])
        except (OSError, EOFError, AttributeError, zipfile.BadZipFile) as error:
            raise ValueError(f"'{self.path}' is no .npz file that can be read: {error}") from error


def require_sklearn() -> None:
    """Raise ValueError where the digits' package is missing."""
    from importlib.util import find_spec

    if find_spec("sklearn") is None:
        raise ValueError("the embedded digits are inside the package scikit-learn: install it")
