"""Compiled layers in training: each layer of a network is traced once and fused by `torch.compile`.

Layer by layer, not the whole network ("regional compilation"): the layers of one network are alike,
so one graph serves all of them and is made once, and what a module does between its layers stays
ordinary code.  Shapes that change from batch to batch become symbols of the graph.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import lightning as L
import torch
from torch import nn

from specstream.files import one_line


class CompileLayers(L.Callback):
    """Compiles the layers of every network of the module, for training steps only.

    Worth it where elementwise work between products counts: runs of minutes or more, on a CPU as
    on a GPU.  The weights that come out are those of uncompiled training but for rounding, and for
    what dropout draws where a model has any.  Validation decodes and samples in many shapes, so
    while it runs nothing in the process is compiled, nor while on-policy data are written.
    `backend` is one of `torch.compile`'s; ValueError for one that this installation does not have.
    """

    def __init__(self, backend: str = "inductor") -> None:
        known = torch.compiler.list_backends(exclude_tags=())
        if backend not in known:
            raise ValueError(f"backend must be one of {', '.join(known)}, not {backend!r}")
        self.backend = backend
        self.uncompiled = ExitStack()  # open during validation

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        try_backend(self.backend, trainer.strategy.root_device)  # before the run folder is opened

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for layer in repeated_layers(pl_module):
            layer.compile(backend=self.backend)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.uncompiled.enter_context(torch.compiler.set_stance("force_eager"))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.uncompiled.close()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: Any
    ) -> None:
        self.uncompiled.close()


def try_backend(backend: str, device: torch.device) -> None:
    """Raise ValueError where a backend lacks what it needs: a compiler, or a package."""
    with one_line(f"CompileLayers: backend {backend} does not work here"):
        compiled = torch.compile(lambda numbers: numbers.square().sum(), backend=backend)
        compiled(torch.ones(2, device=device, requires_grad=True)).backward()


def repeated_layers(module: nn.Module) -> list[nn.Module]:
    """Return the members of the outermost module lists: the layers of networks, heads."""
    found: list[nn.Module] = []
    for child in module.children():
        found += list(child) if isinstance(child, nn.ModuleList) else repeated_layers(child)
    return found
