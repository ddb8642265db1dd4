"""`draft/` of a drafter of denoising steps: its network, and the target that it drafts for."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from specstream.drafters.denoising import (
    IndependentDenoiser,
    StateDrafter,
)
from specstream.drafters.loading import RECORD, read_record
from specstream.drafters.residual import CorrectingDrafter, ResidualDenoiser, WindowDenoiser
from specstream.files import one_line, replaced_folder
from specstream.media_processor import FORM as MEDIA
from specstream.media_processor import MediaProcessor, load_media_processor
from specstream.models.consistency import load_student
from specstream.models.denoiser import STUDENT, Denoiser, load_denoiser
from specstream.models.fingerprint import fingerprint
from specstream.models.latent_consistency import load_latent_student
from specstream.models.noise_schedule import FlowSchedule
from specstream.models.patch_transformer import PatchTransformer
from specstream.models.pretrained_denoiser import PretrainedDenoiser

WEIGHTS = "draft.safetensors"
STORED = [made.__name__ for made in (IndependentDenoiser, ResidualDenoiser, WindowDenoiser)]


def save_state_drafter(folder: Path, drafter: StateDrafter, target: Denoiser) -> None:
    """Write a trained drafter, replacing one that is there only once the new one is whole."""
    from safetensors.torch import save_file

    record: dict[str, Any] = {
        "drafter": {"class_path": f"specstream.drafters.{type(drafter).__name__}"},
        "target": {"path": target.path, "fingerprint": fingerprint(target.network)},
    }
    if isinstance(target, PretrainedDenoiser):
        record["target"]["init_args"] = target.options
    with replaced_folder(folder) as new:
        if isinstance(drafter, IndependentDenoiser):
            drafter.denoiser.save(new)
        else:
            assert isinstance(drafter, CorrectingDrafter)
            assert isinstance(drafter.network, PatchTransformer)
            record["drafter"]["network"] = drafter.network.options
            record["drafter"]["guidance"] = drafter.trained_guidance
            if isinstance(drafter, WindowDenoiser):
                record["drafter"]["num_steps"] = drafter.num_steps
            weights = drafter.network.state_dict()
            save_file({n: value.contiguous() for n, value in weights.items()}, new / WEIGHTS)
        (new / RECORD).write_text(json.dumps(record, indent=2) + "\n")


def is_state_drafter(record: Mapping[str, Any]) -> bool:
    """Whether the record of a drafter's folder names one of denoising steps."""
    return str(record["drafter"]["class_path"]).rpartition(".")[2] in STORED


def load_small(
    path: str | Path, device: str | torch.device = "cpu", dtype: str | None = None
) -> Denoiser:
    """Load a diffusion model of this package; ValueError where a dtype is asked for."""
    if dtype is not None:
        raise ValueError("dtype: small models of media are kept in float32")
    return load_denoiser(path, device)


def load_own_processor(denoiser: Denoiser) -> MediaProcessor:
    """Return what the states of a small model are; ValueError where its record says otherwise."""
    assert denoiser.path is not None and isinstance(denoiser.network, PatchTransformer)
    processor, told = load_media_processor(denoiser.path), denoiser.network.options
    try:
        processor.check_state(denoiser.shape)
    except ValueError as error:
        raise ValueError(f"'{denoiser.path}/{MEDIA}' says that {error}") from error
    found, wanted = len(processor.classes), told["num_classes"]
    if found > wanted:
        raise ValueError(
            f"'{denoiser.path}/{MEDIA}' names {found} classes, and its network tells {wanted} apart"
        )
    found, wanted = processor.text_size, told["text_size"]
    if wanted not in (0, found):
        raise ValueError(
            f"'{denoiser.path}/{MEDIA}' has text_size {found}, and its network {wanted}"
        )
    return processor


def load_state_target(
    folder: Path,
    device: str | torch.device = "cpu",
    dtype: str | None = None,
    sizes: Mapping[str, float | None] | None = None,
) -> Denoiser:
    """Load the target that the drafter of `folder` was trained for; ValueError where it is gone.

    `dtype` is for models of `diffusers`, and so are `sizes` by name: what they are to make, where
    that is not what the drafter was trained for.
    """
    named = read_record(folder)["target"]
    path = str(named["path"])
    if "init_args" not in named:
        with one_line(f"the target of '{folder}'"):
            return load_small(path, device, dtype)
    asked = {name: value for name, value in (sizes or {}).items() if value is not None}
    with one_line(f"the target of '{folder}'"):
        options = named["init_args"] | asked
        return PretrainedDenoiser(path, device=str(device), dtype=dtype or "auto", **options)


