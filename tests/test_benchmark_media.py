"""The tables of media: rounds, laws and seconds of drafted steps, and the errors of solvers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from specstream.benchmark import (
    AcceptByError,
    EqualRounds,
    FreeDraft,
    MediaStudy,
    MediaTask,
    PlainSteps,
    Refined,
    TrainedDraft,
)
from specstream.benchmark.cells import markdown
from specstream.benchmark.command import check_place, main
from specstream.benchmark.media_methods import MediaModels, MediaSetting
from specstream.benchmark.readme import render
from specstream.benchmark.results_page import read_results, render_page
from specstream.benchmark.tables import make_tables
from specstream.generation.denoising import DenoisingPipeline
from specstream.generation.lengths import CostModelLength
from specstream.generation.media_loading import SamplerOptions, load_media_run
from specstream.generation.solvers import AdamsBashforth2, SolverPipeline
from specstream.media_processor import MediaProcessor
from specstream.metrics import energy_distance, feature_distances, psnr
from specstream.models import Denoiser, FlowSchedule, PatchTransformer
from specstream.models.denoiser import load_denoiser
from tests.media_toys import (
    FREE,
    PLAIN,
    SAMPLES,
    SHAPE,
    SOLVED,
    STEPS,
    Flickers,
    block,
    measure,
    method,
    save_models,
    toy,
    write_study,
)  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))


def every_method(models: Path) -> list[dict[str, Any]]:
    solver = block("generation.solvers.AdamsBashforth2")
    return [
        method("PlainSteps", "half", num_steps=STEPS // 2),
        PLAIN,  # not the first here, but in the table
        FREE,
        method("FreeDraft", "velocity", draft="velocity", window=2),
        method("TrainedDraft", "residual", run=str(models / "residual"), window=4),
        method("TrainedDraft", "window", run=str(models / "window"), window=4),
        method("TrainedDraft", "small", run=str(models / "small"), window=4),
        method("EqualRounds", "same", method="free"),
        method("EqualRounds", "ode", method="free", eta=0.0),
        method("EqualRounds", "ab2", method="free", eta=0.0, solver=solver),
    ]


def test_every_way_to_draw_gets_a_row_of_costs_and_laws(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results, configs = tmp_path / "docs/results", tmp_path / "configs"
    configs.mkdir()
    config = write_study(tmp_path, toy(models), every_method(models))
    rows = measure(config, results / "toy.json", capsys)
    found = {row["method"]: row for row in rows}
    assert next(iter(found)) == "plain" and len(found) == 10
    plain = found["plain"]
    assert plain["rounds"] == plain["target_rows"] == STEPS and plain["round_ratio"] == 1
    assert found["half"]["rounds"] == STEPS // 2 and found["half"]["round_ratio"] == 2
    for name in ("free", "velocity", "residual", "window", "small"):
        row = found[name]
        assert row["guarantee"] == "exact law" and 0 < row["acceptance"] <= 1
        assert 1 < row["rounds"] <= STEPS <= row["target_rows"]
        assert row["round_ratio"] == pytest.approx(STEPS / row["rounds"], rel=1e-4)
        assert row["draft_calls"] <= row["rounds"] and row["alphas"]
    assert found["free"]["draft_passes"] == found["velocity"]["draft_passes"] == 0
    assert found["window"]["draft_passes"] == found["window"]["draft_calls"] > 0
    for name in ("residual", "small"):  # a pass for each drafted state
        drafted = found[name]["target_rows"] - found[name]["rounds"]
        assert found[name]["draft_passes"] == pytest.approx(drafted, rel=1e-4)
    for name, eta in (("same", 1.0), ("ode", 0.0), ("ab2", 0.0)):
        assert found[name]["rounds"] == round(found["free"]["rounds"]) and found[name]["eta"] == eta
    for row in rows:
        assert 0 < row["plain_p_value"] <= 1 and row["temporal_consistency"] > 0
        assert min(row["seconds_alone"], row["seconds_in_batch"]) > 0
    assert (results / "toy-rounds.png").is_file() and (results / "toy-alpha.png").is_file()
    files = read_results(results)
    page = render_page(files, "README.md")
    assert f"**toy, {STEPS} steps, eta 1 ({SAMPLES} samples, " in page
    assert "| method | steps | eta | rounds | fewer rounds |" in page
    assert "(toy-rounds.png)" in page
    few = min((row for row in rows if "draft" in row["kind"]), key=lambda row: row["rounds"])
    said = f"| toy, {STEPS} steps, eta 1 | {few['method']} | exact law | {few['rounds']:.2f} ("
    assert said in render(files, configs, tmp_path)


def test_a_row_says_what_became_int8_and_of_which_law_it_is(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"run": str(models / "residual"), "window": 4}
    methods = [
        PLAIN,
        method("TrainedDraft", "both", quantize="both", **options),
        method("TrainedDraft", "coarse", quantize="drafter", **options),
        method("TrainedDraft", "as it is", **options),
        method("EqualRounds", "same", method="both"),
    ]
    rows = measure(write_study(tmp_path, toy(models), methods), tmp_path / "toy.json", capsys)
    found = {row["method"]: row for row in rows}
    assert [found[name]["bytes_ratio"] for name in ("plain", "as it is", "same")] == [None] * 3
    assert found["both"]["law"] == "the target's (target in int8)"
    assert {found[name]["law"] for name in found if name != "both"} == {"the target's"}
    target = MediaModels(str(models / "target"), "cpu")
    drafter = target.drafter(options["run"], 1.0)
    numbers, held = 0, 0
    for model, name in ((drafter, "coarse"), (target.target, "both")):
        weights = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
        numbers += sum(weight.numel() for weight in weights)
        held += sum(weight.numel() + 5 * len(weight) for weight in weights)
        assert found[name]["bytes_ratio"] == pytest.approx(held / numbers / 2, rel=1e-4)
    table = markdown(make_tables(rows)[0])
    assert "| int8 / bf16 bytes |" in table and "| exact law of the target's (target in" in table
    with pytest.raises(ValueError, match="'none': quantize_method says how quantize converts"):
        TrainedDraft("none", options["run"], quantize_method="int8_dynamic")


def test_a_row_is_of_what_the_pipeline_drew(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Recount the rounds and the distances of a drafted row, and of plain beside plain."""
    plain, free = measure(
        write_study(tmp_path, toy(models), [PLAIN, FREE]), tmp_path / "toy.json", capsys
    )
    target, loaded = load_denoiser(models / "target"), MediaModels(str(models / "target"), "cpu")
    first, classes = (loaded.condition(loaded.prompts(SAMPLES, seed)) for seed in (0, 1))
    held_out = MediaTask("toy", str(models / "target"), Flickers(), validation_fraction=0.5)
    data = held_out.held_out().states
    assert 0 < len(data) == free["num_held_out"] < 30
    other = DenoisingPipeline(target, STEPS).complete(SAMPLES, first, seed=0)
    again = DenoisingPipeline(target, STEPS).complete(SAMPLES, classes, seed=1)
    drafted = load_media_run(
        models / "target", SamplerOptions(num_steps=STEPS, free_draft="estimate", window=4)
    )
    samples = drafted.pipeline.complete(SAMPLES, classes, seed=1)
    assert free["rounds"] == pytest.approx(drafted.pipeline.stats.full_rounds / SAMPLES, rel=1e-4)
    for row, own in ((plain, again), (free, samples)):
        expected = energy_distance(own, other)
        assert row["plain_distance"] == pytest.approx(expected, rel=1e-3, abs=1e-5)
        expected = energy_distance(own, data)
        assert row["data_distance"] == pytest.approx(expected, rel=1e-3, abs=1e-5)
        features = feature_distances(own, data)
        assert row["kernel_distance"] == pytest.approx(features.kernel, rel=1e-3, abs=1e-6)
        assert row["kernel_spread"] == pytest.approx(features.kernel_spread, rel=1e-3) != 0


