"""Where the parameters of a trained model live: their dtype, and their shards under FSDP2."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from specstream.models.pretrained_lm import PretrainedLM


def train_in_float32(module: nn.Module) -> None:
    """Cast the trained parameters to float32: steps of an optimizer are lost in bfloat16.

    Computation follows the trainer's `precision`; `bf16-mixed` computes in bfloat16.
    """
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)


def is_sharded(module: nn.Module) -> bool:
    """Return whether processes hold shards, so that every pass needs all of them."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def shard_layers(model: PretrainedLM, mesh: DeviceMesh | None) -> None:
    """Shard the decoder layers over the data-parallel processes (FSDP2); no mesh, nothing to do.

    Embeddings, final norm and head stay whole in every process: they may be tied, or read without
    a forward of the whole model.  Their gradients are averaged by `SummedLossModule`.
    """
    if mesh is None:
        return
    layers = getattr(model.model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"cannot shard the layers of model type {model.config.model_type!r}")
    for layer in layers:
        fully_shard(layer, mesh=mesh["data_parallel"])
