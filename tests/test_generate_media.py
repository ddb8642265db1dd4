"""generate.py on a diffusion model: the files it writes, what it compares, and what it refuses."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from specstream.cli import generate
from specstream.drafters import ResidualDenoiser
from specstream.drafters.state_loading import save_state_drafter
from specstream.generation.denoising import DenoisingPipeline
from specstream.media_processor import MediaProcessor
from specstream.models import Denoiser, FlowSchedule, PatchTransformer
from specstream.models.denoiser import load_denoiser


def network(in_channels: int, patch: tuple[int, ...], num_times: int = 1) -> PatchTransformer:
    torch.manual_seed(0)
    net = PatchTransformer(in_channels, 1, patch, 16, 1, 2, num_times, num_classes=3)
    torch.nn.init.normal_(net.write.weight, std=0.2)
    return net


@pytest.fixture
def image_run(tmp_path: Path) -> Path:
    run = tmp_path / "tiny"
    Denoiser(network(1, (2, 2)), FlowSchedule(), (1, 4, 4)).save(run / "model")
    MediaProcessor("image", enlarge=2, classes=("a", "b", "c")).save(run / "model")
    return run


@pytest.fixture
def draft_run(image_run: Path, tmp_path: Path) -> Path:
    run = tmp_path / "drafter"
    target = load_denoiser(image_run / "model")
    save_state_drafter(run / "draft", ResidualDenoiser(network(2, (2, 2), 2)), target)
    return run


def test_samples_lie_side_by_side_in_a_png(image_run: Path, tmp_path: Path) -> None:
    output, stats = tmp_path / "sheet.png", tmp_path / "stats.json"
    code = generate(
        ["--run", str(image_run), "--prompt", "b", "--output", str(output), "--stats", str(stats)]
        + ["--media.samples", "4", "--media.steps", "6", "--media.free_draft", "estimate"]
    )
    assert code == 0
    assert Image.open(output).size == (17, 17)  # two by two of 8, a line between
    found = json.loads(stats.read_text())
    assert found["modality"] == "image" and found["guarantee"] == "exact law"
    assert found["elements"] == 24 and found["target_calls"] <= 6


@pytest.mark.parametrize("cost, drafts", [(1.0, False), (0.01, True)])
def test_a_window_chosen_by_costs_says_what_drafting_would_take(
    cost: float, drafts: bool, image_run: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    def seconds(passes: Sequence[Callable[[], object]]) -> list[float]:
        assert len(passes) == 2 * 5  # judging and drafting
        return [part for k in (0, 2, 4, 6, 8) for part in (1 + k * cost, 0.0)]

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("specstream.generation.drafting_sampler.fastest", seconds)
    output, stats = tmp_path / "x.png", tmp_path / "stats.json"
    arguments = ["--run", str(image_run), "--prompt", "a", "--output", str(output)]
    arguments += ["--media.free_draft", "estimate", "--media.window", "auto"]
    assert generate([*arguments, "--media.steps", "12", "--stats", str(stats)]) == 0
    shown, found = capsys.readouterr().err, json.loads(stats.read_text())
    assert (found["draft_calls"] > 0) == drafts == (found["predicted_ratio"] < 1)
    refusal = "drafting would take 1.00 times as long here if 100% of drafts stood: not drafted"
    assert (refusal in shown) != drafts and ("steps drafted a round; drafting" in shown) == drafts


def test_compare_writes_the_plain_samples_beside(draft_run: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "x.png"
    arguments = ["--run", str(draft_run), "--prompt", "a", "--output", str(output)]
    arguments += ["--media.steps", "8", "--media.window", "4", "--compare", "true"]
    assert generate(arguments) == 0
    assert (tmp_path / "x-compare.png").is_file() and (tmp_path / "x-plain.png").is_file()
    shown = capsys.readouterr().err
    assert "plain, 8 steps" in shown and "drafted" in shown
    assert generate(arguments) == 2
    assert "x.png' exists; give --overwrite true" in capsys.readouterr().err


@pytest.mark.parametrize("models", ["drafter", "target", "both"])
def test_models_become_int8_and_the_statistics_say_so(
    models: str, draft_run: Path, tmp_path: Path, capsys
) -> None:
    output, stats = tmp_path / "x.png", tmp_path / "stats.json"
    arguments = ["--run", str(draft_run), "--prompt", "a", "--output", str(output)]
    arguments += ["--media.steps", "8", "--quantize", models, "--stats", str(stats)]
    assert generate([*arguments, "--quantize_method", "int8_dynamic"]) == 0
    shown, found = capsys.readouterr().err, json.loads(stats.read_text())
    roles = ["target", "drafter"] if models == "both" else [models]
    assert list(found["quantized"]) == roles and found["guarantee"] == "exact law"
    own = "the target's" if models == "drafter" else "the target's (target in int8)"
    assert found["law"] == own
    for role in roles:
        made = found["quantized"][role]
        layers = f"{role}: {made['linear_layers']} linear layers (int8_dynamic), "
        assert layers in shown and f"{role}: {made['bytes']:,}, {made['bytes_ratio']:.3f}x" in shown
        assert f"not converted    {role}: biases " in shown


@pytest.mark.parametrize(
    "kind, shape, patch", [("video", (1, 3, 4, 4), (1, 2, 2)), ("audio", (1, 64), (8,))]
)
def test_videos_and_sounds_are_written_as_files_that_open(
    kind: str, shape: tuple[int, ...], patch: tuple[int, ...], tmp_path: Path
) -> None:
    import imageio_ffmpeg
    import soundfile

    run = tmp_path / kind
    Denoiser(network(1, patch), FlowSchedule(), shape).save(run / "model")
    processor = MediaProcessor(kind, frame_rate=5, enlarge=8)  # type: ignore[arg-type]
    processor.save(run / "model")
    output = tmp_path / f"out{processor.suffix}"
    arguments = ["--run", str(run), "--prompt", "", "--output", str(output), "--media.steps", "3"]
    assert generate(arguments) == 0
    if kind == "audio":
        assert soundfile.info(output).frames == 64
        return
    reader = imageio_ffmpeg.read_frames(str(output))
    facts = next(reader)
    assert facts["size"] == (32, 32) and facts["fps"] == 5 and len(list(reader)) == 3


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["--prompt", "z"], "'z' is no class of this model; it knows a, b, c"),
        (["--prompt", "a", "--output", "x.mp4"], "makes .png files, not '.mp4'"),
        (["--prompt", "a", "--temperature", "1"], "temperature: is for text"),
        (["--prompt", "a", "--media.eta", "0", "--media.free_draft", "estimate"], "eta 0 is a det"),
        (["--prompt", "a", "--media.window", "4"], "nothing drafts here: give a free_draft"),
        (["--prompt", "a", "--media.window", "auto"], "nothing drafts here: give a free_draft"),
        (
            ["--prompt", "a", "--media.sampler", "picard", "--media.window", "auto"],
            "window auto is for drafted steps; that of picard is a number",
        ),
        (["--prompt", "a", "--compare", "true"], "this is the plain target already"),
        (["--prompt", "a", "--quantize", "drafter"], "no drafter with weights of its own"),
        (
            ["--prompt", "a", "--quantize", "both", "--media.free_draft", "estimate"],
            "quantize both: there is no drafter with weights of its own",
        ),
        (
            ["--prompt", "a", "--quantize", "target", "--media.sampler", "consistency"],
            "asks the student alone, and it is the drafter: quantize that",
        ),
        (["--prompt", "a", "--quantize_method", "int8_dynamic"], "says how --quantize converts"),
        (["--prompt", "a", "--media.devices", "2"], "2 asked for, but cpu is one device"),
        (["--prompt", "a", "--batch_size", "0"], "batch_size must be at least 1, got 0"),
        (["--prompt", "", "--media.guidance", "3"], "guidance: is the weight of a prompt, and the"),
        (["--prompt", "a", "--media.height", "9999999"], "must be above 0 and at most 1000000"),
        (["--prompt", "a", "--media.devices", "0"], "media.devices must be in 1..10000, got 0"),
        (["--prompt", "a", "--media.steps", "0"], "media.steps must be in 1..10000, got 0"),
        (["--media.draft_steps", "2", "--media.window", "3"], "media.window is for drafted steps"),
        (["--media.main_steps", "9", "--media.steps", "8"], "are the same: give one of them"),
        (["--media.main_steps", "9", "--media.steps", "50"], "are the same: give one of them"),
        (["--media.refinement_strength", "1"], "is for refinement: give media.draft_steps"),
        (["--prompt", "a", "--media.draft_steps", "0"], "media.draft_steps must be in 1..10000"),
        (
            ["--prompt", "a", "--media.draft_steps=2", "--media.refinement_strength=2"],
            "strength must be above 0 and at most 1, got 2",
        ),
    ],
)
def test_wrong_options_are_one_line(
    arguments: list[str], line: str, image_run: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["--run", str(image_run), "--device", "cpu", *arguments]
    given += [] if "--output" in arguments else ["--output", "y.png"]
    assert generate(given) == 2
    shown = capsys.readouterr().err.strip()
    assert line in shown and len(shown.splitlines()) == 1
    assert not list(tmp_path.glob("*.png"))


def test_what_compare_writes_replaces_no_other_file(
    draft_run: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["--run", str(draft_run), "--prompt", "a", "--output", "y.png", "--compare", "true"]
    assert generate([*given, "--stats", "y-compare.png"]) == 2
    assert "'y-compare.png' is also what --compare writes" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.png"))


def test_samples_that_are_no_numbers_are_not_written(
    image_run: Path, tmp_path: Path, capsys
) -> None:
    output = tmp_path / "y.png"
    given = ["--run", str(image_run), "--prompt", "a", "--output", str(output)]
    assert generate([*given, "--media.steps", "2", "--media.guidance", "1e39"]) == 2
    assert "not finite; bring media.guidance nearer to 1" in capsys.readouterr().err
    assert not output.exists()


def test_a_drafter_of_another_target_is_refused(draft_run: Path, image_run: Path, capsys) -> None:
    other = network(1, (2, 2))
    torch.nn.init.normal_(other.write.weight, std=0.3)
    Denoiser(other, FlowSchedule(), (1, 4, 4)).save(image_run / "model")
    assert generate(["--run", str(draft_run), "--prompt", "a", "--output", "y.png"]) == 2
    assert "not for this one (fingerprint" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, content, line",
    [
        ("denoiser.safetensors", "nothing", "holds a damaged denoiser"),
        ("denoiser.json", "[]", "holds a damaged denoiser"),
        ("denoiser.json", '{"network": {"num_heads": 0}}', "holds a damaged denoiser"),
        ("media.json", "null", "is damaged"),
    ],
)
def test_damaged_files_are_named(
    name: str, content: str, line: str, image_run: Path, tmp_path: Path, capsys
) -> None:
    (image_run / "model" / name).write_text(content)
    given = ["--run", str(image_run), "--prompt", "a", "--output", str(tmp_path / "y.png")]
    assert generate(given) == 2
    shown = capsys.readouterr().err.strip()
    assert line in shown and len(shown.splitlines()) == 1


@pytest.mark.parametrize(
    "change, line",
    [
        ({"guidance": float("nan")}, "guidance must be a finite number, got nan"),
        (
            {"class_path": "specstream.drafters.WindowDenoiser", "num_steps": 8},
            "its network has 1 out_channels, and must have 8",
        ),
    ],
)
def test_a_damaged_drafter_is_one_line(
    change: dict[str, object], line: str, draft_run: Path, tmp_path: Path, capsys
) -> None:
    record = draft_run / "draft/specstream.json"
    said = json.loads(record.read_text())
    said["drafter"] |= change
    record.write_text(json.dumps(said))
    given = ["--run", str(draft_run), "--prompt", "a", "--output", str(tmp_path / "y.png")]
    assert generate(given) == 2
    shown = capsys.readouterr().err.strip()
    assert line in shown and len(shown.splitlines()) == 1


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half_a_file(self: Image.Image, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr(Image.Image, "save", half_a_file)
    (tmp_path / "kept.png").write_bytes(b"before")
    with pytest.raises(OSError, match="disk is full"):
        MediaProcessor("image").write(torch.zeros(1, 1, 4, 4), tmp_path / "kept.png")
    assert (tmp_path / "kept.png").read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["kept.png"]


@pytest.mark.parametrize("kind, package", [("video", "imageio_ffmpeg"), ("audio", "soundfile")])
def test_what_writing_needs_is_missed_before_anything_is_sampled(
    kind: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    shape, patch = ((1, 2, 16, 16), (1, 2, 2)) if kind == "video" else ((1, 64), (8,))
    Denoiser(network(1, patch), FlowSchedule(), shape).save(tmp_path / "model")
    processor = MediaProcessor(kind)  # type: ignore[arg-type]
    processor.save(tmp_path / "model")
    monkeypatch.setitem(sys.modules, package, None)  # importing it fails

    def sample(*_: object, **__: object) -> None:
        raise AssertionError("nothing is to be sampled")

    monkeypatch.setattr(DenoisingPipeline, "generate", sample)
    output = tmp_path / f"out{processor.suffix}"
    assert generate(["--run", str(tmp_path), "--prompt", "", "--output", str(output)]) == 2
    shown = capsys.readouterr().err.strip()
    assert f"need the package {package.replace('_', '-')}, which is not installed" in shown
    assert len(shown.splitlines()) == 1 and not output.exists()


def test_a_missing_ffmpeg_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import imageio_ffmpeg

    def none_found() -> str:
        raise RuntimeError("No ffmpeg exe could be found.\nInstall it.")

    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", none_found)
    with pytest.raises(ValueError, match="videos need ffmpeg, which is not installed"):
        MediaProcessor("video").check_writer()
    MediaProcessor("image").check_writer()


def test_pixels_are_the_states_in_bytes() -> None:
    bytes_ = MediaProcessor("image").pictures(torch.tensor([[[[-1.0, 0.0, 1.0, 9.0]]]]))
    assert np.array_equal(bytes_[0, 0, :, 0], [0, 128, 255, 255])
