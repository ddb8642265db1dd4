"""From the latents that a diffusion model denoises to pictures, videos and sounds, and back.

Media lie in -1..1.  Each autoencoder of `diffusers` has its own way to say where its latents lie
and how wide they are; here it is known, so that a state is what the network denoises.

Shapes: a state (B, C, H, W), (B, C, F, H, W) or (B, C, L); media likewise, in pixels, frames and
samples.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from specstream.files import one_line

if TYPE_CHECKING:
    from diffusers import ModelMixin

PICTURES = ("AutoencoderKL", "AutoencoderTiny")
VIDEOS = ("AutoencoderKLLTXVideo", "AutoencoderKLWan", "AutoencoderKLCogVideoX")
SOUNDS = ("AutoencoderOobleck",)
AUTOENCODERS = (*PICTURES, *VIDEOS, *SOUNDS)


@dataclass(frozen=True, slots=True)
class Compression:
    """What one place of a state stands for.

    `space` pixels along height and width, `time` frames (of which the first stands alone), or
    `samples` of a sound at `sample_rate` a second.  `odd`: the first stands alone only where the
    state has an odd number of frames.
    """

    space: int = 1
    time: int = 1
    samples: int = 1
    sample_rate: int = 0
    odd: bool = False


class Codec(nn.Module, ABC):
    """Turns states into media and media into states."""

    compression: Compression

    @abstractmethod
    def decode(self, states: Tensor) -> Tensor:
        """Return the media in -1..1, float32, that states (B, C, ...) stand for."""

    @abstractmethod
    def encode(self, media: Tensor) -> Tensor:
        """Return the states, float32, of media (B, C, ...) in -1..1; nothing is drawn."""


class PixelCodec(Codec):
    """States that are the media themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.compression = Compression()

    def decode(self, states: Tensor) -> Tensor:
        return states.float().clamp(-1, 1)

    def encode(self, media: Tensor) -> Tensor:
        return media.float()


class AutoencoderCodec(Codec):
    """An autoencoder of `diffusers`; latents are moved and scaled as its pipeline does.

    Args:
        model: one of `AUTOENCODERS`, else ValueError.
        tile: large media are worked on in overlapping tiles: less memory, but blended seams.
    """

    def __init__(self, model: ModelMixin, tile: bool = False) -> None:
        super().__init__()
        self.compression = compression_of(type(model).__name__, model.config)
        self.model = model.eval().requires_grad_(False)
        self.tile = tile
        if tile:
            model.enable_tiling()

    def decode(self, states: Tensor) -> Tensor:
        kind = type(self.model).__name__
        shift, scale = self._place(states)
        latents = (states.float() * scale + shift).to(self.model.device, self.model.dtype)
        if kind == "AutoencoderKLLTXVideo" and self.model.config.timestep_conditioning:
            clean = latents.new_zeros(len(latents))  # the pipeline's default: no noise is left
            media = self.model.decode(latents, clean, return_dict=False)[0]
        else:
            media = self.model.decode(latents, return_dict=False)[0]
        return media.float().clamp(-1, 1)

    def encode(self, media: Tensor) -> Tensor:
        said = self.model.encode(media.to(self.model.device, self.model.dtype))
        tiny = type(self.model).__name__ == "AutoencoderTiny"
        latents = (said.latents if tiny else said.latent_dist.mode()).float()
        shift, scale = self._place(latents)
        return (latents - shift) / scale

    def _place(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Return what latents = state * scale + shift takes, each to be broadcast over (B, C, ...).

        AutoencoderKLLTXVideo keeps mean and width as buffers, AutoencoderKLWan in its config.
        """
        config, kind = self.model.config, type(self.model).__name__
        if kind in ("AutoencoderKLLTXVideo", "AutoencoderKLWan"):
            ltx = kind == "AutoencoderKLLTXVideo"
            source = self.model if ltx else config
            factor = config.scaling_factor if ltx else 1.0
            shape = (1, -1, 1, 1, 1)
            mean = torch.as_tensor(source.latents_mean).to(latents.device).float().view(shape)
            width = torch.as_tensor(source.latents_std).to(latents.device).float().view(shape)
            return mean, width / factor
        factor = config.get("scaling_factor") or 1.0
        moved = config.get("shift_factor") if kind in PICTURES else None  # videos ignore theirs
        return torch.tensor(moved or 0.0), torch.tensor(1 / factor)


class TinyCodec(Codec):
    """The tiny autoencoder of pictures in `taesd`'s layout (taesd_*.safetensors, MIT).

    Plain convolutions, for development without a download: `folder` holds one file that ends in
    encoder.safetensors and one in decoder.safetensors.  Raises ValueError where it does not.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.compression = Compression(space=8)
        self.encoder = tiny_part(Path(folder), "encoder")
        self.decoder = tiny_part(Path(folder), "decoder")

    def decode(self, states: Tensor) -> Tensor:
        bounded = 3 * torch.tanh(
            states.float() / 3
        )  # as the first layer of the decoder was trained
        return (self.decoder(bounded) * 2 - 1).clamp(-1, 1)

    def encode(self, media: Tensor) -> Tensor:
        return self.encoder((media.float() + 1) / 2)


class TinyBlock(nn.Module):
    """Three convolutions and a way around them; `pooled` blocks add a mix of channels before."""

    def __init__(self, channels: int, pooled: bool) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )
        self.pool = (
            nn.Sequential(
                nn.Conv2d(channels, 4 * channels, 1, bias=False),
                nn.GroupNorm(4, 4 * channels),
                nn.ReLU(),
                nn.Conv2d(4 * channels, channels, 1, bias=False),
            )
            if pooled
            else None
        )

    def forward(self, states: Tensor) -> Tensor:
        """Return states (B, C, H, W)."""
        if self.pool is not None:
            states = states + self.pool(states)
        return torch.relu(states + self.conv(states))


