"""The options of `generate.py` that are for diffusion models of media: `--media.steps 50`."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from specstream.generation.media_given import GivenFiles
from specstream.generation.media_loading import Free, Refinement, Sampler, Window
from specstream.models.state_shape import MediaSize

STEPS, FEW_STEPS = 50, 4  # unless said; few of a student that samples alone
SIZES = ("height", "width", "num_frames", "frame_rate", "seconds")


@dataclass(frozen=True)
class MediaOptions:
    """How images, videos and sounds are sampled.

    Args:
        samples: how many, side by side in one file.
        steps: denoising steps of each; 50 unless said, of sampler consistency 4.
        eta: 0 is the deterministic sampler, 1 the ancestral one; drafts are exact above 0; 1 unless
            said, of a refinement 0.
        guidance: weight of the prompt; 1 is that of training, more follows it more closely.
        sampler: ddim, whose steps have a law where eta is above 0; adams-bashforth and dpm-solver++
            are better solvers of the deterministic one; by-error guesses its velocities and keeps
            what is within a tolerance; picard puts a window of steps right at once; step-cache
            skips steps by the target's first block; consistency has a student of few steps sample
            alone.
        tolerance: of by-error (squared error of a velocity), picard (change of a state), 0.01
            unless said, and step-cache (relative change of the first block), 0.1 unless said.
        order: of the velocities that by-error guesses: 0 the last one, as published, 1 (unless
            said) on a line through the last two.
        window: steps drafted in a round, at most; auto: as many as pay, 0 included, by costs that
            are measured once for the models and the machine; none: 8.
        devices: GPUs that the rows of a call of the target are split over.
        free_draft: draft without a trained drafter, from the target's last estimate of the data,
            its last velocity, or by its first block and what its others added last.
        draft_steps: refine selectively: denoise in so few steps, then have the target do again the
            frames (regions, segments) that look bad; 8 unless said.  This, main_steps or
            refinement_threshold turns refinement on.
        main_steps: of a refinement, the target's steps from noise to data; `steps` unless said.
        refinement_threshold: refine what scores so many standard deviations above the mean; 0.7
            unless said.
        refinement_score: what a part is judged by, how far the target would change it
            (disagreement, unless said) or how it looks (appearance).
        refinement_strength: share of the way back to noise that refinement starts from; 0.6 unless
            said.
        image: a file of which a part is kept (inpainting): a picture, of a video model a video, of
            a sound model a sound.
        mask: a picture (of a video model also a video) of the same size, white where something is
            to be made; of a sound its columns are stretches of time.
        first_frame: a picture that a video begins with.
        height: of what is made, in pixels; of a small model, one of those it was trained on.
        width: in pixels, as the height.
        num_frames: of a video.
        frame_rate: frames a second of a video.
        seconds: of a sound that a model of diffusers makes.
        preview_every: seconds from one preview of the samples to the next, at least: a picture
            NAME.preview.png beside the output, until that stands; none: no previews.
    """

    samples: int = 1
    steps: int | None = None
    eta: float | None = None
    guidance: float = 1.0
    sampler: Sampler = "ddim"
    tolerance: float | None = None
    order: Literal[0, 1] | None = None
    window: Window | None = None
    devices: int = 1
    free_draft: Free | None = None
    draft_steps: int | None = None
    main_steps: int | None = None
    refinement_threshold: float | None = None
    refinement_score: Literal["disagreement", "appearance"] | None = None
    refinement_strength: float | None = None
    image: str | None = None
    mask: str | None = None
    first_frame: str | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    frame_rate: float | None = None
    seconds: float | None = None
    preview_every: float | None = None

    def __post_init__(self) -> None:
        for name in ("samples", "steps", "draft_steps", "main_steps", "devices"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= 10_000:
                raise ValueError(f"media.{name} must be in 1..10000, got {value}")
        if self.eta is not None and not 0 <= self.eta <= 1:
            raise ValueError(f"media.eta must be in [0, 1], got {self.eta}")
        for name in ("guidance", "refinement_threshold", "tolerance"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"media.{name} must be a finite number, got {value}")
        if isinstance(self.window, int) and not 0 <= self.window <= 64:
            raise ValueError(f"media.window must be in 0..64, got {self.window}")
        self._check_given()
        for name in (*SIZES, "preview_every"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1_000_000:
                raise ValueError(f"media.{name} must be above 0 and at most 1000000, got {value}")
        if self.main_steps is not None and self.steps is not None:
            raise ValueError("media.main_steps and media.steps are the same: give one of them")
        refines = self.refinement is not None
        for name in ("refinement_score", "refinement_strength"):
            if not refines and getattr(self, name) is not None:
                raise ValueError(f"media.{name} is for refinement: give media.draft_steps")
        if refines and self.sampler != "ddim":
            raise ValueError("media.sampler is for whole samples, and this is a refinement")
        for name in ("free_draft", "window", "tolerance", "order"):
            if refines and getattr(self, name) is not None:
                raise ValueError(f"media.{name} is for drafted steps, and this is a refinement")

    def _check_given(self) -> None:
        for name, path in asdict(self.given).items():
            if path is not None and not Path(path).is_file():
                raise ValueError(f"media.{name}: there is no file '{path}'")

    @property
    def size(self) -> MediaSize:
        """What is to be made."""
        return MediaSize(self.height, self.width, self.num_frames, self.seconds)

    @property
    def given(self) -> GivenFiles:
        """Files of what is given of each sample."""
        return GivenFiles(self.image, self.mask, self.first_frame)

    @property
    def num_steps(self) -> int:
        """Denoising steps of the target."""
        said = self.steps if self.main_steps is None else self.main_steps
        usual = FEW_STEPS if self.sampler == "consistency" else STEPS
        return usual if said is None else said

    @property
    def refinement(self) -> Refinement | None:
        """How drafts are refined; None: they are not."""
        said = (self.draft_steps, self.main_steps, self.refinement_threshold)
        if all(value is None for value in said):
            return None
        named = {
            "draft_steps": self.draft_steps,
            "threshold": self.refinement_threshold,
            "score": self.refinement_score,
            "strength": self.refinement_strength,
        }
        return Refinement(**{name: value for name, value in named.items() if value is not None})  # type: ignore[arg-type]
