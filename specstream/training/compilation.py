"""Compiled layers in training: each layer of a network is traced once and fused by `torch.compile`.

Layer by layer, not the whole network ("regional compilation"): the layers of one network are alike,
so one graph serves all of them and tracing takes seconds, and what a module does between its
layers stays ordinary code.  Shapes that change from batch to batch become symbols of the graph.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import nn


class CompileLayers(L.Callback):
    """Compiles the layers of every network of the module, for training steps only.

    Worth it where elementwise work between products counts: runs of minutes or more, on a CPU as
    on a GPU.  The weights that come out are those of uncompiled training but for rounding.
    Validation decodes and samples in many shapes, so it runs uncompiled.  `backend` is one of
    `torch.compile`'s; ValueError for one that this installation does not have.
    """

    def __init__(self, backend: str = "inductor") -> None:
        known = torch._dynamo.list_backends(exclude_tags=())
        if backend not in known:
            raise ValueError(f"backend must be one of {', '.join(known)}, not {backend!r}")
        self.backend = backend
        self.compiled: set[int] = set()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for layer in repeated_layers(pl_module):
            if id(layer) not in self.compiled:
                self.compiled.add(id(layer))
                layer.compile(backend=self.backend)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        torch.compiler.set_stance("force_eager")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        torch.compiler.set_stance("default")

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: Any
    ) -> None:
        torch.compiler.set_stance("default")


def repeated_layers(module: nn.Module) -> list[nn.Module]:
    """Return the members of the outermost module lists: the layers of networks, heads."""
    found: list[nn.Module] = []
    for child in module.children():
        found += list(child) if isinstance(child, nn.ModuleList) else repeated_layers(child)
    return found
