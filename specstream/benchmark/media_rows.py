"""From what samplers have drawn to the rows of media: laws, costs, and how near to a solution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from specstream.benchmark.media_counts import draft_passes, target_rounds
from specstream.benchmark.media_curves import CurvePoint
from specstream.benchmark.media_methods import (
    DraftedSteps,
    EqualSeconds,
    MediaModels,
    MediaSetting,
    SamplingMethod,
)
from specstream.benchmark.media_quality import (
    perceptual_distance,
    prompt_score,
    random_feature_distances,
    structural_similarity,
)
from specstream.benchmark.media_records import (
    MediaRow,
    PlainRatio,
    SampleLaw,
    SamplingCosts,
    SolverRow,
)
from specstream.benchmark.rows import Machine
from specstream.benchmark.timing import Measured, ratio_interval
from specstream.generation.denoising_sampler import DenoisingSampler
from specstream.metrics import (
    average_spectrum_distance,
    energy_distance,
    energy_test,
    psnr,
    temporal_consistency,
)
from specstream.models.quantization import bytes_ratio
from specstream.spectrogram import LogMel
from specstream.structures import Stats

VIDEO_AXES = 5  # of a batch of videos (B, C, F, H, W)


@dataclass(frozen=True)
class Drawn:
    """What one method drew, and what it counted."""

    method: SamplingMethod
    setting: MediaSetting  # with what the methods before took
    pipeline: DenoisingSampler
    samples: Tensor  # (n, *S)
    stats: Stats
    rounds: float  # calls of the target, one after another, of a sample
    draft_passes: float

    @property
    def calls(self) -> float:
        """What plain steps are to be as many as: rounds, or where there are none a student's."""
        return self.rounds or self.draft_passes

    @property
    def draft_calls(self) -> float:
        """Rounds of a sample with a draft."""
        stats = self.stats
        is_drafted = isinstance(self.method, DraftedSteps)
        return (stats.full_rounds - stats.plain_rounds) / stats.prompts if is_drafted else 0.0

    @property
    def seconds(self) -> float:
        """Seconds of a sample, of those that were drawn to be judged."""
        return self.stats.seconds / self.stats.prompts

    @property
    def target_rows(self) -> float:
        """States of a sample that the target evaluated."""
        return self.stats.target_rows / self.stats.prompts


@dataclass(frozen=True)
class Timed:
    """The seconds of one method, on samples alone and in batches."""

    alone: Measured
    in_batch: Measured

    @property
    def seconds_alone(self) -> float:
        """Seconds of a sample that is drawn alone."""
        return self.alone.total / len(self.alone.tokens)

    @property
    def seconds_in_batch(self) -> float:
        """Seconds of a sample in a batch."""
        return self.in_batch.total / len(self.in_batch.tokens)


def draw(
    method: SamplingMethod, models: MediaModels, setting: MediaSetting,
    condition: dict[str, Tensor], *, seed: int, num_samples: int,
) -> Drawn:  # fmt: skip
    """Draw the samples of a method."""
    pipeline = method.pipeline(models, setting)
    samples = pipeline.complete(num_samples, condition, seed=seed)
    counts = target_rounds(pipeline), draft_passes(pipeline)
    return Drawn(method, setting, pipeline, samples, replace(pipeline.stats), *counts)


