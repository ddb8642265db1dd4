"""The parts of a `diffusers` pipeline: which there are, what their configs say, and their weights.

Everything that can be refused is refused from the configs, before a weight is read or downloaded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from specstream.files import is_hub_id, one_line
from specstream.models.codec import Compression
from specstream.models.diffusers_image import (
    ClassTransformer,
    ConditionedUNet,
    FluxTransformer,
    UNet,
)
from specstream.models.diffusers_network import DiffusersNetwork
from specstream.models.diffusers_video import (
    CogVideoXTransformer,
    LTXTransformer,
    StableAudioTransformer,
)
from specstream.models.diffusers_wan import WanExperts, WanTransformer
from specstream.models.scheduler_config import with_defaults
from specstream.models.weights import quiet_transformers

if TYPE_CHECKING:
    from diffusers import ModelMixin

NETWORKS: dict[str, type[DiffusersNetwork]] = {
    "UNet2DModel": UNet,
    "UNet2DConditionModel": ConditionedUNet,
    "DiTTransformer2DModel": ClassTransformer,
    "FluxTransformer2DModel": FluxTransformer,
    "LTXVideoTransformer3DModel": LTXTransformer,
    "WanTransformer3DModel": WanTransformer,
    "CogVideoXTransformer3DModel": CogVideoXTransformer,
    "StableAudioDiTModel": StableAudioTransformer,
}

PIPELINES = (  # others tell the same networks other things
    "DDPMPipeline",
    "DDIMPipeline",
    "DiTPipeline",
    "StableDiffusionPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionXLInpaintPipeline",
    "FluxPipeline",
    "FluxFillPipeline",
    "LTXPipeline",
    "LTXImageToVideoPipeline",
    "WanPipeline",
    "WanImageToVideoPipeline",
    "CogVideoXPipeline",
    "CogVideoXImageToVideoPipeline",
    "StableAudioPipeline",
)

LOW_NOISE = "transformer_2"  # where a pipeline's network for clean states lies


def network_class(name: str) -> type[DiffusersNetwork]:
    """Return the adapter of a class of `diffusers`; ValueError names those that have one."""
    if name not in NETWORKS:
        raise ValueError(f"'{name}' is no supported network; these are: {', '.join(NETWORKS)}")
    return NETWORKS[name]


@dataclass(frozen=True, slots=True)
class Part:
    """A model of a pipeline: its folder there, its class and its config with every default."""

    folder: str
    kind: str
    config: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Parts:
    """What a pipeline is made of; without an autoencoder its states are the media themselves."""

    path: str
    pipeline: str
    network: Part
    scheduler: dict[str, Any]
    autoencoder: Part | None
    expand_timesteps: bool = False  # whether a Wan network was trained to be told a time per place
    low_noise: Part | None = None  # the network that clean states are asked of, where it is another
    boundary: float | None = None  # the time below which a state is clean

    @property
    def networks(self) -> tuple[Part, ...]:
        """The network, or the two."""
        return (self.network,) if self.low_noise is None else (self.network, self.low_noise)


def read_parts(path: str) -> Parts:
    """Return the parts that the pipeline of a folder or hub id names.

    Raises ValueError in one line where there is none, or one that is not supported.
    """
    folder = Path(path)
    if not folder.is_dir() and not is_hub_id(path):
        raise ValueError(f"no model folder at {path!r}")
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise ValueError(f"{path!r} holds no model_index.json, so it is no pipeline of diffusers")
    import diffusers

    with one_line(f"cannot read a pipeline from {path!r}"), quiet_diffusers():
        index = dict(diffusers.DiffusionPipeline.load_config(path))
    pipeline = str(index.get("_class_name"))
    if pipeline not in PIPELINES:
        raise ValueError(f"{path!r} is a {pipeline}; supported are: {', '.join(PIPELINES)}")
    if index.get("requires_aesthetics_score"):
        raise ValueError(f"{path!r} is told a score of beauty, which is not supported")
    network = next((name for name in ("transformer", "unet") if named(index, name)), None)
    if network is None:
        raise ValueError(f"{path!r} names neither a transformer nor a unet")
    network_class(named(index, network))
    if not named(index, "scheduler"):
        raise ValueError(f"{path!r} names no scheduler")
    ratio = index.get("boundary_ratio")
    if ratio is not None:
        check_experts(path, ratio, [named(index, network), named(index, LOW_NOISE)])
    autoencoder = next((name for name in ("vae", "vqvae") if named(index, name)), None)
    with one_line(f"cannot read a pipeline from {path!r}"), quiet_diffusers():
        scheduler = dict(diffusers.DDIMScheduler.load_config(path, subfolder="scheduler"))
        parts = Parts(
            path,
            pipeline,
            read_part(path, network, named(index, network)),
            scheduler,
            read_part(path, autoencoder, named(index, autoencoder)) if autoencoder else None,
            bool(index.get("expand_timesteps")),
        )
    return parts if ratio is None else with_experts(parts, float(ratio))


def check_experts(path: str, ratio: Any, kinds: list[str]) -> None:
    """Raise ValueError for a pipeline of two networks that are not those of Wan."""
    if kinds != ["WanTransformer3DModel"] * 2:
        raise ValueError(f"{path!r} has a boundary_ratio, and two Wan networks it has not")
    if not isinstance(ratio, float | int) or not 0 < ratio < 1:
        raise ValueError(f"{path!r}: boundary_ratio {ratio} is not between 0 and 1")


def with_experts(parts: Parts, ratio: float) -> Parts:
    """Return the parts of a pipeline that asks one network of noisy states and one of clean ones.

    Raises ValueError in one line where the two see different states.
    """
    first = parts.network
    with one_line(f"cannot read a pipeline from {parts.path!r}"), quiet_diffusers():
        second = read_part(parts.path, LOW_NOISE, first.kind)
    for option in ("in_channels", "out_channels", "patch_size", "image_dim"):
        one, other = first.config.get(option), second.config.get(option)
        if one != other:
            raise ValueError(f"the networks of {parts.path!r} have {option} {one} and {other}")
    scheduler = str(parts.scheduler.get("_class_name"))
    steps = with_defaults(scheduler, parts.scheduler)["num_train_timesteps"]
    return replace(parts, low_noise=second, boundary=ratio * steps)


def named(index: dict[str, Any], name: str) -> str:
    """Return the class that a pipeline's index gives for one of its parts, "" for none."""
    return str((index.get(name) or (None, None))[1] or "")


