"""The committed diffusion models and their drafters: fewer rounds, and the same law."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from specstream.cli import generate
from specstream.data.sounds import pitch
from specstream.drafters import FrozenEstimate
from specstream.generation.denoising import DenoisingPipeline
from specstream.generation.lengths import FixedLength
from specstream.generation.media_loading import SamplerOptions, load_media_run
from specstream.metrics import energy_test
from tests.denoising_toys import KeepsAll

ROOT = Path(__file__).resolve().parents[1]
SAMPLES, STEPS, WINDOW = 200, 20, 10


def told(seed: int) -> dict[str, Tensor]:
    """Return a class for each sample, drawn alone: the test needs independent samples."""
    noise = torch.Generator().manual_seed(seed)
    return {"classes": torch.randint(10, (SAMPLES,), generator=noise)}


@pytest.fixture(scope="module")
def plain() -> Tensor:
    options = SamplerOptions(num_steps=STEPS, batch_size=SAMPLES)
    pipeline = load_media_run(ROOT / "checkpoints" / "digits", options, "cpu").pipeline
    return pipeline.complete(SAMPLES, told(1), seed=1)


def test_trained_drafts_keep_the_law_in_fewer_rounds_than_free_ones(
    plain: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    rounds = {}
    for run, free in (("digits-residual", None), ("digits", "first-block"), ("digits", "estimate")):
        options = SamplerOptions(
            num_steps=STEPS, free_draft=free, window=WINDOW, batch_size=SAMPLES
        )  # type: ignore[arg-type]
        pipeline = load_media_run(f"checkpoints/{run}", options, "cpu").pipeline
        drafted = pipeline.complete(SAMPLES, told(2), seed=2)
        assert energy_test(drafted, plain).p_value > 0.01
        rounds[run] = pipeline.stats.full_rounds / SAMPLES
    assert rounds["digits-residual"] < 0.8 * rounds["digits"] < STEPS / 2  # of the free estimate


def test_drafted_tones_have_their_pitch_in_fewer_rounds_than_with_free_drafts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    notes, rounds = torch.arange(8), {}
    for run, free in (("tones", "estimate"), ("tones-residual", None)):
        options = SamplerOptions(num_steps=STEPS, free_draft=free, window=WINDOW)  # type: ignore[arg-type]
        found = load_media_run(f"checkpoints/{run}", options, "cpu")
        drafted = found.pipeline.complete(len(notes), {"classes": notes}, seed=1)
        rounds[run] = found.pipeline.stats.full_rounds
    assert rounds["tones-residual"] < 0.9 * rounds["tones"]
    form = found.processor
    assert form.spectrogram is not None
    sounds = form.spectrogram.sound(drafted, form.sample_rate)[:, 0]
    shape = torch.hann_window(sounds.shape[1])
    spectra = torch.fft.rfft(sounds * shape, n=form.sample_rate).abs()  # a number for each Hz
    heard = 180 + spectra[:, 180:400].argmax(1)  # overtones begin at 440 Hz
    asked = torch.tensor([pitch(int(note)) for note in notes])
    assert (12 * (heard / asked).log2()).abs().max() < 0.5  # half tones


def test_generate_samples_with_a_cache_of_the_targets_blocks(tmp_path: Path) -> None:
    stats, output = tmp_path / "stats.json", tmp_path / "seven.png"
    given = ["--run", str(ROOT / "checkpoints/digits"), "--prompt", "7", "--output", str(output)]
    given += ["--media.sampler", "step-cache", "--media.steps", "20", "--stats", str(stats)]
    assert generate([*given, "--media.tolerance", "0.3", "--compare", "true"]) == 0
    found = json.loads(stats.read_text())
    assert found["guarantee"] == "heuristic" and output.is_file()
    assert found["target_calls"] < 20 and found["acceptance"] > 0


def test_a_biased_rule_fails_the_same_test(plain: Tensor) -> None:
    options = SamplerOptions(num_steps=STEPS)
    target = load_media_run(ROOT / "checkpoints" / "digits", options, "cpu").pipeline.target
    pipeline = DenoisingPipeline(
        target, STEPS, 1.0, 1.0, FrozenEstimate(), FixedLength(STEPS - 2), KeepsAll(), SAMPLES
    )
    assert energy_test(pipeline.complete(SAMPLES, told(2), seed=2), plain).p_value < 0.01
