"""Networks that fill holes in pictures: as the pipelines of diffusers do it, drafted and plain."""

from __future__ import annotations

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
from specstream.media_reader import read_mask, read_picture
from specstream.metrics import energy_test
from specstream.models import PretrainedDenoiser
from specstream.sampling import Noise, Role
from tests.diffusers_toys import fresh, save_pipeline

STEPS, SEED, WEIGHT = 4, 3, 30.0
SIZE = {"height": 16, "width": 16}
CHAIN = {"_class_name": "DDIMScheduler", "clip_sample": False, "steps_offset": 1}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}
FAMILIES: dict[str, tuple[str, dict[str, object], str, str]] = {
    "sd": (
        "StableDiffusionInpaintPipeline",
        CHAIN,
        "UNet2DConditionModel:fills",
        "AutoencoderKL:unmoved",
    ),
    "sdxl": (
        "StableDiffusionXLInpaintPipeline",
        CHAIN,
        "UNet2DConditionModel:fills-xl",
        "AutoencoderKL:unmoved",
    ),
    "flux": ("FluxFillPipeline", FLOW, "FluxTransformer2DModel:fills", "AutoencoderKL"),
}


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def prompt(name: str) -> dict[str, Tensor]:
    """Return what a prompt and none say to a family; Flux is not told of none."""
    told = {"prompt_embeds": drawn(1, 5, 12)}
    if name != "sd":
        told["pooled_prompt_embeds"] = drawn(1, 6)
    if name == "flux":
        return told
    return told | {f"negative_{key}": value / 2 for key, value in told.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of each family, a picture, and a mask whose edges lie within blocks."""
    home = tmp_path_factory.mktemp("filled")
    for name, (pipeline, scheduler, network, vae) in FAMILIES.items():
        part = "transformer" if name == "flux" else "unet"
        parts = {part: fresh(network), "vae": fresh(vae)}
        save_pipeline(home / name, pipeline, scheduler, **parts)
        save_file(prompt(name), home / name / "conditions.safetensors")
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(home / "picture.png")
    hole = np.zeros((16, 16), np.uint8)
    hole[3:, 7:13] = 255
    Image.fromarray(hole).save(home / "hole.png")
    return home


def run_of(folder: Path, name: str, guidance: float = 1.0, **size: int) -> MediaRun:
    path = str(folder / name)
    options: dict[str, Any] = SIZE | size
    options |= {"conditions": f"{path}/conditions.safetensors", "prompt_weight": WEIGHT}
    target = PretrainedDenoiser(path, dtype="float32", device="cpu", **options)
    return media_of_target(target, SamplerOptions(num_steps=STEPS, eta=0.0, guidance=guidance))


def files(folder: Path) -> GivenFiles:
    return GivenFiles(str(folder / "picture.png"), str(folder / "hole.png"))


def pure(target: PretrainedDenoiser) -> Tensor:
    first = torch.zeros(1, dtype=torch.int64)
    return Noise(SEED, "cpu").normal(first, first, target.shape, Role.START).float()


def of_stable(target: PretrainedDenoiser, told: dict[str, Any]) -> Tensor:
    """Return the pictures (1, 3, H, W) in 0..1 of StableDiffusionInpaintPipeline."""
    from diffusers import DDIMScheduler, StableDiffusionInpaintPipeline

    theirs = StableDiffusionInpaintPipeline(
        text_encoder=None,
        tokenizer=None,
        unet=target.network.model,
        vae=target.codec.model,
        scheduler=DDIMScheduler.from_config(CHAIN),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return theirs(latents=pure(target), guidance_scale=3.0, **told).images


def of_stable_xl(target: PretrainedDenoiser, told: dict[str, Any]) -> Tensor:
    """Return the pictures of StableDiffusionXLInpaintPipeline, from pure noise."""
    from diffusers import DDIMScheduler, StableDiffusionXLInpaintPipeline

    theirs = StableDiffusionXLInpaintPipeline(
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=target.network.model,
        vae=target.codec.model,
        scheduler=DDIMScheduler.from_config(CHAIN),
        add_watermarker=False,
    )
    return theirs(latents=pure(target), strength=1.0, guidance_scale=3.0, **told).images


def of_flux(target: PretrainedDenoiser, told: dict[str, Any]) -> Tensor:
    """Return the pictures of FluxFillPipeline."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxFillPipeline

    theirs = FluxFillPipeline(
        FlowMatchEulerDiscreteScheduler.from_config(FLOW),
        target.codec.model,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=target.network.model,
    )
    packed = FluxFillPipeline._pack_latents(pure(target), 1, *target.shape)
    return theirs(latents=packed, guidance_scale=WEIGHT, **told).images


THEIRS: dict[str, Callable[[PretrainedDenoiser, dict[str, Any]], Tensor]] = {
    "sd": of_stable,
    "sdxl": of_stable_xl,
    "flux": of_flux,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_hole_is_filled_as_the_pipeline_of_diffusers_fills_it(name: str, folder: Path) -> None:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    run, given = run_of(folder, name, 1.0 if name == "flux" else 3.0), files(folder)
    assert run.told is not None and given.image is not None and given.mask is not None
    asked = asked_for(run, "", given, 1)
    assert asked.known is None
    media = run.media(run.pipeline.complete(1, asked.condition, seed=SEED))
    told: dict[str, Any] = prompt(name) | SIZE | {"num_inference_steps": STEPS}
    told |= {"image": (read_picture(given.image, 3)[None] + 1) / 2, "output_type": "pt"}
    told |= {"mask_image": read_mask(given.mask).float()}
    with pytest.MonkeyPatch.context() as patch:  # an autoencoder that draws nothing
        law = DiagonalGaussianDistribution
        patch.setattr(law, "sample", lambda self, generator=None: self.mode())
        theirs = THEIRS[name](run.told, told)
    assert media.shape == (1, 3, 16, 16)
    assert torch.allclose(media, theirs * 2 - 1, atol=2e-4)


def test_drafts_keep_the_law_of_filled_holes(folder: Path, tmp_path: Path) -> None:
    rows, run = 256, run_of(folder, "flux", height=4, width=4)
    assert run.told is not None
    Image.new("RGB", (4, 4), (200, 40, 90)).save(tmp_path / "picture.png")
    hole = Image.new("L", (4, 4))
    hole.paste(255, (1, 0, 4, 4))
    hole.save(tmp_path / "hole.png")
    asked = asked_for(run, "", files(tmp_path), rows)
    plain, drafted = (
        DenoisingPipeline(run.told, 6, drafter=drafter, lengths=lengths, batch_size=rows)
        for drafter, lengths in ((None, None), (FrozenEstimate(), FixedLength(4)))
    )
    one, other = (
        pipeline.complete(rows, asked.condition, seed=seed)
        for seed, pipeline in enumerate((plain, drafted))
    )
    assert drafted.stats.acceptance and drafted.stats.guarantee.value == "exact law"
    assert energy_test(other, one, num_permutations=199).p_value > 0.01
    assert not torch.equal(one, other)


def test_generate_fills_a_hole_and_asks_for_one(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "sd"
    block = {"path": str(path), "conditions": f"{path}/conditions.safetensors", **SIZE}
    target = {"class_path": "specstream.models.PretrainedDenoiser", "init_args": block}
    config, output = tmp_path / "fill.yaml", tmp_path / "out.png"
    config.write_text(yaml.safe_dump({"target": target, "media": {"steps": 3}}))
    given = ["--config", str(config), "--prompt", "", "--output", str(output)]
    given += ["--device", "cpu", "--dtype", "float32"]
    assert generate(given) == 2
    assert "media.image: this model fills a hole in a picture" in capsys.readouterr().err
    hole = ["--media.image", str(folder / "picture.png"), "--media.mask"]
    Image.new("L", (16, 16), 255).save(tmp_path / "white.png")
    assert generate([*given, *hole, str(tmp_path / "white.png")]) == 2
    assert "is white: nothing of" in capsys.readouterr().err
    assert generate([*given, *hole, str(folder / "hole.png")]) == 0
    assert Image.open(output).size == (16, 16)
