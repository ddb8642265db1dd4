"""Compiled layers: the same training as without, and only where training steps run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def test_the_layers_of_every_network_are_found_once() -> None:
    module, blocks = nn.Module(), nn.ModuleList([nn.Sequential(nn.ModuleList([nn.Linear(2, 2)]))])
    module.network, module.head = nn.Module(), nn.Linear(2, 2)
    module.network.layers = blocks
    assert repeated_layers(module) == list(blocks)


def test_a_backend_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"backend must be one of .*'inducter'"):
        CompileLayers("inducter")
