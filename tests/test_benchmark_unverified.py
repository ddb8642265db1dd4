"""What promises no law stands beside the target's own steps; targets that are asked by text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from specstream.benchmark import EqualSeconds, MediaTask, Refined, Student, timing
from specstream.benchmark.command import main
from specstream.benchmark.media_cells import over_equal_seconds
from specstream.benchmark.media_counts import draft_passes, target_rounds
from specstream.benchmark.media_methods import MediaModels, MediaSetting
from specstream.benchmark.media_rows import MediaRowMaker
from specstream.benchmark.media_seconds import equal_seconds
from specstream.benchmark.rows import describe_machine
from specstream.data import MediaDataModule, Tones
from specstream.data.media_sources import Samples
from specstream.data.text_vectors import text_vector
from specstream.drafters import IndependentDenoiser
from specstream.drafters.state_loading import save_state_drafter
from specstream.generation.denoising import DenoisingPipeline
from specstream.media_processor import MediaProcessor
from specstream.models import Denoiser, FlowSchedule, PatchTransformer
from specstream.models.consistency import ConsistencyModel
from specstream.models.denoiser import load_denoiser
from specstream.spectrogram import LogMel
from specstream.structures import Guarantee, Stats
from tests.media_toys import (
    PLAIN,
    SAMPLES,
    SHAPE,
    STEPS,
    Flickers,
    measure,
    method,
    network,
    save_models,
    toy,
    write_study,
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))


@dataclass(frozen=True)
class ToldFlickers(Flickers):
    """The same videos, each with one of two texts."""

    def samples(self) -> Samples:
        states = super().samples().states
        texts = torch.stack([text_vector(name, 4) for name in ("cat", "dog")])
        return Samples(states, text=texts[torch.arange(len(states)) % 2])

    @property
    def processor(self) -> MediaProcessor:
        return MediaProcessor("video", text_size=4)


def test_a_refinement_is_never_shown_without_the_plain_target_at_its_cost(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refined = method("Refined", "refined", draft_steps=2, main_steps=4, strength=0.5)
    small = method("Refined", "small", draft_steps=2, main_steps=4, run=str(models / "small"))
    config = write_study(tmp_path, toy(models), [refined, small, PLAIN])
    words = ["--study.only_methods", "[plain, refined, small]"]
    rows = measure(config, tmp_path / "docs/results/toy.json", capsys, *words)
    found = {row["method"]: row for row in rows}
    names = [f"{prefix}{name}" for name in ("refined", "small")
             for prefix in ("", "as many calls as ", "as many seconds as ")]  # fmt: skip
    assert list(found) == ["plain", *names]
    # the ends of a video are always refined: a draft of two steps, a score, half of four steps
    assert found["refined"]["rounds"] == found["refined"]["target_rows"] == 5
    assert found["small"]["rounds"] == 3 and found["small"]["draft_passes"] == 2
    assert found["refined"]["draft_passes"] == 0
    for name in ("refined", "small"):
        row, same = found[name], found[f"as many calls as {name}"]
        assert row["guarantee"] == "heuristic" and not row["alphas"] and row["eta"] == 0
        assert (same["num_steps"], same["eta"]) == (row["rounds"], 0)
        seconds = found[f"as many seconds as {name}"]
        assert same["rounds"] == row["rounds"] and seconds["eta"] == 0
        ratio = seconds["seconds_in_batch"] / row["seconds_in_batch"]
        assert seconds["seconds_ratio"] == pytest.approx(ratio, rel=1e-4)
        assert row["seconds_ratio"] is same["seconds_ratio"] is None
    assert (tmp_path / "docs/results/toy-rounds.png").is_file()


def test_a_student_stands_beside_the_plain_target_of_as_many_calls(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = load_denoiser(models / "target")
    student = ConsistencyModel(network(), target.schedule, SHAPE, num_steps=STEPS)
    save_state_drafter(tmp_path / "student", IndependentDenoiser(student), target)
    two = method("Student", "two", run=str(tmp_path / "student"), num_steps=2)
    config = write_study(tmp_path, toy(models), [PLAIN, two])
    rows = measure(config, tmp_path / "docs/results/toy.json", capsys)
    plain, own, same, _ = rows
    assert [row["kind"] for row in rows] == ["plain", "student", "equal rounds", "equal seconds"]
    assert own["rounds"] == own["target_rows"] == own["draft_calls"] == 0
    assert own["round_ratio"] is None and own["draft_passes"] == own["num_steps"] == 2
    assert own["guarantee"] == "heuristic" and own["eta"] == same["eta"] == 0
    assert same["rounds"] == same["num_steps"] == 2 and plain["num_steps"] == STEPS
    config = write_study(tmp_path, toy(models, guidance=2.0), [PLAIN, two])
    assert main(["--config", config, "--output", str(tmp_path / "never.json")]) == 2
    (line,) = capsys.readouterr().err.splitlines()  # nothing was measured before
    assert "method 'two': the student has learned guidance 1, and the task's is 2" in line
    loaded = MediaModels(str(models / "target"), "cpu")
    with pytest.raises(ValueError, match="has learned guidance 1, and the task's is 2"):
        Student("s", str(tmp_path / "student")).pipeline(loaded, MediaSetting(STEPS, 1.0, 2.0))
    with pytest.raises(ValueError, match="holds no student of few steps"):
        Student("s", str(models / "small")).pipeline(loaded, MediaSetting(STEPS, 1.0))


def test_equal_seconds_are_those_of_as_many_plain_steps() -> None:
    setting = MediaSetting(50, 1.0, rounds={"x": 9.0, "y": 1.0}, shares={"x": 0.3, "y": 0.001})
    assert [EqualSeconds("e", name).num_steps(setting) for name in ("x", "y")] == [15, 1]
    assert "was not measured before it" in str(EqualSeconds("e", "z").refusal(setting))


class TakesSeconds:
    """A sampler that moves a clock by its own seconds, and by more in a few of its runs."""

    def __init__(self, seconds: float, clock: list[float]) -> None:
        self.seconds, self.clock, self.runs = seconds, clock, 0
        self.stats = Stats("media", Guarantee.EXACT_LAW)

    def complete(self, num_samples: int, *given: object, **options: object) -> None:
        self.runs += 1
        self.clock[0] += self.seconds * (9 if self.runs % 3 == 0 else 1)


@pytest.mark.parametrize("guess", [0.02, 0.2, 1.0])
def test_equal_seconds_are_found_in_turns_whatever_was_guessed_before(
    monkeypatch: pytest.MonkeyPatch, guess: float
) -> None:
    """A run of n plain steps takes n + 2 seconds, the other method 12.3: ten steps are nearest."""
    clock, asked = [0.0], []

    class Plain:
        place = "cpu"

        def condition(self, prompts: object) -> dict[str, object]:
            return {}

        def plain(self, setting: MediaSetting, num_steps: int, eta: float) -> TakesSeconds:
            asked.append(num_steps)
            return TakesSeconds(num_steps + 2.0, clock)

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    setting = MediaSetting(50, 1.0, rounds={"x": 9.0}, shares={"x": guess})
    method, models, other = EqualSeconds("e", "x"), Plain(), TakesSeconds(12.3, clock)
    found = equal_seconds(method, other, models, setting, [0, 1], 0, 1)  # type: ignore[arg-type]
    assert method.num_steps(found) == pytest.approx(10, abs=1) and asked[0] == 50 * guess
    assert other.runs == 3 * len(asked) <= 9 and setting.shares == {"x": guess}


def test_rows_whose_seconds_are_not_equal_are_marked() -> None:
    shown = [over_equal_seconds({"seconds_ratio": ratio}) for ratio in (0.9, 1.1, 1.11, 0.78, None)]
    assert shown == ["0.90x", "1.10x", "1.11x (unequal)", "0.78x (unequal)", ""]
    assert over_equal_seconds({}) == ""  # of older files


def test_the_calls_of_a_guided_refinement_are_counted_once(models: Path) -> None:
    loaded = MediaModels(str(models / "target"), "cpu")
    setting = MediaSetting(STEPS, 1.0, guidance=2.0, batch_size=3)
    pipeline = Refined("r", 2, 4, score="appearance", strength=0.5).pipeline(loaded, setting)
    pipeline.complete(3, loaded.condition([0, 1, 1]), seed=0)
    assert pipeline.stats.target_calls == target_rounds(pipeline) == 4  # looks cost no call
    assert pipeline.stats.target_rows == 3 * 4 * 2 and draft_passes(pipeline) == 0


def test_a_refinement_drafts_with_a_diffusion_model_that_is_there(models: Path) -> None:
    assert "there is no folder" in str(Refined("r", run=str(models / "gone")).missing())
    assert "no finished drafter" in str(Refined("r", run=str(models / "target")).missing())
    loaded = MediaModels(str(models / "target"), "cpu")
    with pytest.raises(ValueError, match="only guesses steps"):
        Refined("r", run=str(models / "residual")).pipeline(loaded, MediaSetting(STEPS, 1.0))


def test_a_target_of_texts_is_asked_by_those_of_held_out_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    network = PatchTransformer(1, 1, (1, 2, 2), 8, 1, 2, text_size=4)
    torch.nn.init.normal_(network.write.weight, std=0.3)
    Denoiser(network, FlowSchedule(), SHAPE).save(tmp_path / "target")
    MediaProcessor("video", text_size=4).save(tmp_path / "target")
    data = {"class_path": "tests.test_benchmark_unverified.ToldFlickers"}
    config = write_study(tmp_path, toy(tmp_path, data=data), [PLAIN])
    [row] = measure(config, tmp_path / "toy.json", capsys)
    held_out = MediaTask("toy", "", ToldFlickers(), validation_fraction=0.5).held_out()
    assert held_out.text is not None and row["num_held_out"] == len(held_out.text) < 30
    loaded = MediaModels(str(tmp_path / "target"), "cpu", held_out.text)
    numbers = loaded.prompts(SAMPLES, 1)
    assert set(numbers) <= set(range(len(held_out.text))) and len(set(numbers)) > 4
    drawn = DenoisingPipeline(load_denoiser(tmp_path / "target"), STEPS).complete(
        SAMPLES, {"text": held_out.text[numbers]}, seed=1
    )
    maker = MediaRowMaker(
        "toy", "", MediaSetting(STEPS, 1.0), held_out.states, drawn, 19, None,
        describe_machine("cpu", "float32", []),
    )  # fmt: skip
    assert maker.law(drawn).data_distance == pytest.approx(row["data_distance"], rel=1e-3)
    with pytest.raises(ValueError, match="texts of 4 numbers; the data has vectors of 5 numbers"):
        MediaModels(str(tmp_path / "target"), "cpu", torch.zeros(3, 5))


def test_a_file_of_its_own_is_held_out_whole() -> None:
    whole = MediaTask("toy", "", Flickers(), validation_fraction=1.0).held_out()
    assert torch.equal(whole.states, Flickers().samples().states)
    share = MediaTask("toy", "", Flickers(), validation_fraction=0.5).held_out()
    kept = MediaDataModule(Flickers(), validation_fraction=0.5).numbers(held_out=True)
    assert torch.equal(share.states, whole.states[torch.from_numpy(kept)])


def test_spectrograms_are_also_judged_by_their_average_spectrum() -> None:
    log_mel = LogMel(num_bands=8, num_frames=8, window=128, hop=64, decibels=80)
    sounds = Tones(12, log_mel=log_mel).samples().states
    setting, machine = MediaSetting(STEPS, 1.0), describe_machine("cpu", "float32", [])
    maker = MediaRowMaker("toy", "", setting, sounds, sounds, 19, log_mel, machine)
    assert maker.law(sounds).spectrum_distance == 0
    # 0.1 of -1..1 is 4 of 80 dB
    assert maker.law(sounds + 0.1).spectrum_distance == pytest.approx(4, rel=1e-4)
