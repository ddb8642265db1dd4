"""Any-subset speculative decoding keeps the joint law in every order, and its shortcuts do not."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from tests.verification.any_subset import AnySubset, always

TOLERANCE = 1e-12


def joint_law(num_positions: int, seed: int = 0, holes: bool = False) -> Tensor:
    """Return a random law of that many positions over three tokens, some strings impossible."""
    noise = torch.Generator().manual_seed(seed)
    mass = torch.rand([3] * num_positions, generator=noise, dtype=torch.float64) ** 3
    if holes:
        mass = mass * (torch.rand(mass.shape, generator=noise) < 0.5)
    return mass / mass.sum()


def error(toy: AnySubset) -> float:
    law, _ = toy.law()
    assert law.sum().item() == pytest.approx(1.0, abs=TOLERANCE)
    return (law - toy.joint).abs().max().item()


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("num_drafted", [1, 2, 3])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_three_positions_keep_their_law_in_every_order(
    order: tuple[int, ...], num_drafted: int, holes: bool
) -> None:
    assert error(AnySubset(joint_law(3, holes=holes), order, num_drafted)) < TOLERANCE


@pytest.mark.parametrize("num_drafted", [2, 4])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 0, 3, 1)])
def test_four_positions_keep_their_law(order: tuple[int, ...], num_drafted: int) -> None:
    assert error(AnySubset(joint_law(4, seed=1), order, num_drafted)) < TOLERANCE


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_accepting_everything_fails_the_same_check(order: tuple[int, ...]) -> None:
    assert error(AnySubset(joint_law(3), order, 3, accept=always)) > 1e-2


def test_replacing_a_rejected_token_by_a_plain_draw_fails_the_same_check() -> None:
    assert error(AnySubset(joint_law(3), (1, 2, 0), 3, replace=lambda p, q: p)) > 1e-3


def test_one_drafted_token_is_always_accepted() -> None:
    assert error(AnySubset(joint_law(3), (1, 2, 0), 1, accept=always)) < TOLERANCE


@pytest.mark.parametrize("num_positions", [3, 4])
@pytest.mark.parametrize("num_drafted", [1, 2, 3])
def test_every_round_but_the_last_commits_at_least_two_tokens(
    num_positions: int, num_drafted: int
) -> None:
    """So two passes a round are never more than one a token (the last round needs no second)."""
    _, rounds = AnySubset(joint_law(num_positions), (*range(num_positions),), num_drafted).law()
    assert rounds == math.ceil(num_positions / min(num_drafted, 2))
