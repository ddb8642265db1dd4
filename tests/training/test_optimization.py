"""Schedules, parameter groups and the handling of gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from specstream.training.optimization import (
    ConstantRate,
    WarmupCosine,
    clip_gradients,
    divide_gradients,
    parameter_groups,
)


def test_a_warm_up_rises_to_the_peak_and_the_cosine_ends_where_it_should() -> None:
    schedule = WarmupCosine(warmup_steps=4, final_fraction=0.1)
    values = [schedule.scale(step, 20) for step in range(21)]
    assert values[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert values[4:] == sorted(values[4:], reverse=True)
    assert values[20] == pytest.approx(0.1)
    assert WarmupCosine(0, 0.0, decay_steps=5).scale(9, 20) == 0


def test_a_constant_rate_stays_at_the_peak() -> None:
    assert [ConstantRate(1).scale(step, 3) for step in range(3)] == [0.5, 1.0, 1.0]


@pytest.mark.parametrize(
    "options", [{"warmup_steps": -1}, {"final_fraction": 1.5}, {"decay_steps": 0}]
)
def test_a_schedule_refuses_what_makes_no_sense(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        WarmupCosine(**options)  # type: ignore[arg-type]


def test_only_matrices_decay_and_frozen_parameters_are_left_out() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    module[0].weight.requires_grad_(False)
    matrices, vectors = parameter_groups(module)
    assert matrices["params"] == [] and "weight_decay" not in matrices
    assert len(vectors["params"]) == 3 and vectors["weight_decay"] == 0


def test_clipping_is_that_of_torch() -> None:
    gradients = [torch.randn(4, 4), torch.randn(4)]

    def parameters() -> list[nn.Parameter]:
        made = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
        for parameter, gradient in zip(made, gradients, strict=True):
            parameter.grad = gradient.clone()
        return made

    ours, torchs, unclipped = parameters(), parameters(), parameters()
    torch.testing.assert_close(clip_gradients(ours, 0.5), nn.utils.clip_grad_norm_(torchs, 0.5))
    torch.testing.assert_close([p.grad for p in ours], [p.grad for p in torchs])
    clip_gradients(unclipped, None)
    torch.testing.assert_close([p.grad for p in unclipped], gradients)


def test_gradients_are_divided_in_place() -> None:
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.tensor([2.0, 4.0])
    divide_gradients([weight, nn.Parameter(torch.ones(1))], torch.tensor(2.0))
    assert weight.grad.tolist() == [1.0, 2.0]
