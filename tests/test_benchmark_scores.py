"""Differences of quality have intervals over prompts, and equal quality is compared by calls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specstream.benchmark.cells import markdown
from specstream.benchmark.masked_judge import CausalJudge
from specstream.benchmark.masked_methods import DrafterAlone, Filling, MaskedModels
from specstream.benchmark.masked_prompts import CanvasQuestion
from specstream.benchmark.masked_rows import MaskedRowMaker
from specstream.benchmark.masked_scores import Judged, matched
from specstream.benchmark.masked_tables import above_plain
from specstream.benchmark.paired_scores import Scores, difference
from specstream.benchmark.pareto import Point, lies_above, on_curve
from specstream.benchmark.rows import MatchedQuality, describe_machine, read_rows
from specstream.benchmark.tables import make_tables
from specstream.benchmark.timing import Measured
from specstream.drafters import MaskedDraftModel
from specstream.drafters.loading import save_drafter
from specstream.generation import DualDiffusionPipeline, FixedLength, Limits
from specstream.processors import TextProcessor
from specstream.sampling import Sampling
from specstream.unmasking import Threshold
from specstream.verification import NoVerification
from tests import test_benchmark_masked as shared
from tests.test_benchmark_masked import MASKS, PLAIN, block, measure, plain, puzzles, static

RESULTS = Path(__file__).resolve().parents[1] / "docs/results/masked.json"
models = shared.models


def scores(values: Any, weights: Any = 1.0) -> Scores:
    found = np.asarray(values, dtype=float)
    return Scores(found, np.broadcast_to(weights, found.shape).astype(float))


def test_a_difference_is_paired_and_its_interval_covers_it() -> None:
    hard = np.random.default_rng(1).normal(size=200) * 50  # of a prompt, the same for both
    noise = np.random.default_rng(2).normal(size=200)
    found = difference(scores(hard + 1 + noise), [(scores(hard), 1.0)])
    assert found.mean == pytest.approx(1 + noise.mean())
    low, high = found.interval
    assert low < found.mean < high and high - low == pytest.approx(4 / 200**0.5, rel=0.2)
    assert found.is_above is True
    assert difference(scores(hard), [(scores(hard + 1 + noise), 1.0)]).is_above is False
    assert difference(scores(hard + noise), [(scores(hard), 1.0)]).is_above == "level"
    assert difference(scores(hard), [(scores(hard), 1.0)]).is_above == "level"


def test_a_judges_score_is_a_mean_over_tokens_and_a_curve_a_mean_of_two() -> None:
    ours = scores([-4.0, -1.0], [2.0, 3.0])
    assert ours.mean == -1.0
    left, right = scores([-4.0, -6.0], [2.0, 2.0]), scores([-2.0, 0.0], [2.0, 2.0])
    found = difference(ours, [(left, 0.25), (right, 0.75)])
    assert found.mean == pytest.approx(-1.0 - (0.25 * -2.5 + 0.75 * -0.5))


def test_a_curve_is_the_mean_of_the_points_beside_a_cost() -> None:
    steps = [Point(16, 0.9), Point(4, 0.5), Point(1, 0.1), Point(5, 0.4)]
    shares = {point.quality: share for point, share in on_curve(2, steps)}
    assert shares == {0.1: pytest.approx(0.5), 0.5: pytest.approx(0.5)}
    assert on_curve(0.5, steps) == [(Point(1, 0.1), 1.0)]
    assert on_curve(16, steps) == on_curve(99, steps) == [(Point(16, 0.9), 1.0)]
    assert lies_above(Point(2, 0.31), steps) is True


def test_equal_quality_is_read_off_the_line_between_neighbours() -> None:
    curve = [Judged(8, 3.0, 2.0), Judged(16, 2.0, 1.0), Judged(32, 1.9, 1.2)]
    assert matched(Judged(4, 2.5, 9.0), curve) == MatchedQuality("reached", 12.0, 3.0, 1.5)
    assert matched(Judged(4, 3.0, 9.0), curve).matched_passes == 8.0
    for nll in (3.01, 1.89):
        assert matched(Judged(4, nll, 9.0), curve) == MatchedQuality("beyond the curve")


def test_above_is_said_only_where_the_interval_excludes_zero() -> None:
    def said(calls: object, seconds: object) -> str:
        return above_plain({"kind": "nested", "above_plain": calls, "above_plain_seconds": seconds})

    assert said(True, "level") == "calls, time level"
    assert said(False, False) == "no" and said(None, True) == "time, calls?"
    assert above_plain({"kind": "plain"}) == ""


def test_results_from_before_there_were_intervals_still_make_tables() -> None:
    rows = [
        {name: value for name, value in row.items() if "matched" not in name}
        for row in read_rows(RESULTS)
    ]
    for row in rows:
        for name in ("quality_difference", "quality_interval"):
            row.pop(name, None)
    for table in make_tables(rows):
        assert "better than all steps" not in markdown(table)
        assert table.is_plotted


def random(num_steps: int) -> dict[str, Any]:
    return block("unmasking.StaticSchedule", num_steps=num_steps, order="random")


def test_a_table_says_how_much_better_and_at_how_many_calls_plain_sampling_is_as_good(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = puzzles(
        models, quality=None, judge=str(models / "judge"), samplings=[{"temperature": 1.0}]
    )
    own = {"run": str(models / "self"), "num_windows": 2}
    methods = [plain(f"random {n}", random(n)) for n in (MASKS, 2, 1)]
    methods += [PLAIN[2], block("benchmark.SelfSpeculative", name="self", **own)]
    config = shared.write_study(tmp_path, task, methods)
    rows = measure(config, tmp_path / "toy.json", capsys)
    assert rows[0]["quality_difference"] is rows[0]["quality_interval"] is None
    for row in rows[1:]:
        gap = rows[0]["judge_nll"] - row["judge_nll"]
        assert row["quality_difference"] == pytest.approx(gap, abs=1e-5)
        low, high = row["quality_interval"]
        assert low <= gap + 1e-5 and high >= gap - 1e-5
    assert [row["matched"] is None for row in rows] == [True] * 4 + [False]
    judged = [Judged(r["full_passes"], r["judge_nll"], r["entropy"]) for r in rows]
    expected = matched(judged[4], judged[:3])
    assert rows[4]["matched"] == expected.matched
    if expected.matched_passes is not None:
        assert rows[4]["matched_passes"] == pytest.approx(expected.matched_passes, rel=1e-4)
    last = make_tables(rows)[-1]
    assert not last.is_plotted and [row["method"] for row in last.rows] == ["self"]
    assert "random order with the same judge NLL" in last.title
    words = (
        "beyond the curve" if expected.matched_ratio is None else f"{expected.matched_ratio:.2f}x"
    )
    assert words in markdown(last)


def test_lengths_are_chosen_by_costs_that_were_measured_before_the_clock_runs(
    models: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    lengths = block("generation.CostModelLength", max_tokens=2)
    methods = [
        *PLAIN,
        block("benchmark.NestedSteps", name="nested", unmasking=static(MASKS), lengths=lengths),
        block("benchmark.DraftAndVerify", name="pair", run=str(models / "run"), lengths=lengths),
    ]
    config = shared.write_study(tmp_path, puzzles(models), methods, warmups=0)
    rows = measure(config, tmp_path / "toy.json", capsys)
    assert [row["method"] for row in rows[3:]] == ["nested", "pair"]
    assert rows[3]["identical_share"] == 1
    tables = list((tmp_path / "cache").rglob("*.json"))
    assert len(tables) == 2 and all(json.loads(table.read_text()) for table in tables)


def test_a_drafter_alone_fills_in_one_round_what_it_fills_step_by_step(models: Path) -> None:
    shown = MaskedModels(str(models / "target"), "float32", "cpu")
    filling = Filling(Sampling(0.0), Limits(MASKS, ignore_eos=True))
    prompts = ["12=", "3+4*"]
    alone = DrafterAlone("alone", str(models / "run")).pipeline(shown, filling)
    slow = DualDiffusionPipeline(
        shown.target, shown.drafter(str(models / "run"), None), shown.processor,
        NoVerification(), FixedLength(1), sampler=alone.sampler,
    )  # fmt: skip
    found = [[c.tokens for c in pipeline.complete(prompts, seed=0)] for pipeline in (alone, slow)]
    assert found[0] == found[1]
    assert alone.stats.draft_calls == len(prompts) < slow.stats.draft_calls
    assert alone.stats.target_calls == 0


def test_a_drafter_alone_is_asked_for_what_it_is_not_sure_of(models: Path, tmp_path: Path) -> None:
    shown = MaskedModels(str(models / "target"), "float32", "cpu")
    drafter = shown.drafter(str(models / "run"), None)
    assert isinstance(drafter, MaskedDraftModel)
    choosy = MaskedDraftModel(shown.target, lambda: drafter.model, Threshold(0.9), sure=1.0)
    processor = TextProcessor.from_pretrained(str(models / "target"))
    save_drafter(tmp_path / "draft", choosy, processor, str(models / "target"))
    filling = Filling(Sampling(0.0), Limits(MASKS))
    alone = DrafterAlone("alone", str(tmp_path)).pipeline(shown, filling)
    assert len(alone.complete(["12="], seed=0)) == 1
    assert alone.stats.target_calls == 0


def test_a_judge_that_was_given_nothing_to_read_says_so(models: Path) -> None:
    maker = MaskedRowMaker(
        "toy", "", TextProcessor.from_pretrained(str(models / "judge")),
        [CanvasQuestion([], "")], None, CausalJudge(str(models / "judge"), "cpu"),
        Filling(Sampling(), Limits(MASKS)), describe_machine("cpu", "float32", []),
    )  # fmt: skip
    with pytest.raises(ValueError, match="task 'toy': a method left every text empty"):
        maker.samples(Measured(None, np.zeros((1, 1)), [[]]))  # type: ignore[arg-type]
