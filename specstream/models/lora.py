"""Low-rank adapters through peft: on a model's own layers, or on copies that share its weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from specstream.models.pretrained_lm import PretrainedLM

ADAPTER = "streams"


def shared_copies(layers: Sequence[nn.Module]) -> nn.ModuleList:
    """Return copies of `layers` that hold the very same parameters and configuration.

    What is later put into a copy (an adapter) is not in the original, and no weight is stored
    twice.
    """
    memo: dict[int, object] = {}
    for layer in layers:
        memo |= {id(parameter): parameter for parameter in layer.parameters()}
        configs = (getattr(module, "config", None) for module in layer.modules())
        memo |= {id(config): config for config in configs if config is not None}
    return nn.ModuleList(copy.deepcopy(layer, memo) for layer in layers)


def add_adapters(layers: nn.Module, rank: int, alpha: float, seed: int) -> list[nn.Module]:
    """Put trainable adapters of `rank` on every projection of `layers`; return what they add.

    Hu et al. 2021: W x becomes W x + (alpha / rank) B A x, with B zero at the start.  The modules
    returned are the B, whose outputs are the additions.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer
    from transformers.pytorch_utils import Conv1D

    linear = {
        name.rpartition(".")[2]
        for name, module in layers.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }
    transposed = any(isinstance(module, Conv1D) for module in layers.modules())
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=sorted(linear), fan_in_fan_out=transposed
    )
    devices = sorted({p.device.index for p in layers.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, layers, adapter_name=ADAPTER)
    found = [module for module in layers.modules() if isinstance(module, LoraLayer)]
    for layer in found:
        layer.lora_A[ADAPTER].float()
        layer.lora_B[ADAPTER].float()
    return [layer.lora_B[ADAPTER] for layer in found]


def adapter_parameters(layers: nn.Module) -> dict[str, Tensor]:
    """Return the adapters' parameters by name."""
    return {name: p for name, p in layers.named_parameters() if f".{ADAPTER}." in name}


@torch.no_grad()
def merged(target: PretrainedLM) -> PretrainedLM:
    """Return a copy of an adapted `target` with its adapters added into the weights."""
    from peft.tuners.lora import LoraLayer

    model = copy.deepcopy(target.model)
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
    return PretrainedLM.of(model, target.path)
