"""Diffusion models of `diffusers`, from a pipeline's folder or the model hub, behind `Denoiser`.

The pipeline is taken apart: its network, what its scheduler says of noise, its autoencoder and its
text encoders.  How a sample is drawn is not the pipeline's business any more.

Shapes: R rows, B samples, S the shape of a state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from specstream.models.codec import (
    AutoencoderCodec,
    Codec,
    Compression,
    PixelCodec,
    compression_of,
)
from specstream.models.denoiser import Denoiser, load_denoiser
from specstream.models.diffusers_network import DiffusersNetwork
from specstream.models.noise_schedule import FlowSchedule, NoiseSchedule
from specstream.models.pretrained_parts import (
    Parts,
    load_network,
    load_part,
    network_class,
    read_parts,
)
from specstream.models.quantization import METHODS, account, quantization_report, quantize
from specstream.models.scheduler_config import clip_of, schedule_of
from specstream.models.state_shape import MediaSize, state_shape
from specstream.models.text_conditions import encode_prompts, read_conditions
from specstream.models.weights import resolve_dtype

OFFLOADS = {"none": None, "block": "block_level", "leaf": "leaf_level"}
Kind = Literal["image", "video", "audio"]
KINDS: dict[int, Kind] = {1: "audio", 2: "image", 3: "video"}  # by the number of axes


class PretrainedDenoiser(Denoiser):
    """A diffusion model that `diffusers` knows, and what its prompts and its latents stand for.

    Everything that can be refused is refused before a weight is read or downloaded, as ValueError
    in one line: an unknown network or scheduler, a size that the model cannot make.

    `options` are what builds the same model again, without where and how precisely it computes.

    Args:
        path: a pipeline's folder, or its id on the model hub.
        height, width, num_frames: of what is made, in pixels; None: what the model was trained at,
            where its config says so.
        seconds: of a sound; None: the longest.
        frame_rate: frames a second of a video.
        prompt_weight: what a network that was distilled with guidance is told (FLUX.1-dev).
        shift: of a flow's times, in place of the scheduler's.
        conditions: a safetensors file with prompt_embeds, negative_prompt_embeds and so on, instead
            of text encoders.
        dtype, device: of the network, as for `PretrainedLM`.
        codec_dtype: of the autoencoder, which often needs more digits.
        quantize, quantize_codec: see `quantize`; an autoencoder of convolutions has nothing to
            convert, which is reported.
        offload: "block" or "leaf" keeps the weights in the computer's memory and moves those of a
            block or a layer to the GPU for their turn.
        tile: the autoencoder works in overlapping tiles.
    """

    def __init__(
        self,
        path: str,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        seconds: float | None = None,
        frame_rate: float = 25.0,
        prompt_weight: float = 3.5,
        shift: float | None = None,
        conditions: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
        codec_dtype: str = "float32",
        quantize: str = "none",
        quantize_codec: str = "none",
        offload: str = "none",
        tile: bool = False,
    ) -> None:
        size = MediaSize(height, width, num_frames, seconds)
        others: dict[str, float | str | None] = {
            "frame_rate": frame_rate,
            "prompt_weight": prompt_weight,
        }
        others |= {"shift": shift, "conditions": conditions}
        home = check_memory(quantize, quantize_codec, offload, device)
        parts = read_parts(path)
        compression = compression_of_parts(parts)
        form = network_class(parts.network.kind).form(parts.network.config)
        shape = state_shape(form, compression, size)
        tokens = form.num_tokens(shape)
        schedule, prediction = schedule_of(parts.scheduler, tokens)
        schedule = shifted(schedule, shift)
        stored = None if conditions is None else read_conditions(conditions)
        own = resolve_dtype(dtype, device)
        network = load_network(parts, compression, frame_rate, prompt_weight, own)
        super().__init__(network, schedule, shape, prediction, clip_of(parts.scheduler))
        self.codec = load_codec(parts, resolve_dtype(codec_dtype, device), tile)
        self.parts = parts
        self.path, self.options = path, vars(size) | others
        self.frame_rate = frame_rate
        self.seconds = seconds or sound_seconds(shape, compression)
        self.stored = stored
        self.free = {} if stored is None else stored.free
        self.memory = self._place(home, quantize, quantize_codec, offload)

    @property
    def num_classes(self) -> int:
        """How many classes a prompt may name; 0 where prompts are texts or there are none."""
        assert isinstance(self.network, DiffusersNetwork)
        if self.network.needs != ("classes",):
            return 0
        config = self.network.model.config
        return int(config.get("num_embeds_ada_norm") or config["num_class_embeds"])

    @property
    def kind(self) -> Kind:
        """What is made: "image", "video" or "audio"."""
        return KINDS[len(self.shape) - 1]

    @property
    def quantized(self) -> dict[str, dict[str, Any]]:
        """What was converted, by role, as `Stats.quantized` holds it; `memory` says all."""
        return {role: made for role, made in self.memory.items() if made["method"] != "none"}

    @property
    def device(self) -> torch.device:
        return self.home if self.offloaded else super().device

    @property
    def dtype(self) -> torch.dtype:
        dtype = self.network.model.dtype  # its first parameter may be one that stays in float32
        assert isinstance(dtype, torch.dtype)
        return dtype

    def _place(
        self, home: torch.device, quantized: str, codec_quantized: str, offload: str
    ) -> dict[str, dict[str, Any]]:
        """Convert and move the models; return what was done, by role."""
        network, codec = self.network, self.codec
        self.home = home
        self.offloaded = offload != "none"
        made = converted(network, quantized)
        if not self.offloaded:
            network.to(home)
        else:
            assert isinstance(network, DiffusersNetwork)
            blocks = 1 if offload == "block" else None
            for model in network.models:
                model.enable_group_offload(
                    home, offload_type=OFFLOADS[offload], num_blocks_per_group=blocks
                )
        codec.to(home)
        tiled = isinstance(codec, AutoencoderCodec) and codec.tile
        return {
            "target": made | {"offload": offload},
            "codec": converted(codec, codec_quantized) | {"tile": tiled},
        }

    def quantize(self, method: str) -> None:
        """Convert the network of a model that is loaded already; `memory` says so from then on.

        A drafter knows its target by its weights as they are stored: it is loaded before.  Raises
        ValueError where the weights do not stay on one device, and for a network that is int8.
        """
        if self.offloaded:
            raise ValueError("offload and quantize do not go together; choose one")
        if quantization_report(self.network) is not None:
            raise ValueError("the target is already int8, by its own option quantize; give one")
        quantize(self.network, method)
        self.memory["target"] |= quantization_report(self.network) or {}

    def spread(self, devices: Sequence[torch.device]) -> None:
        if self.offloaded:
            raise ValueError("offload and several devices do not go together; choose one")
        super().spread(devices)

    def output(
        self, states: Tensor, times: Tensor, condition: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        self.network.check(condition or {})
        return super().output(states, times, condition)

    def unconditional(self, name: str, value: Tensor) -> Tensor:
        if name in self.free:
            return self.free[name].to(value).expand_as(value)
        return self.network.unconditional(name, value)

    def condition(self, prompts: Sequence[str], negative: str = "") -> dict[str, Tensor]:
        """Return what the network is told of prompts, (B, ...) by name, on its device.

        Classes are given by number.  `negative` is what guidance pushes from; stored conditions
        have their own, and as many rows as there are prompts, or one for all.
        """
        wanted = self.network.needs
        if wanted == ("classes",):
            return {"classes": class_numbers(prompts, self.num_classes).to(self.device)}
        if not wanted:
            return {}
        said = self.stored
        if said is not None and any(prompts):
            raise ValueError('the conditions are stored, and a prompt has no effect: --prompt ""')
        if said is None:
            said = encode_prompts(
                self.parts,
                self._models(),
                prompts,
                negative,
                self.seconds or 0.0,
                self.device,
                self.dtype,
            )
            self.free = said.free
        given = {name: value.to(self.device) for name, value in said.given.items()}
        rows = len(next(iter(given.values())))
        if rows not in (1, len(prompts)):
            raise ValueError(f"{rows} conditions are stored, but {len(prompts)} samples are asked")
        return {name: value.expand(len(prompts), *value.shape[1:]) for name, value in given.items()}

    def _models(self) -> dict[str, nn.Module]:
        assert isinstance(self.network, DiffusersNetwork)
        folders = [part.folder for part in self.parts.networks]
        models: dict[str, nn.Module] = dict(zip(folders, self.network.models, strict=True))
        if self.parts.autoencoder is not None:
            assert isinstance(self.codec, AutoencoderCodec)
            models[self.parts.autoencoder.folder] = self.codec.model
        return models

    @property
    def padding(self) -> int:
        """Frames in front of a state that stand for none; see `frame_count`."""
        return (self.shape[1] + 1) % 2 if self.codec.compression.odd else 0

    @property
    def media_shape(self) -> tuple[int, ...]:
        """The shape of what is decoded: (3, H, W), (3, F, H, W), or (channels, T) of a sound."""
        place, axes = self.codec.compression, self.shape[1:]
        if len(axes) == 1:
            assert isinstance(self.codec, AutoencoderCodec)
            return int(self.codec.model.config.audio_channels), axes[0] * place.samples
        *frames, height, width = axes
        lengths = [(count - self.padding - 1) * place.time + 1 for count in frames]
        channels = self.shape[0] if isinstance(self.codec, PixelCodec) else 3
        return (channels, *lengths, height * place.space, width * place.space)

    @torch.inference_mode()
    def encode(self, media: Tensor) -> Tensor:
        """Return the states, float32 on the CPU, of media (B, 3, ...) in -1..1.

        Of a video perhaps its first frames only; without `padding`.
        """
        return self.codec.encode(media.to(self.device)).cpu()

    def first_frame(self, states: Tensor) -> Tensor:
        """Return what a network is shown of a first frame, whose state is (B, C, 1, H, W).

        Some networks were trained on latents that were scaled the wrong way round (CogVideoX).
        """
        config = {} if self.parts.autoencoder is None else self.parts.autoencoder.config
        inverted = config.get("invert_scale_latents")
        return states / config["scaling_factor"] ** 2 if inverted else states

    @torch.inference_mode()
    def decode(self, states: Tensor) -> Tensor:
        """Return the media in -1..1 of states (B, *S), one by one, float32 on the CPU.

        (B, 3, H, W), (B, 3, F, H, W), or a sound (B, channels, samples) cut to its seconds.
        """
        if self.padding:
            states = states[:, :, self.padding :]
        media = torch.cat(
            [self.codec.decode(state[None].to(self.device)).cpu() for state in states]
        )
        rate = self.codec.compression.sample_rate
        if self.seconds is not None and rate:
            media = media[..., : round(self.seconds * rate)]
        return media


def find_denoiser(target: str | Denoiser) -> Denoiser:
    """Return what a training is told of its target: a folder of either kind, or a model that is.

    Raises ValueError for a folder that holds none.
    """
    if isinstance(target, Denoiser):
        return target
    if (Path(target) / "model_index.json").is_file():
        return PretrainedDenoiser(target)
    return load_denoiser(target)


def check_memory(quantized: str, codec_quantized: str, offload: str, device: str) -> torch.device:
    """Return the device that computes; ValueError for options that do not exist or do not fit."""
    for method in (quantized, codec_quantized):
        if method not in METHODS:
            raise ValueError(f"quantize {method!r} is not one of {', '.join(METHODS)}")
    if offload not in OFFLOADS:
        raise ValueError(f"offload {offload!r} is not one of {', '.join(OFFLOADS)}")
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    home = torch.device(automatic if device == "auto" else device)
    if offload != "none" and home.type == "cpu":
        raise ValueError(f"offload {offload!r} needs a GPU; the model is on the CPU as it is")
    if offload != "none" and quantized != "none":
        raise ValueError("offload and quantize do not go together; choose one")
    return home


def compression_of_parts(parts: Parts) -> Compression:
    """Return what a place of a pipeline's states stands for."""
    if parts.autoencoder is None:
        return Compression()
    return compression_of(parts.autoencoder.kind, parts.autoencoder.config)


