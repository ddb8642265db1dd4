"""Students of few steps of pipelines of diffusers: their weights or adapters, files and samples."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

from specstream.cli import generate, train
from specstream.data import CaptionDataModule, ImageArrays, MediaDataModule
from specstream.drafters import IndependentDenoiser
from specstream.drafters.state_loading import load_state_drafter, save_state_drafter
from specstream.generation.denoising import DenoisingPipeline
from specstream.models import (
    Denoiser,
    FlowSchedule,
    LatentConsistencyModel,
    LowRankAdapters,
    PatchTransformer,
    PretrainedDenoiser,
)
from specstream.models.fingerprint import fingerprint
from specstream.models.latent_consistency import load_latent_student, own_network, with_models
from specstream.models.network_adapters import FILE, chosen_layers
from specstream.training import LatentConsistencyModule
from specstream.transitions import StepGrid, transition
from tests.diffusers_toys import fresh, save_pipeline, save_video_pipeline

FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
PIXELS = {"_class_name": "DDPMScheduler", "prediction_type": "sample", "clip_sample": True}
NOISE = {"_class_name": "DDIMScheduler", "clip_sample": False}
SIZE = {"height": 8, "width": 8, "num_frames": 5}
PROMPTS = ["a cat", "cat", "a"]
ADAPTERS = LowRankAdapters(2, 4.0, ["to_q", "to_out.0"])
STEPS = 4


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> str:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of the text encoder
        return str(save_video_pipeline(tmp_path_factory.mktemp("videos") / "ltx", FLOW))


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("images") / "pixels"
    return str(save_pipeline(folder, "DDPMPipeline", PIXELS, unet=fresh("UNet2DModel")))


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("images") / "classes"
    parts = {"transformer": fresh("DiTTransformer2DModel"), "vae": fresh("AutoencoderKL")}
    return str(save_pipeline(folder, "DiTPipeline", NOISE, **parts))


def loaded(path: str, **options: Any) -> PretrainedDenoiser:
    return PretrainedDenoiser(path, dtype="float32", device="cpu", **options)


def begun(target: PretrainedDenoiser, data: object, **options: Any) -> LatentConsistencyModule:
    """Return a module at the start of its training."""
    module = LatentConsistencyModule(target, STEPS, **options)
    trainer = type("T", (), {"datamodule": data, "current_epoch": 0})()
    object.__setattr__(module, "_trainer", trainer)
    module.on_fit_start()
    return module


def media(folder: Path, side: int, classes: int = 0) -> MediaDataModule:
    """Return images of noise in colour, perhaps of so many classes."""
    noise = np.random.default_rng(0)
    arrays = {"images": noise.integers(256, size=(24, side, side, 3), dtype=np.uint8)}
    if classes:
        arrays["labels"] = np.arange(24) % classes
    np.savez(folder / "media.npz", **arrays)
    labels = "labels" if classes else None
    return MediaDataModule(ImageArrays(str(folder / "media.npz"), labels=labels), batch_size=4)


class Ends(nn.Module):
    """Says where the target's own sampler really ends."""

    def __init__(self, target: Denoiser, guidance: float) -> None:
        super().__init__()
        self.target, self.weight = target, guidance
        self.guidance = guidance  # of the trajectories that it is shown
        self.asked: list[Tensor] = []

    def forward(
        self, states: Tensor, steps: Tensor, grid: StepGrid, condition: dict[str, Tensor]
    ) -> Tensor:
        self.asked.append(states)
        for step in range(grid.num_steps):
            at = torch.full_like(steps, step)
            said = self.target(states, at, grid, condition, self.weight)
            there = (steps <= step).view(-1, *[1] * (states.dim() - 1))
            states = torch.where(there, transition(said, states, at, grid, 0.0).means, states)
        return states