def has_part(path: str, name: str) -> bool:
    """Whether the pipeline of a folder or hub id names a part of that name."""
    import diffusers

    with one_line(f"cannot read a pipeline from {path!r}"), quiet_diffusers():
        return bool(named(dict(diffusers.DiffusionPipeline.load_config(path)), name))


def read_part(path: str, folder: str, kind: str) -> Part:
    """Return what the config of a part says."""
    import diffusers

    config = getattr(diffusers, kind).load_config(path, subfolder=folder)
    return Part(folder, kind, with_defaults(kind, dict(config)))


def load_part(path: str, part: Part, dtype: torch.dtype) -> ModelMixin:
    """Return a part with its weights, frozen; ValueError in one line for damaged ones."""
    import diffusers

    with one_line(f"cannot load the {part.folder} of {path!r}"), quiet_diffusers():
        model, report = getattr(diffusers, part.kind).from_pretrained(
            path, subfolder=part.folder, dtype=dtype, output_loading_info=True
        )
    missing = sorted(report["missing_keys"])
    if missing:  # diffusers would draw them at random; some of its own checkpoints hold too much
        raise ValueError(
            f"the {part.folder} of {path!r} lacks {len(missing)} of its model's weights, "
            f"{missing[0]} for one"
        )
    return model.eval().requires_grad_(False)


def load_network(
    parts: Parts, place: Compression, frame_rate: float, guidance: float, dtype: torch.dtype
) -> DiffusersNetwork:
    """Return a pipeline's network, or its two, behind the one call."""
    kind = network_class(parts.network.kind)
    model = load_part(parts.path, parts.network, dtype)
    told = (place.space, place.time, frame_rate, guidance, parts.expand_timesteps)
    if parts.low_noise is None:
        return kind(model, *told)
    assert parts.boundary is not None
    return WanExperts(model, load_part(parts.path, parts.low_noise, dtype), parts.boundary, *told)


@contextlib.contextmanager
def quiet_diffusers() -> Iterator[None]:
    """Spare the screen what `diffusers` and `transformers` report: what matters is raised."""
    from diffusers.utils import logging

    verbosity, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with quiet_transformers():
            yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