def test_classes_are_drawn_alike_and_independently_of_one_another(models: Path) -> None:
    """Equal counts would bias the distance of two runs of one sampler below 0."""
    loaded = MediaModels(str(models / "target"), "cpu")
    found = [loaded.prompts(400, seed) for seed in (0, 1)]
    assert found[0] == loaded.prompts(400, 0) != found[1]
    assert all(set(classes) == {0, 1} and 0 < abs(sum(classes) - 200) < 40 for classes in found)
    same = sum(one == other for one, other in zip(*found, strict=True))
    assert abs(same - 200) < 40


def test_samples_of_another_law_are_found_out(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One step makes other samples than eight: the test has to tell them apart."""
    task = toy(models, num_samples=40)
    methods = [PLAIN, method("PlainSteps", "one", num_steps=1)]
    rows = measure(write_study(tmp_path, task, methods), tmp_path / "toy.json", capsys)
    assert rows[1]["plain_p_value"] == 0.05 and rows[1]["plain_distance"] > 0
    assert rows[1]["plain_distance"] > 3 * abs(rows[0]["plain_distance"])


def test_solvers_are_held_beside_the_solution_of_their_noise(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    multistep = {"class_path": "specstream.generation.solvers.AdamsBashforth2"}
    solvers = [
        method("SolverSteps", "Euler", num_steps=[4, 16, 40]),
        method("AcceptByError", "error", order=1, tolerances=[0.0, 1e9], window=4),
        method("Picard", "Picard", tolerances=[0.0], window=4),
        method("Picard", "Picard, AB2", tolerances=[0.0], window=4, solver=multistep),
    ]
    config = write_study(
        tmp_path, toy(models), [], solvers=solvers, solver_steps=10, reference_steps=40
    )
    rows = measure(config, tmp_path / "docs/results/toy.json", capsys)
    found = {row["method"]: row for row in rows}
    names = ["Euler 4", "Euler 16", "Euler 40", "error 0", "error 1e+09", "Picard 0"]
    assert list(found)[:7] == [*names, "Picard, AB2 0"]
    approximate = [row for row in rows[3:7] if row["guarantee"] == "bounded error"]
    equal = {max(round(row["rounds"]), 1) for row in approximate}
    assert len(approximate) == 4 and 4 not in equal  # which Euler has by itself
    wanted = [f"{name} {steps}" for name in ("Euler", "AB2") for steps in sorted(equal)]
    assert list(found)[7:] == wanted and len(rows) == 7 + len(wanted)
    assert found["Euler 40"]["psnr"] is None  # the solution itself
    assert found["Euler 4"]["psnr"] < found["Euler 16"]["psnr"]
    assert [found[f"Euler {n}"]["rounds"] for n in (4, 16, 40)] == [4, 16, 40]
    assert found["error 1e+09"]["rounds"] < 10 and found["error 0"]["rounds"] <= 10
    target, loaded = load_denoiser(models / "target"), MediaModels(str(models / "target"), "cpu")
    classes = loaded.condition(loaded.prompts(SOLVED, 0))
    solution, ten = (
        DenoisingPipeline(target, steps, 0.0).complete(SOLVED, classes, seed=0)
        for steps in (40, 10)
    )
    better = SolverPipeline(target, 10, AdamsBashforth2()).complete(SOLVED, classes, seed=0)
    for name, right in (("error 0", better), ("Picard 0", ten), ("Picard, AB2 0", better)):
        # nothing may differ from the 10 steps
        assert found[name]["psnr"] == pytest.approx(psnr(right, solution), abs=0.1)
    assert found["Picard 0"]["guarantee"] == "bounded error"
    assert (tmp_path / "docs/results/toy-psnr.png").is_file()


def test_what_is_missing_is_refused_or_left_out_in_one_line(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = method("TrainedDraft", "gone", run=str(models / "gone"))
    begun = method("TrainedDraft", "begun", run=str(models / "target"))
    after = method("EqualRounds", "after", method="gone")
    config = write_study(tmp_path, toy(models), [PLAIN, gone, begun, after])
    output = tmp_path / "toy.json"
    assert main(["--config", config, "--output", str(output)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and f"'gone': there is no folder '{models}/gone'" in lines[0]
    assert "skip_missing: true leaves it out" in lines[0] and not output.exists()
    assert main(["--config", config, "--output", str(output), "--study.skip_missing", "true"]) == 0
    shown = capsys.readouterr()
    assert [row["method"] for row in json.loads(shown.out.splitlines()[-1])] == ["plain"]
    assert "left out: toy: method 'begun'" in shown.err and "no finished drafter" in shown.err
    assert "method 'after': 'gone' was not measured before it" in shown.err


def test_mistakes_are_one_line(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal(*methods: dict[str, Any], words: Sequence[str] = (), **options: Any) -> str:
        config = write_study(tmp_path, toy(models, **options), methods or [PLAIN])
        output = str(tmp_path / "never.json")
        assert main(["--config", config, "--output", output, *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()  # nothing was measured before
        return line

    assert "there is no task 'x'; there are toy" in refusal(words=["--study.only_tasks", "[x]"])
    assert "there is no diffusion model in" in refusal(target=str(models / "none"))
    assert "etas must be above 0" in refusal(etas=[0.0])
    assert "num_steps must be at least 2" in refusal(num_steps=[1])
    assert "validation_fraction must be above 0" in refusal(validation_fraction=0.0)
    assert "no PlainSteps method without options" in refusal(FREE)
    data = {"class_path": "tests.media_toys.Flickers", "init_args": {"size": 6}}
    assert "the target's states are [1, 2, 4, 4], the data's [1, 2, 6, 6]" in refusal(data=data)
    told = MediaProcessor("video", text_size=4)
    told.save(models / "told")
    load_denoiser(models / "target").save(models / "told")
    assert "is asked by texts of 4 numbers; the data has none" in refusal(
        target=str(models / "told")
    )
    alone = MediaProcessor("video")
    alone.save(models / "alone")
    Denoiser(PatchTransformer(1, 1, (1, 2, 2), 8, 1, 2), FlowSchedule(), SHAPE).save(
        models / "alone"
    )
    assert "guidance is the weight of a prompt, and its target takes none" in refusal(
        target=str(models / "alone"), guidance=2.0
    )
    long = method("TrainedDraft", "long", run=str(models / "window"), window=5)
    assert "guesses 4 steps at once, not 5" in refusal(PLAIN, long)


def test_solvers_are_built_before_anything_is_measured(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, late = tmp_path / "never.json", method("Picard", "late", window=0)
    config = write_study(tmp_path, toy(models), [PLAIN], solvers=[late])
    assert main(["--config", config, "--output", str(output)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "error: window must be in 1..64, got 0" and not output.exists()


def test_results_go_into_a_json_file_of_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "x.json").mkdir()
    for output, line in (
        ("study.yaml", "'.*study.yaml' is not named as a .json file"),
        ("file/x.json", "'.*file' is no folder"),
        ("file/far/x.json", "'.*file' is no folder"),
        ("x.json", "'.*x.json' is a folder, not a file"),
    ):
        with pytest.raises(ValueError, match=f"^config error: output: {line}$"):
            check_place(tmp_path / output)
    check_place(tmp_path / "new" / "y.json")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(ValueError, match=f"output: no permission to write in '{tmp_path}'"):
        check_place(tmp_path / "new" / "y.json")


def test_samples_that_are_no_numbers_get_no_row(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    solver = method("SolverSteps", "Euler", num_steps=[4])
    output, task = tmp_path / "never.json", toy(models, guidance=1e300)
    for methods, solvers in (([PLAIN], []), ([], [solver])):
        config = write_study(
            tmp_path, task, methods, solvers=solvers, solver_steps=4, reference_steps=4
        )
        assert main(["--config", config, "--output", str(output)]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("error: toy: the samples of ") and "not finite" in line
        assert not output.exists()


def test_options_are_checked_where_they_are_given(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a solver is of the sampler with eta 0"):
        EqualRounds("x", "free", solver=AdamsBashforth2())
    gone = MediaTask("gone", str(tmp_path / "gone"), Flickers())
    for name in ("num_samples", "num_solved", "batch_size"):
        with pytest.raises(ValueError, match=f"{name} must be at most 100000, got 1000000000"):
            replace(gone, **{name: 10**9}).check()
    for guidance in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"guidance must be a finite number, got {guidance}"):
            replace(gone, guidance=guidance).check()
    for name in ("num_permutations", "timed_samples", "repeats"):
        with pytest.raises(ValueError, match=f"{name} must be at most 100000, got 1000000000"):
            MediaStudy([gone], [PlainSteps()], **{name: 10**9}).check()
    with pytest.raises(ValueError, match=r"method 'x': eta must be in \[0, 1\], got 3.0"):
        EqualRounds("x", "free", eta=3.0)
    for name in ("nobody", "free"):  # what stands behind a method was not measured before it
        methods = [PlainSteps(), EqualRounds("x", name), FreeDraft("free")]
        with pytest.raises(ValueError, match=f"'x': there is no method '{name}' before it; there"):
            MediaStudy([gone], methods, skip_missing=True).check()
    with pytest.raises(ValueError, match="must be at least 1"):
        MediaStudy([gone], [PlainSteps()], repeats=0).check()
    with pytest.raises(ValueError, match=r"'no' is no folder of one \(skip_missing: true"):
        MediaStudy([gone], [PlainSteps()], clip_model="no").check()
    with pytest.raises(ValueError, match="no task is left"):
        MediaStudy([gone], [], skip_missing=True).check()


def test_what_a_target_and_its_data_do_not_allow_is_refused(models: Path) -> None:
    loaded, setting = MediaModels(str(models / "target"), "cpu"), MediaSetting(STEPS, 1.0)
    task = MediaTask("toy", str(models / "target"), Flickers(), validation_fraction=1e-9)
    with pytest.raises(ValueError, match="'toy': training held out 0 samples, and the laws of two"):
        task.check_target(loaded, task.held_out())
    with pytest.raises(ValueError, match="no method or solver is left to measure"):
        MediaStudy([task], []).check()
    for window in (-1, 65):
        with pytest.raises(ValueError, match=f"window must be in 0..64, got {window}"):
            FreeDraft("far", window=window).pipeline(loaded, setting)
        with pytest.raises(ValueError, match=f"window must be in 0..64, got {window}"):
            list(AcceptByError("far", window=window).points(loaded, setting))
    with pytest.raises(ValueError, match="refinement_threshold must be a finite number, got nan"):
        Refined("vague", threshold=float("nan")).pipeline(loaded, setting)


def test_a_window_may_be_left_to_measured_costs(models: Path) -> None:
    loaded, setting = MediaModels(str(models / "target"), "cpu"), MediaSetting(STEPS, 1.0)
    free = FreeDraft("free", window="auto").pipeline(loaded, setting)
    assert free.lengths == CostModelLength(STEPS - 1, 2)  # the last step is the target's own
    window = TrainedDraft("window", str(models / "window"), "auto").pipeline(loaded, setting)
    assert window.lengths == CostModelLength(4, 2)  # no more than the drafter can
