"""The moving average: its recursion, its place in checkpoints, and its bounds."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import lightning as L
import pytest
import torch

from specstream.training import WeightAveraging
from specstream.training.base import OPTIMIZED


class Scalar(L.LightningModule):
    """One weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))


def test_the_average_follows_its_recursion_and_is_what_a_checkpoint_shows() -> None:
    module, averaging, average = Scalar(), WeightAveraging(decay=0.5), 0.0
    trainer = SimpleNamespace(global_step=0, sanity_checking=False, state=SimpleNamespace(fn="fit"))
    stage = cast("tuple[L.Trainer, L.LightningModule]", (trainer, module))
    averaging.on_fit_start(*stage)
    averaging.on_train_start(*stage)
    for step in range(1, 5):
        trainer.global_step = step
        module.weight.data.fill_(float(step))
        for _ in range(2):  # the second call stands for an accumulated micro-batch
            averaging.on_train_batch_end(*stage, None, None, 0)
        decay = min(0.5, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * step
    averaging.on_validation_start(*stage)
    assert float(module.weight.detach()) == pytest.approx(average)
    swapped: dict[str, Any] = {"state_dict": {}}
    averaging.on_save_checkpoint(*stage, swapped)
    assert float(swapped["state_dict"]["weight"]) == pytest.approx(average)
    assert float(swapped[OPTIMIZED]["weight"]) == 4
    averaging.on_validation_end(*stage)
    assert float(module.weight.detach()) == 4
    checkpoint: dict[str, Any] = {"state_dict": {}}
    averaging.on_save_checkpoint(*stage, checkpoint)
    assert float(checkpoint["state_dict"]["weight"]) == pytest.approx(average)
    assert float(checkpoint[OPTIMIZED]["weight"]) == 4


@pytest.mark.parametrize("steps_left", [False, True])
def test_what_is_exported_is_the_average_also_where_no_step_was_left(steps_left: bool) -> None:
    module, averaging = Scalar(), WeightAveraging()
    stage = cast("tuple[L.Trainer, L.LightningModule]", (SimpleNamespace(global_step=3), module))
    checkpoint = {
        "state_dict": {"weight": torch.tensor(2.0)},
        OPTIMIZED: {"weight": torch.tensor(7.0)},
    }
    averaging.on_load_checkpoint(*stage, checkpoint)
    if steps_left:
        averaging.on_train_end(*stage)
    averaging.on_fit_end(*stage)
    assert float(module.weight.detach()) == 2.0


def test_weights_of_few_digits_are_averaged_in_float32() -> None:
    module, averaging = Scalar(), WeightAveraging(decay=0.999)
    module.bfloat16()
    module.weight.data.fill_(1.0)
    trainer = SimpleNamespace(global_step=0, sanity_checking=False, state=SimpleNamespace(fn="fit"))
    stage = cast("tuple[L.Trainer, L.LightningModule]", (trainer, module))
    averaging.on_fit_start(*stage)
    module.weight.data.fill_(1.125)
    average = 1.0
    for step in range(9000, 13000):
        average += (1 - 0.999) * (1.125 - average)
        trainer.global_step = step
        averaging.on_train_batch_end(*stage, None, None, 0)
        if step % 1000 == 0:
            averaging.on_validation_start(*stage)
            averaging.on_validation_end(*stage)
    assert float(averaging.average["weight"]) == pytest.approx(average, abs=1e-4)
    assert module.weight.dtype is torch.bfloat16 and float(module.weight.detach()) == 1.125


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_outside_its_range_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match="decay must be in"):
        WeightAveraging(decay)
