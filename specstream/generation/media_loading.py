"""From a run folder of a diffusion model, or of a drafter for one, to a pipeline that samples."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from specstream.data.text_vectors import text_vector
from specstream.drafters.denoising import (
    FrozenEstimate,
    FrozenVelocity,
    IndependentDenoiser,
    StateDrafter,
)
from specstream.drafters.first_block import FirstBlockDenoiser
from specstream.drafters.loading import read_record
from specstream.drafters.residual import WindowDenoiser
from specstream.drafters.state_loading import (
    is_state_drafter,
    load_own_processor,
    load_small,
    load_state_drafter,
    load_state_target,
)
from specstream.generation.accept_by_error import AcceptByErrorPipeline
from specstream.generation.consistency import ConsistencyPipeline
from specstream.generation.decoded_score import quality_score
from specstream.generation.denoising import DenoisingPipeline
from specstream.generation.denoising_sampler import DenoisingSampler
from specstream.generation.lengths import MAX_DRAFT, CostModelLength, DraftLength, FixedLength
from specstream.generation.loading import Quantized, find_device, spread_devices
from specstream.generation.media_quantization import quantize_denoisers
from specstream.generation.picard import PicardPipeline
from specstream.generation.refinement import RefinementPipeline
from specstream.generation.refinement_scores import Parts, usual_parts
from specstream.generation.solvers import (
    AdamsBashforth2,
    DPMSolver2M,
    Solver,
    SolverPipeline,
)
from specstream.generation.step_caching import StepCachePipeline
from specstream.media_processor import MediaProcessor
from specstream.models.codec import Compression
from specstream.models.consistency import ConsistencyModel
from specstream.models.denoiser import FORM, Denoiser
from specstream.models.diffusers_network import SHOWN
from specstream.models.pretrained_denoiser import PretrainedDenoiser
from specstream.models.quantization import USUAL
from specstream.models.state_shape import MediaSize, shape_of_size
from specstream.verification.quality import AdaptiveThreshold

TOLERANCES = {"by-error": 0.001, "picard": 0.01, "step-cache": 0.1}  # unless said
WINDOW = 8  # drafted steps a round, unless said; the most where measured costs choose
EVERY = 2  # of the lengths that are chosen from, one in so many: each has to be measured
Free = Literal["estimate", "velocity", "first-block"]  # drafts that need no training
Window = int | Literal["auto"]  # steps drafted in a round; auto: measured costs choose
Sampler = Literal[
    "ddim", "adams-bashforth", "dpm-solver++", "by-error", "picard", "step-cache", "consistency"
]
MOST_AT_ONCE = 64  # samples of a small model that are drawn together, unless said


@dataclass(frozen=True, slots=True)
class Refinement:
    """How a draft of few steps is refined; see `RefinementPipeline`."""

    draft_steps: int = 8
    threshold: float = 0.7
    score: Literal["disagreement", "appearance"] = "disagreement"
    strength: float = 0.6


@dataclass(frozen=True, slots=True)
class SamplerOptions:
    """How samples are drawn: the options that a run and a target of `diffusers` share.

    Without a `batch_size` samples of a large model are drawn one by one, `MOST_AT_ONCE` of a small.
    """

    num_steps: int = 50
    eta: float | None = None
    guidance: float = 1.0
    sampler: Sampler = "ddim"
    tolerance: float | None = None
    order: int | None = None
    free_draft: Free | None = None
    window: Window | None = None
    refinement: Refinement | None = None
    batch_size: int | None = None
    devices: int = 1
    size: MediaSize = field(default_factory=MediaSize)
    frame_rate: float | None = None
    quantize_models: Quantized = "none"
    quantize_method: str = USUAL


@dataclass(frozen=True, slots=True)
class MediaRun:
    """What samples media, and what turns its samples into files.

    `told` is a target of `diffusers`, which encodes prompts and decodes latents itself.
    """

    pipeline: DenoisingSampler
    processor: MediaProcessor
    told: PretrainedDenoiser | None = None

    def condition(self, prompt: str, num_samples: int) -> dict[str, Tensor]:
        """Return what the network is told: the prompt's text or class, nothing for no prompt.

        Raises ValueError for a prompt that the model does not know.
        """
        if self.told is not None:
            return self.told.condition([prompt] * num_samples)
        processor = self.processor
        if processor.text_size:
            return {"text": text_vector(prompt, processor.text_size).expand(num_samples, -1)}
        if not processor.classes:
            if prompt:
                raise ValueError('this model takes no prompt: give --prompt ""')
            return {}
        number = processor.class_number(prompt) if prompt else -1
        return {"classes": torch.full((num_samples,), number)}

    @property
    def media_shape(self) -> tuple[int, ...]:
        """The shape of what is written: (C, H, W), (C, F, H, W), or a sound's."""
        return self.pipeline.target.shape if self.told is None else self.told.media_shape

    @property
    def compression(self) -> Compression:
        """What one place of a state stands for."""
        return Compression() if self.told is None else self.told.codec.compression

    @property
    def padding(self) -> int:
        """Frames in front of a state that stand for none."""
        return 0 if self.told is None else self.told.padding

    def encode(self, media: Tensor) -> Tensor:
        """Return the states (B, *S) of media in -1..1: of a video perhaps its first frames only."""
        return media if self.told is None else self.told.encode(media)

    def media(self, states: Tensor) -> Tensor:
        """Return what samples (B, *S) are to be written as."""
        return states if self.told is None else self.told.decode(states)


