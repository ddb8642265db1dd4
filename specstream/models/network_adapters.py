"""Low-rank adapters on a network of `diffusers`, in a file that its pipelines load.

LoRA (Hu et al. 2021), as LCM-LoRA has it (Luo et al. 2023, arXiv 2311.05556): the network keeps its
weights, and what is trained and stored are two thin matrices for each linear layer.  The file holds
bfloat16 tensors by peft's names behind the network's folder in its pipeline, "transformer" or
"unet", and `load_lora_weights` of that pipeline reads it as it is.  (Of two networks, those of Wan
2.2 with 14 B parameters, it reads the first one's.)
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from specstream.models.lora import ADAPTER, adapter_parameters, add_adapters, shared_copies

FILE = "pytorch_lora_weights.safetensors"  # what pipelines of `diffusers` look for
FORM = "lora_adapter_metadata"  # their name for what is said of the tensors
NAMED = 12  # names of layers in an error: enough to see what they are like


@dataclass(frozen=True)
class LowRankAdapters:
    """Adapters of `rank` on linear layers, whose additions are scaled by alpha / rank.

    Args:
        rank, alpha: as in LCM-LoRA, unless said.
        layers: the ends of their layers' names, "to_q" or "to_out.0"; None: every linear layer.
        seed: of the weights they begin with, which add nothing.
    """

    rank: int = 64
    alpha: float = 64.0
    layers: list[str] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"adapters: rank must be at least 1, got {self.rank}")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"adapters: alpha must be above 0 and finite, got {self.alpha}")
        if self.layers is not None and not self.layers:
            raise ValueError("adapters: layers names none; leave it out for every linear layer")


def adapted_copy(network: nn.Module, adapters: LowRankAdapters) -> nn.Module:
    """Return a copy with trainable adapters that shares the very weights of `network`.

    Raises ValueError in one line for names that no linear layer of it has.
    """
    names = chosen_layers(network, adapters.layers)
    (own,) = shared_copies([network])
    add_adapters(own, adapters.rank, adapters.alpha, adapters.seed, names)
    return own


def chosen_layers(network: nn.Module, ends: list[str] | None) -> list[str]:
    """Return the names of the linear layers that end so; ValueError where one has no such layer."""
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ValueError(f"adapters: {type(network).__name__} has no linear layer")
    if ends is None:
        return linear
    chosen = []
    for end in ends:
        found = [name for name in linear if f".{name}".endswith(f".{end}")]
        if not found:
            known = sorted({short_name(name) for name in linear})
            more = f" and {len(known) - NAMED} more" if len(known) > NAMED else ""
            raise ValueError(
                f"adapters: no linear layer of {type(network).__name__} is named '{end}'; they "
                f"are {', '.join(known[:NAMED])}{more}"
            )
        chosen += found
    return sorted(set(chosen))


def short_name(name: str) -> str:
    """Return the end of a layer's name that says what it is: "to_q", "to_out.0"."""
    parts = name.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdecimal() else parts[-1]


def save_adapters(folder: Path, networks: Mapping[str, nn.Module]) -> None:
    """Write the adapters of networks, by their folders in their pipeline."""
    from peft.tuners.lora import LoraLayer
    from safetensors.torch import save

    form: dict[str, object] = {}
    stored: dict[str, Tensor] = {}
    for part, network in networks.items():
        layers = {name: m for name, m in network.named_modules() if isinstance(m, LoraLayer)}
        first = next(iter(layers.values()))
        form[f"{part}.r"] = first.r[ADAPTER]
        form[f"{part}.lora_alpha"] = first.lora_alpha[ADAPTER]
        form[f"{part}.target_modules"] = sorted(layers)
        for name, tensor in adapter_tensors(network).items():
            stored[f"{part}.{name}"] = tensor.to(torch.bfloat16).cpu()
    # one entry, as the file keeps several in no order
    said = json.dumps(form, sort_keys=True)
    (folder / FILE).write_bytes(save(stored, metadata={FORM: said}))


def load_adapters(folder: Path, networks: Mapping[str, nn.Module]) -> list[nn.Module]:
    """Return copies of networks, by folder, that share their weights and have the stored adapters.

    Raises an error where they are damaged or another network's; the caller says of what.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file

    with safe_open(folder / FILE, "pt") as file:
        form = json.loads(file.metadata()[FORM])
    stored, copies = load_file(folder / FILE), []
    tensors: dict[str, Tensor] = {}
    for part, network in networks.items():
        layers = list(form[f"{part}.target_modules"])
        rank, alpha = int(form[f"{part}.r"]), float(form[f"{part}.lora_alpha"])
        copies.append(adapted_copy(network, LowRankAdapters(rank, alpha, layers)))
        own = adapter_tensors(copies[-1])
        tensors |= {f"{part}.{name}": tensor for name, tensor in own.items()}
    if {n: t.shape for n, t in tensors.items()} != {n: t.shape for n, t in stored.items()}:
        raise ValueError("its adapters are those of another network")
    for name, tensor in tensors.items():
        tensor.copy_(stored[name])
    return copies


def adapter_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Return the adapters' tensors by the names they are stored under."""
    found = adapter_parameters(network).items()
    return {name.replace(f".{ADAPTER}.", "."): parameter.data for name, parameter in found}