def test_of_captions_only_the_ends_of_the_guided_targets_trajectories_have_no_loss(
    video: str,
) -> None:
    data = CaptionDataModule(PROMPTS, num_samples=16)
    module = begun(loaded(video, **SIZE), data, guidance=2.0, levels_per_row=3)
    rows = {"keys": torch.arange(4), "prompts": torch.tensor([0, 1, 2, 1])}
    rows["real"] = torch.tensor([True, True, True, False])
    found = module.loss(rows)
    found.total.backward()
    assert found.count == 9 and found.metrics["error"] > 1e-3
    assert all(p.grad is not None for p in module.student.parameters())
    assert all(p.grad is None for p in module.target.parameters())
    module.student = Ends(module.target, 2.0)
    assert module.loss(rows).metrics["error"] < 1e-8
    begin = module.student.asked[0]  # of each caption's states, some lie on other levels
    assert begin.shape == (12, *module.target.shape) and len({float(x.sum()) for x in begin}) > 4
    module.student.guidance = 1.0
    assert module.loss(rows).metrics["error"] > 1e-4


def test_of_media_their_latents_are_noised_and_their_ends_have_no_loss(
    classes: str, tmp_path: Path
) -> None:
    target, data = loaded(classes), media(tmp_path, 16, classes=10)
    module = begun(target, data, guidance=2.0, levels_per_row=2)
    batch = {"states": data.samples.states[:4], "classes": data.samples.classes[:4]}
    batch |= {"keys": torch.arange(4), "real": torch.ones(4) > 0}
    module.loss(batch).total.backward()
    module.student = Ends(target, 2.0)
    assert module.loss(batch).metrics["error"] < 1e-6
    latents, seen = target.encode(batch["states"]).repeat_interleave(2, 0), module.student.asked[0]
    share = (latents * seen).sum() / latents.square().sum()  # of the data in what was asked
    assert 0.1 < share < 1


def test_a_student_approaches_the_ends_of_the_sampler(video: str) -> None:
    data = CaptionDataModule(["a cat"], num_samples=16)
    module = begun(loaded(video, **SIZE), data, guidance=2.0, levels_per_row=4)
    optimizer = torch.optim.Adam(module.student.parameters(), lr=1e-3)
    rows = {"prompts": torch.zeros(4, dtype=torch.long), "real": torch.ones(4) > 0}
    ends, grid = Ends(module.target, 2.0), module.grid
    states = torch.randn(4, *module.target.shape, generator=torch.Generator().manual_seed(0))
    asked = (states, torch.zeros(4, dtype=torch.long), grid, module.captions.of(rows["prompts"]))
    with torch.no_grad():
        right, before = ends(*asked), module.student(*asked)
    for batch in range(20):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - batch / 20)
        found = module.loss(rows | {"keys": torch.arange(4) + 4 * batch})
        optimizer.zero_grad()
        (found.total / found.count).backward()
        optimizer.step()
    after = module.student(*asked).detach()
    assert (after - right).square().mean() < 0.5 * (before - right).square().mean()


@pytest.mark.parametrize("scheduler", [FLOW, PIXELS, NOISE], ids=lambda s: s["_class_name"])
def test_a_fresh_student_says_what_its_target_says_and_of_data_the_data(
    scheduler: dict[str, object], tmp_path: Path
) -> None:
    folder = save_pipeline(tmp_path / "x", "DDPMPipeline", scheduler, unet=fresh("UNet2DModel"))
    target = loaded(str(folder))
    target.clip = None
    grid, states = target.schedule.grid(STEPS), 2 * torch.randn(2, *target.shape)
    for adapters in (None, LowRankAdapters(2)):
        student = LatentConsistencyModel(own_network(target, adapters), target, STEPS)
        assert student.adapted == (adapters is not None)
        steps, data = torch.tensor([0, STEPS - 1]), torch.tensor([STEPS, STEPS])
        assert torch.equal(student(states, steps, grid), target(states, steps, grid))
        assert torch.equal(student(states, data, grid), states)


def test_a_fresh_student_drafts_steps_that_all_stand(video: str) -> None:
    target = loaded(video, **SIZE)
    student = LatentConsistencyModel(own_network(target, ADAPTERS), target, STEPS)
    pipeline = DenoisingPipeline(target, STEPS, drafter=IndependentDenoiser(student))
    pipeline.complete(2, target.condition(["a cat"] * 2), seed=0)
    assert pipeline.stats.acceptance == 1 and pipeline.stats.guarantee.value == "exact law"


