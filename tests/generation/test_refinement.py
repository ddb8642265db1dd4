"""Selective refinement: what is refined, what is kept to the last bit, and what it costs."""

import math

import pytest
import torch
from torch import Tensor, nn

from specstream.generation.denoising import DenoisingPipeline
from specstream.generation.refinement import RefinementPipeline
from specstream.generation.refinement_scores import (
    Appearance,
    Parts,
    QualityScore,
    TargetDisagreement,
    content_scores,
    content_shares,
    temporal_scores,
    usual_parts,
)
from specstream.models import Denoiser, FlowSchedule
from specstream.structures import Guarantee
from specstream.transitions import Prediction
from specstream.verification import AdaptiveThreshold

SHAPE = (1, 6, 4, 4)  # a video of six frames
SPOILED = 3


class Pattern(nn.Module):
    """Believes the data to be a fixed video, and follows the state a little; some frames spoiled.

    Frames are told of one another: each looks at the mean of the whole state.
    """

    def __init__(self, spoiled: int | None = None, told: float = 0.2) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        video = 0.3 * torch.randn(SHAPE, generator=generator)
        if spoiled is not None:
            video[:, spoiled] = 0.9
        self.video = nn.Parameter(video)
        self.told = told
        self.calls = self.rows = 0

    def forward(self, states: Tensor, times: Tensor) -> Tensor:
        self.calls, self.rows = self.calls + 1, self.rows + len(states)
        whole = states.flatten(1).mean(1).view(-1, 1, 1, 1, 1)
        return self.video + self.told * (0.1 * states + whole)


def model(spoiled: int | None = None) -> Denoiser:
    return Denoiser(Pattern(spoiled), FlowSchedule(), SHAPE, Prediction.DATA)


def refiner(drafter: Denoiser | None, *threshold: float, **options) -> RefinementPipeline:
    return RefinementPipeline(
        model(), drafter, 3, 8, threshold=AdaptiveThreshold(*threshold), **options
    )


@pytest.mark.parametrize("neighbours", [0, 1])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_spoiled_frame_is_refined_with_its_neighbours_and_the_rest_is_kept(
    neighbours: int, eta: float
) -> None:
    drafter = model(SPOILED)
    pipeline = refiner(drafter, 1.5, neighbours, False, eta=eta)
    samples = pipeline.complete(4, seed=1)
    draft = DenoisingPipeline(drafter, 3, eta).complete(4, seed=1)
    changed = (samples != draft).flatten(3).any(-1)[:, 0]  # (4, F)
    right = [abs(frame - SPOILED) <= neighbours for frame in range(6)]
    assert changed.tolist() == [right] * 4
    plain = DenoisingPipeline(model(), 8, eta).complete(4, seed=1)
    better, worse = ((x - plain)[:, :, SPOILED].abs().mean() for x in (samples, draft))
    assert better < 0.2 * worse


def test_nothing_but_the_ends_is_refined_above_any_threshold() -> None:
    pipeline = refiner(model(SPOILED), 1e9)
    samples = pipeline.complete(2, seed=0)
    draft = DenoisingPipeline(model(SPOILED), 3, 0.0).complete(2, seed=0)
    changed = (samples != draft).flatten(3).any(-1)[:, 0]
    assert changed.tolist() == [[True, False, False, False, False, True]] * 2
    untouched = refiner(model(SPOILED), 1e9, 1, False)
    assert torch.equal(untouched.complete(2, seed=0), draft)
    assert untouched.stats.target_calls == 1  # the score's
    assert untouched.stats.acceptance == 1


@pytest.mark.parametrize("drafter", [None, model(SPOILED)])
def test_refining_everything_from_pure_noise_is_plain_sampling(drafter: Denoiser | None) -> None:
    pipeline = refiner(drafter, -1e9, strength=1.0)
    plain = DenoisingPipeline(model(), 8, 0.0)
    assert torch.allclose(pipeline.complete(3, seed=2), plain.complete(3, seed=2), atol=1e-6)
    assert pipeline.stats.acceptance == 0


def test_a_sample_does_not_depend_on_its_batch() -> None:
    for eta in (0.0, 1.0):
        together = refiner(model(SPOILED), 0.5, eta=eta).complete(5, seed=3)
        pairs = refiner(model(SPOILED), 0.5, eta=eta, batch_size=2).complete(5, seed=3)
        alone = refiner(model(SPOILED), 0.5, eta=eta).complete(1, seed=3, indices=[4])
        assert torch.allclose(together, pairs, atol=1e-6)
        assert torch.allclose(together[4], alone[0], atol=1e-6)


def test_the_counts_are_what_the_models_saw() -> None:
    for drafter in (None, model(SPOILED)):
        pipeline = refiner(drafter, 1.5, 0, False, batch_size=2)
        pipeline.complete(4, seed=0)
        stats, network = pipeline.stats, pipeline.target.network
        assert isinstance(network, Pattern)
        assert (stats.target_calls, stats.target_rows) == (network.calls, network.rows)
        assert stats.guarantee is Guarantee.HEURISTIC
        assert sum(stats.tested) == 4 * 6 and stats.prompts == 4
    assert stats.draft_calls == drafter.network.calls == 2 * 3
    assert stats.target_calls == 2 * (1 + 5) and stats.elements == 4 * (3 + 5)
    assert stats.acceptance == 5 / 6