def is_media_run(run: str | Path) -> bool:
    """Whether a run folder holds a diffusion model of media, or a drafter of one."""
    folder = Path(run)
    if (folder / "model" / FORM).is_file() or (folder / FORM).is_file():
        return True
    try:
        record = read_record(folder / "draft")
    except ValueError:
        return False
    return is_state_drafter(record) or "init_args" in record["target"]


def load_media_run(
    run: str | Path,
    options: SamplerOptions | None = None,
    device: str = "auto",
    dtype: str | None = None,
) -> MediaRun:
    """Load a run, its drafter with its target, or a trained model alone, and put it together.

    Raises ValueError for folders that are no such run, and for options without effect.
    """
    options, folder, place = options or SamplerOptions(), Path(run), find_device(device)
    draft = folder / "draft"
    drafter: StateDrafter | None = None
    if draft.is_dir():
        if options.free_draft is not None:
            raise ValueError(f"'{run}' has a trained drafter: free_draft is for a target alone")
        sizes = vars(options.size) | {"frame_rate": options.frame_rate}
        target = load_state_target(draft, place, dtype, sizes)
        drafter = load_state_drafter(draft, target, options.guidance)
        if isinstance(target, PretrainedDenoiser):
            return media_of_target(target, options, drafter)
    else:
        path = folder / "model" if (folder / "model").is_dir() else folder
        target = load_small(path, place, dtype)
    processor = played(load_own_processor(target), options.frame_rate)
    resize(target, drafter, processor, options.size)
    if options.guidance != 1 and not (processor.classes or processor.text_size):
        raise ValueError("guidance is the weight of a prompt, and this model takes none")
    return MediaRun(media_sampler(target, drafter, processor, options), processor)


def media_of_target(
    target: PretrainedDenoiser, options: SamplerOptions, drafter: StateDrafter | None = None
) -> MediaRun:
    """Put a target of `diffusers` into a pipeline; ValueError for options without effect."""
    if options.guidance != 1 and all(name in SHOWN for name in target.network.needs):
        raise ValueError("guidance is the weight of a prompt, and this target takes none")
    processor = played(target_processor(target), options.frame_rate)
    return MediaRun(media_sampler(target, drafter, processor, options), processor, target)


