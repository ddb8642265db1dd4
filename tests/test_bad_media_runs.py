"""Damaged runs of media: each is one line that names the file, before anything is drawn."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from specstream.cli import generate
from specstream.drafters import ResidualDenoiser
from specstream.drafters.state_loading import RECORD, save_state_drafter
from specstream.generation.media_loading import load_media_run
from specstream.media_processor import MediaProcessor
from specstream.models import Denoiser, FlowSchedule, PatchTransformer
from specstream.models.denoiser import load_denoiser


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of pictures of 4 by 4 with three classes."""
    torch.manual_seed(0)
    run = tmp_path_factory.mktemp("media") / "run"
    network = PatchTransformer(1, 1, (2, 2), 8, 1, 2, num_classes=3)
    Denoiser(network, FlowSchedule(), (1, 4, 4)).save(run / "model")
    MediaProcessor("image", classes=("a", "b", "c")).save(run / "model")
    return run


@pytest.fixture
def run(source: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return shutil.copytree(source, tmp_path / "run")


def refusal(run: Path, name: str, key: str, value: object) -> str:
    """Put a value into a file of a run, and return the line that the run is refused by."""
    file = run / "model" / name
    table = json.loads(file.read_text())
    *path, last = key.split(".")
    inner: dict[str, Any] = table
    for part in path:
        inner = inner[part]
    inner[last] = value
    file.write_text(json.dumps(table))
    with pytest.raises(ValueError) as refused:
        load_media_run(run, device="cpu")
    line = str(refused.value)
    assert str(run / "model") in line and "\n" not in line
    return line


WRONG_SHAPES = [
    [], [1], [1, 4], [1, 5, 5], [2, 4, 4], [1, 4, 4, 4], "144", [1, 0, 0], [1, -4, -4],
    [1, 4.0, 4.0], ["1", "4", "4"], [1, 40_000, 40_000], [True, 4, 4], None,
]  # fmt: skip


@pytest.mark.parametrize("shape", WRONG_SHAPES)
def test_a_shape_that_the_network_cannot_make_is_refused(run: Path, shape: object) -> None:
    assert "holds a damaged denoiser" in refusal(run, "denoiser.json", "shape", shape)


@pytest.mark.parametrize("others", [5, [[1]], [["a"]], "abc", [[1, 3, 3]], [[1, 4, 4], None]])
def test_other_shapes_are_held_to_the_same(run: Path, others: object) -> None:
    assert "holds a damaged denoiser" in refusal(run, "denoiser.json", "other_shapes", others)


@pytest.mark.parametrize("clip", [-1, 0, "a", float("nan"), [1], True])
def test_a_clip_that_is_no_bound_is_refused(run: Path, clip: object) -> None:
    line = refusal(run, "denoiser.json", "clip", clip)
    assert f"clip must be a number above 0 or null, got {clip!r}" in line


@pytest.mark.parametrize(
    ("key", "value"),
    [("time_scale", "x"), ("time_scale", float("nan")), ("shift", float("nan")), ("shift", "a")],
)
def test_noise_levels_that_are_no_numbers_are_refused(run: Path, key: str, value: object) -> None:
    assert "holds a damaged denoiser" in refusal(run, "denoiser.json", f"schedule.{key}", value)


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("enlarge", 1.5, "enlarge must be a whole number, got 1.5"),
        ("enlarge", 10**6, "enlarge must be in 1..1000, got 1000000"),
        ("sample_rate", 1.5, "sample_rate must be a whole number, got 1.5"),
        ("frame_rate", float("nan"), "frame_rate must be in 0.01..1000, got nan"),
        ("frame_rate", 1e-300, "frame_rate must be in 0.01..1000, got 1e-300"),
        ("text_size", 0.5, "text_size must be a whole number, got 0.5"),
        ("classes", [1, 2, 3], "classes must be a list of texts, got [1, 2, 3]"),
        ("classes", "abc", "classes must be a list of texts, got 'abc'"),
        ("classes", ["a"] * 3, "two classes are named 'a'"),
        ("classes", list("abcd"), "names 4 classes, and its network tells 3 apart"),
        ("kind", "video", "says that a state [1, 4, 4] is a video, which has 3 axes"),
        ("kind", "audio", "says that a state [1, 4, 4] is a sound, which has 1 axis"),
        ("spectrogram", {}, "spectrogram is for sounds, and this is a model of images"),
    ],
)
def test_a_record_of_media_that_does_not_fit_is_refused(
    run: Path, key: str, value: object, what: str
) -> None:
    assert what in refusal(run, "media.json", key, value)


def test_texts_of_another_width_are_refused(tmp_path: Path) -> None:
    network = PatchTransformer(1, 1, (2, 2), 8, 1, 2, text_size=8)
    Denoiser(network, FlowSchedule(), (1, 4, 4)).save(tmp_path / "run" / "model")
    MediaProcessor("image", text_size=8).save(tmp_path / "run" / "model")
    line = refusal(tmp_path / "run", "media.json", "text_size", 7)
    assert "has text_size 7, and its network 8" in line


@pytest.mark.parametrize("path", ["nowhere", "", "{run}"])
def test_a_target_that_was_moved_is_what_the_line_speaks_of(
    path: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drafter = ResidualDenoiser(PatchTransformer(2, 1, (2, 2), 8, 1, 2, num_times=2, num_classes=3))
    folder = tmp_path / "drafter" / "draft"
    save_state_drafter(folder, drafter, load_denoiser(run / "model"))
    record = json.loads((folder / RECORD).read_text())
    record["target"]["path"] = path.format(run=run)
    (folder / RECORD).write_text(json.dumps(record))
    given = ["--run", str(folder.parent), "--prompt", "a", "--output", str(tmp_path / "a.png")]
    assert generate(given) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"error: the target of '{folder}': '{path.format(run=run)}' is no denoi")


@pytest.mark.parametrize(
    "make",
    [
        lambda: PatchTransformer(1, 1, (2, 2), num_layers=100_000),
        lambda: PatchTransformer(1, 1, (2, 2), hidden_size=100_000, num_layers=900),
    ],
)
def test_networks_that_no_machine_could_build_are_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=r"num_layers must be in 1..1000|parameters or more"):
        make()
