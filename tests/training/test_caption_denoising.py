"""Independent drafters of pipelines of diffusers, trained with captions alone."""

import json
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import pytest
import torch
import yaml

from specstream.cli import generate, train
from specstream.data import CaptionDataModule
from specstream.drafters import IndependentDenoiser
from specstream.drafters.state_loading import load_state_drafter
from specstream.models import Denoiser, FlowSchedule, PatchTransformer, PretrainedDenoiser
from specstream.models.text_conditions import short_condition
from specstream.structures import StateContext
from specstream.training import (
    DenoisingModule,
    HeldOutSampling,
    TargetTrajectories,
    trajectories,
)
from specstream.training.captions import encode_captions
from specstream.training.trajectories import Trajectories, draw_trajectories
from tests.diffusers_toys import fresh, save_pipeline, save_video_pipeline

FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
PIXELS = {"_class_name": "DDPMScheduler", "prediction_type": "sample", "clip_sample": True}
SIZE = {"height": 8, "width": 8, "num_frames": 5}
PROMPTS = ["a cat", "cat", "a"]


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_video_pipeline(tmp_path_factory.mktemp("videos") / "ltx", FLOW))


@pytest.fixture(scope="module")
def target(video: str) -> PretrainedDenoiser:
    return PretrainedDenoiser(video, dtype="float32", device="cpu", **SIZE)


def network(channels: int = 8, text_size: int = 12, **options: Any) -> PatchTransformer:
    torch.manual_seed(0)
    return PatchTransformer(channels, channels, (1, 1, 1), 16, 1, 2, text_size=text_size, **options)


def on_trainer(module: DenoisingModule, data: object = None) -> DenoisingModule:
    trainer = type("T", (), {"current_epoch": 0, "datamodule": data})()
    object.__setattr__(module, "_trainer", trainer)
    return module


def config(folder: Path, video: str) -> str:
    """Write the config of a guided training of two steps."""
    sampler = {"num_steps": 5, "guidance": 2.0}
    net = {"in_channels": 8, "out_channels": 8, "patch": [1, 1, 1], "text_size": 12}
    net |= {"hidden_size": 16, "num_layers": 1, "num_heads": 2}
    options = SIZE | {"path": video, "dtype": "float32", "device": "cpu"}
    module = {
        "target": {"class_path": "specstream.models.PretrainedDenoiser", "init_args": options},
        "network": {"class_path": "specstream.models.PatchTransformer", "init_args": net},
        "trajectories": sampler | {"states_per_row": 3, "keep": True},
        "decoding": sampler | {"num_samples": 2, "window": 3},
    }
    data = {"prompts": PROMPTS, "num_samples": 16, "batch_size": 2, "validation_fraction": 0.2}
    trainer = {"accelerator": "cpu", "max_steps": 2, "limit_val_batches": 1}
    trainer |= {"check_val_every_n_epoch": None, "val_check_interval": 2, "log_every_n_steps": 1}
    whole = {
        "run": str(folder / "run"),
        "model": {"class_path": "specstream.training.DenoisingModule", "init_args": module},
        "data": {"class_path": "specstream.data.CaptionDataModule", "init_args": data},
        "trainer": trainer,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(whole))
    return str(folder / "config.yaml")


