"""From the size of a picture, a video or a sound to the shape of its state, or to the nearest one.

Nothing is rounded: a size that a model cannot make is refused, and the next ones are named.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from specstream.models.codec import Compression
from specstream.models.diffusers_network import StateForm


@dataclass(frozen=True)
class MediaSize:
    """What is to be made; None: what the network was trained to make, where its config says so."""

    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    seconds: float | None = None


def shape_of_size(shapes: Sequence[tuple[int, ...]], size: MediaSize) -> tuple[int, ...]:
    """Return the first shape, (C, H, W) or (C, F, H, W), that has a size.

    Raises ValueError where there is none, and names the sizes that there are.
    """
    given = {name: value for name, value in vars(size).items() if value is not None}
    names = ("num_frames", "height", "width")
    for shape in shapes:
        sides = dict(zip(names[-len(shape) + 1 :], shape[1:], strict=True))
        if all(sides.get(name) == value for name, value in given.items()):
            return shape
    axes = names[-len(shapes[0]) + 1 :]
    made = [" ".join(f"{n} {side}" for n, side in zip(axes, s[1:], strict=True)) for s in shapes]
    asked = " ".join(f"{name} {value}" for name, value in given.items())
    raise ValueError(f"this model was trained to make {', or '.join(made)}, not {asked}")


def state_shape(form: StateForm, compression: Compression, size: MediaSize) -> tuple[int, ...]:
    """Return the shape of a state, (C, H, W), (C, F, H, W) or (C, L), in latents.

    Raises ValueError for a size that the autoencoder or the network's patches do not divide.
    """
    if len(form.patch) == 1:
        return (form.channels, *sound_shape(form, compression, size))
    if size.seconds is not None:
        raise ValueError("seconds are for sounds; a video's length is its num_frames")
    sides = side_lengths(form, compression, size)
    if len(form.patch) == 2:
        if size.num_frames is not None:
            raise ValueError("this model makes pictures, which have no num_frames")
        return check_fixed(form, (form.channels, *sides))
    frames = frame_count(form, compression, size.num_frames)
    return check_fixed(form, (form.channels, frames, *sides))


def side_lengths(form: StateForm, compression: Compression, size: MediaSize) -> tuple[int, int]:
    """Return height and width in latents."""
    trained: Sequence[int | None] = form.size[-2:] if form.size else (None, None)
    sides = []
    for name, given, usual, patch in zip(
        ("height", "width"), (size.height, size.width), trained, form.patch[-2:], strict=True
    ):
        if given is None and usual is None:
            raise ValueError("this model does not say its usual size: give height and width")
        pixels = given if given is not None else (usual or 0) * compression.space
        unit = compression.space * patch
        if pixels < unit or pixels % unit:
            raise ValueError(
                f"{name} {pixels} is not a multiple of {unit}, as this model wants; "
                f"{nearest(pixels, unit)} would do"
            )
        sides.append(pixels // compression.space)
    if form.square and sides[0] != sides[1]:
        raise ValueError(
            f"this model makes square pictures, not {sides[0] * compression.space} x "
            f"{sides[1] * compression.space}"
        )
    return sides[0], sides[1]


def frame_count(form: StateForm, compression: Compression, num_frames: int | None) -> int:
    """Return the frames of a state: the first stands for one, each other for `time` of them.

    Where the autoencoder wants an odd number and the network's patches an even one, there is one
    more, which is dropped before decoding (CogVideoX 1.5).
    """
    time, patch = compression.time, form.patch[0]
    if num_frames is None:
        if form.size is None:
            raise ValueError("this model does not say its usual length: give num_frames")
        num_frames = (form.size[0] - 1) * time + 1
    unit, first = time * patch, time * (patch - 1) + 1  # first, first + unit, ... are legal
    if compression.odd:
        unit, first = 2 * time, 1
    if num_frames < first or (num_frames - first) % unit:
        below = max(num_frames - first, 0) // unit * unit + first
        counts = f"{below} or {below + unit}" if num_frames > first else str(first)
        raise ValueError(
            f"this model makes {unit} k + {first} frames, not {num_frames}; {counts} would do"
        )
    return math.ceil(((num_frames - 1) // time + 1) / patch) * patch


def sound_shape(form: StateForm, compression: Compression, size: MediaSize) -> tuple[int]:
    """Return the length of a sound's state, always the network's own."""
    given = {"height": size.height, "width": size.width, "num_frames": size.num_frames}
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"this model makes sounds, which have no {name}; give seconds")
    assert form.size is not None and form.fixed
    if compression.sample_rate and size.seconds is not None:
        longest = form.size[0] * compression.samples / compression.sample_rate
        if not 0 < size.seconds <= longest:
            raise ValueError(f"seconds must be in (0, {longest:.2f}], got {size.seconds}")
    return (form.size[0],)


def check_fixed(form: StateForm, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return `shape`; ValueError where the network takes its own size only."""
    if form.fixed and shape[1:] != form.size:
        raise ValueError(
            f"this network takes states of {list(form.size or ())} only, not {list(shape[1:])}"
        )
    return shape


def nearest(value: int, unit: int) -> str:
    """Return the multiples of `unit` around a value, as text."""
    below = value // unit * unit
    return f"{below} or {below + unit}" if below else str(unit)
