"""Training of diffusion models and their drafters: what the losses are, and that runs are whole."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from specstream.cli import generate, train
from specstream.data import Digits
from specstream.data.media import MediaDataModule
from specstream.drafters.state_loading import load_state_drafter
from specstream.generation.denoising import DenoisingPipeline
from specstream.generation.lengths import FixedLength
from specstream.models import Denoiser, FlowSchedule, PatchTransformer
from specstream.models.denoiser import Reads
from specstream.structures import StateContext
from specstream.training import (
    DenoisingModule,
    RejectionProbability,
    ResidualModule,
    SquaredError,
    trajectories,
)
from specstream.training.trajectories import draw_trajectories
from specstream.verification.gaussian import step_acceptance


def network(
    in_channels: int = 1, num_times: int = 1, out_channels: int = 1, feature_size: int = 0
) -> PatchTransformer:
    torch.manual_seed(0)
    sizes = {"num_times": num_times, "num_classes": 10, "feature_size": feature_size}
    return PatchTransformer(in_channels, out_channels, (2, 2), 16, 1, 2, **sizes)


def wake(net: PatchTransformer) -> PatchTransformer:
    """Let a fresh network, whose last layer is 0, say something."""
    for weight in (net.write.weight, net.last_scale.weight, net.blocks[0].scales.weight):
        torch.nn.init.normal_(weight, std=0.3)
    return net


@pytest.fixture
def target(tmp_path: Path) -> str:
    folder = tmp_path / "target" / "model"
    Denoiser(wake(network()), FlowSchedule(), (1, 8, 8)).save(folder)
    Digits().processor.save(folder)
    return str(folder)


def batch(rows: int = 8) -> dict[str, torch.Tensor]:
    return next(iter(MediaDataModule(Digits(), batch_size=rows).train_dataloader()))


def test_an_untrained_flow_pays_the_mean_square_of_its_velocity() -> None:
    module, rows = DenoisingModule(network()), batch(512)
    module.on_fit_start = lambda: None  # type: ignore[method-assign]
    object.__setattr__(module, "_trainer", type("T", (), {"current_epoch": 0})())
    found = module.loss(rows)
    mean = float(found.total.detach() / found.count)
    expected = 1 + float(rows["states"].square().mean())  # E |noise - x0|^2 a pixel
    assert found.count == 512 and abs(mean - expected) < 0.05


def test_rows_that_only_fill_up_a_batch_cost_nothing() -> None:
    module, rows = DenoisingModule(network()), batch(8)
    object.__setattr__(module, "_trainer", type("T", (), {"current_epoch": 0})())
    whole = module.loss(rows)
    rows["real"] = torch.tensor([True] * 5 + [False] * 3)
    part = module.loss(rows)
    assert part.count == 5 and part.total < whole.total


def test_a_step_costs_the_probability_that_it_falls() -> None:
    delta = torch.tensor([0.0, 1.0, 30.0], requires_grad=True)
    loss = RejectionProbability(0.01)(delta, delta)
    assert torch.allclose(loss, 1 - step_acceptance(delta) + 0.01 * delta)
    loss.sum().backward()
    assert delta.grad is not None and delta.grad[2] > 0.009  # alive where the rest is flat
    assert torch.equal(SquaredError()(delta, torch.full((3,), 2.0)), torch.full((3,), 2.0))


def test_an_untrained_residual_drafter_is_accepted_as_the_free_one(target: str) -> None:
    module = ResidualModule(network(2, 2), target, num_steps=12, window=4, windows_per_row=6)
    object.__setattr__(module, "_trainer", type("T", (), {"current_epoch": 0})())
    found = module.loss(batch())
    assert found.count == 8 * 6
    metrics = found.metrics
    assert torch.allclose(metrics["acceptance"], metrics["free_acceptance"], atol=1e-4)
    assert 0 < metrics["acceptance"] < found.count


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_trajectories_and_estimates_are_those_of_the_guided_target(
    target: str, guidance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ResidualModule(network(2, 2), target, num_steps=6, guidance=guidance, window=4)
    object.__setattr__(module, "_trainer", type("T", (), {"current_epoch": 0})())
    assert module.drafter.trained_guidance == guidance
    kept = []
    monkeypatch.setattr(
        trajectories,
        "draw_trajectories",
        lambda *given, **options: kept.append(draw_trajectories(*given, **options)) or kept[0],
    )
    rows = batch()
    module.loss(rows)
    states, keys = kept[0].states, rows["keys"]
    for step in range(6):
        steps = torch.full_like(keys, step)
        given = (states[step], steps, module.grid, {"classes": rows["classes"]}, guidance)
        assert torch.allclose(kept[0].estimates[step], module.target(*given), atol=1e-5)
    other = module.target(states[0], steps * 0, module.grid, {"classes": rows["classes"]}, 2.0)
    assert not torch.allclose(kept[0].estimates[0], other, atol=1e-3)


def test_kept_trajectories_are_drawn_once_and_are_those_of_the_first_epoch(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    monkeypatch.setattr(
        trajectories,
        "draw_trajectories",
        lambda *given, **options: drawn.append(given[1]) or draw_trajectories(*given, **options),
    )
    asked: list[StateContext] = []
    for keep in (False, True):
        module = ResidualModule(network(2, 2, 1, 16), target, 6, window=4, keep_trajectories=keep)
        trainer = type("T", (), {"current_epoch": 0})()
        object.__setattr__(module, "_trainer", trainer)
        guess = module._guess

        def watch(*given: Any, guess: Any = guess) -> torch.Tensor:
            asked.append(given[2])
            return guess(*given)

        monkeypatch.setattr(module, "_guess", watch)
        rows = batch(4)
        for epoch in (0, 1):
            trainer.current_epoch = epoch
            module.loss(rows)
        module.eval()
        module.loss(rows)
    assert [len(keys) for keys in drawn] == [4, 4, 4] + [4, 4]  # kept: training, validation
    first, _, held, same, again, held_same = asked
    for one, other in ((first, same), (held, held_same)):
        assert torch.equal(one.steps, other.steps)
        assert torch.equal(one.states, other.states) and torch.equal(one.features, other.features)
    assert not torch.equal(again.steps, same.steps)  # other windows of the same trajectories
    pick = [(a, b) for a in range(32) for b in range(32) if same.steps[a] == again.steps[b]]
    kept = [a for a, b in pick if torch.equal(same.states[a], again.states[b])]
    assert kept


@pytest.mark.parametrize("channels", [2, 3])
@pytest.mark.parametrize("at_once", [False, True])
def test_training_asks_the_drafter_what_decoding_asks_it(
    target: str, at_once: bool, channels: int
) -> None:
    """Drafted means of a round equal those of the training forward on the same states."""
    window = 4
    net = wake(network(channels, 2, window if at_once else 1))
    module = ResidualModule(net, target, num_steps=12, window=window, at_once=at_once)
    pipeline = DenoisingPipeline(module.target, 12, 1.0, 1.0, module.drafter, FixedLength(window))
    seen = []
    propose = module.drafter.propose

    def watch(context, lengths, grid, eta, noise):
        draft = propose(context, lengths, grid, eta, noise)
        seen.append((context, draft))
        return draft

    module.drafter.propose = watch  # type: ignore[method-assign]
    pipeline.complete(3, {"classes": torch.tensor([1, 2, 3])}, seed=4)
    context, draft = seen[1]
    grid = module.grid
    for place in range(int(draft.lengths.min())):
        states = context.states if place == 0 else draft.states[:, place - 1]
        guess = module._guess(states, context.steps + place, context, grid)
        from specstream.transitions import transition

        law = transition(guess, states, context.steps + place, grid, 1.0)
        assert torch.allclose(law.means, draft.means[:, place], atol=1e-5)


@pytest.mark.parametrize("at_once", [False, True])
def test_the_loss_asks_about_the_states_after_those_that_the_target_spoke_of(
    target: str, at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lazy restart: the target spoke of step s, and the drafter begins at s + 1."""
    window, asked = 4, []
    net = network(2, 2, window if at_once else 1, 16)
    module = ResidualModule(net, target, num_steps=12, window=window, at_once=at_once)
    object.__setattr__(module, "_trainer", type("T", (), {"current_epoch": 0})())
    guess, seen = module._guess, []
    monkeypatch.setattr(
        trajectories,
        "draw_trajectories",
        lambda *given, **options: seen.append(draw_trajectories(*given, **options)) or seen[-1],
    )
    monkeypatch.setattr(module, "_guess", lambda *given: asked.append(given) or guess(*given))
    module.loss(batch(4))
    ((states, at, context, _),) = asked
    rows = torch.arange(4).repeat(len(at) // 4)
    assert torch.equal(context.steps, context.seen_steps + 1)
    assert torch.equal(context.seen, seen[0].states[context.seen_steps, rows])
    assert torch.equal(context.states, seen[0].states[context.steps, rows])
    assert torch.equal(context.estimates, seen[0].estimates[context.seen_steps, rows])
    assert torch.equal(context.features, seen[0].features[context.seen_steps, rows])
    assert torch.equal(states, seen[0].states[at, rows])
    ahead = at - context.seen_steps
    assert (ahead.min(), ahead.max()) == (1, window) and at.max() <= 10


def arguments(run: Path, name: str, *more: str) -> list[str]:
    given = ["--config", f"configs/train/{name}.yaml", "--run", str(run)]
    given += ["--trainer.accelerator", "cpu", "--trainer.max_steps", "3"]
    return [*given, "--trainer.log_every_n_steps", "1", *more]


def small(drafter: bool) -> list[str]:
    net = {"hidden_size": 16, "num_layers": 1, "num_heads": 2}
    flags = [f"--model.init_args.network.init_args.{key}={value}" for key, value in net.items()]
    return [*flags, "--data.init_args.batch_size", "4" if drafter else "16"]


def test_a_target_and_its_drafter_are_trained_and_then_sample(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, drafts = tmp_path / "digits", tmp_path / "residual"
    often = ["--trainer.check_val_every_n_epoch", "null", "--trainer.val_check_interval", "3"]
    often += ["--trainer.limit_val_batches", "1"]
    sampling = "--model.init_args.decoding.init_args."
    assert train(arguments(run, "digits", *small(False), *often)) == 0
    short = ["--model.init_args.num_steps", "8", "--model.init_args.window", "3"]
    short += [f"{sampling}num_steps", "8", f"{sampling}window", "3"]
    short += ["--model.init_args.guidance", "2", f"{sampling}guidance", "2"]
    short += ["--model.init_args.target", str(run / "model")]
    assert train(arguments(drafts, "digits-residual", *small(True), *short, *often)) == 0
    assert list((run / "samples").glob("step-*.png"))
    logged = [json.loads(line) for line in (drafts / "metrics.jsonl").read_text().splitlines()]
    assert any("val/round_ratio" in row for row in logged)
    output = tmp_path / "seven.png"
    given = ["--run", str(drafts), "--prompt", "7", "--output", str(output)]
    given += ["--media.steps", "8", "--media.window", "3", "--overwrite", "true"]
    assert generate(given) == 0 and output.is_file()
    shown = capsys.readouterr().err
    assert "exact law" in shown and "the drafter was trained for guidance 2: with 1" in shown
    assert generate([*given, "--media.guidance", "2"]) == 0
    assert "the drafter was trained for" not in capsys.readouterr().err


def test_a_drafter_that_reads_hidden_states_is_exported_and_samples(
    target: str, tmp_path: Path
) -> None:
    run, output = tmp_path / "run", tmp_path / "x.png"
    module = ResidualModule(wake(network(2, 2, 1, 16)), target, num_steps=8, window=3)
    module.export(run, Digits().processor)
    drafter = load_state_drafter(run / "draft", module.target)
    assert drafter.reads is Reads.HIDDEN
    given = ["--run", str(run), "--prompt", "7", "--output", str(output), "--media.steps", "8"]
    assert generate([*given, "--media.window", "3"]) == 0 and output.is_file()


@pytest.mark.parametrize(
    "name, flags, line",
    [
        ("digits-residual", ["--model.init_args.eta", "0"], "eta must be above 0"),
        ("digits-residual", ["--model.init_args.window", "50"], "window must be in 1..49, got 50"),
        ("digits-residual", ["--model.init_args.target", "nowhere"], "'nowhere' is no denoiser"),
        ("digits", ["--model.init_args.class_dropout", "2"], "class_dropout must be in [0, 1]"),
        ("digits", ["--model.init_args.network.init_args.hidden_size", "30"], "not a multiple"),
        ("digits", ["--data.init_args.batch_size", "5000"], "fewer than one global batch"),
        ("digits", ["--model.init_args.network.init_args.num_classes", "9"], "it must be 10"),
        ("digits", ["--model.init_args.network.init_args.in_channels", "3"], "it must be 1"),
        ("digits-residual", ["--model.init_args.network.init_args.num_times", "1"], "must be 2"),
        ("digits-residual", ["--model.init_args.num_steps", "20"], "drafts are trained for 20"),
        ("digits-residual", ["--model.init_args.guidance", "3"], "trained for 50, 1.0 and 3.0"),
        ("digits-residual", ["--model.init_args.guidance", ".nan"], "must be a finite number"),
        ("digits-residual", ["--model.init_args.num_steps", "2"], "num_steps must be at least 3"),
        ("digits-residual-features", [], "feature_size is 96, but the target's hidden states are"),
        ("digits", ["--model.init_args.network.init_args.feature_size", "8"], "it must be 0"),
    ],
)
def test_wrong_options_are_one_line(
    name: str, flags: list[str], line: str, target: str, tmp_path: Path, capsys
) -> None:
    run = tmp_path / "run"
    given = (
        []
        if "--model.init_args.target" in flags or name == "digits"
        else ["--model.init_args.target", target]
    )
    assert train(arguments(run, name, *given, *flags)) == 2
    shown = capsys.readouterr().err.strip().splitlines()
    assert line in shown[-1] and not run.exists()


def test_a_drafter_for_states_of_another_shape_is_refused(
    target: str, tmp_path: Path, capsys
) -> None:
    flags = ["--model.init_args.target", target, "--data.init_args.source", "MovingDigits"]
    flags += ["--data.init_args.source.init_args.num_clips", "300"]
    assert train(arguments(tmp_path / "run", "digits-residual", *flags)) == 2
    assert "the target's states are [1, 8, 8], the data's [1, 8, 16, 16]" in capsys.readouterr().err


def test_prediction_of_noise_and_of_flow_learn_the_same_thing() -> None:
    from specstream.transitions import Prediction, data_estimate, network_output

    noise = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 5, 3, generator=noise).unbind(0)
    sigma = torch.tensor([0.2, 0.5, 0.7, 0.9, 0.4])
    for alphas in (1 - sigma, (1 - sigma**2).sqrt()):
        states = alphas[:, None] * x0 + sigma[:, None] * eps
        for prediction in Prediction:
            output = network_output(x0, states, alphas, sigma, prediction)
            if prediction is Prediction.NOISE:
                assert torch.allclose(output, eps, atol=1e-5)
            if prediction is Prediction.FLOW:
                assert torch.allclose(output, eps - x0, atol=1e-5)
            back = data_estimate(output, states, alphas, sigma, prediction)
            assert torch.allclose(back, x0, atol=1e-5)
            assert F.mse_loss(back, x0) < 1e-9


def test_more_windows_of_a_trajectory_than_it_has_are_refused(target: str) -> None:
    with pytest.raises(ValueError, match=r"windows_per_row must be in 1\.\.48, got 49"):
        ResidualModule(network(2, 2), target, num_steps=12, window=4, windows_per_row=49)


def test_a_drafter_is_shown_two_states_or_three(target: str, tmp_path: Path, capsys) -> None:
    config = arguments(tmp_path / "run", "digits-residual", "--model.init_args.target", target)
    config += ["--model.init_args.network.init_args.in_channels", "4"]
    assert train(config) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "in_channels is 4, but here it must be 2, for a state and an estimate, or 3" in lines[-1]
