"""Loops that fill canvases ask the device for as little as they can: on a GPU each answer waits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from specstream.drafters import MaskedDraftModel
from specstream.generation import (
    DualDiffusionPipeline,
    FixedLength,
    FreeDavePipeline,
    Limits,
    MaskedPipeline,
    Sampler,
    SelfSpeculativePipeline,
)
from specstream.models import SelfSpeculativeHead
from specstream.sampling import Sampling
from specstream.unmasking import StaticSchedule, Threshold
from specstream.verification import ExactMatch
from tests.masked_toys import characters, masked_lm

ASKS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}


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
