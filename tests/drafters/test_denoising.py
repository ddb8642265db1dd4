"""Drafters of denoising steps: what they guess before they are trained, and when they refuse."""

import pytest
import torch

from specstream.drafters import FrozenEstimate, FrozenVelocity, ResidualDenoiser, WindowDenoiser
from specstream.drafters.residual import noise_since
from specstream.models import Denoiser, DiscreteSchedule, FlowSchedule, PatchTransformer
from specstream.sampling import Noise, Role
from specstream.structures import KnownParts, StateContext
from specstream.transitions import noised, transition

SHAPE = (1, 4, 4)
GRID = FlowSchedule().grid(10)


def context(rows: int = 3) -> StateContext:
    noise = torch.Generator().manual_seed(0)
    seen = torch.randn(rows, *SHAPE, generator=noise)
    return StateContext(
        states=torch.randn(rows, *SHAPE, generator=noise),
        steps=torch.arange(rows) + 1,
        samples=torch.arange(rows),
        drawn=torch.arange(rows) * 5,
        condition={},
        seen=seen,
        seen_steps=torch.arange(rows),
        estimates=torch.randn(rows, *SHAPE, generator=noise),
    )


def residual(out_channels: int = 1, in_channels: int = 2) -> PatchTransformer:
    return PatchTransformer(in_channels, out_channels, (2, 2), 16, 1, 2, num_times=2)


@pytest.mark.parametrize("channels", [2, 3])
def test_an_untrained_residual_drafter_drafts_what_the_free_one_does(channels: int) -> None:
    rows, noise = context(), Noise(0)
    free = FrozenEstimate().propose(rows, [3, 1, 2], GRID, 1.0, noise)
    step, window = residual(1, channels), residual(4, channels)
    for drafter in (ResidualDenoiser(step), WindowDenoiser(window, 4)):
        draft = drafter.propose(rows, [3, 1, 2], GRID, 1.0, noise)
        assert drafter.told_noise == (channels == 3)
        assert torch.equal(draft.means, free.means) and torch.equal(draft.states, free.states)
        assert draft.lengths.tolist() == [3, 1, 2]


def test_the_noise_drawn_since_the_estimate_is_a_unit_normal_of_the_ancestral_sampler() -> None:
    for grid in (FlowSchedule().grid(10), DiscreteSchedule().grid(10)):
        rows = context(4000)
        rows.seen_steps = torch.arange(4000) % 7
        states, steps, noise = rows.seen, rows.seen_steps, Noise(1)
        for _ in range(2):  # two steps, as if the estimate were right
            law = transition(rows.estimates, states, steps, grid, 1.0)
            states = law.sample(noise.normal(rows.samples, steps, SHAPE, Role.DRAFT))
            steps = steps + 1
        found = noise_since(states, steps, rows, grid)
        for seen in range(7):
            part = found[rows.seen_steps == seen]
            assert abs(part.mean()) < 0.05 and abs(part.std() - 1) < 0.03
            assert abs((part * rows.seen[rows.seen_steps == seen]).mean()) < 0.05  # new to it


def test_given_parts_draw_all_their_noise_anew() -> None:
    rows = context(2000)
    rows.seen_steps = torch.full_like(rows.steps, 5)
    data = torch.randn(2000, *SHAPE)
    rows.known = KnownParts(data, torch.ones(2000, *SHAPE, dtype=torch.bool))
    rows.estimates, rows.seen = data, noised(data, torch.randn_like(data), rows.seen_steps, GRID)
    normals, steps = torch.randn_like(data), rows.seen_steps + 1
    found = noise_since(noised(data, normals, steps, GRID), steps, rows, GRID)
    assert torch.allclose(found, normals, atol=1e-4)


def test_frozen_velocity_goes_on_straight_where_steps_have_no_noise() -> None:
    rows = context()
    denoiser = Denoiser(residual(), FlowSchedule(), SHAPE)
    seen = rows.seen_steps
    rows.states = transition(rows.estimates, rows.seen, seen, GRID, 0.0).means
    draft = FrozenVelocity(denoiser).propose(rows, [4, 4, 4], GRID, 0.0, Noise(0))
    slope = rows.states - rows.seen
    for place in range(4):
        ahead = rows.states + (place + 1) * slope
        assert torch.allclose(draft.means[:, place], ahead, atol=1e-4)


def test_drafts_of_a_row_do_not_depend_on_its_neighbours() -> None:
    rows, noise = context(), Noise(3)
    together = FrozenEstimate().propose(rows, [2, 5, 3], GRID, 1.0, noise)
    alone = FrozenEstimate().propose(rows.rows(torch.tensor([1])), [5], GRID, 1.0, noise)
    assert torch.equal(together.states[1], alone.states[0])


def test_a_window_longer_than_trained_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 4 steps at once, not 5"):
        WindowDenoiser(residual(4), 4).propose(context(), [5, 1, 1], GRID, 1.0, Noise(0))