def test_adapters_share_the_targets_weights_and_are_what_a_pipeline_loads(
    video: str, tmp_path: Path
) -> None:
    import diffusers

    target = loaded(video, **SIZE)
    name = fingerprint(target.network)
    network = own_network(target, ADAPTERS)
    own = {p.data_ptr() for p in network.parameters()}
    assert {p.data_ptr() for p in target.network.parameters()} <= own
    trained = {n: p for n, p in network.named_parameters() if p.requires_grad}
    assert len(trained) == 8 and all(".to_q." in n or ".to_out.0." in n for n in trained)
    for parameter in trained.values():
        nn.init.normal_(parameter, std=0.3)
        parameter.data = parameter.data.bfloat16().float()  # as they are stored
    assert fingerprint(target.network) == name
    student = LatentConsistencyModel(network, target, 9, 2.0)
    student.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [FILE, "student.json"]
    pipeline = diffusers.LTXPipeline.from_pretrained(video)
    pipeline.load_lora_weights(tmp_path)
    network = with_models(target.network, [pipeline.transformer])
    theirs = LatentConsistencyModel(network, target, 9)
    found = load_latent_student(tmp_path, target)
    assert (found.num_steps, found.guidance, found.adapted) == (9, 2.0, True)
    states, steps = torch.randn(2, *target.shape), torch.tensor([0, 3])
    asked = (states, steps, student.schedule.grid(9), target.condition(["a cat", "a"]))
    said = student(*asked)
    assert torch.equal(found(*asked), said) and torch.allclose(theirs(*asked), said, atol=1e-6)
    assert (target(*asked) - said).abs().max() > 1e-2


@pytest.mark.parametrize("adapters", [ADAPTERS, None], ids=["adapters", "whole"])
def test_a_student_of_two_experts_learns_in_both(
    adapters: LowRankAdapters | None, tmp_path: Path
) -> None:
    parts = {name: fresh("WanTransformer3DModel") for name in ("transformer", "transformer_2")}
    nn.init.normal_(parts["transformer_2"].proj_out.weight)
    folder, told = tmp_path / "wan", tmp_path / "told.safetensors"
    parts["vae"] = fresh("AutoencoderKLWan")
    save_pipeline(folder, "WanPipeline", FLOW, {"boundary_ratio": 0.5}, **parts)
    save_file({"prompt_embeds": torch.ones(1, 5, 12)}, told)
    target = loaded(str(folder), conditions=str(told), height=32, width=32, num_frames=5)
    module = begun(target, CaptionDataModule([""]), adapters=adapters, levels_per_row=8)
    rows = {"keys": torch.arange(2), "prompts": torch.zeros(2, dtype=torch.long)}
    module.loss(rows | {"real": torch.ones(2) > 0}).total.backward()
    trained = {n: p for n, p in module.student.named_parameters() if p.requires_grad}
    learned = {name.startswith("network.low_noise.") for name, p in trained.items() if p.grad.any()}
    assert learned == {True, False}
    for parameter in trained.values():
        parameter.data = (parameter.data - parameter.grad).bfloat16().float()
    module.student.save(tmp_path / "draft")
    found = load_latent_student(tmp_path / "draft", target)
    states, steps = torch.randn(2, *target.shape), torch.tensor([0, 3])
    asked = (states, steps, module.grid, target.condition(["", ""]))
    said = module.student(*asked)
    assert torch.allclose(found(*asked), said, atol=1e-4)  # gradients may take other kernels
    assert ((said - target(*asked)).flatten(1).abs().amax(1) > 0).all()


