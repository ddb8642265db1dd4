"""generate.py that shows samples while they are drawn, and draws the same ones."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from specstream.cli import generate
from specstream.generation.command import preview as previews
from specstream.generation.command.preview import GREY, SHARE, Preview
from specstream.generation.consistency import ConsistencyPipeline
from specstream.generation.media_loading import (
    MediaRun,
    Refinement,
    SamplerOptions,
    load_media_run,
)
from specstream.media_processor import MediaProcessor
from specstream.models import ConsistencyModel, Denoiser, FlowSchedule, PatchTransformer
from specstream.models.denoiser import Evaluation
from specstream.spectrogram import LogMel
from specstream.structures import StateStep

ROOT = Path(__file__).resolve().parents[1]
SHAPE = (1, 8, 8)


def network(patch: tuple[int, ...], num_times: int = 1) -> PatchTransformer:
    torch.manual_seed(0)
    net = PatchTransformer(1, 1, patch, 16, 2, 2, num_times)
    torch.nn.init.normal_(net.write.weight, std=0.2)
    return net


def saved(folder: Path, shape: tuple[int, ...], patch: tuple[int, ...], kind: str) -> Path:
    Denoiser(network(patch), FlowSchedule(), shape).save(folder / "model")
    spectrogram = LogMel(8, 8, 256, 128, iterations=2) if kind == "spectrogram" else None
    own = "audio" if kind == "spectrogram" else kind
    MediaProcessor(own, spectrogram=spectrogram).save(folder / "model")  # type: ignore[arg-type]
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return saved(tmp_path / "run", SHAPE, (2, 2), "image")


@pytest.fixture
def every_round(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The option with which a picture is made of every round, whatever it costs."""
    monkeypatch.setattr(previews, "SHARE", 1e9)
    return ["--media.preview_every", "1e-9"]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """The previews that lie beside outputs, just before these are written."""
    write, found = MediaProcessor.write, []

    def watched(self: MediaProcessor, states: torch.Tensor, path: Path) -> None:
        beside = path.with_name(f"{path.stem}.preview.png")
        found.extend([np.array(Image.open(beside))] if beside.exists() else [])
        write(self, states, path)

    monkeypatch.setattr(MediaProcessor, "write", watched)
    return found


def test_a_preview_lies_beside_until_the_same_samples_stand(
    run: Path, tmp_path: Path, every_round: list[str], seen: list[np.ndarray]
) -> None:
    given = ["--run", str(run), "--prompt", "", "--media.samples", "3", "--media.steps", "8"]
    given += ["--media.free_draft", "estimate"]
    facts = []
    for name, previewed in (("a", []), ("b", every_round)):
        output, stats = tmp_path / f"{name}.png", tmp_path / f"{name}.json"
        files = ["--output", str(output), "--stats", str(stats)]
        assert generate([*given, *files, *previewed]) == 0
        said = json.loads(stats.read_text())
        counts = {key: said[key] for key in said if "second" not in key}
        facts.append((output.read_bytes(), counts))
    assert facts[0] == facts[1]
    (picture,) = seen  # of the second run only
    assert picture.shape == (17, 17)
    assert not list(tmp_path.glob("*.preview.png"))


SAMPLERS = {
    "plain": SamplerOptions(8),
    "drafted": SamplerOptions(8, free_draft="velocity"),
    "solver": SamplerOptions(8, sampler="dpm-solver++"),
    "by-error": SamplerOptions(8, sampler="by-error", tolerance=0.0),
    "picard": SamplerOptions(8, sampler="picard", window=2),
    "step-cache": SamplerOptions(8, sampler="step-cache", window=1),
    "refinement": SamplerOptions(8, refinement=Refinement(3)),
    "refinement of nothing": SamplerOptions(8, refinement=Refinement(3, threshold=99)),
    "consistency": None,
}


