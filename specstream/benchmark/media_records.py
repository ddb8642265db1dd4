"""Rows of the two tables of media: drafts that keep a law, and solvers that miss a solution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from specstream.benchmark.rows import Machine


@dataclass(frozen=True, slots=True)
class SamplingCosts:
    """What drawing one sample takes, as a mean over samples.

    `rounds` are calls of the target one after another and `target_rows` the states that those
    evaluated.  `draft_calls` are rounds with a draft, and `draft_passes` the passes of a drafter's
    network in them, or of a student that samples alone.  Seconds are medians over the repeats: of a
    sample that is drawn alone, and of one in a batch.
    """

    rounds: float
    target_rows: float
    draft_calls: float
    draft_passes: float
    seconds_alone: float
    seconds_in_batch: float


@dataclass(frozen=True, slots=True)
class SampleLaw:
    """How far the law of the samples is from that of held-out data, and from the plain sampler's.

    Energy distances, unbiased: below 0 where nothing tells the two apart.  `noise` is their
    standard deviation over random divisions of the samples of both.  The plain samples are of an
    independent run, so that the plain sampler's own row says what no difference looks like, and
    `plain_p_value` is that of the permutation test.  `kernel_distance` is the unbiased KID to
    held-out data in random features, and `kernel_spread` its deviation over subsets.  What older
    files do not say, and what has no meaning for a state, is None.
    """

    data_distance: float
    data_noise: float
    plain_distance: float
    plain_noise: float
    plain_p_value: float
    temporal_consistency: float | None  # of videos: change a frame over that of the data
    spectrum_distance: float | None  # of spectrograms: dB between average spectra
    kernel_distance: float | None = None
    kernel_spread: float | None = None
    clip_score: float | None = None  # of pictures and the names of their classes, 0 to 100


@dataclass(frozen=True, slots=True)
class PlainRatio:
    """Against the plain sampler with all steps: how many times fewer rounds, more rows, less time.

    The 95 % interval is a bootstrap interval over the samples that are drawn alone.
    """

    reference: str
    round_ratio: float | None  # None: the target is not asked
    row_ratio: float
    speedup_alone: float
    speedup_alone_interval: tuple[float, float]
    speedup_in_batch: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaRow:
    """One way of drawing samples of one diffusion model, under one number of steps and one eta.

    `acceptance` is the share of drafted steps that stand, of a refinement that of the parts that
    are kept; `alphas` is the acceptance by place in the window, given that all before it stood.
    `bytes_ratio` is over the layers that became int8: their bytes as they are held, scales
    included, over those of bfloat16; None where none did.  `seconds_ratio` is of the plain target
    that is to take as many seconds as another method: its own in a batch over that one's.
    """

    study: str = "media"
    task: str
    setting: str
    target: str
    method: str
    kind: str
    guarantee: str
    law: str  # whose the guarantee speaks of
    num_steps: int
    eta: float
    num_samples: int
    num_held_out: int
    batch_size: int
    repeats: int
    costs: SamplingCosts
    samples: SampleLaw
    comparison: PlainRatio
    acceptance: float | None
    alphas: list[float]
    bytes_ratio: float | None
    seconds_ratio: float | None = None
    machine: Machine


@dataclass(frozen=True, slots=True, kw_only=True)
class SolverRow:
    """One solver of the deterministic sampler: its rounds, and how near it comes to the solution.

    `psnr` is in dB, to the samples of `reference_steps` Euler steps from the same noise; None where
    they are equal.  `ssim` and `lpips` are to the same samples, of pictures and videos that are
    large enough.  `data_distance` is the energy distance to held-out data.  `draft_passes` are as
    in `SamplingCosts`: those of a step cache are the target's first block, which is no round.
    Seconds are of a sample in a batch of `batch_size`, one pass of every row in turns.  What older
    files do not say is None.
    """

    study: str = "solvers"
    task: str
    target: str
    curve: str
    method: str
    guarantee: str
    law: str
    num_samples: int
    reference_steps: int
    rounds: float
    target_rows: float
    psnr: float | None
    data_distance: float
    ssim: float | None = None
    lpips: float | None = None
    draft_passes: float | None = None
    seconds_in_batch: float | None = None
    batch_size: int | None = None
    machine: Machine
