"""Latents and media: what the network denoises is what the autoencoder's pipeline decodes."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from specstream.models import AutoencoderCodec, PixelCodec, TinyCodec
from tests.diffusers_toys import fresh

TINY = Path(__file__).resolve().parents[3] / "shared" / "models" / "taef2"
STATES = {
    "AutoencoderKL": (4, 4, 6),
    "AutoencoderTiny": (4, 4, 6),
    "AutoencoderKLLTXVideo": (8, 2, 3, 2),
    "AutoencoderKLWan": (4, 2, 3, 2),
    "AutoencoderKLCogVideoX": (4, 3, 3, 2),
    "AutoencoderOobleck": (4, 6),
}


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def latents_of(name: str, model: torch.nn.Module, states: Tensor) -> Tensor:
    """Return what the pipeline of each autoencoder gives it to decode."""
    config = model.config
    if name == "AutoencoderKL":
        return states / 0.5 + 0.1
    if name == "AutoencoderKLLTXVideo":
        from diffusers import LTXPipeline

        mean, std = model.latents_mean, model.latents_std
        return LTXPipeline._denormalize_latents(states, mean, std, 0.5)
    if name == "AutoencoderKLWan":
        mean, std = (
            torch.tensor(x).view(1, 4, 1, 1, 1) for x in (config.latents_mean, [1, 2, 3, 4])
        )
        return states * std + mean
    return states / 0.7 if name == "AutoencoderKLCogVideoX" else states


@pytest.mark.parametrize("name", STATES)
def test_states_are_decoded_as_the_pipeline_decodes_them(name: str) -> None:
    model, states = fresh(name), drawn(2, *STATES[name])
    if name == "AutoencoderKLLTXVideo":  # zeros and ones at first
        model.latents_mean += 0.3
        model.latents_std *= 2
    codec = AutoencoderCodec(model)
    media = codec.decode(states)
    raw = latents_of(name, model, states)
    assert torch.allclose(media, model.decode(raw).sample.clamp(-1, 1), atol=1e-4)
    place = codec.compression
    if name == "AutoencoderOobleck":
        assert media.shape == (2, 2, 6 * place.samples) and place.sample_rate == 64
    else:
        *frames, height, width = states.shape[2:]
        length = [(count - 1) * place.time + 1 for count in frames]
        assert media.shape == (2, 3, *length, height * place.space, width * place.space)


@pytest.mark.parametrize("name", STATES)
def test_encoding_undoes_the_place_and_the_scale(name: str) -> None:
    model = fresh(name)
    codec = AutoencoderCodec(model)
    media = codec.decode(drawn(1, *STATES[name]))
    states = codec.encode(media)
    assert states.shape == (1, *STATES[name])
    said = model.encode(media)
    raw = said.latents if name == "AutoencoderTiny" else said.latent_dist.mode()
    assert torch.allclose(latents_of(name, model, states), raw, atol=1e-5)


@pytest.mark.parametrize("name", STATES)
def test_tiles_are_switched_on(name: str) -> None:
    assert AutoencoderCodec(fresh(name), tile=True).model.use_tiling
    assert not AutoencoderCodec(fresh(name)).model.use_tiling


def test_pixels_are_their_own_latents() -> None:
    pixels = drawn(2, 1, 4, 4).clamp(-1, 1)
    codec = PixelCodec()
    assert torch.equal(codec.decode(codec.encode(pixels)), pixels)


def test_an_unknown_autoencoder_is_refused_with_the_known_ones() -> None:
    class Other(torch.nn.Module):
        config: ClassVar[dict[str, int]] = {}

    with pytest.raises(ValueError, match=r"'Other' is no supported autoencoder.*AutoencoderKL, "):
        AutoencoderCodec(Other())


@pytest.mark.skipif(not TINY.is_dir(), reason="needs shared/models/taef2")
def test_the_tiny_autoencoder_knows_pictures() -> None:
    codec = TinyCodec(str(TINY))
    down, across = torch.meshgrid(*[torch.linspace(-1, 1, 64)] * 2, indexing="ij")
    picture = 0.8 * torch.stack([(3 * across).sin(), (4 * down).cos(), down * across])[None]
    states = codec.encode(picture)
    assert states.shape == (1, 32, 8, 8)
    error = (codec.decode(states) - picture).square().mean()
    assert 10 * torch.log10(4 / error) > 25  # dB


def test_a_folder_without_a_tiny_autoencoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds 0 files \*encoder.safetensors"):
        TinyCodec(str(tmp_path))
