"""Recorded videos, moving images and captioned images, from files that are already here.

Shapes: n samples, F frames, H height, W width, C colours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from specstream.data.caption_records import CaptionRecords
from specstream.data.media_arrays import (
    check_labels,
    check_pictures,
    check_room,
    check_speed,
    class_names,
    read_array,
)
from specstream.data.media_sources import (
    IMAGES,
    MediaSource,
    Samples,
    bounced_corners,
    composed,
)
from specstream.data.sources import check_limit
from specstream.media_processor import MediaProcessor

AT_ONCE = 256  # pictures that are shrunk together
GREY_IMAGES = {3: "grey images are (n, H, W)"}
VIDEOS = {4: "videos are (n, F, H, W)", 5: "videos are (n, F, H, W, C)"}


@dataclass(frozen=True)
class VideoArrays(MediaSource):
    """Videos of bytes in an .npz file, (n, F, H, W, C) or (n, F, H, W), cut into windows.

    A window is held out or not by its own number, so windows of one video lie on both sides, unless
    `split` parts the videos.

    Args:
        path: the file.
        captions: records (.jsonl, .jsonl.gz or .parquet) with a text for each video, as many and in
            the same order; None: there is no text.
        video: name of the array.
        template: how a record becomes the text, such as "{caption}".
        split: only videos whose record has this in its field `split`; None: all.
        num_frames: F of a sample; each video gives as many windows as fit; None: it is one.
        size: height and width of a sample, by averaging areas; None: as they are.
        text_size: width of the vector that a text becomes.
        frame_rate: frames a second, to write them.
        enlarge: pixels are written so much larger.
        limit: only the first videos.
    """

    path: str
    captions: str | None = None
    video: str = "video"
    template: str = "{caption}"
    split: str | None = None
    num_frames: int | None = None
    size: int | None = None
    text_size: int = 256
    frame_rate: float = 8.0
    enlarge: int = 4
    limit: int | None = None

    def check(self) -> None:
        check_limit(type(self).__name__, self.limit)
        shape = check_pictures(self.path, self.video, VIDEOS)
        if self.num_frames is not None and not 1 <= self.num_frames <= shape[1]:
            raise ValueError(f"num_frames must be in 1..{shape[1]}, got {self.num_frames}")
        check_size(self.size, min(shape[2:4]))
        if self._captions is not None:
            self._captions.check()
        elif self.split is not None:
            raise ValueError(f"split '{self.split}' is a field of the captions: give their file")

    def samples(self) -> Samples:
        video, text = read_array(self.path, self.video), None
        if self._captions is not None:
            told = self._captions.told(len(video))
            video, text = video[told.rows], told.text[: self.limit]
        video = video[: self.limit]
        video = video[..., None] if video.ndim == 4 else video
        length = self.num_frames or video.shape[1]
        windows = video.shape[1] // length
        cut = video[:, : windows * length].reshape(-1, *video.shape[2:])  # (n * F, H, W, C)
        pictures = shrunk(cut, self.size).unflatten(0, (-1, length))
        states = pictures.movedim(2, 1).contiguous()
        return Samples(states, text=None if text is None else text.repeat_interleave(windows, 0))

    @property
    def processor(self) -> MediaProcessor:
        size = 0 if self.captions is None else self.text_size
        return MediaProcessor(
            "video", frame_rate=self.frame_rate, enlarge=self.enlarge, text_size=size
        )

    @property
    def _captions(self) -> CaptionRecords | None:
        if self.captions is None:
            return None
        return CaptionRecords(self.captions, self.template, self.split, self.text_size)


@dataclass(frozen=True)
class MovingImages(MediaSource):
    """Images that fly straight and bounce off the edges, after Moving MNIST: (1, F, H, W).

    Composed by rule from grey images of bytes, (n, H, W) in an .npz file (Srivastava et al. 2015).

    Args:
        path: the file.
        images, labels: names of its arrays; `labels` None: there are no classes.
        num_clips: how many; each is drawn by its number.
        num_frames: F.
        size: height and width of the video.
        image_size: height and width of what moves, by averaging areas; None: as it is.
        num_objects: how many images a video has, the brighter pixel in front; with more than one
            there are no classes.
        speed: most pixels a frame along each axis.
        enlarge: pixels are written so much larger.
    """

    path: str
    images: str = "image"
    labels: str | None = "label"
    num_clips: int = 4096
    num_frames: int = 16
    size: int = 32
    image_size: int | None = 14
    num_objects: int = 1
    speed: float = 3.0
    enlarge: int = 4

    def check(self) -> None:
        shape = check_pictures(self.path, self.images, GREY_IMAGES)
        for name in ("num_clips", "num_frames", "num_objects"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        check_size(self.image_size, min(shape[1:]))
        largest = self.image_size or max(shape[1:])
        if self.size < largest:
            raise ValueError(f"size must be at least {largest}, an image's, got {self.size}")
        check_labels(self.path, self.labels, shape[0])
        check_speed(self.speed, self.size)
        check_room(self.num_clips, self.num_frames, self.size, self.size, self.num_objects)

    def samples(self) -> Samples:
        stills = read_array(self.path, self.images)
        noise = np.random.default_rng(0)
        chosen = noise.integers(len(stills), size=(self.num_objects, self.num_clips))
        layers = []
        for numbers in chosen:
            images = shrunk(stills[numbers][..., None], self.image_size)[:, 0]
            room = self.size - max(images.shape[1:])
            corners = bounced_corners(noise, self.num_clips, self.num_frames, room, self.speed)
            layers.append(composed(images, corners, self.size, -1.0))
        video = torch.stack(layers).amax(0)[:, None]
        if not self._has_classes:
            return Samples(video)
        labels = read_array(self.path, str(self.labels))[chosen[0]]
        return Samples(video, torch.from_numpy(labels.astype(np.int64)))

    @property
    def processor(self) -> MediaProcessor:
        names = class_names(read_array(self.path, str(self.labels))) if self._has_classes else ()
        return MediaProcessor("video", frame_rate=8, enlarge=self.enlarge, classes=names)

    @property
    def _has_classes(self) -> bool:
        return self.labels is not None and self.num_objects == 1


@dataclass(frozen=True)
class CaptionedImages(MediaSource):
    """Images of bytes in an .npz file with a text for each in a file of records: (C, H, W).

    Args:
        path: the images, (n, H, W) or (n, H, W, C).
        captions: the records (.jsonl, .jsonl.gz or .parquet), as many and in the same order.
        images: name of the array.
        template: how a record becomes the text, such as "{caption}".
        split: only records whose field `split` is this; None: all.
        size: height and width of a sample, by averaging areas; None: as they are.
        text_size: width of the vector that a text becomes.
        enlarge: pixels are written so much larger.
    """

    path: str
    captions: str
    images: str = "image"
    template: str = "{caption}"
    split: str | None = None
    size: int | None = None
    text_size: int = 256
    enlarge: int = 4

    def check(self) -> None:
        shape = check_pictures(self.path, self.images, IMAGES)
        check_size(self.size, min(shape[1:3]))
        self._captions.check()

    def samples(self) -> Samples:
        images = read_array(self.path, self.images)
        told = self._captions.told(len(images))
        pixels = images[told.rows]
        pixels = pixels if pixels.ndim == 4 else pixels[..., None]
        return Samples(shrunk(pixels, self.size), text=told.text)

    @property
    def processor(self) -> MediaProcessor:
        return MediaProcessor("image", enlarge=self.enlarge, text_size=self.text_size)

    @property
    def _captions(self) -> CaptionRecords:
        return CaptionRecords(self.captions, self.template, self.split, self.text_size)


def check_size(size: int | None, most: int) -> None:
    """Raise ValueError for a size that pictures of `most` pixels cannot be shrunk to."""
    if size is not None and not 1 <= size <= most:
        raise ValueError(f"the size must be in 1..{most}, that of the pictures, got {size}")


def shrunk(pictures: np.ndarray, size: int | None) -> Tensor:
    """Return pictures of bytes (n, H, W, C) as (n, C, size, size) in -1..1, by averaging areas."""
    parts = []
    for first in range(0, len(pictures), AT_ONCE):
        part = torch.from_numpy(pictures[first : first + AT_ONCE].astype(np.float32))
        part = part.movedim(-1, 1)
        parts.append(part if size is None else interpolate(part, (size, size), mode="area"))
    return torch.cat(parts) / 127.5 - 1