def made(run: Path, name: str) -> MediaRun:
    """Load what draws two samples together by a sampler."""
    media = load_media_run(run, SAMPLERS[name], "cpu")
    pipeline = media.pipeline
    if name == "consistency":
        student = ConsistencyModel(network((2, 2)), FlowSchedule(), SHAPE)
        pipeline = ConsistencyPipeline(media.pipeline.target, student, 4)
    pipeline.batch_size = 2
    return MediaRun(pipeline, media.processor)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_is_seen_and_draws_the_same(
    name: str, run: Path, tmp_path: Path, every_round: list[str]
) -> None:
    media = made(run, name)
    pipeline = media.pipeline
    unseen = pipeline.complete(3, seed=0)
    facts = asdict(pipeline.stats) | {"seconds": 0}
    preview = Preview(media, tmp_path / "x.png", 3, 1e-9)
    for step in pipeline.generate(3, seed=0):
        preview.show(step)
    assert torch.equal(pipeline.samples, unseen)
    assert asdict(pipeline.stats) | {"seconds": 0} == facts
    picture = np.array(Image.open(tmp_path / "x.png"))
    finished = media.processor.pictures(unseen)[..., 0].astype(int)
    away = np.abs(picture[:8, :8] - finished[0])
    assert away.mean() < 16 and picture[:8, :8].std() > 1  # an estimate of that sample


@pytest.mark.parametrize("name, steps", [("plain", 8), ("refinement", 3)])  # 3 of its draft
def test_what_is_seen_is_what_the_network_has_just_said(
    name: str, steps: int, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate, said = Denoiser.evaluate, []

    def heard(*given: Any, **options: Any) -> Evaluation:
        said.append(evaluate(*given, **options))
        return said[-1]

    monkeypatch.setattr(Denoiser, "evaluate", heard)
    for number, step in enumerate(made(run, name).pipeline.generate(1, seed=0), 1):
        assert torch.equal(step.estimate, said[-1].estimates[0])
        if number == steps:
            break


# solvers of order 2 end where the last two estimates lead
@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in ("solver", "by-error")])
def test_what_is_said_before_the_last_step_is_the_sample(name: str, run: Path) -> None:
    pipeline = made(run, name).pipeline
    last = {step.sample: step.estimate for step in pipeline.generate(3, seed=0)}
    estimates = torch.stack([last[sample] for sample in range(3)])
    assert torch.allclose(estimates, pipeline.samples, atol=1e-6)


def test_a_preview_is_what_was_last_said_and_grey_where_nothing_was(
    run: Path, tmp_path: Path, every_round: list[str]
) -> None:
    media = load_media_run(run, SamplerOptions(8, batch_size=2), "cpu")
    preview = Preview(media, tmp_path / "x.png", 3, 1e-9)
    last: dict[int, torch.Tensor] = {}
    for number, step in enumerate(media.pipeline.generate(3, seed=0)):
        preview.show(step)
        assert preview.is_written == (number > 1)  # not of half a batch
        last[step.sample] = step.estimate
        if number == 4:  # the third round
            break
    picture = np.array(Image.open(tmp_path / "x.png"))
    stills = media.processor.pictures(torch.stack([last[0], last[1]]))[..., 0]
    assert np.array_equal(picture[:8, :8], stills[0])
    assert np.array_equal(picture[:8, 9:], stills[1])
    assert (picture[9:, :8] == GREY).all()


