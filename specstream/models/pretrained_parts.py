"""The parts of a `diffusers` pipeline: which there are, what their configs say, and their weights.

Everything that can be refused is refused from the configs, before a weight is read or downloaded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from specstream.files import is_hub_id, one_line
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
    WanTransformer,
)
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
    "StableDiffusionXLPipeline",
    "FluxPipeline",
    "LTXPipeline",
    "LTXImageToVideoPipeline",
    "WanPipeline",
    "CogVideoXPipeline",
    "CogVideoXImageToVideoPipeline",
    "StableAudioPipeline",
)


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
    if index.get("boundary_ratio") is not None:
        raise ValueError(
            f"{path!r} has one transformer for noisy states and one for clean ones; models with "
            "one only are supported (Wan 2.1, or the 5B of Wan 2.2)"
        )
    network = next((name for name in ("transformer", "unet") if named(index, name)), None)
    if network is None:
        raise ValueError(f"{path!r} names neither a transformer nor a unet")
    network_class(named(index, network))
    if not named(index, "scheduler"):
        raise ValueError(f"{path!r} names no scheduler")
    autoencoder = next((name for name in ("vae", "vqvae") if named(index, name)), None)
    with one_line(f"cannot read a pipeline from {path!r}"), quiet_diffusers():
        scheduler = diffusers.DDIMScheduler.load_config(path, subfolder="scheduler")
        return Parts(
            path,
            pipeline,
            read_part(path, network, named(index, network)),
            dict(scheduler),
            read_part(path, autoencoder, named(index, autoencoder)) if autoencoder else None,
            bool(index.get("expand_timesteps")),
        )


def named(index: dict[str, Any], name: str) -> str:
    """Return the class that a pipeline's index gives for one of its parts, "" for none."""
    return str((index.get(name) or (None, None))[1] or "")


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
