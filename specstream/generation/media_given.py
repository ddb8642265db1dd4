"""What is given of the samples that are asked for: a prompt, parts of a medium, a first frame.

A state may be smaller than its medium: the latents of an autoencoder stand for blocks of pixels, of
which the first frame of a video stands alone.  A block is given only where all of it is.

Shapes: B samples, S the shape of a state, A its axes; media as in `media_reader`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from specstream.generation.media_loading import MediaRun
from specstream.media_reader import read_mask, read_picture, read_sound, read_video
from specstream.models.codec import Compression
from specstream.models.diffusers_network import BESIDE, FIRST_FRAME
from specstream.models.shown_media import shown
from specstream.structures import KnownParts


@dataclass(frozen=True, slots=True)
class GivenFiles:
    """Files of what is given: a medium and its mask, or the first frame of a video."""

    image: str | None = None
    mask: str | None = None
    first_frame: str | None = None

    def __post_init__(self) -> None:
        if self.mask is not None and self.image is None:
            raise ValueError("media.mask says what of media.image is to be made: give both")
        if self.image is not None and self.mask is None:
            raise ValueError("media.image needs media.mask, white where something is to be made")
        if self.image is not None and self.first_frame is not None:
            raise ValueError("give media.image with media.mask, or media.first_frame; not both")


@dataclass(frozen=True, slots=True)
class Asked:
    """What samples are asked for."""

    condition: dict[str, Tensor]  # what the network is told, (B, ...) by name
    known: KnownParts | None  # what each sample is to hold


def asked_for(run: MediaRun, prompt: str, files: GivenFiles, num_samples: int) -> Asked:
    """Return what a prompt and files ask for, the same of each sample.

    Raises ValueError in one line for a prompt or files that the model can do nothing with.
    """
    known: KnownParts | None = None
    seen: dict[str, Tensor] = {}
    wanted = None if run.told is None else run.told.network.wants
    if files.first_frame is not None:
        known, seen = begun(run, files.first_frame)
    elif wanted == "first_frame":
        refuse("first_frame", "this model goes on from a picture: give one")
    elif files.image is not None:
        assert files.mask is not None
        if wanted == "image":
            seen = with_hole(run, files.image, files.mask)
        else:
            known = known_parts(run, files.image, files.mask)
    elif wanted == "image":
        refuse("image", "this model fills a hole in a picture: give one, and media.mask")
    condition = run.condition(prompt, num_samples)
    condition |= {name: value.expand(num_samples, *value.shape[1:]) for name, value in seen.items()}
    if known is not None:
        data, given = (x.expand(num_samples, *x.shape[1:]) for x in (known.data, known.given))
        known = KnownParts(data, given)
    return Asked(condition, known)


def begun(run: MediaRun, path: str) -> tuple[KnownParts | None, dict[str, Tensor]]:
    """Return what a first frame gives of a video, as one row, and what the network is shown of it.

    A network that needs to be shown it makes its own first frame after it.
    """
    picture = first_picture(run, path)
    if run.told is not None and BESIDE in run.told.network.needs:
        channels, *sizes = run.media_shape
        media, made = torch.zeros(1, channels, *sizes), torch.ones(1, 1, *sizes, dtype=torch.bool)
        media[0, :, :1], made[:, :, 0] = picture, False
        return None, shown(run.told, media, made)
    states = run.encode(picture[None])
    held = in_place(run, states, torch.ones_like(states[:, :1], dtype=torch.bool))
    if run.told is None:
        return held, {}
    network = run.told.network
    seen = {FIRST_FRAME: run.told.first_frame(states)}
    if FIRST_FRAME in network.needs:
        return None, seen
    return held, seen if FIRST_FRAME in network.may_see else {}


def with_hole(run: MediaRun, path: str, mask: str) -> dict[str, Tensor]:
    """Return what a network that fills holes is shown of a picture and its mask, as one row.

    It makes what is around the hole again, much as it was.
    """
    assert run.told is not None
    media, made = medium(run, path), picture_mask(run, mask)
    check_mask(path, mask, ~made)
    return shown(run.told, media[None], made[None])


def known_parts(run: MediaRun, path: str, mask: str) -> KnownParts:
    """Return what a medium gives where its mask is black, as one row."""
    if run.processor.kind == "audio":
        media, made = sound(run, path), sound_mask(run, mask)
    else:
        media, made = medium(run, path), picture_mask(run, mask)
    given = ~any_in_blocks(made, run.compression)
    check_mask(path, mask, given)
    return in_place(run, run.encode(media[None]), given[None])


def check_mask(path: str, mask: str, given: Tensor) -> None:
    """Raise ValueError where nothing or all of a medium is given, (1, ...)."""
    if not given.any():
        refuse("mask", f"all of '{mask}' is white: nothing of '{path}' would be kept")
    if given.all():
        refuse("mask", f"nothing of '{mask}' is white, so there is nothing to make")


def first_picture(run: MediaRun, path: str) -> Tensor:
    """Return the picture (C, 1, H, W) that a video is to begin with."""
    if run.processor.kind != "video":
        refuse("first_frame", f"is for videos, and this model makes {run.processor.suffix} files")
    if run.media_shape[1] == 1:
        refuse("first_frame", "videos of one frame are asked for, so there is nothing to make")
    picture = read_picture(path, run.media_shape[0])
    return fitted(run, "first_frame", path, picture[:, None])


def in_place(run: MediaRun, states: Tensor, given: Tensor) -> KnownParts:
    """Return the first frames of a state, or all of it, in the place that they have there."""
    shape = run.pipeline.target.shape
    if len(shape) != 4:
        return KnownParts(states, given)
    frames = slice(run.padding, run.padding + states.shape[2])
    data, where = torch.zeros(1, *shape), torch.zeros(1, 1, *shape[1:], dtype=torch.bool)
    data[:, :, frames], where[:, :, frames] = states, given
    return KnownParts(data, where)


def medium(run: MediaRun, path: str) -> Tensor:
    """Return the picture (C, H, W) or the video (C, F, H, W) of a file."""
    channels, *frames, _, _ = run.media_shape
    if frames:
        return fitted(run, "image", path, read_video(path, channels), frames[0])
    return fitted(run, "image", path, read_picture(path, channels)[:, None])[:, 0]


def picture_mask(run: MediaRun, path: str) -> Tensor:
    """Return what of pictures or videos is to be made, (1, *A): a picture is of all frames.

    Of a pixel that is written as several all must be black to be given.
    """
    frames, made = run.media_shape[1:-2], read_mask(path).float()
    if not frames:
        return fitted(run, "mask", path, made)[:, 0] > 0
    count = frames[0] if made.shape[1] > 1 else 1
    made = fitted(run, "mask", path, made, count)
    return made.expand(1, frames[0], *made.shape[2:]) > 0


def fitted(run: MediaRun, name: str, path: str, media: Tensor, num_frames: int = 1) -> Tensor:
    """Return frames (C, F, H, W) in the pixels of the model; ValueError for another size.

    A file may also be as large as the processor writes it.
    """
    processor, (height, width) = run.processor, run.media_shape[-2:]
    if media.shape[1] != num_frames:
        refuse(name, f"'{path}' has {media.shape[1]} frames, and {num_frames} are wanted here")
    own, found = (height, width), tuple(media.shape[2:])
    if found == own:
        return media
    if found != processor.written_size(*own):
        written = "" if processor.enlarge == 1 else ", or that " + str(processor.enlarge) + " times"
        refuse(
            name,
            f"'{path}' has height {found[0]} and width {found[1]}, and this model makes height "
            f"{height} and width {width}{written}",
        )
    times = processor.enlarge
    cut = media[:, :, : height * times, : width * times]
    return cut.unflatten(3, (width, times)).unflatten(2, (height, times)).mean((3, 5))


def sound(run: MediaRun, path: str) -> Tensor:
    """Return the wave (C, T) of a file or its spectrogram (1, M, T)."""
    if run.told is not None:
        refuse("image", "parts of a sound are given to small models only, not to this target")
    processor, found = run.processor, read_sound(path)
    mel = processor.spectrogram
    channels, length = (1, mel.length) if mel is not None else run.media_shape
    facts = (("channels", found.wave.shape[0], channels), ("numbers", found.wave.shape[1], length))
    for what, number, wanted in (("Hz", found.sample_rate, processor.sample_rate), *facts):
        if number != wanted:
            refuse("image", f"'{path}' has {number} {what}, and this model makes {wanted}")
    return found.wave if mel is None else mel.states(found.wave, found.sample_rate)[0]


def sound_mask(run: MediaRun, path: str) -> Tensor:
    """Return what of a sound is to be made, (1, *A): the columns of a picture with white in them.

    Each column stands for as much of the time.
    """
    made = read_mask(path)
    if made.shape[1] > 1:
        refuse("mask", f"'{path}' is a video, and the mask of a sound is a picture")
    columns = made[0, 0].any(0)
    *bands, length = run.media_shape[1:]
    if length % len(columns):
        refuse("mask", f"'{path}' has width {len(columns)}, which does not divide {length}")
    return columns.repeat_interleave(length // len(columns)).expand(1, *bands, length)


def any_in_blocks(made: Tensor, place: Compression) -> Tensor:
    """Return of which places of a state anything is to be made, (1, *A), of its media (1, ...)."""
    if made.dim() == 2:
        return made
    height, width = (side // place.space for side in made.shape[-2:])
    cut = made.unflatten(-1, (width, place.space)).unflatten(-3, (height, place.space))
    blocks = cut.any(-1).any(-2)
    if made.dim() == 3:
        return blocks
    first, rest = blocks[:, :1], blocks[:, 1:]
    return torch.cat([first, rest.unflatten(1, (-1, place.time)).any(2)], 1)


def refuse(name: str, reason: str) -> NoReturn:
    """Raise the one line for a file that is given."""
    raise ValueError(f"media.{name}: {reason}")
