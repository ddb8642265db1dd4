"""Arrays of media that are not what a source reads: one line that names the file, before a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specstream.data import (
    CaptionedImages,
    ImageArrays,
    MediaSource,
    MovingDigits,
    MovingImages,
    Spectrograms,
    VideoArrays,
)

BYTES = np.arange(6 * 8 * 8, dtype=np.uint64).reshape(6, 8, 8).astype(np.uint8)
LABELS = np.array([0, 1, 2, 0, 1, 2])


def images(path: str, **options: Any) -> MediaSource:
    return ImageArrays(path, **options)


def moving(path: str, **options: Any) -> MediaSource:
    return MovingImages(path, "images", "labels", image_size=None, **options)


def captioned(path: str, **options: Any) -> MediaSource:
    return CaptionedImages(path, "none.jsonl", "images", **options)


def videos(path: str, **options: Any) -> MediaSource:
    return VideoArrays(path, video="images", **options)


def lines_of(path: Path, make: Callable[..., MediaSource], **arrays: Any) -> str:
    """Write arrays beside good ones, and return the one line that their source is refused by."""
    file = path / "arrays.npz"
    np.savez(file, **({"images": BYTES, "labels": LABELS} | arrays))
    with pytest.raises(ValueError) as refusal:
        make(str(file)).check()
    line = str(refusal.value)
    assert str(file) in line and "\n" not in line
    return line


@pytest.mark.parametrize("make", [images, moving, captioned, videos])
@pytest.mark.parametrize(
    "pixels",
    [
        BYTES.astype(np.float32) / 255,
        np.where(BYTES > 9, np.nan, 1.0),
        BYTES.astype(np.uint16) * 256,
        BYTES > 3,
        BYTES.astype(np.complex64),
        np.full((6, 8, 8), "a"),
    ],
    ids=["shares", "nan", "16 bits", "bool", "complex", "text"],
)
def test_pixels_that_are_no_bytes_are_refused(
    pixels: np.ndarray, make: Callable[..., MediaSource], tmp_path: Path
) -> None:
    pixels = pixels[..., None] if make is videos else pixels
    line = lines_of(tmp_path, make, images=pixels)
    assert f"'images' must be bytes (uint8), not {pixels.dtype}" in line


@pytest.mark.parametrize("make", [images, moving, captioned, videos])
def test_arrays_without_a_pixel_are_refused(
    make: Callable[..., MediaSource], tmp_path: Path
) -> None:
    for none in (BYTES[:0], BYTES[:, :, :0]):
        none = none[..., None] if make is videos else none
        assert f"'images' holds nothing: {list(none.shape)}" in lines_of(
            tmp_path, make, images=none
        )


@pytest.mark.parametrize("pixels", [np.uint8(3), BYTES[0], BYTES[:, None, :, :, None]])
def test_arrays_of_another_number_of_axes_are_refused(pixels: Any, tmp_path: Path) -> None:
    line = lines_of(tmp_path, images, images=pixels)
    assert f"images are (n, H, W, C), not {list(np.shape(pixels))}" in line


@pytest.mark.parametrize("colours", [2, 4, 8])
def test_colours_are_1_or_3(colours: int, tmp_path: Path) -> None:
    pixels = np.stack([BYTES] * colours, -1)
    wanted = f"'images' has {colours} colours, the last of its sizes, and they must be 1 or 3"
    assert wanted in lines_of(tmp_path, images, images=pixels)
    assert wanted in lines_of(tmp_path, captioned, images=pixels)
    assert wanted in lines_of(tmp_path, videos, images=pixels[:, None])


WRONG_LABELS = [
    (LABELS[:5], "'labels' must be 6 whole numbers, one for each sample, not int64 [5]"),
    (np.arange(9), "one for each sample, not int64 [9]"),
    (np.stack([LABELS] * 2, 1), "one for each sample, not int64 [6, 2]"),
    (LABELS + 0.5, "one for each sample, not float64 [6]"),
    (LABELS * np.nan, "one for each sample, not float64 [6]"),
    (LABELS.astype(str), "one for each sample, not <U21 [6]"),
    (LABELS - 1, "'labels' must be in 0..99999, and goes from -1 to 1"),
    (LABELS * 10**12, "'labels' must be in 0..99999, and goes from 0 to 2000000000000"),
]


@pytest.mark.parametrize("make", [images, moving])
@pytest.mark.parametrize(("labels", "what"), WRONG_LABELS)
def test_labels_that_are_no_classes_are_refused(
    labels: np.ndarray, what: str, make: Callable[..., MediaSource], tmp_path: Path
) -> None:
    assert what in lines_of(tmp_path, make, labels=labels)


def spoken(path: str) -> MediaSource:
    return Spectrograms(path)


RECORDED = {
    "audio": np.arange(4000, dtype=np.int16),
    "offsets": np.array([0, 1500, 4000]),
    "digit": np.array([4, 2]),
    "sample_rate": np.int32(8000),
}
WRONG_SOUNDS: list[tuple[dict[str, Any], str]] = [
    ({"audio": RECORDED["audio"] / 9000}, "'audio' must be numbers of 16 bits (int16) end to end"),
    ({"audio": np.zeros((2, 2000), np.int16)}, "end to end, not int16 [2, 2000]"),
    ({"offsets": np.array([0, 1500, 5000])}, "'offsets' must rise from 0 or more to at most 4000"),
    ({"offsets": np.array([-9, 1500, 4000])}, "'offsets' must rise from 0 or more to at most 4000"),
    ({"offsets": np.array([0, 3000, 1500])}, "'offsets' must rise from 0 or more to at most 4000"),
    ({"offsets": np.array([0.0, 1.5, 9.0])}, "'offsets' must be two whole numbers or more"),
    ({"offsets": np.array([0])}, "'offsets' must be two whole numbers or more"),
    ({"digit": np.array([1, 2, 3])}, "'digit' must be 2 whole numbers"),
    ({"sample_rate": np.array([8000, 8000])}, "'sample_rate' must be one whole number above 0"),
    ({"sample_rate": np.int32(0)}, "'sample_rate' must be one whole number above 0"),
    ({"sample_rate": "8 kHz"}, "'sample_rate' must be one whole number above 0"),
]


@pytest.mark.parametrize(("arrays", "what"), WRONG_SOUNDS)
def test_recordings_that_do_not_lie_end_to_end_are_refused(
    arrays: dict[str, Any], what: str, tmp_path: Path
) -> None:
    assert what in lines_of(tmp_path, spoken, **(RECORDED | arrays))


def test_options_of_sources_that_nothing_can_come_of_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "arrays.npz"
    np.savez(file, images=BYTES, labels=LABELS, **RECORDED)
    path = str(file)
    cases = [
        (ImageArrays(path, limit=-1), "limit must be at least 1"),
        (VideoArrays(path, video="images", limit=0), "limit must be at least 1"),
        (Spectrograms(path, limit=-1), "limit must be at least 1"),
        (ImageArrays(path, padded_size=7), "padded_size must be at least 8, .* got 7"),
        (MovingDigits(speed=float("inf")), "speed must be in 0..16, got inf"),
        (MovingDigits(speed=float("nan")), "speed must be in 0..16, got nan"),
        (MovingDigits(speed=-1.0), "speed must be in 0..16, got -1"),
        (MovingDigits(num_clips=10**12), "would take 8.19e\\+15 bytes of memory"),
        (moving(path, speed=float("nan")), "speed must be in 0..32, got nan"),
        (moving(path, num_clips=10**12), "bytes of memory, more than"),
    ]
    for source, line in cases:
        with pytest.raises(ValueError, match=line):
            source.check()
