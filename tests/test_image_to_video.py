"""Videos that begin with a picture: as the pipelines of diffusers make them, drafted and plain."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from specstream.cli import generate
from specstream.drafters import FrozenEstimate
from specstream.generation.denoising import DenoisingPipeline
from specstream.generation.lengths import FixedLength
from specstream.generation.media_given import GivenFiles, asked_for
from specstream.generation.media_loading import MediaRun, SamplerOptions, media_of_target
from specstream.media_reader import read_picture, read_video
from specstream.metrics import energy_test
from specstream.models import PretrainedDenoiser
from specstream.sampling import Noise, Role
from tests.diffusers_toys import fresh, other, save_image_encoder, save_pipeline

STEPS, SEED = 4, 3
SIZE = {"height": 32, "width": 32, "num_frames": 9}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
CHAIN = {"_class_name": "CogVideoXDDIMScheduler", "prediction_type": "v_prediction"}
CHAIN |= {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
FAMILIES = {
    "ltx": ("LTXPipeline", FLOW, "LTXVideoTransformer3DModel", "AutoencoderKLLTXVideo"),
    "wan": ("WanPipeline", FLOW, "WanTransformer3DModel", "AutoencoderKLWan"),
    "cogvideox": (
        "CogVideoXImageToVideoPipeline",
        CHAIN,
        "CogVideoXTransformer3DModel:continues",
        "AutoencoderKLCogVideoX:inverted",
    ),
    "cogvideox-1.5": (
        "CogVideoXImageToVideoPipeline",
        CHAIN,
        "CogVideoXTransformer3DModel:1.5-continues",
        "AutoencoderKLCogVideoX:inverted",
    ),
    "wan-read": (
        "WanImageToVideoPipeline",
        FLOW,
        "WanTransformer3DModel:reads",
        "AutoencoderKLWan",
    ),
    "wan-experts": (
        "WanImageToVideoPipeline",
        FLOW,
        "WanTransformer3DModel:continues",
        "AutoencoderKLWan",
    ),
}
SHARE = 0.6  # of the times, below which the second expert is asked
INDEX: dict[str, dict[str, object]] = {
    "wan": {"expand_timesteps": True},
    "wan-experts": {"boundary_ratio": SHARE},
}


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def prompt(name: str) -> dict[str, Tensor]:
    """Return what a prompt and none say to a family: to one that reads pictures, in 512 tokens."""
    embeds = drawn(1, 512 if name == "wan-read" else 5, 12)
    return {"prompt_embeds": embeds, "negative_prompt_embeds": embeds.flip(1) / 2}


MASKS = {
    "prompt_mask": torch.tensor([[1, 1, 1, 0, 0]]),
    "negative_prompt_mask": torch.tensor([[1, 0, 0, 0, 0]]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of each family, and a picture."""
    home = tmp_path_factory.mktemp("continued")
    for name, (pipeline, scheduler, network, vae) in FAMILIES.items():
        parts = {"transformer": fresh(network), "vae": fresh(vae)}
        if name == "wan-experts":
            parts["transformer_2"] = other(network)
        save_pipeline(home / name, pipeline, scheduler, INDEX.get(name), **parts)
        if name == "wan-read":
            save_image_encoder(home / name)
        told = prompt(name) | (MASKS if name == "ltx" else {})
        save_file(told, home / name / "conditions.safetensors")
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).save(home / "first.png")
    return home


def run_of(folder: Path, name: str, guidance: float = 1.0, **options: Any) -> MediaRun:
    path = str(folder / name)
    given = SIZE | {"conditions": f"{path}/conditions.safetensors"} | options
    target = PretrainedDenoiser(path, dtype="float32", device="cpu", **given)
    how = SamplerOptions(num_steps=STEPS, eta=0.0, guidance=guidance)
    return media_of_target(target, how)


def pure(target: PretrainedDenoiser) -> Tensor:
    first = torch.zeros(1, dtype=torch.int64)
    return Noise(SEED, "cpu").normal(first, first, target.shape, Role.START).float()


def of_ltx(target: PretrainedDenoiser, picture: Tensor, told: dict[str, Any]) -> Tensor:
    """Return the frames (1, F, 3, H, W) in 0..1 of LTXImageToVideoPipeline."""
    from diffusers import FlowMatchEulerDiscreteScheduler, LTXImageToVideoPipeline

    latents = pure(target)
    latents[:, :, :1] = target.encode(picture[None, :, None])
    parts = {"vae": target.codec.model, "transformer": target.network.model}
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(FLOW)
    theirs = LTXImageToVideoPipeline(scheduler, text_encoder=None, tokenizer=None, **parts)
    masks = {k.replace("prompt_mask", "prompt_attention_mask"): v for k, v in MASKS.items()}
    packed = LTXImageToVideoPipeline._pack_latents(latents)
    return theirs(frame_rate=25, latents=packed, **masks, **told).frames


