"""Scores of decoded drafts: the parts of latents are judged by the media that they stand for."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from specstream.generation.decoded_score import DecodedScore, quality_score
from specstream.generation.media_loading import Refinement, SamplerOptions, media_of_target
from specstream.generation.refinement_scores import Appearance, Ask, Parts, QualityScore
from specstream.models.codec import Codec, Compression
from specstream.models.pretrained_denoiser import PretrainedDenoiser
from tests.diffusers_toys import save_video_pipeline
from tests.models.test_pretrained_denoiser import FLOW


class Enlarging(Codec):
    """Media of which every place of a state is a block: so many pixels, frames, samples."""

    def __init__(self, compression: Compression, alone: bool = True) -> None:
        super().__init__()
        self.compression, self.alone = compression, alone

    def decode(self, states: Tensor) -> Tensor:
        factors = [self.compression.space] * (states.dim() - 2)
        if states.dim() == 3:
            factors = [self.compression.samples]
        if states.dim() == 5:
            factors[0] = self.compression.time
        for axis, factor in enumerate(factors):
            states = states.repeat_interleave(factor, axis + 2)
        if states.dim() == 5 and self.alone:
            states = states[:, :, self.compression.time - 1 :]  # the first frame stands alone
        return states

    def encode(self, media: Tensor) -> Tensor:
        raise AssertionError("drafts are decoded")


class Mean(QualityScore):
    """A part's mean, so that it can be told which part a score is of."""

    def __call__(self, drafts: Tensor, parts: Parts, ask: Ask) -> Tensor:
        return parts.cut(drafts).flatten(2).mean(2).view(-1, *parts.grid)


def nobody(level: float) -> Tensor:
    raise AssertionError("this score asks no model")


@pytest.mark.parametrize(
    ("shape", "sizes", "codec", "padding"),
    [
        ((1, 4, 4), (2, 2), Enlarging(Compression(space=8)), 0),
        ((1, 12), (3,), Enlarging(Compression(samples=5)), 0),
        ((1, 4, 2, 2), (1, 2, 2), Enlarging(Compression(2, 4)), 0),
        ((1, 4, 2, 2), (1, 2, 2), Enlarging(Compression(2, 4), alone=False), 0),
        ((1, 4, 2, 2), (1, 1, 2), Enlarging(Compression(2, 3)), 0),
        ((1, 4, 2, 2), (1, 2, 2), Enlarging(Compression(2, 4)), 1),
    ],
)
def test_each_part_is_scored_by_the_media_it_becomes(
    shape: tuple[int, ...], sizes: tuple[int, ...], codec: Codec, padding: int
) -> None:
    drafts, parts = torch.randn(2, *shape), Parts(shape, sizes)
    right = Mean()(drafts, parts, nobody)
    if padding:
        right[:, 0] = right[:, 1]  # nothing is seen of it
    found = DecodedScore(Mean(), codec, padding)(drafts, parts, nobody)
    assert torch.allclose(found, right, atol=1e-6)


def test_frames_of_one_part_count_equally() -> None:
    drafts = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 4, 1, 1)
    codec = Enlarging(Compression(1, 4))  # 1 frame, then 4 for each
    found = DecodedScore(Mean(), codec)(drafts, Parts((1, 4, 1, 1), (2, 1, 1)), nobody)
    assert found[0].tolist() == pytest.approx([(1 + 4 * 2) / 5, (3 + 4) / 2])


def test_a_target_of_latents_is_refined_by_how_its_drafts_look(tmp_path: Path) -> None:
    folder = save_video_pipeline(tmp_path / "ltx", FLOW)
    target = PretrainedDenoiser(str(folder), height=64, width=64, num_frames=17)
    options = SamplerOptions(num_steps=4, refinement=Refinement(2, 0.0, "appearance"))
    run = media_of_target(target, options)
    states = run.pipeline.complete(1, run.condition("a cat", 1), seed=0)
    assert states.isfinite().all() and run.pipeline.stats.draft_calls == 0
    score = quality_score("appearance", target)
    parts = run.pipeline.parts
    frames = target.decode(states)
    seen = Appearance()(frames, Parts(tuple(frames.shape[1:]), (1, *frames.shape[3:])), nobody)[0]
    found = score(states, parts, nobody)[0]
    assert found[0] == pytest.approx(float(seen[0]), abs=1e-5)
    each = target.codec.compression.time
    assert found[1] == pytest.approx(float(seen[1 : 1 + each].mean()), abs=1e-5)
