"""The reflection coupling: its output's law is the target's, and it keeps as much as can be."""

import pytest
import torch
from torch import Tensor

from specstream.structures import StateDraft
from specstream.verification.gaussian import ReflectionCoupling, StateVerifier, step_acceptance
from tests.denoising_toys import KeepsAll

ROWS = 400_000
STD = 0.7


def coupled(rule: StateVerifier, distance: float) -> tuple[Tensor, Tensor]:
    """Return the first of the committed states (ROWS, 2), and whether each draft stood."""
    noise = torch.Generator().manual_seed(1)
    normals = torch.randn(ROWS, 1, 2, generator=noise, dtype=torch.float64)
    means = torch.tensor([[0.3, -0.2]], dtype=torch.float64).expand(ROWS, 1, 2)
    toward = torch.tensor([0.6, 0.8], dtype=torch.float64)
    target = means + STD * distance * toward
    draft = StateDraft(means + STD * normals, means, torch.ones(ROWS, dtype=torch.long))
    after = torch.cat([target, target], 1)
    uniforms = torch.rand(ROWS, 1, generator=noise, dtype=torch.float64)
    stds = torch.full((ROWS, 2), STD, dtype=torch.float64)
    verdict = rule(draft, after, stds, uniforms, torch.zeros(ROWS, 2, dtype=torch.float64))
    kept = verdict.accepted[:, 0]
    return torch.where(kept[:, None], draft.states[:, 0], verdict.correction), kept


def errors(states: Tensor, distance: float) -> tuple[float, float]:
    """Return how far mean and covariance lie from the target's, in Monte Carlo errors."""
    right = torch.tensor([0.3, -0.2]) + STD * distance * torch.tensor([0.6, 0.8])
    mean = ((states.mean(0) - right).abs() / (STD / ROWS**0.5)).max()
    covariance = (states.T.cov() - STD**2 * torch.eye(2)).abs() / (STD**2 * (2 / ROWS) ** 0.5)
    return float(mean), float(covariance.max())


@pytest.mark.parametrize("distance", [0.0, 0.5, 2.0])
def test_coupled_states_have_the_targets_mean_and_covariance(distance: float) -> None:
    states, kept = coupled(ReflectionCoupling(), distance)
    assert max(errors(states, distance)) < 4.5
    expected = float(step_acceptance(torch.tensor(distance)))
    assert abs(kept.double().mean() - expected) < 4.5 * (0.25 / ROWS) ** 0.5


def test_a_rule_that_keeps_every_draft_fails_the_same_check() -> None:
    states, _ = coupled(KeepsAll(), 0.5)
    assert max(errors(states, 0.5)) > 100


def test_a_draft_of_the_targets_own_law_always_stands_and_is_followed_by_a_fresh_draw() -> None:
    means = torch.zeros(5, 3, 4)
    draft = StateDraft(torch.randn(5, 2, 4), means[:, :2], torch.tensor([2, 1, 0, 2, 1]))
    verdict = ReflectionCoupling()(
        draft, means + 0.0, torch.ones(5, 3), torch.rand(5, 2).double(), torch.full((5, 4), 2.0)
    )
    assert verdict.accepted.sum(1).tolist() == [2, 1, 0, 2, 1]
    assert torch.allclose(verdict.correction, torch.full((5, 4), 2.0))
