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
