"""Compiled layers: the same training as without, and only where training steps run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from specstream.cli import train
from specstream.training import CompileLayers
from specstream.training.compilation import repeated_layers

Write = Callable[..., str]
COMPILED = {
    "class_path": "specstream.training.CompileLayers",
    "init_args": {"backend": "aot_eager"},
}


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "last.ckpt", weights_only=False)["state_dict"]


def test_compiled_training_is_uncompiled_training_but_for_rounding(
    write_config: Write, language_model: dict[str, Any], tmp_path: Path
) -> None:
    torch._dynamo.utils.counters.clear()
    train(["--config", write_config("compiled", language_model, callbacks=[COMPILED])])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    train(["--config", write_config("plain", language_model)])
    compiled, plain = weights(tmp_path / "compiled"), weights(tmp_path / "plain")
    assert compiled.keys() == plain.keys()
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=0, atol=2e-3, msg=name)


def test_nothing_is_compiled_while_validation_runs_and_all_is_as_before_after_it() -> None:
    class Layer(nn.Module):
        def forward(self, states: torch.Tensor) -> torch.Tensor:
            return states.relu() + 1

    callback, module, trainer = CompileLayers("eager"), L.LightningModule(), L.Trainer(logger=False)
    module.layers = nn.ModuleList([Layer()])
    callback.on_train_start(trainer, module)
    torch._dynamo.utils.counters.clear()

    def graphs() -> int:
        module.layers[0](torch.ones(3, 2))
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    def validate(fails: bool) -> None:
        callback.on_validation_start(trainer, module)
        assert graphs() == 0
        if fails:
            callback.on_exception(trainer, module, RuntimeError())
        else:
            callback.on_validation_end(trainer, module)

    with torch.compiler.set_stance("force_eager"):  # another's wish is not forgotten
        validate(fails=False)
        assert graphs() == 0
    validate(fails=True)
    assert graphs() == 1
    callback.on_exception(trainer, module, RuntimeError())  # of a training step
    assert graphs() == 1


def test_the_layers_of_every_network_are_found_once() -> None:
    module, blocks = nn.Module(), nn.ModuleList([nn.Sequential(nn.ModuleList([nn.Linear(2, 2)]))])
    module.network, module.head = nn.Module(), nn.Linear(2, 2)
    module.network.layers = blocks
    assert repeated_layers(module) == list(blocks)


def test_a_backend_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"backend must be one of .*'inducter'"):
        CompileLayers("inducter")


def test_a_backend_that_does_not_work_here_is_refused_before_training() -> None:
    trainer, module = L.Trainer(accelerator="cpu", logger=False), L.LightningModule()
    with pytest.raises(ValueError, match="backend tvm does not work here: backend='tvm' raised"):
        CompileLayers("tvm").on_fit_start(trainer, module)  # known to torch, and not installed
