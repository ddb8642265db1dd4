"""Residual drafters of pipelines of diffusers, trained with captions alone."""

import json
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from specstream.cli import generate, train
from specstream.data import CaptionDataModule
from specstream.drafters import ResidualDenoiser
from specstream.models import Denoiser, FlowSchedule, PatchTransformer, PretrainedDenoiser
from specstream.models.text_conditions import short_condition
from specstream.training import ResidualModule
from specstream.training.captions import encode_captions
from tests.diffusers_toys import fresh, save_pipeline, save_video_pipeline

FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
PIXELS = {"_class_name": "DDPMScheduler", "prediction_type": "sample", "clip_sample": True}
STEPPED = {"_class_name": "CogVideoXDDIMScheduler", "prediction_type": "v_prediction"}
SIZE = {"height": 8, "width": 8, "num_frames": 5}
PROMPTS = ["a cat", "cat", "a"]


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_video_pipeline(tmp_path_factory.mktemp("videos") / "ltx", FLOW))


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("images") / "pixels"
    return str(save_pipeline(folder, "DDPMPipeline", PIXELS, unet=fresh("UNet2DModel")))


def loaded(path: str, **options: Any) -> PretrainedDenoiser:
    return PretrainedDenoiser(path, dtype="float32", device="cpu", **options)


def network(channels: int, axes: int, **options: int) -> PatchTransformer:
    torch.manual_seed(0)
    return PatchTransformer(2 * channels, channels, (1,) * axes, 16, 1, 2, 2, **options)


def config(folder: Path, target: object, net: dict[str, Any], prompts: list[str]) -> Path:
    """Write the config of a training of three steps."""
    net = net | {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "num_times": 2}
    sampler = {"num_steps": 5, "guidance": 2.0 if len(prompts) > 1 else 1.0}
    module = sampler | {
        "target": target,
        "window": 3,
        "network": {"class_path": "specstream.models.PatchTransformer", "init_args": net},
        "decoding": sampler | {"num_samples": 2, "window": 3},
    }
    data = {"prompts": prompts, "num_samples": 16, "batch_size": 2, "validation_fraction": 0.2}
    trainer = {"accelerator": "cpu", "max_steps": 3, "limit_val_batches": 1}
    trainer |= {"check_val_every_n_epoch": None, "val_check_interval": 3, "log_every_n_steps": 1}
    path = folder / "config.yaml"
    whole = {
        "run": str(folder / "run"),
        "model": {"class_path": "specstream.training.ResidualModule", "init_args": module},
        "data": {"class_path": "specstream.data.CaptionDataModule", "init_args": data},
        "trainer": trainer,
    }
    path.write_text(yaml.safe_dump(whole))
    return path


