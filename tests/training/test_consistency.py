"""Students of few steps: what is learned, what holds without training, and what samples."""

import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from specstream.cli import generate, train
from specstream.data import Digits
from specstream.drafters import IndependentDenoiser
from specstream.drafters.state_loading import load_state_drafter, save_state_drafter
from specstream.generation.consistency import ConsistencyPipeline
from specstream.generation.denoising import DenoisingPipeline
from specstream.models import (
    ConsistencyModel,
    Denoiser,
    DiscreteSchedule,
    FlowSchedule,
    PatchTransformer,
)
from specstream.models.consistency import load_student
from specstream.models.denoiser import load_denoiser
from specstream.models.noise_schedule import NoiseSchedule
from specstream.structures import KnownParts
from specstream.training import ConsistencyModule, HeldOutSampling
from specstream.transitions import Prediction, transition
from tests.denoising_toys import gaussian_model

STEPS = 8


class Lines(nn.Module):
    """A line in the state for each level of a flow of `STEPS` steps: what a Gaussian needs."""

    def __init__(self, slopes: Tensor | None = None, offsets: Tensor | None = None) -> None:
        super().__init__()
        nothing = torch.zeros(STEPS + 1)
        self.slopes = nn.Parameter(nothing.clone() if slopes is None else slopes)
        self.offsets = nn.Parameter(nothing.clone() if offsets is None else offsets)

    def forward(self, states: Tensor, times: Tensor) -> Tensor:
        level = STEPS - (times * STEPS / 1000).round().long()  # (R, 1)
        return self.slopes[level] * states + self.offsets[level]


def right_lines() -> Lines:
    """Return the velocities to where the steps of the Gaussian toy's sampler really end."""
    target, grid = gaussian_model(size=1), FlowSchedule().grid(STEPS)
    slopes, offsets = torch.zeros(STEPS + 1), torch.zeros(STEPS + 1)
    for level in range(STEPS):
        states = torch.tensor([[0.0], [1.0]])
        for step in range(level, STEPS):
            steps = torch.full((2,), step)
            states = transition(target(states, steps, grid), states, steps, grid, 0.0).means
        at_0, at_1 = states.flatten().double()
        sigma = grid.sigmas[level]
        slopes[level], offsets[level] = (1 - (at_1 - at_0)) / sigma, -at_0 / sigma
    return Lines(slopes, offsets)


def toy(network: Lines, target_path: str, epoch: int = 0) -> ConsistencyModule:
    module = ConsistencyModule(target_path, num_steps=STEPS)
    module.target = gaussian_model(size=1).requires_grad_(False)
    module.student = ConsistencyModel(network, FlowSchedule(), (1,), num_steps=STEPS)
    object.__setattr__(module, "_trainer", type("T", (), {"current_epoch": epoch})())
    return module


def toy_batch(rows: int = 256) -> dict[str, Tensor]:
    states = 1 + 0.5 * torch.randn(rows, 1, generator=torch.Generator().manual_seed(0))
    return {"states": states, "keys": torch.arange(rows), "real": torch.ones(rows) > 0}


def awake(**options: int) -> PatchTransformer:
    torch.manual_seed(0)
    network = PatchTransformer(1, 1, (2, 2), 16, 1, 2, num_classes=10, **options)
    for layer in (network.write, network.last_scale):
        nn.init.normal_(layer.weight, std=0.3)
    return network


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("target") / "model"
    Denoiser(awake(), FlowSchedule(), (1, 8, 8)).save(folder)
    Digits().processor.save(folder)
    return str(folder)


def test_the_loss_is_zero_at_the_consistency_function_and_nowhere_near(target: str) -> None:
    right = toy(right_lines(), target).loss(toy_batch())
    assert right.count == 256 and right.metrics["error"] / right.count < 1e-10
    assert right.total / right.count < 1e-8
    wrong = right_lines()
    wrong.slopes.data[3] += 0.1
    assert toy(wrong, target).loss(toy_batch()).metrics["error"] / 256 > 1e-5
    fresh = toy(Lines(), target).loss(toy_batch())  # says that every state is its own end
    assert fresh.metrics["error"] / 256 > 1e-3


