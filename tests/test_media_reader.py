"""Files of media: read as they are, or refused in one line; nothing of them is lost unseen."""

import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from specstream.media_reader import read_mask, read_picture, read_sound

COLOURS = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)


def write_pictures() -> None:
    """Write files that hold more than a picture of bytes does."""
    Image.fromarray(np.full((4, 6), 300, np.uint16)).save("deep.png")
    Image.fromarray(np.full((4, 6), np.nan, np.float32)).save("nan.tiff")
    clear = np.concatenate([COLOURS, np.full((4, 6, 1), 255, np.uint8)], 2)
    Image.fromarray(clear, "RGBA").save("solid.png")
    clear[0, 0, 3] = 254
    Image.fromarray(clear, "RGBA").save("clear.png")
    pictures = [Image.fromarray(COLOURS + shade) for shade in (0, 1, 2)]
    for name in ("moving.png", "moving.gif"):
        pictures[0].save(name, save_all=True, append_images=pictures[1:])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("deep.png", "its numbers are of kind I;16; save it with 8 bits a channel"),
        ("nan.tiff", "its numbers are of kind F; save it with 8 bits a channel"),
        ("clear.png", "parts of it are transparent; put it on a background"),
        ("moving.png", "it holds 3 pictures, not one"),
        ("moving.gif", "it holds 3 pictures, not one"),
    ],
)
def test_of_a_picture_nothing_is_lost_unseen(
    name: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_pictures()
    line = re.escape(f"cannot read the picture '{name}': {reason}")
    for channels in (1, 3):
        with pytest.raises(ValueError, match=line):
            read_picture(name, channels)
    if not name.endswith(".gif"):
        with pytest.raises(ValueError, match=line):
            read_mask(name)
    right = torch.from_numpy(COLOURS).movedim(-1, 0) / 127.5 - 1
    assert torch.allclose(read_picture("solid.png", 3), right)


def test_a_photograph_is_read_the_right_way_up(tmp_path: Path) -> None:
    lying = Image.fromarray(COLOURS)
    turned = lying.getexif()
    turned[0x0112] = 6  # a quarter turn to the right is still to be made
    lying.save(tmp_path / "lying.png", exif=turned)
    right = torch.from_numpy(np.rot90(COLOURS, -1).copy()).movedim(-1, 0) / 127.5 - 1
    assert torch.allclose(read_picture(str(tmp_path / "lying.png"), 3), right)


def test_of_a_picture_with_a_preview_behind_it_the_picture_is_read(tmp_path: Path) -> None:
    """As phones write them."""
    picture, preview = Image.fromarray(COLOURS), Image.fromarray(COLOURS[::2, ::2])
    picture.save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=[preview])
    assert read_picture(str(tmp_path / "phone.jpg"), 3).shape == (3, 4, 6)


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (np.nan, "it holds numbers that are not finite"),
        (-np.inf, "it holds numbers that are not finite"),
        (-3.0, "it goes up to 3, and 1 is the loudest"),
    ],
)
def test_a_sound_that_is_no_sound_is_refused(number: float, reason: str, tmp_path: Path) -> None:
    wave, path = np.full(64, 0.5, np.float32), str(tmp_path / "a.wav")
    soundfile.write(path, wave, 8000, "FLOAT")
    assert torch.equal(read_sound(path).wave, torch.from_numpy(wave)[None])
    wave[7] = number
    soundfile.write(path, wave, 8000, "FLOAT")
    with pytest.raises(ValueError, match=re.escape(f"cannot read the sound '{path}': {reason}")):
        read_sound(path)
