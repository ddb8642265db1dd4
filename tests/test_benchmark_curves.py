"""What approximates the deterministic sampler never stands alone; what its rows say of its cost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from specstream.benchmark import AcceptByError, FreeDraft, SolverSteps, StepCache
from specstream.benchmark.media_counts import draft_passes
from specstream.benchmark.media_curves import equal_rounds
from specstream.benchmark.media_methods import MediaModels, MediaSetting
from specstream.benchmark.tables import make_tables
from specstream.generation.solvers import AdamsBashforth2, DPMSolver2M, Euler
from specstream.media_processor import MediaProcessor
from specstream.models import Denoiser, FlowSchedule, PatchTransformer
from tests.media_toys import SHAPE, SOLVED, measure, method, toy, write_study

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a target of two blocks, the fewest that a cache is for."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    network = PatchTransformer(1, 1, (1, 2, 2), 8, 2, 2, num_classes=2)
    torch.nn.init.normal_(network.write.weight, std=0.3)
    Denoiser(network, FlowSchedule(), SHAPE).save(folder / "target")
    MediaProcessor("video", classes=("a", "b")).save(folder / "target")
    return folder


def test_what_approximates_is_given_the_target_at_as_many_steps() -> None:
    cache = StepCache("cache")
    euler, ab2 = equal_rounds([cache], [14.4, 14.1, 6.6, 0.2])
    assert (euler.name, ab2.name) == ("Euler", "AB2")
    assert isinstance(euler.solver, Euler) and isinstance(ab2.solver, AdamsBashforth2)
    assert euler.num_steps == ab2.num_steps == [1, 7, 14]


def test_steps_that_a_study_has_are_not_drawn_again() -> None:
    own = [
        SolverSteps("mine", Euler(), [7, 25]),
        SolverSteps("more", Euler(), [14]),
        SolverSteps("DPM", DPMSolver2M(), [7, 14]),  # another solver is no baseline
        SolverSteps("two", AdamsBashforth2(), [14]),
        AcceptByError("error"),
    ]
    mine, two = equal_rounds(own, [7.0, 14.0, 9.0])
    assert (mine.name, mine.num_steps) == ("mine", [9])
    assert (two.name, two.num_steps) == ("two", [7, 9])
    assert equal_rounds(own[:4], []) == []


def test_a_cache_alone_is_shown_with_its_cost_and_what_it_has_to_beat(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    solvers = [
        method("SolverSteps", "Euler", num_steps=[3]),
        method("StepCache", "cache", tolerances=[-1.0, 1e9], window=4),
    ]
    config = write_study(
        tmp_path, toy(models), [], solvers=solvers, solver_steps=10, reference_steps=12
    )
    words = ["--study.only_methods", "[cache]"]
    rows = measure(config, tmp_path / "toy.json", capsys, *words)
    names = ["cache -1", "cache 1e+09", "Euler 3", "Euler 10", "AB2 3", "AB2 10"]
    assert [row["method"] for row in rows] == names
    found = {row["method"]: row for row in rows}
    # of 10 steps the target takes the first, the one after 4 that are skipped, and the last
    assert (found["cache 1e+09"]["rounds"], found["cache 1e+09"]["draft_passes"]) == (3, 7)
    assert found["cache -1"]["rounds"] == 10
    assert found["cache -1"]["draft_passes"] == 8  # none before the first step and the last
    assert found["Euler 3"]["draft_passes"] == found["AB2 10"]["draft_passes"] == 0
    assert all(row["seconds_in_batch"] > 0 and row["batch_size"] == SOLVED for row in rows)
    [table] = make_tables(rows)
    headings = [column.heading for column in table.columns]
    assert {"draft passes", "ms in batch"} <= set(headings) and f"; batch {SOLVED})" in table.title


def test_passes_of_the_first_block_are_counted_where_it_drafts(models: Path) -> None:
    loaded = MediaModels(str(models / "target"), "cpu")
    pipeline = FreeDraft("f", "first-block", 3).pipeline(loaded, MediaSetting(8, 1.0, 1.0, 2))
    pipeline.complete(2, loaded.condition([0, 1]), seed=0)
    drafted = pipeline.stats.target_rows - pipeline.stats.full_rounds
    assert draft_passes(pipeline) == drafted / 2 > 0


def test_older_files_of_solvers_are_shown_without_empty_columns() -> None:
    rows = json.loads((ROOT / "docs/results/media-digits.json").read_text())
    old = [row for row in rows if row["study"] == "solvers"]
    new = ("draft_passes", "seconds_in_batch", "batch_size")
    [table] = make_tables([{k: v for k, v in row.items() if k not in new} for row in old])
    headings = [column.heading for column in table.columns]
    assert "PSNR, dB" in headings and not {"draft passes", "ms in batch"} & set(headings)
    assert "batch" not in table.title