@dataclass(frozen=True)
class MediaRowMaker:
    """Turns the samples and the seconds of one task under one setting into rows.

    `plain` (n, *S) are samples of the reference from other noise than that of the methods;
    `spectrogram` is how sounds became states, None for others.  `kind` is that of the media,
    `texts` (n,) the names of what the methods' samples are of, empty where they have none, and
    `clip_model` the folder of a CLIP model that compares pictures with them.
    """

    task: str
    target: str
    setting: MediaSetting
    held_out: Tensor  # (m, *S)
    plain: Tensor
    num_permutations: int
    spectrogram: LogMel | None
    machine: Machine
    kind: str = "image"
    texts: Sequence[str] = ()
    clip_model: str | None = None

    def rows(self, drawn: Sequence[Drawn], timed: Sequence[Timed]) -> list[MediaRow]:
        """Return a row for each method; the first is the reference of all."""
        reference = drawn[0], timed[0]
        seconds = {
            each.method.name: took.seconds_in_batch for each, took in zip(drawn, timed, strict=True)
        }
        rows = []
        for each, took in zip(drawn, timed, strict=True):
            row = self._row(each, took, *reference)
            if isinstance(each.method, EqualSeconds):
                ratio = took.seconds_in_batch / seconds[each.method.method]
                row = replace(row, seconds_ratio=ratio)
            rows.append(row)
        return rows

    def _row(self, each: Drawn, took: Timed, plain: Drawn, plain_took: Timed) -> MediaRow:
        stats = each.stats
        return MediaRow(
            task=self.task,
            setting=self.setting.label,
            target=self.target,
            method=each.method.name,
            kind=each.method.kind,
            guarantee=stats.guarantee.value,
            law=stats.law,
            num_steps=each.pipeline.grid.num_steps,
            eta=each.pipeline.eta,
            num_samples=len(each.samples),
            num_held_out=len(self.held_out),
            batch_size=self.setting.batch_size,
            repeats=len(took.alone.seconds),
            costs=SamplingCosts(
                rounds=each.rounds,
                target_rows=each.target_rows,
                draft_calls=each.draft_calls,
                draft_passes=each.draft_passes,
                seconds_alone=took.seconds_alone,
                seconds_in_batch=took.seconds_in_batch,
            ),
            samples=self.law(each.samples),
            comparison=PlainRatio(
                reference=plain.method.name,
                round_ratio=plain.rounds / each.rounds if each.rounds else None,
                row_ratio=each.target_rows / plain.target_rows,
                speedup_alone=plain_took.seconds_alone / took.seconds_alone,
                speedup_alone_interval=ratio_interval(
                    plain_took.alone.block_seconds, took.alone.block_seconds
                ),
                speedup_in_batch=plain_took.seconds_in_batch / took.seconds_in_batch,
            ),
            acceptance=stats.acceptance,
            alphas=stats.alphas if isinstance(each.method, DraftedSteps) else [],
            bytes_ratio=bytes_ratio(stats.quantized),
            machine=self.machine,
        )

    def law(self, samples: Tensor) -> SampleLaw:
        """Compare the law of samples (n, *S) with that of the data and the plain sampler's."""
        to_data = energy_test(samples, self.held_out, self.num_permutations)
        to_plain = energy_test(samples, self.plain, self.num_permutations)
        features = random_feature_distances(samples, self.held_out)
        is_video = samples.dim() == VIDEO_AXES and samples.shape[2] > 1
        return SampleLaw(
            data_distance=to_data.distance,
            data_noise=to_data.noise,
            plain_distance=to_plain.distance,
            plain_noise=to_plain.noise,
            plain_p_value=to_plain.p_value,
            temporal_consistency=(
                temporal_consistency(samples, self.held_out) if is_video else None
            ),
            spectrum_distance=(
                None
                if self.spectrogram is None
                else average_spectrum_distance(samples, self.held_out, self.spectrogram.decibels)
            ),
            kernel_distance=None if features is None else features.kernel,
            kernel_spread=None if features is None else features.kernel_spread,
            clip_score=prompt_score(self.kind, samples, self.texts, self.clip_model),
        )


@dataclass(frozen=True)
class SolverRowMaker:
    """Turns samples of one kind into rows; `solution` (n, *S) is what the deterministic miss."""

    task: str
    target: str
    held_out: Tensor  # (m, *S)
    solution: Tensor
    reference_steps: int
    kind: str
    machine: Machine

    def row(self, curve: str, point: CurvePoint, samples: Tensor) -> SolverRow:
        """Return the row of the samples (n, *S) that a point of a curve has drawn."""
        stats = point.pipeline.stats
        decibels = psnr(samples, self.solution)
        return SolverRow(
            task=self.task,
            target=self.target,
            curve=curve,
            method=point.label,
            guarantee=stats.guarantee.value,
            law=stats.law,
            num_samples=len(samples),
            reference_steps=self.reference_steps,
            rounds=stats.full_rounds / stats.prompts,
            target_rows=stats.target_rows / stats.prompts,
            psnr=decibels if np.isfinite(decibels) else None,
            data_distance=energy_distance(samples, self.held_out),
            ssim=structural_similarity(self.kind, samples, self.solution),
            lpips=perceptual_distance(self.kind, samples, self.solution),
            draft_passes=draft_passes(point.pipeline),
            machine=self.machine,
        )
