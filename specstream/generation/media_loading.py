"""From a run folder of a diffusion model, or of a drafter for one, to a pipeline that samples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from specstream.drafters.denoising import FrozenEstimate, FrozenVelocity, StateDrafter
from specstream.drafters.state_loading import load_state_drafter, read_state_record
from specstream.generation.denoising import DenoisingPipeline
from specstream.generation.lengths import FixedLength
from specstream.generation.loading import find_device
from specstream.media_processor import MediaProcessor, load_media_processor
from specstream.models.denoiser import FORM, Denoiser, load_denoiser

WINDOW = 8  # drafted steps a round, unless said
FREE = ("estimate", "velocity")  # drafts that need no training


@dataclass(frozen=True, slots=True)
class MediaRun:
    """What samples media, and what turns its samples into files."""

    pipeline: DenoisingPipeline
    processor: MediaProcessor


def is_media_run(run: str | Path) -> bool:
    """Whether a run folder holds a diffusion model of media, or a drafter of one."""
    folder = Path(run)
    if (folder / "model" / FORM).is_file() or (folder / FORM).is_file():
        return True
    try:
        target = read_state_record(folder / "draft")["target"]["path"]
    except ValueError:
        return False
    return (Path(str(target)) / FORM).is_file()


def load_media_run(
    run: str | Path,
    *,
    num_steps: int = 50,
    eta: float = 1.0,
    guidance: float = 1.0,
    free_draft: str | None = None,
    window: int | None = None,
    batch_size: int = 16,
    device: str = "auto",
) -> MediaRun:
    """Load a run: its drafter with its target, or a trained model alone.

    `free_draft` drafts without a trained drafter, going on with the target's last "estimate" of the
    data or its last "velocity"; `window` is how many steps are drafted in a round, at most.
    Raises ValueError for folders that are no such run, and for options without effect.
    """
    if free_draft not in (None, *FREE):
        raise ValueError(f"free_draft must be one of {', '.join(FREE)}, got '{free_draft}'")
    folder, place = Path(run), find_device(device)
    draft = folder / "draft"
    drafter: StateDrafter | None = None
    if draft.is_dir():
        if free_draft is not None:
            raise ValueError(f"'{run}' has a trained drafter: free_draft is for a target alone")
        path = str(read_state_record(draft)["target"]["path"])
        target = load_denoiser(path, place)
        drafter = load_state_drafter(draft, target)
    else:
        path = str(folder / "model" if (folder / "model").is_dir() else folder)
        target = load_denoiser(path, place)
        drafter = free_drafter(free_draft, target)
    if drafter is None and window is not None:
        raise ValueError("window is for drafts, and nothing drafts here: give a free_draft")
    target.eval().requires_grad_(False)
    pipeline = DenoisingPipeline(
        target,
        num_steps,
        eta,
        guidance,
        drafter,
        None if drafter is None else FixedLength(WINDOW if window is None else window),
        batch_size=batch_size,
    )
    return MediaRun(pipeline, load_media_processor(path))


def free_drafter(name: str | None, target: Denoiser) -> StateDrafter | None:
    """Return the drafter of that name that needs no training; None for none."""
    if name is None:
        return None
    return FrozenEstimate() if name == "estimate" else FrozenVelocity(target)
