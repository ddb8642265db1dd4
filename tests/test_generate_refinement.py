"""generate.py that refines drafts selectively, and media that are asked for by a text."""

import json
from pathlib import Path

import pytest
import soundfile
import torch

from specstream.cli import generate
from specstream.drafters import IndependentDenoiser, ResidualDenoiser
from specstream.drafters.state_loading import save_state_drafter
from specstream.generation.media_loading import Refinement, SamplerOptions, load_media_run
from specstream.generation.refinement import RefinementPipeline
from specstream.media_processor import MediaProcessor
from specstream.models import Denoiser, FlowSchedule, PatchTransformer
from specstream.models.denoiser import load_denoiser
from specstream.spectrogram import LogMel


def network(in_channels: int, seed: int = 0, **options: int) -> PatchTransformer:
    torch.manual_seed(seed)
    net = PatchTransformer(in_channels, 1, (2, 2), 16, 1, 2, **options)
    for layer in (net.write, net.last_scale):  # as built they are 0, and nothing said is heard
        torch.nn.init.normal_(layer.weight, std=0.2)
    return net


@pytest.fixture
def run(tmp_path: Path) -> Path:
    Denoiser(network(1), FlowSchedule(), (1, 8, 8)).save(tmp_path / "run/model")
    MediaProcessor("image").save(tmp_path / "run/model")
    return tmp_path / "run"


def test_a_refined_image_is_compared_with_the_plain_target(
    run: Path, tmp_path: Path, capsys
) -> None:
    stats = tmp_path / "stats.json"
    arguments = ["--run", str(run), "--prompt", "", "--output", str(tmp_path / "x.png")]
    arguments += ["--media.draft_steps", "2", "--media.main_steps", "10", "--stats", str(stats)]
    assert generate([*arguments, "--compare", "true", "--media.samples", "3"]) == 0
    shown = capsys.readouterr().err
    assert "guarantee      heuristic" in shown and "% of 48 parts" in shown
    # two rounds of the draft, one of the score, six of ten steps
    assert "plain, 10 steps" in shown and "plain, 9 steps" in shown
    assert "no law that is promised" in shown
    found = json.loads(stats.read_text())
    assert found["guarantee"] == "heuristic" and found["target_calls"] == 9
    assert 0 < found["acceptance"] < 1 and found["draft_calls"] == 0
    assert (tmp_path / "x-compare.png").is_file()


def test_a_smaller_model_drafts_what_the_target_refines(run: Path, tmp_path: Path, capsys) -> None:
    target = load_denoiser(run / "model")
    small = IndependentDenoiser(Denoiser(network(1, 1), FlowSchedule(), (1, 8, 8)))
    save_state_drafter(tmp_path / "small/draft", small, target)
    arguments = ["--prompt", "", "--media.draft_steps", "3"]
    output = ["--output", str(tmp_path / "y.png")]
    score = ["--media.refinement_score", "appearance"]
    assert generate(["--run", str(tmp_path / "small"), *arguments, *output, *score]) == 0
    assert "3 of a smaller model" in capsys.readouterr().err
    guesser = ResidualDenoiser(network(2, num_times=2))
    save_state_drafter(tmp_path / "residual/draft", guesser, target)
    output = ["--output", str(tmp_path / "z.png")]
    assert generate(["--run", str(tmp_path / "residual"), *arguments, *output]) == 2
    assert "a ResidualDenoiser, only guesses steps" in capsys.readouterr().err


def test_a_spectrogram_is_refined_in_segments_of_time_and_written_as_a_sound(
    run: Path, tmp_path: Path
) -> None:
    log_mel = LogMel(num_bands=8, num_frames=8, window=256, hop=128, iterations=2)
    MediaProcessor("audio", spectrogram=log_mel).save(run / "model")
    pipeline = load_media_run(run, SamplerOptions(refinement=Refinement(2, 0.0))).pipeline
    assert isinstance(pipeline, RefinementPipeline)
    assert pipeline.parts.sizes == (8, 1) and pipeline.eta == 0
    output = tmp_path / "a.wav"
    arguments = ["--run", str(run), "--prompt", "", "--output", str(output)]
    assert generate([*arguments, "--media.steps", "3", "--media.refinement_threshold", "1"]) == 0
    assert soundfile.info(output).frames == log_mel.length