def target_processor(target: PretrainedDenoiser) -> MediaProcessor:
    """Return what turns the media of a target of `diffusers` into files."""
    rate = target.codec.compression.sample_rate or MediaProcessor.sample_rate
    return MediaProcessor(target.kind, target.frame_rate, rate)


def played(processor: MediaProcessor, frame_rate: float | None) -> MediaProcessor:
    """Return a processor of videos of that many frames a second; ValueError for other media."""
    if frame_rate is None:
        return processor
    if processor.kind != "video":
        raise ValueError(f"frame_rate is for videos, and this model makes {processor.suffix} files")
    return replace(processor, frame_rate=frame_rate)


def resize(
    target: Denoiser, drafter: StateDrafter | None, processor: MediaProcessor, size: MediaSize
) -> None:
    """Have models make another of the sizes that they were trained on; ValueError for others."""
    if size == MediaSize():
        return
    if processor.kind == "audio":
        raise ValueError("this model makes sounds of one length, which have no other size")
    models = [target]
    if isinstance(drafter, IndependentDenoiser):
        models.append(drafter.denoiser)
    for model in models:
        model.shape = shape_of_size((model.shape, *model.other_shapes), size)


def media_sampler(
    target: Denoiser,
    drafter: StateDrafter | None,
    processor: MediaProcessor,
    options: SamplerOptions,
) -> DenoisingSampler:
    """Return the pipeline that the options name; ValueError for options without effect."""
    target.eval().requires_grad_(False)
    usual = 1 if isinstance(target, PretrainedDenoiser) else MOST_AT_ONCE
    refinement = options.refinement
    size = usual if options.batch_size is None else options.batch_size
    is_alone = options.sampler == "consistency" and refinement is None
    if is_alone and options.quantize_models in ("target", "both"):
        raise ValueError(
            "sampler consistency asks the student alone, and it is the drafter: quantize that"
        )
    quantize_denoisers(target, drafter, options.quantize_models, options.quantize_method)
    if is_alone:
        return few_step_sampler(target, drafter, options, size)
    if options.devices > 1:
        target.spread(spread_devices(target.device, options.devices))
    if refinement is not None:
        return RefinementPipeline(
            target,
            rough_model(drafter),
            refinement.draft_steps,
            options.num_steps,
            quality_score(refinement.score, target),
            AdaptiveThreshold(refinement.threshold),
            refinement.strength,
            options.guidance,
            size,
            0.0 if options.eta is None else options.eta,
            refined_parts(target, processor),
        )
    if options.sampler != "ddim":
        if drafter is not None or options.free_draft is not None:
            raise ValueError(f"drafters are for ddim's steps, not for sampler {options.sampler}")
        return deterministic_sampler(target, options, size)
    if options.tolerance is not None:
        raise ValueError("tolerance is for the samplers by-error, picard and step-cache")
    if options.order is not None:
        raise ValueError("order is of the guesses of sampler by-error")
    if drafter is None:
        drafter = free_drafter(options.free_draft, target, options.guidance)
    if drafter is None and options.window is not None:
        raise ValueError("window is for drafts, and nothing drafts here: give a free_draft")
    return DenoisingPipeline(
        target,
        options.num_steps,
        1.0 if options.eta is None else options.eta,
        options.guidance,
        drafter,
        None if drafter is None else drafted_lengths(drafter, options.window),
        batch_size=size,
    )


def few_step_sampler(
    target: Denoiser, drafter: StateDrafter | None, options: SamplerOptions, batch_size: int
) -> ConsistencyPipeline:
    """Return the sampler of a run's student; ValueError for none, or an option without effect."""
    student = drafter.denoiser if isinstance(drafter, IndependentDenoiser) else None
    if not isinstance(student, ConsistencyModel):
        raise ValueError("sampler consistency is for a student of few steps; this run has none")
    for name in ("eta", "tolerance", "order", "window", "free_draft"):
        if getattr(options, name) is not None:
            raise ValueError(f"sampler consistency asks the student alone: {name} is for others")
    if options.guidance not in (1, student.guidance):
        raise ValueError(
            f"the student has learned guidance {student.guidance:g}, which its sampler cannot "
            f"change: leave out {options.guidance:g}"
        )
    if options.devices > 1:
        student.spread(spread_devices(student.device, options.devices))
    return ConsistencyPipeline(target, student, options.num_steps, batch_size)


