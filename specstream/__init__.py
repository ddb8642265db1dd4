"""Train draft models and decode with them.  Importing this package has no side effect."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from specstream.generation.base import TextPipeline
    from specstream.generation.masked import MaskedPipeline

__all__ = ["load_run"]


def load_run(run: str | Path, **options: Any) -> TextPipeline | MaskedPipeline:
    """Load a run folder for generation: its drafter with its target, or a trained model alone.

    A causal LM continues texts, with the options of `specstream.generation.loading.load_run`
    (`sampling`, `limits`, ...); a masked diffusion model fills canvases, with those of
    `specstream.generation.masked_loading.load_masked_run` (`sampler`, ...).  Raises ValueError in
    one line for a folder that is not a run, or one of media, and TypeError for an option of the
    other kind.
    """
    from specstream.generation import loading, masked_loading, media_loading

    if media_loading.is_media_run(run):
        raise ValueError(
            f"'{run}' makes media: load it with specstream.generation.media_loading.load_media_run"
        )
    if masked_loading.is_masked_run(run):
        return masked_loading.load_masked_run(run, **options)
    return loading.load_run(run, **options)