def test_a_trained_student_approaches_the_consistency_function(target: str) -> None:
    module, batch = toy(Lines(), target), toy_batch()
    optimizer = torch.optim.Adam(module.student.parameters(), lr=0.05)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    for epoch in range(400):
        module.trainer.current_epoch = epoch
        optimizer.zero_grad()
        found = module.loss(batch)
        (found.total / found.count).backward()
        optimizer.step()
        rates.step()
    right, grid = right_lines(), FlowSchedule().grid(STEPS)
    states = torch.tensor([[-1.0], [0.0], [1.0], [2.0]])
    for level in (0, 3, 6):
        steps = torch.full((4,), level)
        exact = ConsistencyModel(right, FlowSchedule(), (1,))(states, steps, grid)
        said = module.student(states, steps, grid)
        assert (said - exact).abs().max() < 0.1 < (states - exact).abs().max()


@pytest.mark.parametrize("schedule", [FlowSchedule(shift=2.0), DiscreteSchedule()])
@pytest.mark.parametrize("prediction", [Prediction.FLOW, Prediction.VELOCITY])
def test_where_nothing_is_noise_a_student_returns_the_state(
    schedule: NoiseSchedule, prediction: Prediction
) -> None:
    student = ConsistencyModel(awake(), schedule, (1, 8, 8), prediction, STEPS)
    grid = schedule.grid(STEPS)
    states = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    data, before = torch.full((2,), STEPS), torch.full((2,), STEPS - 1)
    assert torch.equal(student(states, data, grid), states)
    assert not torch.allclose(student(states, before, grid), states, atol=1e-3)


def test_a_student_whose_network_says_data_or_noise_is_refused() -> None:
    for prediction in (Prediction.DATA, Prediction.NOISE):
        with pytest.raises(ValueError, match="a student predicts flow_prediction or v_pred"):
            ConsistencyModel(awake(), FlowSchedule(), (1, 8, 8), prediction)


def test_one_step_of_the_right_student_ends_where_the_plain_sampler_does() -> None:
    target = gaussian_model(size=1)
    student = ConsistencyModel(right_lines(), FlowSchedule(), (1,), num_steps=STEPS)
    plain = DenoisingPipeline(target, STEPS, eta=0.0).complete(5, seed=3)
    pipeline = ConsistencyPipeline(target, student, 1)
    assert torch.allclose(pipeline.complete(5, seed=3), plain, atol=1e-5)
    stats = pipeline.stats
    assert (stats.guarantee.value, stats.target_calls, stats.draft_calls) == ("heuristic", 0, 1)
    few = ConsistencyPipeline(target, student, 4, batch_size=4000).complete(4000, seed=4)
    many = DenoisingPipeline(target, STEPS, eta=0.0, batch_size=4000).complete(4000, seed=5)
    assert abs(float(few.mean() - many.mean())) < 0.05
    assert abs(float(few.std() / many.std()) - 1) < 0.1
    alone = ConsistencyPipeline(target, student, 4, batch_size=1).complete(1, seed=4, indices=[7])
    assert torch.allclose(alone[0], few[7], atol=1e-6)


def test_what_is_given_takes_its_place_in_every_guess_of_a_student() -> None:
    student = ConsistencyModel(awake(), FlowSchedule(), (1, 8, 8), num_steps=STEPS)
    pipeline = ConsistencyPipeline(student, student, 3)
    data = torch.linspace(-1, 1, 64).view(1, 1, 8, 8).expand(3, -1, -1, -1)
    held = KnownParts(data, (torch.arange(8) < 5).expand(3, 1, 8, 8))
    shown: list[Tensor] = []
    hook = student.network.register_forward_pre_hook(lambda _, told: shown.append(told[0].clone()))
    samples = pipeline.complete(3, seed=0, known=held)
    hook.remove()
    assert torch.equal(samples[..., :5], data[..., :5]) and len(shown) == 3
    for step, states in enumerate(shown):
        noise = states.double() - pipeline.grid.alphas[step] * data
        noise = (noise / pipeline.grid.sigmas[step])[..., :5]
        assert noise.mean().abs() < 0.4 and (noise.std() - 1).abs() < 0.3
    assert pipeline.stats.law == "the target's, held to what is given"
    free = pipeline.complete(3, seed=0)  # of a patch with given numbers in it, the rest follows
    assert not torch.allclose(samples[..., 5], free[..., 5], atol=1e-2)
    alone = pipeline.complete(1, seed=0, indices=[2], known=held.rows(torch.tensor([2])))
    assert torch.allclose(alone[0], samples[2], atol=1e-5)