def test_previews_take_a_tenth_of_the_time(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, ends = [0.0], []
    monkeypatch.setattr(previews, "perf_counter", lambda: clock[0])

    def slow(pictures: object, path: Path) -> None:
        clock[0] += 3.0
        ends.append(clock[0])

    monkeypatch.setattr(previews, "write_sheet", slow)
    preview = Preview(load_media_run(run, device="cpu"), tmp_path / "x.png", 1, 5.0)
    for done in range(300):
        clock[0] += 1.0
        preview.show(StateStep(0, 0, 0, done, False, torch.zeros(SHAPE)))
    assert ends[0] == 5.0 + 3.0 and len(ends) > 9
    assert all(3.0 * number <= SHARE * end for number, end in enumerate(ends, 1) if number > 1)


@pytest.mark.parametrize(
    "kind, shape, patch, size",
    [
        ("video", (1, 6, 4, 4), (1, 2, 2), (4, 16)),  # four of six frames
        ("spectrogram", SHAPE, (2, 2), (8, 8)),
    ],
)
def test_videos_and_spectrograms_have_pictures(
    kind: str,
    shape: tuple[int, ...],
    patch: tuple[int, ...],
    size: tuple[int, int],
    tmp_path: Path,
    every_round: list[str],
    seen: list[np.ndarray],
) -> None:
    run = saved(tmp_path / "other", shape, patch, kind)
    output = tmp_path / ("x.mp4" if kind == "video" else "x.wav")
    given = ["--run", str(run), "--prompt", "", "--output", str(output), "--media.steps", "4"]
    assert generate([*given, *every_round]) == 0
    assert [picture.shape for picture in seen] == [size] and output.is_file()


def test_low_pitches_are_at_the_bottom() -> None:
    rising = torch.linspace(-1, 1, 8).view(1, 1, 8, 1)  # the lowest band is silent
    still = MediaProcessor("audio", spectrogram=LogMel(8, 8)).stills(rising)
    assert still[0, -1, 0, 0] == 0 and still[0, 0, 0, 0] == 255


@pytest.mark.parametrize("kept", [False, True])
def test_after_an_interrupt_only_a_whole_preview_stays(
    kept: bool, run: Path, tmp_path: Path, every_round: list[str], monkeypatch, capsys
) -> None:
    save, number = Image.Image.save, iter(range(99))

    def interrupted(self: Image.Image, path: Path) -> None:
        if next(number) == int(kept):
            Path(path).write_bytes(b"half")
            raise KeyboardInterrupt
        save(self, path)

    monkeypatch.setattr(Image.Image, "save", interrupted)
    given = ["--run", str(run), "--prompt", "", "--output", str(tmp_path / "x.png"), *every_round]
    assert generate(given) == 130
    left = [path.name for path in tmp_path.iterdir() if path.is_file()]
    assert left == (["x.preview.png"] if kept else [])
    shown = capsys.readouterr().err
    assert ("x.preview.png is a preview" if kept else "nothing was written") in shown
    if kept:
        Image.open(tmp_path / "x.preview.png").load()


def test_samples_that_are_no_numbers_leave_no_preview(
    run: Path, tmp_path: Path, every_round: list[str], monkeypatch, capsys
) -> None:
    wrong = load_media_run(run).pipeline.target
    torch.nn.init.constant_(wrong.network.write.bias, torch.inf)
    wrong.save(run / "model")
    given = ["--run", str(run), "--prompt", "", "--output", str(tmp_path / "x.png"), *every_round]
    assert generate(given) == 2
    assert "numbers that are not finite" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["--media.preview_every", "-1"], "media.preview_every must be above 0 and at most"),
        (["--media.preview_every", "0"], "media.preview_every must be above 0 and at most"),
        (["--media.preview_every", "often"], "media.preview_every: expected float or null, got"),
        (["--media.preview_every", "5"], "y.preview.png' exists; give --overwrite true to replace"),
        (
            ["--media.preview_every=5", "--overwrite=true", "--stats=y.preview.png"],
            "stats: 'y.preview.png' is also what --media.preview_every writes beside --output",
        ),
        (
            ["--media.preview_every=5", "--overwrite=true", "--output=folder.png"],
            "'folder.preview.png', which --media.preview_every writes, is a folder",
        ),
    ],
)
def test_what_cannot_be_shown_is_refused_in_one_line(
    arguments: list[str], line: str, run: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "y.preview.png").write_bytes(b"of the user")
    (tmp_path / "folder.preview.png").mkdir()
    assert generate(["--run", str(run), "--prompt", "", "--output", "y.png", *arguments]) == 2
    shown = capsys.readouterr().err.strip()
    assert line in shown and len(shown.splitlines()) == 1
    assert (tmp_path / "y.preview.png").read_bytes() == b"of the user"
    assert not (tmp_path / "y.png").exists()


def test_waveforms_and_texts_have_no_previews(tmp_path: Path, capsys) -> None:
    wave = saved(tmp_path / "wave", (1, 64), (8,), "audio")
    given = ["--media.preview_every", "5", "--prompt", ""]
    assert generate(["--run", str(wave), "--output", str(tmp_path / "x.wav"), *given]) == 2
    assert "preview_every: is for pictures, and this model's sounds" in capsys.readouterr().err
    assert generate(["--run", str(ROOT / "checkpoints/target-pycode"), *given]) == 2
    assert "media: is for diffusion models of media" in capsys.readouterr().err
    assert not list(tmp_path.glob("x*"))
