"""Networks of `diffusers` that denoise the latents of videos and of sounds.

Shapes: R rows, C channels, F frames, H height, W width, L length of a sound, T tokens of a prompt,
D its width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from specstream.models.diffusers_network import (
    FIRST_FRAME,
    TIMES,
    DiffusersNetwork,
    StateForm,
    plain_channels,
)

OFS = 2.0  # what CogVideoX 1.5 is told beside the time


def begun(
    states: Tensor, times: Tensor, first_frame: Tensor | None, num_places: int
) -> tuple[Tensor, Tensor]:
    """Return states (R, C, F, H, W) that begin with a frame (R, C, 1, H, W), and their times.

    Times (R,) become (R, places), `num_places` of a frame: of that frame they are 0, as it holds
    no noise.  Without a frame both are what they were.
    """
    if first_frame is None:
        return states, times
    told = times[:, None].repeat(1, num_places * states.shape[2])
    told[:, :num_places] = 0
    return torch.cat([first_frame.to(states), states[:, :, 1:]], 2), told


class LTXTransformer(DiffusersNetwork):
    """LTXVideoTransformer3DModel: latents (R, C, F, H, W), of which it sees a sequence of places.

    Told prompt_embeds (R, T, D) and prompt_mask (R, T), 0 where the prompt has ended.  It may be
    shown a first frame, in place of the state's own and without noise.
    """

    needs = ("prompt_embeds", "prompt_mask")
    may_see = (FIRST_FRAME,)

    @staticmethod
    def form(config: Mapping[str, Any]) -> StateForm:
        kind = "LTXVideoTransformer3DModel"
        if (config["patch_size"], config["patch_size_t"]) != (1, 1):
            raise ValueError(f"{kind}: only patches of size 1 are supported")
        return StateForm(plain_channels(kind, config), (1, 1, 1))

    def forward(
        self,
        states: Tensor,
        times: Tensor,
        prompt_embeds: Tensor,
        prompt_mask: Tensor,
        first_frame: Tensor | None = None,
    ) -> Tensor:
        frames, height, width = states.shape[2:]
        states, told = begun(states, times[:, 0], first_frame, height * width)
        output = self.model(
            states.flatten(2).transpose(1, 2),
            prompt_embeds.to(states),
            told,
            prompt_mask.to(states.device),
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=(self.time / self.frame_rate, self.space, self.space),
            return_dict=False,
        )[0]  # (R, F H W, C)
        return output.transpose(1, 2).reshape(states.shape)


class CogVideoXTransformer(DiffusersNetwork):
    """CogVideoXTransformer3DModel: latents (R, C, F, H, W) under prompt_embeds (R, T, D).

    One of twice as many channels is also shown a first frame, beside the state; the first frame
    that it makes is its own.  That of version 1.5 has a further number (`ofs`), always the same.
    """

    @property
    def needs(self) -> tuple[str, ...]:
        shown = self.model.config.in_channels == 2 * self.model.config.out_channels
        return ("prompt_embeds", FIRST_FRAME) if shown else ("prompt_embeds",)

    @staticmethod
    def form(config: Mapping[str, Any]) -> StateForm:
        kind = "CogVideoXTransformer3DModel"
        side, frames = config["patch_size"], config.get("patch_size_t") or 1
        shown = config["in_channels"] == 2 * (config.get("out_channels") or config["in_channels"])
        channels = config["out_channels"] if shown else plain_channels(kind, config)
        length = (config["sample_frames"] - 1) // config["temporal_compression_ratio"] + 1
        size = (length, config["sample_height"], config["sample_width"])
        learned = bool(config["use_learned_positional_embeddings"])
        return StateForm(channels, (frames, side, side), size, fixed=learned)

    def forward(
        self,
        states: Tensor,
        times: Tensor,
        prompt_embeds: Tensor,
        first_frame: Tensor | None = None,
    ) -> Tensor:
        seen = states
        if first_frame is not None:
            shown = torch.zeros_like(states)
            shown[:, :, :1] = first_frame
            seen = torch.cat([states, shown], 1)
        output = self.model(
            seen.transpose(1, 2),  # (R, F, C, H, W)
            prompt_embeds.to(states),
            times[:, 0],
            ofs=None if self.model.ofs_embedding is None else times.new_full((1,), OFS),
            image_rotary_emb=self._rotary(states),
            return_dict=False,
        )[0]
        return output.transpose(1, 2)

    def _rotary(self, states: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the cosines and sines of the places, as the family's two versions count them."""
        from diffusers.models.embeddings import get_3d_rotary_pos_embed
        from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

        config = self.model.config
        if not config.use_rotary_positional_embeddings:
            return None
        side = config.patch_size
        frames, height, width = states.shape[2:]
        grid = (height // side, width // side)
        trained = (config.sample_height // side, config.sample_width // side)
        if config.patch_size_t is None:
            return get_3d_rotary_pos_embed(
                config.attention_head_dim,
                get_resize_crop_region_for_grid(grid, trained[1], trained[0]),
                grid,
                frames,
                device=states.device,
            )
        return get_3d_rotary_pos_embed(
            config.attention_head_dim,
            None,
            grid,
            frames // config.patch_size_t,
            grid_type="slice",
            max_size=trained,
            device=states.device,
        )


class StableAudioTransformer(DiffusersNetwork):
    """StableAudioDiTModel: latents (R, C, L) of a sound, always of one length.

    Told prompt_embeds (R, T, D), with those of the duration behind the text's, and duration_embeds
    (R, 1, D).
    """

    needs = ("prompt_embeds", "duration_embeds")

    @staticmethod
    def form(config: Mapping[str, Any]) -> StateForm:
        channels = plain_channels("StableAudioDiTModel", config)
        return StateForm(channels, (1,), (config["sample_size"],), fixed=True)

    def forward(
        self, states: Tensor, times: Tensor, prompt_embeds: Tensor, duration_embeds: Tensor
    ) -> Tensor:
        from diffusers.models.embeddings import get_1d_rotary_pos_embed

        places = torch.arange(states.shape[2] + duration_embeds.shape[1], device=states.device)
        rotary = get_1d_rotary_pos_embed(
            self.model.config.attention_head_dim // 2,
            places,
            use_real=True,
            repeat_interleave_real=False,
        )
        return self.model(
            states,
            times[:, 0] / TIMES,
            prompt_embeds.to(states),
            duration_embeds.to(states),
            rotary,
            return_dict=False,
        )[0]

    def unconditional(self, name: str, value: Tensor) -> Tensor:
        return torch.zeros_like(value) if name == "prompt_embeds" else value