def tiny_part(folder: Path, part: str) -> nn.Sequential:
    """Build the encoder or decoder whose layers' numbers and sizes its file gives."""
    from safetensors.torch import load_file

    files = sorted(folder.glob(f"*{part}.safetensors"))
    if len(files) != 1:
        raise ValueError(f"'{folder}' holds {len(files)} files *{part}.safetensors, not one")
    with one_line(f"'{files[0]}' is no tiny autoencoder"):
        weights = {name: value.float() for name, value in load_file(files[0]).items()}
        number = max(int(name.split(".")[0]) for name in weights)
        layers = [tiny_layer(weights, str(index), part) for index in range(number + 1)]
        network = nn.Sequential(*layers)
        network.load_state_dict(weights)
    return network.eval().requires_grad_(False)


def tiny_layer(weights: Mapping[str, Tensor], name: str, part: str) -> nn.Module:
    """Return layer `name`: a block, a convolution, or what stands between them without weights."""
    if f"{name}.conv.0.weight" in weights:
        channels = len(weights[f"{name}.conv.0.weight"])
        return TinyBlock(channels, f"{name}.pool.0.weight" in weights)
    if f"{name}.weight" in weights:
        leaving, entering = weights[f"{name}.weight"].shape[:2]
        plain = f"{name}.bias" in weights
        stride = 1 if plain or part == "decoder" else 2
        return nn.Conv2d(entering, leaving, 3, stride, padding=1, bias=plain)
    if name == "0":
        return nn.Identity()  # the bound of `TinyCodec.decode`
    return nn.ReLU() if name == "2" else nn.Upsample(scale_factor=2)


def compression_of(name: str, config: Mapping[str, Any]) -> Compression:
    """Return what a place of an autoencoder's latents stands for, from its class and config.

    Raises ValueError for a class that is not supported.
    """
    if name not in AUTOENCODERS:
        raise ValueError(
            f"'{name}' is no supported autoencoder; these are: {', '.join(AUTOENCODERS)}"
        )
    if name in PICTURES:
        levels = config.get("block_out_channels") or config["decoder_block_out_channels"]
        return Compression(2 ** (len(levels) - 1))
    if name == "AutoencoderKLLTXVideo":
        halvings = 2 ** sum(config["spatio_temporal_scaling"])
        return Compression(
            config.get("spatial_compression_ratio") or config["patch_size"] * halvings,
            config.get("temporal_compression_ratio") or config["patch_size_t"] * halvings,
        )
    if name == "AutoencoderKLWan":
        return Compression(config["scale_factor_spatial"], config["scale_factor_temporal"])
    if name == "AutoencoderKLCogVideoX":
        space = 2 ** (len(config["block_out_channels"]) - 1)
        return Compression(space, int(config["temporal_compression_ratio"]), odd=True)
    ratios = config["downsampling_ratios"]
    return Compression(samples=prod(ratios), sample_rate=config["sampling_rate"])