def load_codec(parts: Parts, dtype: torch.dtype, tile: bool) -> Codec:
    """Return a pipeline's autoencoder, or the codec of states that are pixels."""
    if parts.autoencoder is not None:
        return AutoencoderCodec(load_part(parts.path, parts.autoencoder, dtype), tile)
    if tile:
        raise ValueError("this model has no autoencoder that could work in tiles; set tile false")
    return PixelCodec()


def shifted(schedule: NoiseSchedule, shift: float | None) -> NoiseSchedule:
    """Return a flow's schedule with another shift; ValueError for a schedule that has none."""
    if shift is None:
        return schedule
    if not isinstance(schedule, FlowSchedule):
        raise ValueError(f"shift is for flows; this model has a {type(schedule).__name__}")
    return replace(schedule, shift=shift)


def sound_seconds(shape: tuple[int, ...], compression: Compression) -> float | None:
    """Return how long the longest sound is, None for what is no sound."""
    if not compression.sample_rate:
        return None
    return shape[-1] * compression.samples / compression.sample_rate


def converted(model: nn.Module, method: str) -> dict[str, Any]:
    """Quantise a model and return the report; what has nothing to convert says so."""
    nothing = {"method": "none", "linear_layers": 0, "share_of_parameters": 0.0}
    try:
        quantize(model, method)
    except ValueError as error:
        return account(model) | {"method": "none", "reason": str(error)}
    return quantization_report(model) or nothing


def class_numbers(prompts: Sequence[str], num_classes: int) -> Tensor:
    """Return classes (B,) that are given by number; ValueError for a word, or one too many."""
    for prompt in prompts:
        if not prompt.isdecimal():
            raise ValueError(f"this model is told the number of a class, not '{prompt}'")
        if int(prompt) >= num_classes:
            raise ValueError(
                f"there is no class {prompt}: this model knows {num_classes}, counted from 0"
            )
    return torch.tensor([int(prompt) for prompt in prompts])