def wan_pipeline(target: PretrainedDenoiser) -> Any:
    """Return WanImageToVideoPipeline around a target of whatever version."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline
    from transformers import AutoImageProcessor, CLIPVisionModel

    class Even(FlowMatchEulerDiscreteScheduler):
        """Euler's method at the times of our steps, which the pipeline does not ask for."""

        def set_timesteps(self, num_steps: int, device: object = None) -> None:
            super().set_timesteps(sigmas=np.linspace(1, 1 / num_steps, num_steps).tolist())

    home, models = str(target.path), target.network.models
    parts: dict[str, Any] = {"transformer": models[0]}
    if len(models) > 1:
        parts |= {"transformer_2": models[1], "boundary_ratio": SHARE}
    if models[0].config.image_dim is not None:
        encoder = CLIPVisionModel.from_pretrained(home, subfolder="image_encoder").eval()
        parts["image_encoder"] = encoder
        where = {"subfolder": "image_processor", "backend": "pil"}
        parts["image_processor"] = AutoImageProcessor.from_pretrained(home, **where)
    return WanImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=target.codec.model,
        scheduler=Even.from_config(FLOW),
        expand_timesteps=target.network.expand_timesteps,
        **parts,
    )


def of_wan(target: PretrainedDenoiser, picture: Tensor, told: dict[str, Any]) -> Tensor:
    """Return the frames of WanImageToVideoPipeline."""
    theirs = wan_pipeline(target)
    pixels = ((picture + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    return theirs(image=Image.fromarray(pixels), latents=pure(target), **told).frames


def of_cogvideox(target: PretrainedDenoiser, picture: Tensor, told: dict[str, Any]) -> Tensor:
    """Return the frames of CogVideoXImageToVideoPipeline, whose autoencoder draws nothing."""
    from diffusers import CogVideoXDDIMScheduler, CogVideoXImageToVideoPipeline
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    theirs = CogVideoXImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=target.codec.model,
        transformer=target.network.model,
        scheduler=CogVideoXDDIMScheduler.from_config(CHAIN),
    )
    image, latents = (picture[None] + 1) / 2, pure(target).transpose(1, 2)
    with pytest.MonkeyPatch.context() as patch:
        law = DiagonalGaussianDistribution
        patch.setattr(law, "sample", lambda self, generator=None: self.mode())
        return theirs(image=image, latents=latents, **told).frames


THEIRS: dict[str, Callable[[PretrainedDenoiser, Tensor, dict[str, Any]], Tensor]] = {
    "ltx": of_ltx,
    "wan": of_wan,
    "cogvideox": of_cogvideox,
    "cogvideox-1.5": of_cogvideox,
    "wan-read": of_wan,
    "wan-experts": of_wan,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_video_begins_as_the_pipeline_of_diffusers_begins_it(name: str, folder: Path) -> None:
    run, picture = run_of(folder, name, 3.0), folder / "first.png"
    assert run.told is not None
    asked = asked_for(run, "", GivenFiles(first_frame=str(picture)), 1)
    samples = run.pipeline.complete(1, asked.condition, seed=SEED, known=asked.known)
    told = prompt(name) | SIZE | {"num_inference_steps": STEPS, "guidance_scale": 3.0}
    told |= {"output_type": "pt"}
    frames = THEIRS[name](run.told, read_picture(str(picture), 3), told)
    media = run.media(samples)
    assert media.shape == (1, 3, 9, 32, 32)
    theirs = torch.as_tensor(frames).transpose(1, 2) * 2 - 1
    assert torch.allclose(media, theirs, atol=2e-4)
    if asked.known is not None:
        assert torch.equal(samples[:, :, 0], asked.known.data[:, :, 0])


def test_wan_is_shown_the_mask_and_the_grey_video_that_its_pipeline_prepares(folder: Path) -> None:
    run, picture = run_of(folder, "wan-experts"), str(folder / "first.png")
    assert run.told is not None
    asked = asked_for(run, "", GivenFiles(first_frame=picture), 2)
    _, right = wan_pipeline(run.told).prepare_latents(
        read_picture(picture, 3)[None], 2, 4, **SIZE, dtype=torch.float32, device="cpu"
    )
    assert asked.condition["beside"].shape == (2, 8, 3, 4, 4)
    assert torch.allclose(asked.condition["beside"], right, atol=1e-5)


@pytest.mark.parametrize(("name", "side"), [("ltx", 4), ("wan-experts", 16)])
def test_drafts_keep_the_law_of_videos_that_begin_with_a_picture(
    name: str, side: int, folder: Path, tmp_path: Path
) -> None:
    rows, picture = 256, tmp_path / "small.png"
    Image.new("RGB", (side, side), (200, 40, 90)).save(picture)
    run = run_of(folder, name, height=side, width=side, num_frames=5)
    assert run.told is not None
    asked = asked_for(run, "", GivenFiles(first_frame=str(picture)), rows)
    plain, drafted = (
        DenoisingPipeline(run.told, 6, drafter=drafter, lengths=lengths, batch_size=rows)
        for drafter, lengths in ((None, None), (FrozenEstimate(), FixedLength(4)))
    )
    one, another = (
        pipeline.complete(rows, asked.condition, seed=seed, known=asked.known)
        for seed, pipeline in enumerate((plain, drafted))
    )
    assert drafted.stats.acceptance and drafted.stats.guarantee.value == "exact law"
    assert energy_test(another, one, num_permutations=199).p_value > 0.01
    assert not torch.equal(one, another)
    if asked.known is not None:
        assert torch.equal(one[:, :, 0], another[:, :, 0])


def test_a_model_that_is_not_told_of_a_picture_holds_its_latents(
    folder: Path, tmp_path: Path
) -> None:
    index = json.loads((folder / "wan" / "model_index.json").read_text())
    plain = shutil.copytree(folder / "wan", tmp_path / "wan")
    (plain / "model_index.json").write_text(json.dumps(index | {"expand_timesteps": False}))
    run = run_of(tmp_path, "wan")
    asked = asked_for(run, "", GivenFiles(first_frame=str(folder / "first.png")), 1)
    assert list(asked.condition) == ["prompt_embeds"] and asked.known is not None
    samples = run.pipeline.complete(1, asked.condition, seed=SEED, known=asked.known)
    assert torch.equal(samples[:, :, 0], asked.known.data[:, :, 0])


def test_a_frame_is_placed_behind_those_that_stand_for_none(folder: Path, tmp_path: Path) -> None:
    parts = {"transformer": fresh("CogVideoXTransformer3DModel:1.5")}
    parts["vae"] = fresh("AutoencoderKLCogVideoX")
    home = save_pipeline(tmp_path / "padded", "CogVideoXPipeline", CHAIN, **parts)
    save_file(prompt("cogvideox"), home / "conditions.safetensors")
    run = run_of(tmp_path, "padded")
    asked = asked_for(run, "", GivenFiles(first_frame=str(folder / "first.png")), 1)
    assert asked.known is not None and run.padding == 1
    assert asked.known.given[0, 0].flatten(1).all(1).tolist() == [False, True, False, False]
    assert run.media(asked.known.data).shape == (1, *run.media_shape)


def test_latents_are_kept_where_no_pixel_of_theirs_is_to_be_made(
    folder: Path, tmp_path: Path
) -> None:
    run = run_of(folder, "ltx")  # a place stands for 4 by 4 pixels and 4 frames
    assert run.told is not None and run.media_shape == (3, 9, 32, 32)
    clip, hole = tmp_path / "clip.mp4", np.zeros((32, 32), np.uint8)
    run.processor.write(drawn(1, *run.media_shape).clamp(-1, 1), clip)
    hole[:, 17:] = 255
    Image.fromarray(hole).save(tmp_path / "hole.png")
    asked = asked_for(run, "", GivenFiles(str(clip), str(tmp_path / "hole.png")), 1)
    assert asked.known is not None and asked.known.given.shape == (1, 1, 3, 8, 8)
    assert asked.known.given.all(2).all(2).tolist() == [[[True] * 4 + [False] * 4]]
    right = run.told.encode(read_video(str(clip), 3)[None])
    assert torch.allclose(asked.known.data, right)


def test_generate_begins_a_video_with_a_picture(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "cogvideox"
    block = {"path": str(path), "conditions": f"{path}/conditions.safetensors", **SIZE}
    target = {"class_path": "specstream.models.PretrainedDenoiser", "init_args": block}
    config, output = tmp_path / "video.yaml", tmp_path / "out.mp4"
    config.write_text(yaml.safe_dump({"target": target, "media": {"steps": 3}}))
    given = ["--config", str(config), "--prompt", "", "--output", str(output)]
    given += ["--device", "cpu", "--dtype", "float32"]
    assert generate(given) == 2
    assert "media.first_frame: this model goes on from a picture" in capsys.readouterr().err
    assert generate([*given, "--media.first_frame", str(folder / "first.png")]) == 0
    assert read_video(str(output), 3).shape == (3, 9, 32, 32)