def test_few_steps_are_levels_that_the_student_was_distilled_on() -> None:
    student = ConsistencyModel(awake(), FlowSchedule(3.0), (1, 8, 8), num_steps=10)
    whole, few = FlowSchedule(3.0).grid(10), student.few(4)
    assert few.num_steps == 4 and torch.equal(few.times, whole.times[[0, 2, 5, 7, 10]])
    with pytest.raises(ValueError, match=r"must be in 1\.\.10, got 11"):
        student.few(11)


def test_a_student_keeps_the_sizes_it_was_distilled_at(tmp_path: Path) -> None:
    student = ConsistencyModel(awake(), FlowSchedule(), (1, 8, 8), num_steps=7, guidance=2.0)
    student.other_shapes = ((1, 8, 4),)
    student.save(tmp_path)
    found = load_student(tmp_path)
    assert (found.shape, found.other_shapes) == ((1, 8, 8), ((1, 8, 4),))
    assert (found.num_steps, found.guidance) == (7, 2.0)


def test_guidance_is_learned_once_and_not_applied_again(target: str) -> None:
    module = ConsistencyModule(target, num_steps=STEPS, guidance=3.0, class_dropout=0.0)
    object.__setattr__(module, "_trainer", type("T", (), {"current_epoch": 0})())
    rows = {"states": torch.zeros(4, 1, 8, 8), "keys": torch.arange(4)}
    rows |= {"real": torch.ones(4) > 0, "classes": torch.arange(4)}
    guided = float(module.loss(rows).total.detach())
    module.student.guidance = 1.0
    assert abs(float(module.loss(rows).total.detach()) - guided) > 1e-4
    states, steps, grid = rows["states"] + 1, torch.full((4,), 2), module.grid
    told = {"classes": rows["classes"]}
    plain = module.student(states, steps, grid, told)
    assert torch.equal(module.student(states, steps, grid, told, guidance=5.0), plain)


@pytest.mark.parametrize(
    "options, line",
    [
        ({"num_steps": 1}, "num_steps must be at least 2"),
        ({"sample_steps": 51}, r"must be in 1\.\.50, got 51"),
        ({"prediction": Prediction.VELOCITY}, "a copy of the target predicts flow_prediction"),
        ({"network": awake(), "prediction": Prediction.NOISE}, "not epsilon"),
        ({"guidance": 2.0, "decoding": HeldOutSampling()}, "with guidance 1.0, but the student"),
        ({"huber": 0.0}, "huber must be above 0"),
        ({"huber": float("nan")}, "huber must be above 0 and finite, got nan"),
        ({"huber": float("inf")}, "huber must be above 0 and finite, got inf"),
        ({"class_dropout": 2.0}, r"class_dropout must be in \[0, 1\]"),
        ({"guidance": float("nan")}, "guidance must be a finite number"),
    ],
)
def test_what_makes_no_student_is_refused(
    options: dict[str, object], line: str, target: str
) -> None:
    with pytest.raises(ValueError, match=line):
        ConsistencyModule(target, **options)  # type: ignore[arg-type]


def test_a_student_is_no_target_and_samples_for_its_own_only(target: str, tmp_path: Path) -> None:
    model = load_denoiser(target)
    student = ConsistencyModel(awake(), model.schedule, model.shape, num_steps=STEPS)
    save_state_drafter(tmp_path / "draft", IndependentDenoiser(student), model)
    assert isinstance(load_state_drafter(tmp_path / "draft", model), IndependentDenoiser)
    with pytest.raises(ValueError, match="is no denoiser but a student of few steps"):
        ConsistencyModule(str(tmp_path / "draft"))
    with torch.no_grad():
        model.network.write.weight[0, 0] += 1
    with pytest.raises(ValueError, match=r"was trained for the target .* as it was then"):
        load_state_drafter(tmp_path / "draft", model)


