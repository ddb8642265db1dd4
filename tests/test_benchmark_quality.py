"""Measures of media that not every state can be given: what they are of, and when none are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from specstream.benchmark import media_quality
from specstream.benchmark.media_curves import CurvePoint
from specstream.benchmark.media_methods import MediaSetting
from specstream.benchmark.media_quality import (
    perceptual_distance,
    prompt_score,
    random_feature_distances,
    structural_similarity,
)
from specstream.benchmark.media_rows import MediaRowMaker, SolverRowMaker
from specstream.benchmark.rows import describe_machine
from specstream.benchmark.tables import make_tables
from specstream.generation.solvers import SolverPipeline
from specstream.metrics import feature_distances, ssim
from specstream.models import Denoiser, FlowSchedule, PatchTransformer

ROOT = Path(__file__).parents[1]
NEW = {
    "media": {"kernel_distance", "kernel_spread", "clip_score", "seconds_ratio"},
    "solvers": {"ssim", "lpips", "draft_passes", "seconds_in_batch", "batch_size"},
}
HEADINGS = {"random-feature KID x 1000", "CLIP score", "over equal seconds", "SSIM", "LPIPS"}


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_states_that_are_no_grid_have_no_random_features() -> None:
    samples, data = drawn(0, 8, 1, 6, 6), drawn(1, 9, 1, 6, 6)
    assert random_feature_distances(samples, data) == feature_distances(samples, data)
    assert random_feature_distances(drawn(0, 8, 1, 36), drawn(1, 9, 1, 36)) is None  # waveforms
    assert random_feature_distances(samples[:3], data) is None
    samples[0, 0, 0, 0] = torch.nan
    assert random_feature_distances(samples, data) is None


def test_a_solver_row_has_the_ssim_of_its_own_samples_to_the_solution() -> None:
    torch.manual_seed(0)
    network = PatchTransformer(1, 1, (1, 4, 4), 8, 1, 2)
    torch.nn.init.normal_(network.write.weight, std=0.3)
    pipeline = SolverPipeline(Denoiser(network, FlowSchedule(), (1, 1, 12, 12)).eval(), 2)
    samples = pipeline.complete(4, seed=0)
    solution, machine = samples + 0.1 * drawn(2, *samples.shape), describe_machine("cpu", "x", [])
    found = {
        kind: SolverRowMaker("toy", "", samples, solution, 9, kind, machine).row(
            "Euler", CurvePoint("Euler 2", pipeline), samples
        )
        for kind in ("video", "audio")
    }
    assert found["video"].ssim == pytest.approx(ssim(samples, solution)) and found["video"].ssim < 1
    assert found["audio"].ssim is found["audio"].lpips is None
    small = samples[..., :10]
    assert structural_similarity("video", small, small) is None


def test_lpips_is_of_colours_that_are_large_enough_where_its_weights_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grey, seen = drawn(0, 2, 1, 3, 32, 32), []
    monkeypatch.setattr(media_quality, "lpips", lambda one, two: seen.append((one, two)) or 0.5)
    monkeypatch.setattr(media_quality, "missing_lpips", lambda: "not there")
    assert perceptual_distance("video", grey, grey) is None
    monkeypatch.setattr(media_quality, "missing_lpips", lambda: None)
    assert perceptual_distance("video", grey, -grey) == 0.5
    [(one, two)] = seen
    assert one.shape == (6, 3, 32, 32) and torch.equal(one[1, 2], grey[0, 0, 1])
    assert torch.equal(two, -one)
    assert perceptual_distance("video", grey[..., :31], grey[..., :31]) is None
    assert perceptual_distance("audio", grey, grey) is None


def test_pictures_of_classes_are_held_beside_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures, names, seen = drawn(0, 4, 1, 6, 6), ["a", "b", "b", "a"], []

    def score(images: Tensor, texts: list[str], model: str) -> float:
        seen.append((images, texts, model))
        return 20.0

    monkeypatch.setattr(media_quality, "clip_score", score)
    folder = str(tmp_path)
    assert prompt_score("image", pictures, names, folder) is None  # no model is in it
    (tmp_path / "config.json").write_text("{}")
    setting, machine = MediaSetting(8, 1.0), describe_machine("cpu", "x", [])
    maker = MediaRowMaker(
        "toy", "", setting, pictures, pictures, 9, None, machine, "image", names, folder
    )
    assert maker.law(pictures).clip_score == 20
    [(images, texts, model)] = seen
    assert torch.equal(images, pictures.expand(-1, 3, -1, -1))
    assert texts == names and model == folder
    assert prompt_score("image", pictures, [], folder) is None
    assert prompt_score("image", pictures, names, None) is None


def test_older_files_are_shown_without_empty_columns() -> None:
    rows = json.loads((ROOT / "docs/results/media-digits.json").read_text())
    old = [{k: v for k, v in row.items() if k not in NEW[row["study"]]} for row in rows]
    shown = {column.heading for table in make_tables(old) for column in table.columns}
    assert {"PSNR, dB", "distance to data"} <= shown and not HEADINGS & shown
    new = [row | {"kernel_distance": 0.001, "kernel_spread": 0.0002, "ssim": 0.5} for row in old]
    tables = make_tables(new)
    cells = {c.heading: c.cell(t.rows[0]) for t in tables for c in t.columns}
    assert cells["random-feature KID x 1000"] == "+1.00 (spread 0.20)" and cells["SSIM"] == "0.5000"
