"""Low-rank adapters through peft: on a model's own layers, or on copies that share its weights.

Copies whose adapters serve some of the states only are decoded with the adapters folded into a
second weight (`split_copies`): two products for each projection, where the adapters take three.

A model that was tuned by an adapter can be kept as the adapter alone, in a folder in peft's format
that names its base: a fraction of the model's size.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

ADAPTER = "streams"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # peft's names


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


def add_adapters(
    layers: nn.Module, rank: int, alpha: float, seed: int, names: Sequence[str] | None = None
) -> list[nn.Module]:
    """Put trainable adapters of `rank` on every projection of `layers`; return what they add.

    With `names` only on those, which are whole names.

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
    asked = linear if names is None else set(names)
    transposed = any(isinstance(module, Conv1D) for module in layers.modules())
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=sorted(asked), fan_in_fan_out=transposed
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


class SplitProjection(nn.Module):
    """One projection for the first `count()` states of a sequence, another for those after them."""

    def __init__(self, own: nn.Module, tuned: nn.Module, count: Callable[[], int]) -> None:
        super().__init__()
        self.own, self.tuned, self.count = own, tuned, count

    def forward(self, states: Tensor) -> Tensor:
        """Return the projected states (B, T, ...)."""
        count = self.count()
        first, rest = states[:, :count].contiguous(), states[:, count:].contiguous()
        return torch.cat([self.own(first), self.tuned(rest)], 1)


@torch.inference_mode(False)  # weights that outlive the decoding which asks for them
@torch.no_grad()
def split_copies(
    layers: Sequence[nn.Module], adapted: nn.ModuleList, count: Callable[[], int]
) -> nn.ModuleList:
    """Return copies of `layers` in which the adapters of `adapted` act after `count()` states.

    The first states meet the very weights of `layers`, the others those weights with the adapters
    added in, which are summed in float64 and rounded once.
    """
    from peft.tuners.lora import LoraLayer

    copies = shared_copies(layers)
    for name, module in adapted.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        own = copies.get_submodule(name)
        tuned = copy.deepcopy(own).requires_grad_(False)
        weight, added = own.weight.double(), module.get_delta_weight(ADAPTER).double()
        tuned.weight.copy_(weight + added)
        parent, _, child = name.rpartition(".")
        setattr(copies.get_submodule(parent), child, SplitProjection(own, tuned, count))
    return copies


@torch.no_grad()
def fold(model: nn.Module) -> None:
    """Add the adapters of `model` into its weights, and take them away.

    The sums are taken in float64, so that they round to the same weights on every machine.
    """
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            dtype = module.get_base_layer().weight.dtype
            module.double()
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer().to(dtype))


def save_adapter(folder: Path, model: nn.Module, base: str) -> None:
    """Write the adapters of `model`, whose weights without them are those of the path `base`."""
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer
    from safetensors.torch import save

    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    first = next(iter(layers.values()))
    folder.mkdir(parents=True, exist_ok=True)
    LoraConfig(
        r=first.r[ADAPTER],
        lora_alpha=first.lora_alpha[ADAPTER],
        target_modules=sorted(layers),
        fan_in_fan_out=getattr(first, "fan_in_fan_out", False),
        base_model_name_or_path=base,
        task_type="CAUSAL_LM",
    ).save_pretrained(str(folder))
    stored = {n: t.to(torch.bfloat16).contiguous().cpu() for n, t in _tensors(model).items()}
    (folder / WEIGHTS).write_bytes(save(stored, metadata={"format": "pt"}))


def base_of(folder: Path) -> str | None:
    """Return the path of the base that an adapter's folder names; None for any other folder."""
    if not (folder / CONFIG).is_file() or (folder / "config.json").is_file():
        return None
    try:
        return str(json.loads((folder / CONFIG).read_text())["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(folder)!r} holds no readable {CONFIG}: {error!r}") from error


def fold_in(folder: Path, model: nn.Module) -> None:
    """Add the adapter that lies in `folder` into the weights of its base.

    Raises ValueError in one line where it is damaged, or made for another model.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        config = LoraConfig.from_pretrained(str(folder))
        inject_adapter_in_model(config, model, adapter_name=ADAPTER)
        found = load((folder / WEIGHTS).read_bytes())
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"cannot load the adapter in {str(folder)!r}: {reason}") from error
    own = _tensors(model)
    if {n: t.shape for n, t in own.items()} != {n: t.shape for n, t in found.items()}:
        raise ValueError(f"the adapter in {str(folder)!r} was made for another model than its base")
    for name, tensor in own.items():
        tensor.copy_(found[name])
    fold(model)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the adapters' tensors by peft's names for them."""
    from peft.tuners.lora import LoraLayer

    return {
        f"base_model.model.{name}.{part}.weight": getattr(module, part)[ADAPTER].weight.data
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
        for part in ("lora_A", "lora_B")
    }