def test_a_guided_video_target_is_drafted_for_in_its_latents(
    video: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = SIZE | {"path": video, "dtype": "float32", "device": "cpu"}
    target = {"class_path": "specstream.models.PretrainedDenoiser", "init_args": options}
    net = {"in_channels": 16, "out_channels": 8, "patch": [1, 1, 1], "text_size": 12}
    assert train(["--config", str(config(tmp_path, target, net, PROMPTS))]) == 0
    run, output, stats = tmp_path / "run", tmp_path / "cat.mp4", tmp_path / "x.json"
    assert list((run / "samples").glob("step-*.mp4"))
    named = json.loads((run / "draft" / "specstream.json").read_text())["target"]
    assert named["path"] == video and named["init_args"]["num_frames"] == 5
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any("val/round_ratio" in row for row in rows)
    given = ["--run", str(run), "--prompt", "a cat", "--output", str(output), "--device", "cpu"]
    given += ["--stats", str(stats), "--media.steps", "5", "--media.window", "3"]
    given += ["--dtype", "float32", "--overwrite", "true"]
    assert generate([*given, "--media.guidance", "2"]) == 0 and output.is_file()
    assert "was trained for guidance" not in capsys.readouterr().err
    found = json.loads(stats.read_text())
    assert (found["modality"], found["guarantee"]) == ("video", "exact law")
    assert found["draft_calls"] > 0
    assert generate(given) == 0
    assert "the drafter was trained for guidance 2: with 1" in capsys.readouterr().err
    begun = [*given, "--media.first_frame", str(tmp_path / "first.png")]
    Image.new("RGB", (8, 16), "red").save(tmp_path / "first.png")
    assert generate([*begun, "--media.height", "16", "--media.num_frames", "9"]) == 0
    reader = imageio_ffmpeg.read_frames(str(output))
    assert next(reader)["size"] == (8, 16) and len(list(reader)) == 9
    found = json.loads(stats.read_text())
    assert found["law"].endswith("held to what is given") and found["draft_calls"] > 0
    capsys.readouterr()
    assert generate([*given, "--media.height", "10"]) == 2
    assert "height 10 is not a multiple of 4, as this model wants" in capsys.readouterr().err


def test_the_folder_of_a_pipeline_is_a_target_too(image: str, tmp_path: Path) -> None:
    net = {"in_channels": 6, "out_channels": 3, "patch": [2, 2]}
    assert train(["--config", str(config(tmp_path, image, net, [""]))]) == 0
    output = tmp_path / "x.png"
    given = ["--run", str(tmp_path / "run"), "--prompt", "", "--output", str(output)]
    assert generate([*given, "--media.steps", "5", "--device", "cpu"]) == 0 and output.is_file()


def test_the_drafter_is_told_the_caption_that_the_target_is_told(video: str) -> None:
    target = loaded(video, **SIZE)
    captions = encode_captions(target, PROMPTS)
    assert (captions.text_size, captions.num_classes) == (12, 0)
    for name, value in target.condition(["cat"]).items():
        assert torch.equal(captions.of(torch.tensor([1]))[name], value)
    module = ResidualModule(network(8, 3, text_size=12), target, 5, window=3)
    for layer in (module.drafter.network.write, module.drafter.network.last_scale):
        torch.nn.init.normal_(layer.weight)
    module.captions = captions
    object.__setattr__(module, "_trainer", type("T", (), {"current_epoch": 0})())
    rows = {"keys": torch.arange(4), "real": torch.ones(4) > 0}
    texts = []
    heard = module.drafter.network.text
    heard.register_forward_pre_hook(lambda _, given: texts.append(given[0]))
    found = module.loss(rows | {"prompts": torch.tensor([0, 1, 2, 1])})
    found.total.backward()
    assert heard.weight.grad.abs().max() > 0 and found.count == 4 * 8
    expected = short_condition(captions.of(torch.tensor([0, 1, 2, 1])))["text"]
    assert torch.allclose(texts[0][:4], expected) and not torch.equal(expected[0], expected[1])


def test_a_text_is_the_mean_of_what_its_tokens_say() -> None:
    embeds = torch.tensor([[[3.0, 4.0], [1.0, 0.0], [100.0, 100.0]]])
    told = {"prompt_embeds": embeds, "prompt_mask": torch.tensor([[1, 1, 0]])}
    text = short_condition(told)["text"]
    assert torch.allclose(text, torch.tensor([[1.0, 1.0]]))  # (4, 4), of length 1 a number
    told["prompt_mask"] *= 0
    assert torch.equal(short_condition(told)["text"], torch.zeros(1, 2))
    classes = {"classes": torch.tensor([3])}
    assert short_condition(classes) is classes


def test_captions_take_turns_and_their_samples_are_each_seen_once() -> None:
    data = CaptionDataModule(PROMPTS, num_samples=30, batch_size=4, validation_fraction=0.3)
    held = [row for batch in data.val_dataloader() for row in batch["keys"][batch["real"]].tolist()]
    assert sorted(held) == data.numbers(held_out=True).tolist() and 0 < len(held) < 20
    for batch in data.train_dataloader():
        assert not set(batch["keys"].tolist()) & set(held)
        assert torch.equal(batch["prompts"], batch["keys"] % 3)


@pytest.mark.parametrize(
    "options, line",
    [
        ({}, "give prompts, or a file of them"),
        ({"prompts": ["a"] * 9, "num_samples": 8}, "num_samples must be at least 9"),
        ({"prompts": ["a"], "batch_size": 0}, "batch_size must be at least 1"),
        ({"prompts": ["a"], "validation_fraction": 1.0}, r"must be in \[0, 1\)"),
    ],
)
def test_captions_that_cannot_be_are_refused(options: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        CaptionDataModule(**options)


def test_what_does_not_go_together_is_refused(image: str, video: str, tmp_path: Path) -> None:
    def begin(module: ResidualModule, data: object) -> None:
        object.__setattr__(module, "_trainer", type("T", (), {"datamodule": data})())
        module.on_fit_start()

    target, captions = loaded(image), CaptionDataModule([""])
    small = Denoiser(PatchTransformer(1, 1, (2, 2), 16, 1, 2), FlowSchedule(), (1, 8, 8))
    with pytest.raises(ValueError, match="are trained with captions"):
        begin(ResidualModule(network(3, 2), target), object())
    with pytest.raises(ValueError, match="are trained with captions"):
        begin(ResidualModule(network(1, 2), small), captions)
    with pytest.raises(ValueError, match="takes no prompts: give data prompts"):
        begin(ResidualModule(network(3, 2), target), CaptionDataModule(["a cat"]))
    with pytest.raises(ValueError, match="text_size is 7, but here it must be 0"):
        begin(ResidualModule(network(3, 2, text_size=7), target), captions)
    with pytest.raises(ValueError, match="guidance is the weight of a prompt"):
        begin(ResidualModule(network(3, 2), target, guidance=2.0), captions)
    with pytest.raises(ValueError, match="leave out quantize and offload"):
        ResidualModule(network(3, 2), loaded(image, quantize="int8_weight_only"))
    parts = {"transformer": fresh("CogVideoXTransformer3DModel:continues")}
    parts["vae"] = fresh("AutoencoderKLCogVideoX")
    folder = save_pipeline(tmp_path / "cog", "CogVideoXImageToVideoPipeline", STEPPED, **parts)
    with pytest.raises(ValueError, match="is shown a picture, and captions hold none"):
        ResidualModule(network(4, 3), loaded(str(folder), height=32, width=32, num_frames=9))
    told = tmp_path / "told.safetensors"
    save_file({"prompt_embeds": torch.ones(1, 5, 12), "prompt_mask": torch.ones(1, 5)}, told)
    stored = loaded(video, conditions=str(told), **SIZE)
    with pytest.raises(ValueError, match="guidance needs the prompt_embeds of an empty prompt"):
        begin(ResidualModule(network(8, 3), stored, guidance=2.0), captions)
    begin(ResidualModule(network(3, 2), target), captions)
    assert ResidualDenoiser(network(3, 2)).trained_guidance == 1