def deterministic_sampler(target: Denoiser, options: SamplerOptions, size: int) -> DenoisingSampler:
    """Return a better solver, or one that guesses; ValueError for options without effect."""
    name = options.sampler
    solvers: dict[str, Solver] = {
        "adams-bashforth": AdamsBashforth2(),
        "dpm-solver++": DPMSolver2M(),
    }
    if name not in ("picard", "step-cache") and options.eta not in (None, 0):
        raise ValueError(f"sampler {name} is deterministic: eta must be 0, not {options.eta}")
    if name != "by-error" and options.order is not None:
        raise ValueError(f"order is of the guesses of by-error, and not of {name}")
    if name in solvers:
        if options.tolerance is not None or options.window is not None:
            raise ValueError(f"sampler {name} guesses nothing: tolerance and window are for others")
        return SolverPipeline(target, options.num_steps, solvers[name], options.guidance, size)
    tolerance = TOLERANCES[name] if options.tolerance is None else options.tolerance
    if name == "by-error":
        return AcceptByErrorPipeline(
            target,
            options.num_steps,
            tolerance,
            1 if options.order is None else options.order,
            guidance=options.guidance,
            lengths=drafted_lengths(None, options.window),
            batch_size=size,
        )
    if options.window == "auto":
        raise ValueError(f"window auto is for drafted steps; that of {name} is a number")
    window = WINDOW if options.window is None else options.window
    eta = 0.0 if options.eta is None else options.eta
    kind = PicardPipeline if name == "picard" else StepCachePipeline
    return kind(target, options.num_steps, eta, tolerance, window, options.guidance, size)


def drafted_lengths(drafter: StateDrafter | None, window: Window | None) -> DraftLength:
    """Return how many steps are drafted in a round; ValueError for more than the drafter can."""
    most = WINDOW
    if isinstance(window, int) and not 0 <= window <= MAX_DRAFT:
        raise ValueError(f"window must be in 0..{MAX_DRAFT}, got {window}")
    if isinstance(drafter, WindowDenoiser):
        most = min(WINDOW, drafter.num_steps)
        if isinstance(window, int) and window > drafter.num_steps:
            raise ValueError(f"media.window: the drafter guesses {drafter.num_steps} steps at most")
    if window == "auto":
        return CostModelLength(most, EVERY)
    return FixedLength(most if window is None else window)


def rough_model(drafter: StateDrafter | None) -> Denoiser | None:
    """Return the diffusion model that drafts for a refinement; ValueError for other drafters."""
    if drafter is None:
        return None
    if not isinstance(drafter, IndependentDenoiser):
        raise ValueError(
            f"refinement drafts with the target or a smaller diffusion model; the drafter of this "
            f"run, a {type(drafter).__name__}, only guesses steps"
        )
    return drafter.denoiser


def refined_parts(target: Denoiser, processor: MediaProcessor) -> Parts:
    """Return what is kept or refined as a whole: of a spectrogram, 16 segments of time."""
    parts = usual_parts(target.shape)
    if processor.kind != "audio" or len(parts.sizes) != 2:
        return parts
    _, bands, frames = target.shape
    return Parts(target.shape, (bands, frames // math.gcd(frames, 16)))


def free_drafter(name: Free | None, target: Denoiser, guidance: float) -> StateDrafter | None:
    """Return the drafter of that name that needs no training; None for none."""
    if name is None:
        return None
    if name == "first-block":
        return FirstBlockDenoiser(target, guidance)
    return FrozenEstimate() if name == "estimate" else FrozenVelocity(target)
