"""Real media as sources: shapes, values and conditions, and one line for what is wrong."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from specstream.data import CaptionedImages, MovingImages, VideoArrays
from specstream.data.text_vectors import text_vector

RNG = np.random.default_rng(0)


@pytest.fixture
def video(tmp_path: Path) -> str:
    path = tmp_path / "clips.npz"
    np.savez(path, video=RNG.integers(0, 256, (3, 7, 8, 8, 3), dtype=np.uint8))
    return str(path)


@pytest.fixture
def images(tmp_path: Path) -> str:
    path = tmp_path / "images.npz"
    pixels = RNG.integers(1, 256, (5, 8, 8), dtype=np.uint8)
    np.savez(path, image=pixels, label=np.array([3, 1, 4, 1, 0], np.uint8))
    return str(path)


@pytest.fixture
def captions(tmp_path: Path) -> str:
    path = tmp_path / "captions.jsonl.gz"
    names = ["red apple", "blue car", "red car", "sad face", "happy face"]
    with gzip.open(path, "wt") as file:
        for number, name in enumerate(names):
            split = "test" if number == 4 else "train"
            file.write(json.dumps({"row": number, "caption": name, "split": split}) + "\n")
    return str(path)


def test_videos_are_cut_into_windows_and_shrunk_by_averaging(video: str) -> None:
    source = VideoArrays(video, num_frames=3, size=4)
    source.check()
    states = source.samples().states
    assert states.shape == (6, 3, 3, 4, 4)  # two windows of three frames each; the seventh is left
    with np.load(video) as arrays:
        raw = arrays["video"].astype(np.float64)
    right = raw[1, 4, 2:4, 6:8, 2].mean() / 127.5 - 1  # clip 1, second window, its second frame
    assert states[3, 2, 1, 1, 3].item() == pytest.approx(right, abs=1e-5)
    assert VideoArrays(video).samples().states.shape == (3, 3, 7, 8, 8)
    assert source.processor.kind == "video"


def test_every_window_of_a_video_has_its_text_and_the_split_parts_whole_videos(
    video: str, tmp_path: Path
) -> None:
    names = [("a cat", "train"), ("a dog", "test"), ("a bird", "train")]
    file = tmp_path / "manifest.jsonl"
    file.write_text("".join(json.dumps({"caption": n, "split": s}) + "\n" for n, s in names))
    source = VideoArrays(video, str(file), split="train", num_frames=3, text_size=64)
    source.check()
    samples, every = source.samples(), VideoArrays(video, num_frames=3).samples()
    assert torch.equal(samples.states, every.states[[0, 1, 4, 5]]) and every.text is None
    wanted = [text_vector(name, 64) for name in ("a cat", "a cat", "a bird", "a bird")]
    assert samples.text is not None and torch.equal(samples.text, torch.stack(wanted))
    assert source.processor.text_size == 64 and VideoArrays(video).processor.text_size == 0
    first = VideoArrays(video, str(file), split="train", limit=1).samples()
    assert first.text is not None and len(first.states) == len(first.text) == 1


def test_moving_images_fly_and_bounce(images: str) -> None:
    source = MovingImages(images, num_clips=20, num_frames=6, size=12, image_size=4)
    source.check()
    samples = source.samples()
    assert samples.states.shape == (20, 1, 6, 12, 12) and samples.classes is not None
    assert set(samples.classes.tolist()) <= {0, 1, 3, 4}
    assert source.processor.classes == ("0", "1", "2", "3", "4")
    lit = samples.states > -1  # every pixel of the images is lit: 16 in every frame
    assert (lit.flatten(3).sum(-1) == 16).all()
    rows = lit[:, 0].any(-1).float().argmax(-1)  # (n, F) top of the image
    assert rows.diff(dim=1).abs().max() <= 3 and len(rows.unique()) > 4
    assert torch.equal(samples.states, source.samples().states)


def test_two_moving_images_lie_over_each_other_and_have_no_class(images: str) -> None:
    source = MovingImages(images, num_clips=8, num_frames=4, size=12, image_size=4, num_objects=2)
    samples = source.samples()
    assert samples.classes is None and source.processor.classes == ()
    lit = (samples.states > -1).flatten(3).sum(-1)
    assert lit.max() == 32 and lit.min() >= 16


def test_captioned_images_carry_their_text(images: str, captions: str) -> None:
    source = CaptionedImages(images, captions, split="train", size=4, text_size=64)
    source.check()
    samples = source.samples()
    assert samples.states.shape == (4, 1, 4, 4) and samples.classes is None
    assert samples.text is not None and samples.text.shape == (4, 64)
    assert torch.equal(samples.text[1], text_vector("blue car", 64))
    assert source.processor.text_size == 64
    whole = CaptionedImages(images, captions, template="{split} {caption}").samples()
    assert whole.text is not None
    assert torch.equal(whole.text[4], text_vector("test happy face", 256))


def test_a_text_is_its_words_and_letters_whatever_their_case_and_order() -> None:
    smile = text_vector("Smiling face", 256)
    assert torch.equal(smile, text_vector("face, SMILING!", 256))
    assert smile.norm().item() == pytest.approx(16)
    near, far = text_vector("smile", 256), text_vector("fire truck", 256)
    assert smile @ near > smile @ far + 20
    assert not text_vector("?!", 8).any()
    # the same on every machine, or trained models would lose their prompts
    right = [-0.6501152, 1.7761478, 0.0, 0.6501152]
    assert text_vector("cat", 4).tolist() == pytest.approx(right)


def test_wrong_options_are_one_line(video: str, images: str, captions: str, tmp_path: Path) -> None:
    short = tmp_path / "short.jsonl"
    short.write_text('{"caption": "one"}\n')
    cases = [
        (VideoArrays(video, num_frames=8), r"num_frames must be in 1..7, got 8"),
        (VideoArrays(video, size=9), r"the size must be in 1..8, that of the pictures, got 9"),
        (VideoArrays(images, video="image"), r"videos are \(n, F, H, W, C\), not \[5, 8, 8\]"),
        (VideoArrays(images), "has no array 'video', but image, label"),
        (VideoArrays(video, split="test"), "split 'test' is a field of the captions"),
        (VideoArrays("none.npz"), "'none.npz' is no .npz file that can be read"),
        (MovingImages(images, size=6, image_size=7), "size must be at least 7, an image's, got 6"),
        (MovingImages(images, num_objects=0), "num_objects must be at least 1, got 0"),
        (MovingImages(video, images="video"), r"grey images are \(n, H, W\)"),
        (CaptionedImages(images, captions, text_size=0), "text_size must be at least 1, got 0"),
        (CaptionedImages(images, "none.jsonl"), "'none.jsonl' does not exist"),
    ]
    for source, line in cases:
        with pytest.raises(ValueError, match=line):
            source.check()
    with pytest.raises(ValueError, match="has 1 records for 5 media"):
        CaptionedImages(images, str(short)).samples()
    with pytest.raises(ValueError, match="has no record of the split 'validation'"):
        CaptionedImages(images, captions, split="validation").samples()