def test_a_guided_video_target_is_drafted_for_by_a_model_of_its_latents(
    video: str, target: PretrainedDenoiser, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(["--config", config(tmp_path, video)]) == 0
    run, output, stats = tmp_path / "run", tmp_path / "cat.mp4", tmp_path / "x.json"
    assert list((run / "samples").glob("step-*.mp4"))
    named = json.loads((run / "draft" / "specstream.json").read_text())["target"]
    assert named["path"] == video and named["init_args"]["num_frames"] == 5
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for key in ("train/delta", "val/acceptance", "val/round_ratio"):
        assert any(key in row for row in rows)
    given = ["--run", str(run), "--prompt", "a cat", "--output", str(output), "--device", "cpu"]
    given += ["--stats", str(stats), "--media.steps", "5", "--dtype", "float32"]
    given += ["--overwrite", "true"]
    assert generate([*given, "--media.guidance", "2", "--media.window", "3"]) == 0
    assert "was trained for guidance" not in capsys.readouterr().err
    found = json.loads(stats.read_text())
    assert (found["modality"], found["guarantee"]) == ("video", "exact law")
    assert found["draft_calls"] > 0
    assert generate([*given, "--media.height", "16", "--media.num_frames", "9"]) == 0
    assert "the drafter was trained for guidance 2: with 1" in capsys.readouterr().err
    reader = imageio_ffmpeg.read_frames(str(output))
    assert next(reader)["size"] == (8, 16) and len(list(reader)) == 9
    assert json.loads(stats.read_text())["draft_calls"] > 0
    drafter = load_state_drafter(run / "draft", target, 2.0)
    assert isinstance(drafter, IndependentDenoiser) and drafter.trained_guidance == 2


def test_a_drafter_learns_what_the_guided_target_says_on_its_own_way(
    target: PretrainedDenoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Trajectories] = []

    def draw(*given: Any) -> Trajectories:
        drawn.append(draw_trajectories(*given))
        return drawn[-1]

    monkeypatch.setattr(trajectories, "draw_trajectories", draw)
    use = TargetTrajectories(num_steps=6, guidance=3.0, states_per_row=4)
    module = on_trainer(DenoisingModule(network(), target=target, trajectories=use))
    module.captions = encode_captions(target, PROMPTS, 3.0)
    asked: list[tuple[Any, ...]] = []
    net = module.denoiser.network
    net.register_forward_pre_hook(
        lambda _, given, named: asked.append((*given, named["text"])), with_kwargs=True
    )
    numbers = torch.tensor([1, 2])
    rows = {"keys": torch.arange(2), "prompts": numbers, "real": torch.tensor([True, False])}
    found = module.loss(rows)
    (seen,), ((states, times, texts),) = drawn, asked
    condition, grid = module.captions.of(numbers), target.schedule.grid(6)
    losses = []
    for row, text in enumerate(short_condition(condition)["text"]):
        mine = (texts == text).all(1)
        steps = [int((grid.times.float() - time).abs().argmin()) for time in times[mine, 0]]
        assert len(set(steps)) == 4 and 5 not in steps  # the last step is never drafted
        told = {name: value[[row] * 4] for name, value in condition.items()}
        assert torch.equal(states[mine], seen.states[steps, row])
        right = target(states[mine], torch.tensor(steps), grid, told, 3.0)
        sigmas = grid.sigmas[steps].float().view(-1, 1, 1, 1, 1)
        losses.append(((states[mine] - right) / sigmas).square().flatten(1).mean(1).sum())
    assert found.count == 4 and torch.allclose(found.total, losses[0], rtol=1e-4)  # it says 0
    assert not torch.allclose(losses[0], losses[1], rtol=1e-2)
    found.total.backward()
    assert net.write.weight.grad.abs().max() > 0


def test_a_drafter_hears_the_short_condition_and_holds_its_guidance(
    target: PretrainedDenoiser,
) -> None:
    net = network()
    for layer in (net.write, net.last_scale, net.text):
        torch.nn.init.normal_(layer.weight)
    grid, told = target.schedule.grid(5), target.condition(["a cat", "cat"])
    states, steps = torch.randn(2, *target.shape), torch.tensor([1, 2])
    unseen = (states, steps * 0 - 1, states)
    context = StateContext(states, steps, steps, steps * 0, told, *unseen)
    small = Denoiser(net, FlowSchedule(), target.shape, guidance=2.0)
    said = IndependentDenoiser(small, 4.0).estimate(states, steps, context, grid)
    assert torch.equal(said, small(states, steps, grid, short_condition(told)))
    small.guidance = None
    other = IndependentDenoiser(small, 4.0).estimate(states, steps, context, grid)
    assert not torch.allclose(said, other, atol=1e-3)


def test_what_does_not_go_together_is_refused(target: PretrainedDenoiser, tmp_path: Path) -> None:
    def begin(net: PatchTransformer, told: object, **options: Any) -> None:
        on_trainer(DenoisingModule(net, **({"target": target} | options)), told).on_fit_start()

    captions = CaptionDataModule(PROMPTS)
    small = Denoiser(network(), FlowSchedule(), target.shape)
    with pytest.raises(ValueError, match="are trained with captions"):
        begin(network(), object())
    with pytest.raises(ValueError, match="are trained with captions"):
        begin(network(), captions, target=small)
    with pytest.raises(ValueError, match="this trains with media"):
        begin(network(), captions, target=None)
    with pytest.raises(ValueError, match="text_size is 7, but here it must be 12"):
        begin(network(text_size=7), captions)
    with pytest.raises(ValueError, match="in_channels is 4, but here it must be 8"):
        begin(network(4), captions)
    with pytest.raises(ValueError, match="num_times is 2, but here it must be 1"):
        begin(network(num_times=2), captions)
    with pytest.raises(ValueError, match="drawn of a diffusers target only"):
        DenoisingModule(network(), target=small, trajectories=TargetTrajectories())
    with pytest.raises(ValueError, match="a drafter of captions learns guidance itself"):
        DenoisingModule(network(), target=target, class_dropout=0.2)
    with pytest.raises(ValueError, match="takes its target's levels"):
        DenoisingModule(network(), FlowSchedule(shift=9.0), target=target)
    with pytest.raises(ValueError, match=r"trained for 50, 1\.0 and 1\.0"):
        DenoisingModule(network(), target=target, decoding=HeldOutSampling(num_steps=9))
    with pytest.raises(ValueError, match=r"states_per_row must be in 1\.\.4, got 5"):
        TargetTrajectories(num_steps=5, states_per_row=5)
    parts = {"unet": fresh("UNet2DModel")}
    folder = save_pipeline(tmp_path / "pixels", "DDPMPipeline", PIXELS, **parts)
    begin(PatchTransformer(3, 3, (2, 2), 16, 1, 2), CaptionDataModule([""]), target=str(folder))
