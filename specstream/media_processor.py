"""The boundary between states and media: arrays in -1..1 in the program, png, mp4 and wav outside.

Shapes: an image is (C, H, W), a video (C, F, H, W), a sound (C, T) or its spectrogram (1, M, T);
C is 1 or 3, of a sound 1 or 2.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from specstream.files import sound_package, video_package
from specstream.spectrogram import LogMel

if TYPE_CHECKING:
    from numpy.typing import NDArray

FORM = "media.json"
SUFFIXES = {"image": ".png", "video": ".mp4", "audio": ".wav"}
STILLS = 4  # frames that stand for a video in one picture
BOUNDS = {"enlarge": (1, 1000), "frame_rate": (0.01, 1000), "sample_rate": (1, 1_000_000)}
AXES = {"image": ("an image", 2), "video": ("a video", 3), "audio": ("a sound", 1)}


@dataclass(frozen=True)
class MediaProcessor:
    """What a state of a diffusion model is, and how it is written to a file.

    Args:
        kind: "image", "video" or "audio".
        frame_rate: frames a second of a video.
        sample_rate: numbers a second of a sound.
        enlarge: each pixel is written as so many by so many, to be seen.
        classes: names of the classes that a sample may be asked for.
        text_size: width of the vector that a sample's text becomes; 0: there is no text.
        spectrogram: how sounds became spectrograms; None: they are waveforms.
    """

    kind: Literal["image", "video", "audio"]
    frame_rate: float = 8.0
    sample_rate: int = 8000
    enlarge: int = 1
    classes: tuple[str, ...] = ()
    text_size: int = 0
    spectrogram: LogMel | None = None

    def __post_init__(self) -> None:
        if self.kind not in SUFFIXES:
            raise ValueError(f"kind must be one of {', '.join(SUFFIXES)}, got '{self.kind}'")
        for name in ("enlarge", "sample_rate", "text_size"):
            if type(getattr(self, name)) is not int:
                raise ValueError(f"{name} must be a whole number, got {getattr(self, name)!r}")
        for name, (least, most) in BOUNDS.items():
            value = getattr(self, name)
            if not least <= value <= most:
                raise ValueError(f"{name} must be in {least}..{most}, got {value}")
        twice = [name for name in self.classes if self.classes.count(name) > 1]
        if twice:
            raise ValueError(f"two classes are named {twice[0]!r}")
        if self.spectrogram is not None and self.kind != "audio":
            raise ValueError(f"spectrogram is for sounds, and this is a model of {self.kind}s")
        if self.text_size < 0 or (self.text_size and self.classes):
            raise ValueError("text_size is a width, and for media without classes")

    @property
    def suffix(self) -> str:
        return SUFFIXES[self.kind]

    @property
    def is_seen(self) -> bool:
        """Whether samples are pictures, or have some: a waveform has none."""
        return self.kind != "audio" or self.spectrogram is not None

    def check_state(self, shape: Sequence[int]) -> None:
        """Raise ValueError for states of that shape, channels first, that are no such media."""
        what, number = AXES[self.kind]
        number += self.spectrogram is not None
        if len(shape) - 1 != number:
            axes = "axis" if number == 1 else "axes"
            raise ValueError(f"a state {list(shape)} is {what}, which has {number} {axes}")

    def written_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width in which one sample is written."""
        sides = height * self.enlarge, width * self.enlarge
        if self.kind == "video":
            return sides[0] + sides[0] % 2, sides[1] + sides[1] % 2  # yuv420 halves
        return sides

    def check_writer(self) -> None:
        """Raise ValueError where a package that writing needs is missing."""
        if self.kind == "video":
            video_package()
        if self.kind == "audio":
            sound_package()

    def class_number(self, name: str) -> int:
        """Return the number of a class by its name; ValueError names the known ones."""
        if name not in self.classes:
            known = ", ".join(self.classes) or "none"
            raise ValueError(f"'{name}' is no class of this model; it knows {known}")
        return self.classes.index(name)

    def pictures(self, states: Tensor) -> NDArray[np.uint8]:
        """Return states (B, C, ..., H, W) as bytes (B, ..., H, W, C), enlarged."""
        bytes_ = ((states.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        moved = bytes_.movedim(1, -1)
        if self.enlarge > 1:
            moved = moved.repeat_interleave(self.enlarge, -3).repeat_interleave(self.enlarge, -2)
        return moved.cpu().numpy()

    def write(self, states: Tensor, path: Path) -> None:
        """Write samples (B, *S) into one file: pictures and videos side by side, sounds in a row.

        Nothing is left half-written.  Raises ValueError where a program that is needed is missing,
        and OSError where the file cannot be written.
        """
        if self.kind == "audio":
            if self.spectrogram is not None:
                states = self.spectrogram.sound(states, self.sample_rate)
            self._write_sound(torch.cat([*states], -1), path)
            return
        if self.kind == "video":
            self._write_video(tile(self.pictures(states)), path)
            return
        write_sheet(self.pictures(states), path)

    def stills(self, states: Tensor) -> NDArray[np.uint8]:
        """Return one picture (B, H, W, C) of each state: of a video a few frames side by side.

        A spectrogram's low pitches are at the bottom; `is_seen` says whether there are pictures.
        """
        assert self.is_seen
        if self.kind == "audio":
            states = states.flip(-2)
        if self.kind == "video":
            number = states.shape[2]
            shown = torch.linspace(0, number - 1, min(number, STILLS)).round().long()
            states = torch.cat(states[:, :, shown].unbind(2), -1)
        return self.pictures(states)

    def _write_video(self, frames: NDArray[np.uint8], path: Path) -> None:
        ffmpeg = video_package()
        if frames.shape[-1] == 1:
            frames = frames.repeat(3, -1)
        height, width = frames.shape[1:3]
        frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))  # yuv420 halves
        with whole_file(path) as new:
            writer = ffmpeg.write_frames(
                str(new),
                (frames.shape[2], frames.shape[1]),
                fps=self.frame_rate,
                quality=8,
                macro_block_size=2,
            )
            writer.send(None)
            for frame in frames:
                writer.send(np.ascontiguousarray(frame))
            writer.close()

    def _write_sound(self, wave: Tensor, path: Path) -> None:
        with whole_file(path) as new:
            channels = wave.clamp(-1, 1).cpu().numpy().T  # (T, C)
            sound_package().write(new, channels, self.sample_rate, "PCM_16")

    def save(self, folder: Path) -> None:
        """Write the record that `load_media_processor` reads."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FORM).write_text(json.dumps(asdict(self), indent=2) + "\n")


def load_media_processor(folder: str | Path) -> MediaProcessor:
    """Read what `MediaProcessor.save` wrote; ValueError in one line for what is none."""
    path = Path(folder) / FORM
    try:
        found = json.loads(path.read_text())
        names = found["classes"]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"classes must be a list of texts, got {names!r}")
        found["classes"] = tuple(names)
        if found.get("spectrogram") is not None:
            found["spectrogram"] = LogMel(**found["spectrogram"])
        return MediaProcessor(**found)
    except FileNotFoundError as error:
        raise ValueError(f"'{folder}' holds no media model: it has no {FORM}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"'{path}' is damaged: {error}") from error


def tile(pictures: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return pictures (B, ..., H, W, C) side by side, in rows of about as many as there are rows.

    A lighter line of one pixel parts them.
    """
    number = len(pictures)
    columns = int(np.ceil(np.sqrt(number)))
    rows = -(-number // columns)
    *_, height, width, channels = pictures.shape
    between = (height + 1, width + 1)
    shape = (*pictures.shape[1:-3], rows * between[0] - 1, columns * between[1] - 1, channels)
    sheet = np.full(shape, 64, np.uint8)
    if number == 1:
        return pictures[0]
    for index, picture in enumerate(pictures):
        top, left = index // columns * between[0], index % columns * between[1]
        sheet[..., top : top + height, left : left + width, :] = picture
    return sheet


def write_sheet(pictures: NDArray[np.uint8], path: Path) -> None:
    """Write pictures (B, H, W, C) side by side into one file, or nothing."""
    from PIL import Image

    sheet = tile(pictures)
    with whole_file(path) as new:
        Image.fromarray(sheet[..., 0] if sheet.shape[-1] == 1 else sheet).save(new)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a path beside `path` to write to, which takes its place once all is written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        yield new
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)