def config(folder: Path, module: dict[str, Any], data: dict[str, Any]) -> list[str]:
    """Return the arguments of a training of three steps."""
    kind, guidance = "specstream.models.PretrainedDenoiser", module.get("guidance", 1.0)
    module = {"num_steps": 5, "sample_steps": 2, "levels_per_row": 2} | module
    module["target"] = {"class_path": kind, "init_args": module["target"]}
    module["decoding"] = {"num_samples": 2, "num_steps": 5, "window": 3, "guidance": guidance}
    trainer = {"accelerator": "cpu", "max_steps": 3, "limit_val_batches": 1}
    trainer |= {"check_val_every_n_epoch": None, "val_check_interval": 3, "log_every_n_steps": 1}
    path = folder / "config.yaml"
    whole = {
        "model": {
            "class_path": "specstream.training.LatentConsistencyModule",
            "init_args": module,
        },
        "data": data,
        "trainer": trainer,
    }
    path.write_text(yaml.safe_dump(whole))
    return ["--config", str(path)]


def captions(prompts: list[str]) -> dict[str, Any]:
    options = {"prompts": prompts, "num_samples": 16, "batch_size": 2, "validation_fraction": 0.2}
    return {"class_path": "specstream.data.CaptionDataModule", "init_args": options}


def stop_at_1(module: LatentConsistencyModule, batch: object, batch_idx: int) -> None:
    if module.global_step == 1:
        os.kill(os.getpid(), signal.SIGTERM)