def test_a_text_asks_for_an_image(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Denoiser(network(1, text_size=32), FlowSchedule(), (1, 8, 8))
    model.save(tmp_path / "model")
    MediaProcessor("image", text_size=32).save(tmp_path / "model")
    written = []
    for name, prompt in (("a", "red apple"), ("b", "Apple, red"), ("c", "blue car")):
        output = tmp_path / f"{name}.png"
        arguments = ["--run", str(tmp_path), "--prompt", prompt, "--output", str(output)]
        assert generate([*arguments, "--media.steps", "3", "--media.guidance", "2"]) == 0
        written.append(output.read_bytes())
    assert written[0] == written[1] != written[2]


def test_what_promises_no_law_is_held_beside_as_few_plain_steps_unless_told_not_to(
    run: Path, tmp_path: Path, capsys
) -> None:
    stats = tmp_path / "stats.json"
    arguments = ["--run", str(run), "--prompt", "", "--media.sampler", "by-error"]
    arguments += ["--media.steps", "12", "--media.tolerance", "0.05"]
    output = ["--output", str(tmp_path / "x.png"), "--stats", str(stats)]
    assert generate([*arguments, *output]) == 0
    shown = capsys.readouterr().err
    assert "plain, 12 steps" in shown and "adams-bashforth, 12 steps" in shown
    assert "dB: how near the same noise comes to adams-bashforth, 12 steps" in shown
    found = json.loads(stats.read_text())
    ours, rows = found["compared"][0], {row["name"]: row for row in found["compared"]}
    assert ours["name"] == "drafted" and ours["target_calls"] < 12 and ours["psnr"] > 0
    assert rows[f"adams-bashforth, {ours['target_calls']} steps"]["psnr"] > 0
    assert rows["adams-bashforth, 12 steps"]["psnr"] is None  # the solution itself
    assert sorted(file.name for file in tmp_path.glob("*.png")) == ["x.png"]
    again = ["--output", str(tmp_path / "y.png"), "--compare", "false"]
    assert generate([*arguments, *again]) == 0
    assert "plain, 12 steps" not in capsys.readouterr().err


def test_guesses_of_order_0_are_those_of_another_order(run: Path, tmp_path: Path, capsys) -> None:
    orders = []
    for order in ("0", "1"):
        options = SamplerOptions(num_steps=9, sampler="by-error", order=int(order))
        orders.append(load_media_run(run, options).pipeline.order)  # type: ignore[attr-defined]
    assert orders == [0, 1]
    arguments = ["--run", str(run), "--prompt", "", "--output", str(tmp_path / "x.png")]
    assert generate([*arguments, "--media.order", "0"]) == 2
    assert "order is of the guesses of sampler by-error" in capsys.readouterr().err
    assert generate([*arguments, "--media.sampler", "picard", "--media.order", "0"]) == 2
    assert "order is of the guesses of by-error, and not of picard" in capsys.readouterr().err


def test_sizes_and_steps_of_media_need_no_section(run: Path, tmp_path: Path, capsys) -> None:
    arguments = ["--run", str(run), "--prompt", "", "--output", str(tmp_path / "x.png")]
    assert generate([*arguments, "--height", "9"]) == 2
    assert "height 9" in capsys.readouterr().err
    short = ["--draft_steps=2", "--main_steps", "4", "--refinement_threshold", "1"]
    assert generate([*arguments, *short, "--compare", "false"]) == 0
    assert "heuristic" in capsys.readouterr().err