def test_a_target_of_other_classes_than_the_data_is_refused_before_training(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = PatchTransformer(1, 1, (2, 2), 16, 1, 2, num_classes=4)
    Denoiser(few, FlowSchedule(), (1, 8, 8)).save(tmp_path / "few")
    network = {"class_path": "specstream.models.PatchTransformer", "init_args": awake().options}
    words = ["--model.init_args.network", json.dumps(network)]
    assert train(arguments(tmp_path / "run", str(tmp_path / "few"), *words)) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "model.target: num_classes is 4, but here it must be 10" in line
    assert not (tmp_path / "run").exists()


def arguments(run: Path, target: str, *more: str) -> list[str]:
    given = ["--config", "configs/train/digits-student.yaml", "--run", str(run)]
    given += ["--model.init_args.target", target, "--model.init_args.num_steps", "8"]
    given += ["--model.init_args.guidance", "2", "--data.init_args.batch_size", "16"]
    given += ["--model.init_args.decoding.init_args.num_steps", "8"]
    given += ["--model.init_args.decoding.init_args.guidance", "2"]
    given += ["--trainer.accelerator", "cpu", "--trainer.check_val_every_n_epoch", "null"]
    given += ["--trainer.max_steps", "4"]
    given += ["--trainer.limit_val_batches", "1", "--trainer.val_check_interval", "2"]
    return [*given, "--trainer.log_every_n_steps", "1", *more]


def stop_at_2(module: ConsistencyModule, batch: object, batch_idx: int) -> None:
    if module.global_step == 2:
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_student_is_trained_resumed_loaded_and_samples_both_ways(
    target: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(arguments(whole, target)) == 0
    with monkeypatch.context() as patch:
        patch.setattr(ConsistencyModule, "on_train_batch_start", stop_at_2, raising=False)
        assert train(arguments(parts, target)) == 143
    assert train(arguments(parts, target, "--ckpt_path", "last")) == 0
    name = "draft/denoiser.safetensors"
    assert (whole / name).read_bytes() == (parts / name).read_bytes()
    assert list((whole / "samples").glob("step-*.png"))
    drafter = load_state_drafter(whole / "draft", load_denoiser(target), 5.0)
    assert isinstance(drafter, IndependentDenoiser)
    student = drafter.denoiser
    assert isinstance(student, ConsistencyModel)
    assert (student.num_steps, student.guidance, drafter.trained_guidance) == (8, 2.0, 2.0)
    stats = tmp_path / "x.json"
    given = ["--run", str(whole), "--prompt", "7", "--output", str(tmp_path / "x.png")]
    given += ["--stats", str(stats), "--overwrite", "true", "--compare", "true"]
    capsys.readouterr()
    assert generate([*given, "--media.sampler", "consistency", "--media.steps", "2"]) == 0
    shown, found = capsys.readouterr().err, json.loads(stats.read_text())
    assert "heuristic, of the target's with guidance 2" in shown
    assert "student samples have no law" in shown and "plain, 8 steps" in shown
    assert "2; the target was not asked" in shown
    assert re.search(r"^student +2 +0 ", shown, re.MULTILINE)
    assert generate([*given[:-2], "--media.sampler", "consistency"]) == 0
    assert "4; the target was not asked" in capsys.readouterr().err
    assert (found["guarantee"], found["target_calls"], found["draft_calls"]) == ("heuristic", 0, 2)
    assert generate([*given, "--media.steps", "6"]) == 0
    assert "was trained for guidance 2: with 1 the samples" in capsys.readouterr().err
    assert json.loads(stats.read_text())["guarantee"] == "exact law"
    assert generate([*given, "--media.steps", "6", "--media.guidance", "2"]) == 0
    assert "was trained for" not in capsys.readouterr().err
    few = ["--media.sampler", "consistency", "--media.steps"]
    for flags, line in (
        ([*few, "9"], "this student knows 8 noise levels"),
        ([*few, "2", "--media.window", "3"], "window is for others"),
        ([*few, "2", "--media.eta", "1"], "eta is for others"),
        ([*few, "2", "--media.guidance", "3"], "has learned guidance 2, which its sampler cannot"),
    ):
        assert generate([*given, *flags]) == 2
        assert line in capsys.readouterr().err
    alone = ["--run", str(Path(target).parent), *given[2:6], *few, "2", "--overwrite", "true"]
    assert generate(alone) == 2
    assert "is for a student of few steps; this run has none" in capsys.readouterr().err
