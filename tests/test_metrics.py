"""The numbers of speculative decoding, against their definitions and over several processes."""

from __future__ import annotations

import math

import pytest
import torch

from specstream.metrics import Acceptance, AcceptedLength, Speedup

# of six rounds that drafted 3, 3, 3, 2, 0, 3 tokens, of which 3, 1, 0, 2, 0, 2 stood: how often
# each position was tested and was accepted, in the first two rounds and in the other four
PARTS = (
    (torch.tensor([2, 2, 1, 0]), torch.tensor([2, 1, 1, 0])),
    (torch.tensor([3, 2, 1, 0]), torch.tensor([2, 2, 0, 0])),
)


def test_acceptance_is_conditional_and_prefixes_are_joint() -> None:
    metric = Acceptance(positions=4)
    for tested, accepted in PARTS:
        metric.update(tested, accepted)
    values = {name: round(value.item(), 6) for name, value in metric.compute().items()}
    assert values == {
        "acceptance": round(8 / 11, 6),
        "alpha_1": 0.8,
        "prefix_1": 0.8,
        "alpha_2": 0.75,
        "prefix_2": 0.6,
        "alpha_3": 0.5,
        "prefix_3": 0.3,
    }


def test_acceptance_takes_fewer_positions_than_it_has() -> None:
    metric = Acceptance(positions=5)
    metric.update(torch.tensor([4]), torch.tensor([1]))
    metric.update(torch.tensor([], dtype=torch.long), torch.tensor([], dtype=torch.long))
    assert metric.compute()["acceptance"] == 0.25


def test_nothing_drafted_is_no_number() -> None:
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert Acceptance(positions=3).compute() == {}
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert math.isnan(AcceptedLength().compute())


def test_accepted_length_and_speedup_are_ratios_of_sums() -> None:
    tau, speedup = AcceptedLength(), Speedup()
    tau.update(10, 4)
    tau.update(torch.tensor(5), torch.tensor(2))
    speedup.update(3.0, 2.0)
    speedup.update(1.0, 2.0)
    assert (tau.compute(), speedup.compute()) == (2.5, 1.0)
    tau.reset()
    tau.update(3, 3)
    assert tau.compute() == 1.0


def test_a_metric_of_no_positions_is_refused() -> None:
    with pytest.raises(ValueError, match="positions must be at least 1, got 0"):
        Acceptance(positions=0)


def test_processes_agree_because_states_add_up() -> None:
    """Metrics of two halves, reduced as torchmetrics reduces over processes, equal the whole."""
    parts, whole = [], Acceptance(positions=4)
    whole.update(*(first + second for first, second in zip(*PARTS, strict=True)))
    for (tested, accepted), rounds in zip(PARTS, (2, 4), strict=True):
        acceptance, tau = Acceptance(positions=4), AcceptedLength()
        acceptance.update(tested, accepted)
        tau.update(int(accepted.sum()) + rounds, rounds)
        parts.append((acceptance, tau))
    (acceptance, tau), (other_acceptance, other_tau) = parts
    acceptance.merge_state(other_acceptance)
    tau.merge_state(other_tau)
    assert acceptance.compute() == whole.compute()
    assert tau.compute() == torch.tensor((8 + 6) / 6)
