"""The adaptive threshold: which parts of a draft are refined."""

import pytest
import torch

from specstream.verification import AdaptiveThreshold

SCORES = torch.tensor([[1.0, 1.0, 1.0, 9.0, 1.0, 1.0, 1.0, 1.0]])


def chosen(scores: torch.Tensor, *options: float, **named: bool) -> list[int]:
    return AdaptiveThreshold(*options, **named)(scores)[0].nonzero()[:, 0].tolist()


def test_parts_above_mean_and_deviations_are_refined_with_their_neighbours() -> None:
    # mean 2, standard deviation sqrt(7) = 2.65: 9 lies 2.646 deviations above
    assert chosen(SCORES, 2.64, 0, always_ends=False) == [3]
    assert chosen(SCORES, 2.65, 0, always_ends=False) == []
    assert chosen(SCORES, 0.7, 1, always_ends=False) == [2, 3, 4]
    assert chosen(SCORES, 0.7, 2, always_ends=False) == [1, 2, 3, 4, 5]
    assert chosen(SCORES, 0.7, 1) == [0, 2, 3, 4, 7]
    assert chosen(SCORES, 1e9, 1) == [0, 7]
    assert chosen(SCORES, -1e9, 0) == list(range(8))


def test_each_row_has_a_threshold_of_its_own() -> None:
    both = AdaptiveThreshold(0.7, 0, always_ends=False)(torch.cat([SCORES, 1000 * SCORES.flip(1)]))
    assert both[0].nonzero().tolist() == [[3]] and both[1].nonzero().tolist() == [[4]]


def test_the_regions_of_an_image_have_neighbours_on_all_sides_and_no_ends() -> None:
    scores = torch.zeros(1, 4, 5)
    scores[0, 1, 2] = 1
    right = torch.zeros(1, 4, 5, dtype=torch.bool)
    right[0, 0:3, 1:4] = True
    assert torch.equal(AdaptiveThreshold()(scores), right)


def test_a_negative_distance_is_one_line() -> None:
    with pytest.raises(ValueError, match="neighbours must be at least 0, got -1"):
        AdaptiveThreshold(neighbours=-1)


def test_given_parts_do_not_count_in_mean_and_deviation() -> None:
    threshold = AdaptiveThreshold(0.7, neighbours=0, always_ends=False)
    scores = torch.tensor([[0.0, 0.0, 0.0, 0.0, 2.0, 3.0, 2.0, 5.0]])
    made = torch.tensor([[False] * 4 + [True] * 4])
    alone = threshold(scores[:, 4:])
    assert torch.equal(threshold(scores, made)[:, 4:], alone)
    assert torch.equal(threshold(scores, torch.ones_like(made)), threshold(scores))
    assert not torch.equal(threshold(scores)[:, 4:], threshold(scores, made)[:, 4:])
    assert not threshold(scores, torch.zeros_like(made)).any()


def test_refinement_does_not_spread_from_given_parts() -> None:
    threshold = AdaptiveThreshold(0.7, neighbours=1, always_ends=False)
    scores = torch.tensor([[9.0, 9.0, 1.0, 1.0, 1.0, 3.0]])
    made = torch.tensor([[False, False, True, True, True, True]])
    assert threshold(scores, made).tolist() == [[False, False, False, False, True, True]]
