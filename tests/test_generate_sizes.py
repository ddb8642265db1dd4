"""generate.py that is asked for a size: of a target of diffusers, or one that was trained on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import imageio_ffmpeg
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from specstream.cli import generate
from specstream.drafters import IndependentDenoiser
from specstream.drafters.state_loading import save_state_drafter
from specstream.media_processor import MediaProcessor
from specstream.models import Denoiser, FlowSchedule, PatchTransformer
from specstream.models.denoiser import load_denoiser
from specstream.training import DenoisingModule
from tests.diffusers_toys import fresh, save_pipeline


def network(patch: tuple[int, ...] = (2, 2)) -> PatchTransformer:
    torch.manual_seed(0)
    return PatchTransformer(1, 1, patch, 16, 1, 2)


def trained(folder: Path, *shapes: tuple[int, ...], kind: str = "image") -> Path:
    """Write a model as training on buckets of these shapes leaves it."""
    processor = MediaProcessor(kind)  # type: ignore[arg-type]
    module = DenoisingModule(network((1, 2, 2) if kind == "video" else (2, 2)))
    data = SimpleNamespace(shape=shapes[0], shapes=list(shapes), processor=processor)
    object.__setattr__(module, "_trainer", SimpleNamespace(datamodule=data))
    module.on_fit_start()
    module.export(folder, processor)
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return trained(tmp_path / "images", (1, 4, 4), (1, 4, 8), (1, 8, 4))


def sampled(run: Path, output: Path, *flags: str) -> int:
    given = ["--run", str(run), "--prompt", "", "--output", str(output), "--media.steps", "3"]
    return generate([*given, "--overwrite", "true", *flags])


def test_a_model_of_several_sizes_makes_the_one_that_is_asked_for(
    images: Path, tmp_path: Path
) -> None:
    output = tmp_path / "x.png"
    for flags, size in (
        ([], (4, 4)),
        (["--media.width", "8"], (8, 4)),
        (["--media.height", "8", "--media.width", "4"], (4, 8)),
        (["--media.height", "8", "--media.draft_steps", "2"], (4, 8)),
    ):
        assert sampled(images, output, *flags) == 0
        assert Image.open(output).size == size
    target = load_denoiser(images / "model")
    assert target.shape == (1, 4, 4) and target.other_shapes == ((1, 4, 8), (1, 8, 4))
    small = Denoiser(network(), FlowSchedule(), (1, 4, 4))
    small.other_shapes = ((1, 4, 8),)
    save_state_drafter(tmp_path / "small" / "draft", IndependentDenoiser(small), target)
    assert sampled(tmp_path / "small", output, "--media.width", "8") == 0
    assert Image.open(output).size == (8, 4)


def test_videos_have_the_length_and_the_rate_that_are_asked_for(tmp_path: Path) -> None:
    run = trained(tmp_path / "videos", (1, 2, 16, 16), (1, 4, 16, 16), kind="video")
    output = tmp_path / "x.mp4"
    assert sampled(run, output, "--media.num_frames", "4", "--media.frame_rate", "12") == 0
    reader = imageio_ffmpeg.read_frames(str(output))
    assert next(reader)["fps"] == 12 and len(list(reader)) == 4


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ltx")
    parts = {"transformer": fresh("LTXVideoTransformer3DModel")}
    parts["vae"] = fresh("AutoencoderKLLTXVideo")
    scheduler: dict[str, object] = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    save_pipeline(folder / "ltx", "LTXPipeline", scheduler, **parts)
    told = {"prompt_embeds": torch.ones(1, 5, 12), "prompt_mask": torch.ones(1, 5)}
    save_file(told, folder / "told.safetensors")
    block = {"path": str(folder / "ltx"), "conditions": str(folder / "told.safetensors")}
    block |= {"height": 8, "width": 8, "num_frames": 5, "dtype": "float32", "device": "cpu"}
    target = {"class_path": "specstream.models.PretrainedDenoiser", "init_args": block}
    path = folder / "ltx.yaml"
    path.write_text(yaml.safe_dump({"target": target, "media": {"steps": 2}}))
    return path


def test_a_target_of_diffusers_takes_its_size_from_the_command_line(
    config: Path, tmp_path: Path
) -> None:
    output = tmp_path / "x.mp4"
    given = ["--config", str(config), "--prompt", "", "--output", str(output)]
    given += ["--media.height", "16", "--media.width", "32", "--media.num_frames", "9"]
    assert generate([*given, "--media.frame_rate", "10"]) == 0
    reader = imageio_ffmpeg.read_frames(str(output))
    facts = next(reader)
    assert facts["size"] == (32, 16) and facts["fps"] == 10 and len(list(reader)) == 9


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--media.num_frames 7", "this model makes 4 k + 1 frames, not 7; 5 or 9 would do"),
        ("--media.height 10", "height 10 is not a multiple of 4, as this model wants; 8 or 12"),
        ("--media.height -8", "media.height must be above 0 and at most 1000000, got -8"),
        ("--media.frame_rate 0", "media.frame_rate must be above 0 and at most 1000000, got 0"),
        ("--media.seconds 2", "seconds are for sounds; a video's length is its num_frames"),
    ],
)
def test_a_size_that_a_target_cannot_make_is_one_line(
    flags: str, line: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "x.mp4"
    given = ["--config", str(config), "--prompt", "", "--output", str(output), *flags.split()]
    assert generate(given) == 2
    shown = capsys.readouterr().err.strip()
    assert line in shown and len(shown.splitlines()) == 1 and not output.exists()


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (
            "--media.height 8 --media.width 8",
            "this model was trained to make height 4 width 4, or height 4 width 8, or height 8 "
            "width 4, not height 8 width 8",
        ),
        ("--media.num_frames 4", "or height 8 width 4, not num_frames 4"),
        ("--media.seconds 4", "or height 8 width 4, not seconds 4"),
        ("--media.frame_rate 4", "frame_rate is for videos, and this model makes .png files"),
    ],
)
def test_a_size_that_was_not_trained_is_one_line(
    flags: str, line: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sampled(images, tmp_path / "x.png", *flags.split()) == 2
    shown = capsys.readouterr().err.strip()
    assert line in shown and len(shown.splitlines()) == 1
    assert not (tmp_path / "x.png").exists()