def load_state_drafter(folder: Path, target: Denoiser, guidance: float = 1.0) -> StateDrafter:
    """Build the drafter of `folder` for `target`; ValueError for another one's or damaged files.

    A drafter that is a diffusion model itself is guided as the target is, but where its weights
    hold a guidance.  One that was trained in a target's latents drafts at other sizes too.
    """
    from safetensors.torch import load_file

    record = read_record(folder)
    kind = str(record["drafter"]["class_path"]).rpartition(".")[2]
    drafter: StateDrafter
    if not is_state_drafter(record):
        raise ValueError(f"'{folder}' names {kind}, which is none of {', '.join(STORED)}")
    distilled = (folder / STUDENT).is_file()
    if distilled or kind != IndependentDenoiser.__name__:  # a model of its own has no other target
        check_fingerprint(folder, record["target"], target)
    with one_line(f"'{folder}' holds a damaged drafter"):
        if kind == IndependentDenoiser.__name__:
            drafter = IndependentDenoiser(load_independent(folder, target, distilled), guidance)
            check_shapes(drafter.denoiser, target)
            return drafter.eval().requires_grad_(False)
        network = PatchTransformer(**record["drafter"]["network"])
        network.load_state_dict(load_file(folder / WEIGHTS))
        trained = float(record["drafter"].get("guidance", 1.0))
        if not math.isfinite(trained):
            raise ValueError(f"guidance must be a finite number, got {trained}")
        at_once = 1
        if kind == ResidualDenoiser.__name__:
            drafter = ResidualDenoiser(network, trained)
        else:
            at_once = int(record["drafter"]["num_steps"])
            drafter = WindowDenoiser(network, at_once, trained)
        said, wanted = network.options["out_channels"], at_once * target.shape[0]
        if said != wanted:
            raise ValueError(f"its network has {said} out_channels, and must have {wanted}")
    return drafter.to(target.device).eval().requires_grad_(False)


def load_independent(folder: Path, target: Denoiser, distilled: bool) -> Denoiser:
    """Load a diffusion model that drafts for `target`, or a student that was distilled from it."""
    if not distilled:
        drafter = load_denoiser(folder, target.device)
        if isinstance(target, PretrainedDenoiser):
            take_size(drafter, target)
        return drafter
    if isinstance(target, PretrainedDenoiser):
        return load_latent_student(folder, target)
    return load_student(folder, target.device)


def take_size(drafter: Denoiser, target: Denoiser) -> None:
    """Have a small network draft at a target's size, where channels and axes are the same.

    The levels' shift may go with the size; what a time means to the network does not.
    """
    own, other = drafter.schedule, target.schedule
    if drafter.shape[0] == target.shape[0] and len(drafter.shape) == len(target.shape):
        drafter.shape = target.shape
    if isinstance(own, FlowSchedule) and isinstance(other, FlowSchedule):
        drafter.schedule = replace(own, shift=other.shift)


def check_fingerprint(folder: Path, named: Mapping[str, Any], target: Denoiser) -> None:
    """Raise ValueError where a target is another than the one that a record names."""
    found, expected = fingerprint(target.network), named.get("fingerprint")
    if expected is not None and found != expected:
        raise ValueError(
            f"'{folder}' was trained for the target '{named['path']}' as it was then "
            f"(fingerprint {expected}), not for this one (fingerprint {found})"
        )


def check_shapes(drafter: Denoiser, target: Denoiser) -> None:
    """Raise ValueError where two models do not denoise the same states in the same way."""
    if drafter.shape != target.shape:
        raise ValueError(
            f"the drafter's states are {list(drafter.shape)}, the target's {list(target.shape)}"
        )
    if drafter.schedule != target.schedule:
        raise ValueError(
            f"the drafter's noise levels are {drafter.schedule}, the target's {target.schedule}"
        )
