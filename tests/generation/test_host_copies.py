"""Rounds of canvases and of denoising ask the device for little: on a GPU each answer waits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from specstream.drafters import FrozenEstimate, IndependentDenoiser, MaskedDraftModel, StateDrafter
from specstream.generation import (
    DualDiffusionPipeline,
    FixedLength,
    FreeDavePipeline,
    Limits,
    MaskedPipeline,
    Sampler,
    SelfSpeculativePipeline,
)
from specstream.generation.accept_by_error import AcceptByErrorPipeline
from specstream.generation.denoising import DenoisingPipeline
from specstream.generation.denoising_sampler import DenoisingSampler
from specstream.generation.lengths import CostModelLength, StepCosts
from specstream.generation.picard import PicardPipeline
from specstream.generation.solvers import AdamsBashforth2, SolverPipeline
from specstream.models import SelfSpeculativeHead
from specstream.sampling import Sampling
from specstream.unmasking import StaticSchedule, Threshold
from specstream.verification import ExactMatch
from tests.denoising_toys import gaussian_model
from tests.masked_toys import characters, masked_lm

ASKS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.item.default,  # in inference mode operations come as they are called
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.nonzero_numpy.default,
}


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Collect the names of operations that would wait for a device."""
    asked: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, arguments: Any = (), options: Any = None
        ) -> Any:
            if function in ASKS:
                asked.append(str(function))
            return function(*arguments, **(options or {}))

    tolist = Tensor.tolist

    def told(self: Tensor) -> Any:
        asked.append("tolist")
        return tolist(self)

    with monkeypatch.context() as patch, Watch():
        patch.setattr(Tensor, "tolist", told)
        yield asked


def asked_a_round(
    pipeline: MaskedPipeline, monkeypatch: pytest.MonkeyPatch, masks: tuple[int, int] = (6, 12)
) -> float:
    """Return how many answers one more round costs, from canvases of two sizes."""
    counts, rounds = [], []
    for size in masks:
        with counted(monkeypatch) as asked:
            rounds.append(len(list(pipeline.generate([f"ab[MASK:{size}]"], seed=1))))
        counts.append(len(asked))
    assert rounds[1] > rounds[0]
    return (counts[1] - counts[0]) / (rounds[1] - rounds[0])


def test_a_plain_step_copies_to_the_host_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for rule in (StaticSchedule(99), Threshold(1.0)):
        sampler = Sampler(rule, Sampling(), Limits(8))
        pipeline = MaskedPipeline(masked_lm(sharpness=2.0), characters(), sampler)
        assert asked_a_round(pipeline, monkeypatch) == 1


def test_a_round_of_nested_steps_copies_three_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which canvases are full, how many stand, and the round's report."""
    sampler = Sampler(StaticSchedule(99), limits=Limits(8))
    pipeline = FreeDavePipeline(masked_lm(), characters(), FixedLength(3), sampler)
    assert asked_a_round(pipeline, monkeypatch) <= 3


def test_a_round_of_self_speculation_copies_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """How many tokens stand, and the round's report."""
    target = masked_lm()
    head = SelfSpeculativeHead(target)
    sampler = Sampler(sampling=Sampling(), limits=Limits(8))
    pipeline = SelfSpeculativePipeline(
        target, head, characters(), num_windows=1, speculate=False, sampler=sampler
    )
    assert asked_a_round(pipeline, monkeypatch) <= 2


def test_a_drafted_round_copies_three_times_and_a_drafters_step_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was drafted, what stands, the report; of a step its shapes and what it has chosen."""
    target = masked_lm(sharpness=2.0)
    for steps in (1, 3):
        drafter = MaskedDraftModel(target, lambda: masked_lm(5, 4), Threshold(1.0))
        sampler = Sampler(StaticSchedule(99), limits=Limits(8))
        pipeline = DualDiffusionPipeline(
            target, drafter, characters(), ExactMatch(), FixedLength(steps), sampler=sampler
        )
        assert asked_a_round(pipeline, monkeypatch) <= 3 + 2 * steps


def denoising_rounds() -> dict[str, Callable[[int], DenoisingSampler]]:
    def drafted(drafter: StateDrafter) -> Callable[[int], DenoisingSampler]:
        policy, costs = CostModelLength(3), StepCosts(1.0, (1.0, 1.0, 1.1, 1.2), (0.0,) * 4)
        return lambda steps: DenoisingPipeline(
            gaussian_model(), steps, drafter=drafter, lengths=policy, costs=costs
        )

    return {
        "free draft": drafted(FrozenEstimate()),
        "a draft model": drafted(IndependentDenoiser(gaussian_model(0.4, 0.7))),
        "by error": lambda steps: AcceptByErrorPipeline(gaussian_model(), steps, 0.1),
        "picard": lambda steps: PicardPipeline(gaussian_model(), steps),
        "solver": lambda steps: SolverPipeline(gaussian_model(), steps, AdamsBashforth2()),
    }


@pytest.mark.parametrize("name", denoising_rounds())
def test_a_round_of_denoising_copies_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many steps stand: which states the target sees, the host knows without asking."""
    counts, rounds = [], []
    for steps in (12, 60):
        pipeline = denoising_rounds()[name](steps)
        with counted(monkeypatch) as asked:
            pipeline.complete(3, seed=1)
        counts.append(len(asked))
        rounds.append(pipeline.stats.target_calls)
    assert rounds[1] > rounds[0]
    assert counts[1] - counts[0] == rounds[1] - rounds[0]