def test_every_round_reports_steps_until_all_are_done() -> None:
    for threshold in (1e9, 0.5):
        pipeline = refiner(model(SPOILED), threshold, 0, False)
        done: dict[int, int] = {}
        for step in pipeline.generate(3, seed=0):
            assert step.done == done.get(step.sample, 0) + step.accepted + 1
            done[step.sample] = step.done
            assert step.finished == (step.done == pipeline.total_steps == 8)
        assert done == dict.fromkeys(range(3), 8)


def test_parts_are_cut_and_spread_over_what_they_hold() -> None:
    parts = Parts((2, 4, 6), (2, 3))
    states = torch.arange(48.0).view(1, 2, 4, 6)
    pieces = parts.cut(states)
    assert pieces.shape == (1, 4, 2, 2, 3) and parts.grid == (2, 2)
    assert torch.equal(pieces[0, 1], states[0, :, :2, 3:])
    chosen = torch.tensor([[[False, True], [False, False]]])
    spread = parts.spread(chosen)
    assert spread.shape == (1, 1, 4, 6)
    assert spread[0, 0, :2, 3:].all() and spread.sum() == 6
    assert usual_parts((3, 8, 16, 16)).grid == (8,)
    assert usual_parts((1, 28, 30)).grid == (4, 2)
    assert usual_parts((1, 64)).grid == (16,)
    with pytest.raises(ValueError, match=r"parts of \[3\] do not divide states of \[64\]"):
        Parts((1, 64), (3,))


def test_temporal_scores_are_the_formula_by_hand() -> None:
    # frame 1 = 1 - frame 0: MSE 1, correlation -1; frame 2 = frame 1: MSE 0, correlation 1
    pieces = torch.tensor([[[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [0.5, 0.5]]])
    right = [0.0, 0.7 * 1 + 0.3 * 1, 0.0, 0.7 * 0.25 + 0.3 * 0.5]
    assert temporal_scores(pieces)[0].tolist() == pytest.approx(right, abs=1e-6)


def test_content_scores_are_the_formula_by_hand() -> None:
    flat, edge = torch.full((2, 2), 0.5), torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    # at every place of the edge one neighbour differs by 1: |Laplacian| 1; deviation 0.5
    scores = content_scores(torch.stack([flat, edge])[None])[0]
    assert scores.tolist() == pytest.approx([1.0, 0.6 * 0 + 0.4 * 0.5], abs=1e-6)


def test_appearance_weighs_first_middle_and_last() -> None:
    assert content_shares(4, 1.0, 0.5, 0.7).tolist() == pytest.approx([1, 0.5, 0.5, 0.7])
    assert content_shares(1, 1.0, 0.5, 0.7).tolist() == [1]
    video = torch.full((1, 1, 3, 2, 2), -1.0)
    video[:, :, 1] = torch.tensor([[-1.0, 1.0], [-1.0, 1.0]])
    scores = Appearance()(video, Parts((1, 3, 2, 2), (1, 2, 2)), nobody)[0]
    change = 0.7 * 0.5 + 0.3 * 0.5
    right = [1.0, 0.5 * 0.2 + 0.5 * change, 0.7 * 1.0 + 0.3 * change]
    assert scores.tolist() == pytest.approx(right, abs=1e-6)


def nobody(level: float) -> Tensor:
    raise AssertionError("this score asks no model")


def test_regions_of_an_image_are_scored_by_what_is_in_them() -> None:
    image = torch.zeros(1, 1, 4, 4)
    image[..., :2, 1] = 1.0
    scores = Appearance()(image, Parts((1, 4, 4), (2, 2)), nobody)
    assert scores.shape == (1, 2, 2) and scores.argmin() == 0
    assert scores[0, 1].tolist() == pytest.approx([1.0, 1.0])


def test_disagreement_is_the_squared_difference_in_each_part() -> None:
    parts = Parts((1, 4), (2,))
    said = {0.25: torch.tensor([[[1.0, 1.0, 0.0, 2.0]]])}
    scores = TargetDisagreement(0.25)(torch.zeros(1, 1, 4), parts, said.__getitem__)
    assert scores.tolist() == [[1.0, 2.0]]


def test_a_level_of_noise_is_the_nearest_step_of_the_target() -> None:
    class Heard(QualityScore):
        def __call__(self, drafts: Tensor, parts: Parts, ask) -> Tensor:
            ask(0.5)
            return torch.zeros(len(drafts), *parts.grid)

    pipeline = RefinementPipeline(model(), None, 2, 10, Heard(), AdaptiveThreshold(1, 0, False))
    times: list[float] = []
    pipeline.target.network.register_forward_pre_hook(lambda _, given: times.append(given[1].max()))
    pipeline.complete(1, seed=0)
    assert [round(float(time)) for time in times] == [1000, 500, 500]


def test_wrong_options_are_one_line() -> None:
    with pytest.raises(ValueError, match="strength must be above 0 and at most 1, got 0"):
        refiner(None, strength=0.0)
    other = Denoiser(Pattern(), FlowSchedule(), (1, 5, 4, 4), Prediction.DATA)
    with pytest.raises(ValueError, match=r"the drafter's states are \[1, 5, 4, 4\]"):
        refiner(other)
    with pytest.raises(ValueError, match="level must be between 0 and 1, got 1"):
        TargetDisagreement(1.0)
    with pytest.raises(ValueError, match=r"first must be in \[0, 1\], got 2"):
        Appearance(first=2.0)
    assert math.isclose(TargetDisagreement().level, 0.5)
