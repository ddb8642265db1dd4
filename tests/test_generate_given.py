"""generate.py with parts of a medium, or the first frame of a video, given as files."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from torch import Tensor

from specstream.cli import generate
from specstream.generation.media_given import GivenFiles, any_in_blocks, asked_for
from specstream.generation.media_loading import MediaRun, load_media_run
from specstream.media_processor import MediaProcessor
from specstream.media_reader import read_picture, read_video
from specstream.models import Denoiser, FlowSchedule, PatchTransformer
from specstream.models.codec import Compression
from specstream.spectrogram import LogMel


def saved(
    folder: Path, kind: str, shape: tuple[int, ...], patch: tuple[int, ...], **options: object
) -> Path:
    torch.manual_seed(0)
    network = PatchTransformer(shape[0], shape[0], patch, 16, 1, 2)
    torch.nn.init.normal_(network.write.weight, std=0.2)
    Denoiser(network, FlowSchedule(), shape).save(folder / "model")
    MediaProcessor(kind, **options).save(folder / "model")  # type: ignore[arg-type]
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return saved(tmp_path / "images", "image", (3, 4, 6), (2, 2), enlarge=2)


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    return saved(tmp_path / "videos", "video", (1, 3, 8, 8), (1, 2, 2), enlarge=4, frame_rate=5)


def picture(path: Path, height: int, width: int, channels: int = 3) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)
    Image.fromarray(pixels.squeeze()).save(path)
    return path


def mask(path: Path, height: int, width: int, white_from: int) -> Path:
    pixels = np.zeros((height, width), np.uint8)
    pixels[:, white_from:] = 255
    Image.fromarray(pixels).save(path)
    return path


def run_of(folder: Path) -> MediaRun:
    return load_media_run(folder, device="cpu")


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--media.free_draft", "estimate"],
        ["--media.sampler", "by-error"],
        ["--media.draft_steps", "2"],
    ],
)
def test_the_black_part_of_a_picture_is_kept_to_the_last_byte(
    flags: list[str], images: Path, tmp_path: Path
) -> None:
    image = picture(tmp_path / "in.png", 4, 6)
    output, hole = tmp_path / "out.png", mask(tmp_path / "mask.png", 4, 6, 3)
    given = ["--run", str(images), "--prompt", "", "--output", str(output), "--media.steps", "5"]
    assert generate([*given, "--media.image", str(image), "--media.mask", str(hole), *flags]) == 0
    before, after = (np.asarray(Image.open(path)).astype(int) for path in (image, output))
    small = after[::2, ::2]
    assert (small[:, :3] == before[:, :3]).all()
    assert (small[:, 3:] != before[:, 3:]).mean() > 0.5
    again = ["--run", str(images), "--prompt", "", "--output", str(tmp_path / "again.png")]
    again += ["--media.image", str(output), "--media.mask", str(hole), "--media.steps", "5"]
    assert generate([*again, "--media.samples", "2"]) == 0  # as large as it was written


def test_a_video_goes_on_from_its_first_frame(videos: Path, tmp_path: Path) -> None:
    first, output = picture(tmp_path / "first.png", 8, 8, 1), tmp_path / "out.mp4"
    given = ["--run", str(videos), "--prompt", "", "--output", str(output), "--media.steps", "4"]
    assert generate([*given, "--media.first_frame", str(first), "--media.samples", "1"]) == 0
    assert read_video(str(output), 1).shape == (1, 3, 32, 32)
    asked = asked_for(run_of(videos), "", GivenFiles(first_frame=str(first)), 2)
    assert asked.known is not None
    assert asked.known.given.flatten(2).all(2).tolist() == [[False]] * 2
    assert asked.known.given[:, 0].flatten(2).float().mean(2).tolist() == [[1, 0, 0]] * 2
    assert torch.equal(asked.known.data[1, :, 0], read_picture(str(first), 1))


def test_a_video_is_kept_where_a_mask_of_one_or_of_all_frames_is_black(
    videos: Path, tmp_path: Path
) -> None:
    clip, run = tmp_path / "clip.mp4", run_of(videos)
    frames = torch.linspace(-1, 1, 3).view(1, 1, 3, 1, 1).expand(1, 1, 3, 8, 8)
    run.processor.write(frames, clip)
    hole = mask(tmp_path / "mask.png", 8, 8, 6)
    asked = asked_for(run, "", GivenFiles(str(clip), str(hole)), 1)
    assert asked.known is not None
    assert asked.known.given[0, 0, :, :, :6].all() and not asked.known.given[..., 6:].any()
    assert torch.allclose(asked.known.data, frames, atol=0.05)  # mp4 is lossy
    asked = asked_for(run, "", GivenFiles(str(clip), str(clip)), 1)  # dark frames are kept
    assert asked.known is not None
    assert asked.known.given[0, 0].flatten(1).float().mean(1)[[0, 2]].tolist() == [1, 0]


@pytest.mark.parametrize("mel", [None, LogMel(num_bands=8, num_frames=8, window=256, hop=128)])
def test_a_stretch_of_a_sound_is_made_anew(mel: LogMel | None, tmp_path: Path) -> None:
    shape, patch = ((1, 64), (8,)) if mel is None else ((1, 8, 8), (2, 2))
    run = run_of(saved(tmp_path / "sounds", "audio", shape, patch, spectrogram=mel))
    wave = 0.5 * torch.sin(torch.arange(64 if mel is None else mel.length) / 3)
    soundfile.write(tmp_path / "a.wav", wave.numpy(), 8000)
    hole = mask(tmp_path / "mask.png", 1, 4, 2)
    asked = asked_for(run, "", GivenFiles(str(tmp_path / "a.wav"), str(hole)), 1)
    assert asked.known is not None
    assert asked.known.given[0, 0].float().mean(-1).flatten().unique().tolist() == [0.5]
    assert asked.known.given[..., 0].all() and not asked.known.given[..., -1].any()
    samples = run.pipeline.complete(1, seed=0, known=asked.known)
    kept = samples[asked.known.given.expand_as(samples)]
    assert torch.equal(kept, asked.known.data[asked.known.given.expand_as(samples)])


def test_a_block_is_to_be_made_where_any_of_its_pixels_is() -> None:
    made = torch.zeros(1, 5, 4, 4, dtype=torch.bool)
    made[0, 0, 0, 0] = made[0, 3, 3, 3] = True
    blocks = any_in_blocks(made, Compression(space=2, time=4))
    right: Tensor = torch.zeros(1, 2, 2, 2, dtype=torch.bool)
    right[0, 0, 0, 0] = right[0, 1, 1, 1] = True
    assert torch.equal(blocks, right)
    assert torch.equal(any_in_blocks(made, Compression()), made)


def test_a_pixel_is_given_only_where_all_that_it_is_written_as_is_black(
    images: Path, tmp_path: Path
) -> None:
    hole = np.zeros((8, 12), np.uint8)  # twice the model's size
    hole[:, 6:] = hole[5, 2] = 255
    Image.fromarray(hole).save(tmp_path / "mask.png")
    files = GivenFiles(str(picture(tmp_path / "in.png", 4, 6)), str(tmp_path / "mask.png"))
    asked = asked_for(run_of(images), "", files, 1)
    right = (torch.arange(6) < 3).expand(4, 6).clone()
    right[2, 1] = False
    assert asked.known is not None and torch.equal(asked.known.given[0, 0], right)


MISTAKES = [
    ("images", "--media.mask m.png", "media.mask says what of media.image is to be made: give bo"),
    ("images", "--media.image i.png", "media.image needs media.mask, white where something is"),
    ("images", "--media.image no.png --media.mask m.png", "media.image: there is no file 'no.png'"),
    (
        "images",
        "--media.image i.png --media.mask small.png",
        "media.mask: 'small.png' has height 2",
    ),
    (
        "images",
        "--media.image small.png --media.mask m.png",
        "height 4 and width 6, or that 2 time",
    ),
    ("images", "--media.image bad.png --media.mask m.png", "cannot read the picture 'bad.png': "),
    ("images", "--media.image i.png --media.mask bad.png", "cannot read the picture 'bad.png': "),
    ("images", "--media.image deep.png --media.mask m.png", "its numbers are of kind I;16; save"),
    ("images", "--media.image i.png --media.mask black.png", "so there is nothing to make"),
    ("images", "--media.image i.png --media.mask white.png", "nothing of 'i.png' would be kept"),
    ("images", "--media.image i.png --media.mask vast.png", "cannot read the picture 'vast.png': "),
    (
        "images",
        "--media.image i.png --media.mask m.png --output i.png --overwrite true",
        "output: 'i.png' is the file of --media.image, which it would replace",
    ),
    (
        "images",
        "--media.image i.png --media.mask m.png --stats m.png --overwrite true",
        "stats: 'm.png' is the file of --media.mask, which it would replace",
    ),
    ("images", "--media.first_frame i.png", "media.first_frame: is for videos, and this model mak"),
    ("videos", "--media.image bad.png --media.mask m.png", "cannot read the video 'bad.png': "),
    ("videos", "--media.first_frame i.png", "and this model makes height 8 and width 8, or that 4"),
    ("videos", "--media.first_frame i.png --media.image i.png --media.mask m.png", "not both"),
]


@pytest.mark.parametrize(("run", "flags", "line"), MISTAKES)
def test_files_that_cannot_be_used_are_one_line(
    run: str,
    flags: str,
    line: str,
    images: Path,
    videos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    picture(Path("i.png"), 4, 6)
    picture(Path("small.png"), 2, 2)
    for name, start in (("m.png", 3), ("black.png", 6), ("white.png", 0)):
        mask(Path(name), 4, 6, start)
    Path("bad.png").write_text("no picture")
    Image.fromarray(np.full((4, 6), 300, np.uint16)).save("deep.png")
    mask(Path("vast.png"), 300, 400, 0)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    before = sorted(tmp_path.iterdir())
    output = "out.png" if run == "images" else "out.mp4"
    given = ["--run", run, "--prompt", "", *flags.split()]
    given += [] if "--output" in given else ["--output", output]
    assert generate(given) == 2
    shown = capsys.readouterr().err.strip()
    assert line in shown and len(shown.splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before


def test_files_that_do_not_go_together_are_one_line() -> None:
    for files, message in (
        ({"image": "a.png"}, "media.image needs media.mask"),
        ({"mask": "a.png"}, "media.mask says what of media.image is to be made"),
        ({"image": "a.png", "mask": "b.png", "first_frame": "c.png"}, "not both"),
    ):
        with pytest.raises(ValueError, match=message):
            GivenFiles(**files)