def test_adapters_of_a_video_target_are_trained_resumed_and_sample_both_ways(
    video: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module = {"target": SIZE | {"path": video, "dtype": "float32", "device": "cpu"}}
    module |= {"guidance": 2.0, "adapters": {"rank": 2, "layers": ["to_q", "to_v"]}}
    given = config(tmp_path, module | {"gradient_checkpointing": True}, captions(PROMPTS))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train([*given, "--run", str(whole)]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(LatentConsistencyModule, "on_train_batch_start", stop_at_1, raising=False)
        assert train([*given, "--run", str(parts)]) == 143
    assert train([*given, "--run", str(parts), "--ckpt_path", "last"]) == 0
    assert (whole / "draft" / FILE).read_bytes() == (parts / "draft" / FILE).read_bytes()
    assert not list((whole / "draft").glob("**/diffusion_pytorch_model*"))
    trained = torch.load(whole / "last.ckpt", weights_only=False)["state_dict"]
    assert trained and all("lora_" in name for name in trained)
    assert list((whole / "samples").glob("step-*.mp4"))
    output, stats = tmp_path / "cat.mp4", tmp_path / "x.json"
    asked = ["--run", str(whole), "--prompt", "a cat", "--output", str(output), "--device", "cpu"]
    asked += ["--stats", str(stats), "--dtype", "float32", "--overwrite", "true"]
    few = [*asked, "--media.sampler", "consistency", "--media.steps", "2"]
    assert generate([*few, "--media.num_frames", "9"]) == 0 and output.is_file()
    found = json.loads(stats.read_text())
    assert (found["guarantee"], found["target_calls"], found["draft_calls"]) == ("heuristic", 0, 2)
    assert generate([*asked, "--media.steps", "5", "--media.guidance", "2"]) == 0
    found = json.loads(stats.read_text())
    assert found["guarantee"] == "exact law" and found["draft_calls"] > 0
    capsys.readouterr()
    assert generate([*few, "--media.guidance", "3"]) == 2
    assert "has learned guidance 2, which its sampler cannot" in capsys.readouterr().err


def test_all_weights_of_a_pixel_target_are_trained_on_media(pixels: str, tmp_path: Path) -> None:
    source = media(tmp_path, 8).sources[0]
    init_args = {"source": {"class_path": "specstream.data.ImageArrays", "init_args": vars(source)}}
    data = {"class_path": "specstream.data.MediaDataModule", "init_args": init_args}
    data["init_args"] |= {"batch_size": 4, "validation_fraction": 0.2}
    module = {"target": {"path": pixels, "dtype": "float32", "device": "cpu"}}
    run, output = tmp_path / "run", tmp_path / "x.png"
    assert train([*config(tmp_path, module, data), "--run", str(run)]) == 0
    assert (run / "draft" / "unet" / "config.json").is_file()
    asked = ["--run", str(run), "--prompt", "", "--output", str(output), "--device", "cpu"]
    asked += ["--media.sampler", "consistency", "--media.steps", "4", "--dtype", "float32"]
    assert generate(asked) == 0 and output.is_file()


def test_a_student_is_loaded_for_its_own_target_only(video: str, tmp_path: Path) -> None:
    target = loaded(video, **SIZE)
    student = LatentConsistencyModel(own_network(target, ADAPTERS), target, STEPS)
    save_state_drafter(tmp_path / "draft", IndependentDenoiser(student), target)
    assert load_state_drafter(tmp_path / "draft", target).trained_guidance == 1
    (tmp_path / "draft" / FILE).write_bytes(b"nothing")
    with pytest.raises(ValueError, match="holds a damaged drafter"):
        load_state_drafter(tmp_path / "draft", target)
    next(target.network.parameters()).data += 1
    with pytest.raises(ValueError, match="as it was then"):
        load_state_drafter(tmp_path / "draft", target)


def test_what_makes_no_student_of_a_pipeline_is_refused(
    video: str, pixels: str, classes: str, tmp_path: Path
) -> None:
    target, image = loaded(video, **SIZE), loaded(pixels)
    told, untold = CaptionDataModule(PROMPTS, num_samples=16), CaptionDataModule([""])
    small = Denoiser(PatchTransformer(1, 1, (2, 2), 16, 1, 2), FlowSchedule(), (1, 8, 8))
    mute = tmp_path / "mute"
    shutil.copytree(video, mute)
    index = json.loads((mute / "model_index.json").read_text()) | {"text_encoder": [None, None]}
    (mute / "model_index.json").write_text(json.dumps(index))
    for line, refused in (
        ("has no text encoder", lambda: begun(loaded(str(mute), **SIZE), told)),
        ("this target takes none", lambda: begun(image, untold, guidance=2.0)),
        ("this target takes none", lambda: begun(image, media(tmp_path, 8), guidance=2.0)),
        ("takes no prompts: give data prompts", lambda: begun(image, told)),
        ("trains with media", lambda: begun(image, object())),
        ("is told prompt_embeds, which media do not", lambda: begun(target, media(tmp_path, 8))),
        (r"\[3, 8, 8\], the data's are of \[3, 9, 9\]", lambda: begun(image, media(tmp_path, 9))),
        ("knows 0 classes, the data has 3 classes", lambda: begun(image, media(tmp_path, 8, 3))),
        ("knows 10 classes, the data has 0", lambda: begun(loaded(classes), media(tmp_path, 16))),
        ("no class 10: this", lambda: begun(loaded(classes), CaptionDataModule(["9", "10"]))),
        ("trained by ConsistencyModule", lambda: LatentConsistencyModule(small)),
        ("levels_per_row must be", lambda: LatentConsistencyModule(image, levels_per_row=0)),
        ("named 'to_x'; they are linear, ", lambda: own_network(target, adapters("to_x"))),
        ("rank must be at least 1", lambda: LowRankAdapters(0)),
        ("alpha must be above 0", lambda: LowRankAdapters(alpha=float("nan"))),
        ("layers names none", lambda: LowRankAdapters(layers=[])),
    ):
        with pytest.raises(ValueError, match=line):
            refused()


def test_the_recipes_adapters_are_on_the_blocks_of_wan() -> None:
    recipe = yaml.safe_load(Path("configs/train/wan-student.yaml").read_text())
    layers = recipe["model"]["init_args"]["adapters"]["layers"]
    found = chosen_layers(fresh("WanTransformer3DModel"), layers)
    assert len(found) == 10 and all(name.startswith("blocks.0.") for name in found)


def adapters(*layers: str) -> LowRankAdapters:
    return LowRankAdapters(layers=list(layers))


def test_a_prediction_that_is_not_known_is_one_line_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = NOISE | {"prediction_type": "wishes"}
    folder = save_pipeline(tmp_path / "odd", "DDPMPipeline", odd, unet=fresh("UNet2DModel"))
    module = {"target": {"path": str(folder), "dtype": "float32", "device": "cpu"}}
    run = tmp_path / "run"
    assert train([*config(tmp_path, module, captions([""])), "--run", str(run)]) == 2
    line = capsys.readouterr().err.strip()
    assert "prediction_type 'wishes' is none of" in line and "\n" not in line
    assert not run.exists()
