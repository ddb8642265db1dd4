"""Networks of `diffusers` that denoise pictures, or the latents of pictures.

Shapes: R rows, C channels, H height, W width, T tokens of a prompt, D its width.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from specstream.models.diffusers_network import (
    BESIDE,
    TIMES,
    DiffusersNetwork,
    StateForm,
    plain_channels,
)


class UNet(DiffusersNetwork):
    """UNet2DModel: pixels or latents (R, C, H, W), perhaps of classes (R,)."""

    @staticmethod
    def form(config: Mapping[str, Any]) -> StateForm:
        if config.get("time_embedding_type", "positional") != "positional":
            raise ValueError(
                f"UNet2DModel: time_embedding_type '{config['time_embedding_type']}' is not "
                "supported, only positional is"
            )
        if config.get("class_embed_type") is not None:
            raise ValueError("UNet2DModel: class_embed_type is not supported")
        return unet_form("UNet2DModel", config)

    @property
    def needs(self) -> tuple[str, ...]:
        return ("classes",) if self.model.class_embedding is not None else ()

    def forward(self, states: Tensor, times: Tensor, classes: Tensor | None = None) -> Tensor:
        output = self.model(states, times[:, 0], class_labels=classes, return_dict=False)[0]
        return without_variance(output, states)


class ConditionedUNet(DiffusersNetwork):
    """UNet2DConditionModel: latents (R, C, H, W) under prompt_embeds (R, T, D).

    That of Stable Diffusion XL is also told pooled_prompt_embeds (R, D) and the picture's size.
    One that fills holes is shown beside the state where they are and what is around them.
    """

    @property
    def needs(self) -> tuple[str, ...]:
        config = self.model.config
        size = () if config.addition_embed_type is None else ("pooled_prompt_embeds",)
        return ("prompt_embeds", *size, *((BESIDE,) if fills(config) else ()))

    @staticmethod
    def form(config: Mapping[str, Any]) -> StateForm:
        for name in (
            "class_embed_type",
            "num_class_embeds",
            "time_cond_proj_dim",
            "encoder_hid_dim",
        ):
            if config.get(name) is not None:
                raise ValueError(f"UNet2DConditionModel: {name} is not supported")
        if config.get("addition_embed_type") not in (None, "text_time"):
            raise ValueError(
                f"UNet2DConditionModel: addition_embed_type '{config['addition_embed_type']}' is "
                "not supported, only text_time is"
            )
        if fills(config):
            config = {**config, "in_channels": config["out_channels"]}
        return unet_form("UNet2DConditionModel", config)

    def beside(self, latents: Tensor, made: Tensor) -> Tensor:
        corners = made[..., :: self.space, :: self.space]  # of the blocks that latents stand for
        return torch.cat([corners.to(latents), latents], 1)

    def forward(
        self,
        states: Tensor,
        times: Tensor,
        prompt_embeds: Tensor,
        pooled_prompt_embeds: Tensor | None = None,
        beside: Tensor | None = None,
    ) -> Tensor:
        added = None
        if pooled_prompt_embeds is not None:
            height, width = (side * self.space for side in states.shape[2:])
            size = torch.tensor([height, width, 0, 0, height, width])  # whole and uncropped
            added = {
                "text_embeds": pooled_prompt_embeds.to(states),
                "time_ids": size.to(states).expand(len(states), -1),
            }
        seen = states if beside is None else torch.cat([states, beside.to(states)], 1)
        output = self.model(
            seen,
            times[:, 0],
            prompt_embeds.to(states),
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return without_variance(output, states)


class ClassTransformer(DiffusersNetwork):
    """DiTTransformer2DModel: square latents (R, C, H, W) of classes (R,), -1 for none."""

    needs = ("classes",)

    @staticmethod
    def form(config: Mapping[str, Any]) -> StateForm:
        side = config["sample_size"]
        channels = plain_channels("DiTTransformer2DModel", config)
        return StateForm(channels, (config["patch_size"],) * 2, (side, side), square=True)

    def forward(self, states: Tensor, times: Tensor, classes: Tensor) -> Tensor:
        none = self.model.config.num_embeds_ada_norm  # the row behind the last class
        labels = torch.where(classes < 0, none, classes)
        output = self.model(states, times[:, 0], labels, return_dict=False)[0]
        return without_variance(output, states)

    def unconditional(self, name: str, value: Tensor) -> Tensor:
        return torch.full_like(value, -1)


class FluxTransformer(DiffusersNetwork):
    """FluxTransformer2DModel: latents (R, C, H, W), of which it sees squares of 2 x 2 in a row.

    Told prompt_embeds (R, T, D) and pooled_prompt_embeds (R, D), and a guidance where distilled.
    One that fills holes (FLUX.1 Fill) is shown what is around them, and every pixel of the mask.
    """

    @property
    def needs(self) -> tuple[str, ...]:
        told = ("prompt_embeds", "pooled_prompt_embeds")
        return (*told, BESIDE) if fills_squares(self.model.config) else told

    @staticmethod
    def form(config: Mapping[str, Any]) -> StateForm:
        if fills_squares(config):
            config = {**config, "in_channels": config["out_channels"]}
        channels = plain_channels("FluxTransformer2DModel", config)
        return StateForm(channels // 4, (2, 2), (128, 128))

    def beside(self, latents: Tensor, made: Tensor) -> Tensor:
        blocks = torch.nn.functional.pixel_unshuffle(made.to(latents), self.space)
        return torch.cat([latents, blocks], 1)

    def forward(
        self,
        states: Tensor,
        times: Tensor,
        prompt_embeds: Tensor,
        pooled_prompt_embeds: Tensor,
        beside: Tensor | None = None,
    ) -> Tensor:
        rows, channels, height, width = states.shape
        down, across = height // 2, width // 2
        seen = states if beside is None else torch.cat([states, beside.to(states)], 1)
        packed = in_squares(seen)
        places = torch.zeros(down, across, 3, device=states.device, dtype=states.dtype)
        places[..., 1] = torch.arange(down, device=states.device)[:, None]
        places[..., 2] = torch.arange(across, device=states.device)
        told = torch.full((rows,), self.guidance, device=states.device)
        output = self.model(
            packed,
            prompt_embeds.to(states),
            pooled_prompt_embeds.to(states),
            times[:, 0] / TIMES,
            places.flatten(0, 1),
            places.new_zeros(prompt_embeds.shape[1], 3),
            told if self.model.config.guidance_embeds else None,
            return_dict=False,
        )[0]  # (R, H W / 4, 4 C)
        squares = output.view(rows, down, across, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return squares.reshape(states.shape)


def in_squares(states: Tensor) -> Tensor:
    """Return states (R, C, H, W) as a sequence of squares of 2 x 2, (R, H W / 4, 4 C)."""
    rows, channels, height, width = states.shape
    squares = states.reshape(rows, channels, height // 2, 2, width // 2, 2)
    return squares.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def fills(config: Mapping[str, Any]) -> bool:
    """Whether a UNet is shown a mask, in one channel, and latents of a picture with holes."""
    return bool(config["in_channels"] == 2 * config["out_channels"] + 1)


def fills_squares(config: Mapping[str, Any]) -> bool:
    """Whether a Flux network is shown latents of a picture with holes, and a mask in pixels."""
    mask = config["in_channels"] - 2 * (config.get("out_channels") or config["in_channels"])
    return mask > 0 and mask == 4 * isqrt(mask // 4) ** 2


def unet_form(kind: str, config: Mapping[str, Any]) -> StateForm:
    """Return what states a UNet takes: every level but the first halves them."""
    side = 2 ** (len(config["block_out_channels"]) - 1)
    size = config.get("sample_size")
    sides = (size, size) if isinstance(size, int) else size
    return StateForm(plain_channels(kind, config), (side, side), sides and tuple(sides))


def without_variance(output: Tensor, states: Tensor) -> Tensor:
    """Return the part of an output (R, C or 2 C, ...) that is no learned variance."""
    return output[:, : states.shape[1]]
