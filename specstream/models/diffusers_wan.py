"""The networks of Wan: of texts, of a first frame (2.1 and 2.2), and in pairs of experts (2.2).

Shapes: R rows, C channels, F frames, H height, W width, T tokens of a prompt, D its width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from specstream.models.diffusers_network import (
    BESIDE,
    FIRST_FRAME,
    IMAGE_EMBEDS,
    DiffusersNetwork,
    StateForm,
    plain_channels,
)
from specstream.models.diffusers_video import begun

if TYPE_CHECKING:
    from diffusers import ModelMixin

MASK = 4  # channels of a mask: the frames that one of the latents stands for
TOKENS = 512  # of a prompt: what `diffusers` counts on where it parts a picture's from them


class WanTransformer(DiffusersNetwork):
    """WanTransformer3DModel: latents (R, C, F, H, W) under prompt_embeds (R, T, D).

    That of Wan 2.2 with 5 B parameters may be shown a first frame as LTX is.  Those that are named
    I2V are shown a video that is grey behind its first frame, and its mask, beside the state; that
    of Wan 2.1 also reads what an image encoder says of that frame, (R, P, D').
    """

    @property
    def needs(self) -> tuple[str, ...]:
        config = self.model.config
        read = () if config.image_dim is None else (IMAGE_EMBEDS,)
        return ("prompt_embeds", *((BESIDE,) if continues(config) else ()), *read)

    @property
    def may_see(self) -> tuple[str, ...]:
        return (FIRST_FRAME,) if self.expand_timesteps else ()

    @staticmethod
    def form(config: Mapping[str, Any]) -> StateForm:
        kind = "WanTransformer3DModel"
        if config.get("pos_embed_seq_len") is not None:
            raise ValueError(f"{kind}: one that is shown two pictures is not supported")
        if continues(config):
            config = {**config, "in_channels": config["out_channels"]}
        elif config.get("image_dim") is not None:
            raise ValueError(f"{kind}: image_dim without channels of a picture is not supported")
        return StateForm(plain_channels(kind, config), tuple(config["patch_size"]))

    def check(self, condition: Mapping[str, Tensor]) -> None:
        super().check(condition)
        found = condition["prompt_embeds"].shape[1]
        if IMAGE_EMBEDS in self.needs and found != TOKENS:
            raise ValueError(
                f"a Wan network that reads a picture is told {TOKENS} tokens, not {found}"
            )

    def beside(self, latents: Tensor, made: Tensor) -> Tensor:
        given = (~made[..., :: self.space, :: self.space]).to(latents)  # (1, 1, F', H, W)
        first = given[:, :, :1].repeat_interleave(self.time, 2)  # it stands alone in its latent
        frames = torch.cat([first, given[:, :, 1:]], 2).unflatten(2, (-1, self.time))
        return torch.cat([frames[:, 0].transpose(1, 2), latents], 1)

    def forward(
        self,
        states: Tensor,
        times: Tensor,
        prompt_embeds: Tensor,
        first_frame: Tensor | None = None,
        beside: Tensor | None = None,
        image_embeds: Tensor | None = None,
    ) -> Tensor:
        _, side, other = self.model.config.patch_size
        places = states.shape[3] // side * (states.shape[4] // other)
        states, told = begun(states, times[:, 0], first_frame, places)
        return self.model(
            states if beside is None else torch.cat([states, beside.to(states)], 1),
            told,
            prompt_embeds.to(states),
            None if image_embeds is None else image_embeds.to(states),
            return_dict=False,
        )[0]


class WanExperts(WanTransformer):
    """Two networks, one for noisy states and one for clean ones (Wan 2.2 of 14 B parameters).

    Which of them is asked of a row depends on its time alone: rows of one call may fall to either,
    and each network sees its own rows only.  In each call the host waits to learn how many these
    are.

    Args:
        model: asked at times from `boundary` on.
        low_noise: asked below; a network of the same form.
        space, time, frame_rate, guidance, expand_timesteps: as of `DiffusersNetwork`.
    """

    def __init__(
        self,
        model: ModelMixin,
        low_noise: ModelMixin,
        boundary: float,
        space: int = 1,
        time: int = 1,
        frame_rate: float = 25.0,
        guidance: float = 3.5,
        expand_timesteps: bool = False,
    ) -> None:
        rest = (space, time, frame_rate, guidance, expand_timesteps)
        super().__init__(model, *rest)
        self.low_noise = WanTransformer(low_noise, *rest)
        self.boundary = boundary

    @property
    def models(self) -> tuple[ModelMixin, ...]:
        return (self.model, self.low_noise.model)

    def forward(
        self,
        states: Tensor,
        times: Tensor,
        prompt_embeds: Tensor,
        first_frame: Tensor | None = None,
        beside: Tensor | None = None,
        image_embeds: Tensor | None = None,
    ) -> Tensor:
        named = {FIRST_FRAME: first_frame, BESIDE: beside, IMAGE_EMBEDS: image_embeds}
        told = {name: value for name, value in named.items() if value is not None}
        told["prompt_embeds"] = prompt_embeds
        noisy = times[:, 0] >= self.boundary
        order, count = (~noisy).byte().argsort(stable=True), int(noisy.sum())  # noisy rows first
        said = torch.empty_like(states)
        for expert, rows in (
            (super().forward, order[:count]),
            (self.low_noise, order[count:]),
        ):
            if len(rows):
                picked = {name: value[rows] for name, value in told.items()}
                answer = expert(states[rows], times[rows], **picked)
                said[rows] = answer.to(said)  # autocast answers in its own dtype
        return said


def continues(config: Mapping[str, Any]) -> bool:
    """Whether a network is shown the mask and the latents of a video beside the state."""
    given = config.get("out_channels") or config["in_channels"]
    return bool(config["in_channels"] == 2 * given + MASK)
