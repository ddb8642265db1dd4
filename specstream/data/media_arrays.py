"""Arrays of an .npz file that someone else has made: what media are read from, or one line.

Shapes: n samples, F frames, H height, W width, C colours.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np

from specstream.files import one_line

COLOURS = (1, 3)
MOST_CLASSES = 100_000  # as many as a network may tell apart
FLOAT32_BYTES = 4


def read_array(path: str, name: str) -> np.ndarray:
    """Return an array of an .npz file; ValueError in one line for what is none."""
    with one_line(f"'{path}' is no .npz file that can be read"):
        arrays = np.load(path, allow_pickle=False)
        if isinstance(arrays, np.ndarray):
            raise ValueError("it holds one array without a name")
        with arrays:
            if name in arrays.files:
                return np.asarray(arrays[name])
            raise ValueError(f"it has no array '{name}', but {', '.join(arrays.files)}")


def check_pictures(path: str, name: str, forms: Mapping[int, str]) -> tuple[int, ...]:
    """Return the shape of an array of pictures or videos, which are bytes.

    forms: what the array is called, by the number of its axes; where there are two, the larger has
    colours at the end.  Raises ValueError for what would be read as something else, or not at all.
    """
    found = read_array(path, name)
    what, shape = forms[max(forms)], list(found.shape)
    if found.ndim not in forms:
        raise ValueError(f"'{path}': {what}, not {shape}")
    if found.dtype != np.uint8:
        raise ValueError(f"'{path}': '{name}' must be bytes (uint8), not {found.dtype}")
    if not found.size:
        raise ValueError(f"'{path}': '{name}' holds nothing: {shape}")
    if len(forms) > 1 and found.ndim == max(forms) and shape[-1] not in COLOURS:
        raise ValueError(
            f"'{path}': '{name}' has {shape[-1]} colours, the last of its sizes, and they must be "
            "1 or 3"
        )
    return found.shape


def check_labels(path: str, name: str | None, number: int) -> None:
    """Raise ValueError for classes that are not a number for each sample; None: there are none."""
    if name is None:
        return
    found = read_array(path, name)
    if found.dtype.kind not in "iu" or found.shape != (number,):
        raise ValueError(
            f"'{path}': '{name}' must be {number} whole numbers, one for each sample, not "
            f"{found.dtype} {list(found.shape)}"
        )
    least, most = int(found.min()), int(found.max())
    if least < 0 or most >= MOST_CLASSES:
        raise ValueError(
            f"'{path}': '{name}' must be in 0..{MOST_CLASSES - 1}, and goes from {least} to {most}"
        )


def class_names(labels: np.ndarray) -> tuple[str, ...]:
    """Return the names of classes that are numbered, from 0 to the last that occurs."""
    return tuple(str(number) for number in range(int(labels.max()) + 1))


def check_room(*sizes: int) -> None:
    """Raise ValueError for float32 media of these sizes that do not fit into this machine."""
    taken = FLOAT32_BYTES * float(np.prod([float(size) for size in sizes]))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if taken > memory:
        raise ValueError(
            f"{sizes[0]} samples of {list(sizes[1:])} would take {taken:.3g} bytes of memory, more "
            f"than this machine has"
        )


def check_speed(speed: float, size: int) -> None:
    """Raise ValueError for what flies backwards, or farther in a frame than the frame is wide."""
    if not 0 <= speed <= size:
        raise ValueError(f"speed must be in 0..{size}, got {speed:g}")
