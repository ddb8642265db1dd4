"""A network as a folder that any runtime of `transformers` models loads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def save_model(
    model: PreTrainedModel,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    also: Mapping[str, object] | None = None,
) -> None:
    """Write config, tokenizer and weights: bfloat16 safetensors.  `also` goes into config.json.

    Of a model sharded by FSDP2 every process must call it, because each gives its shards.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    state = {
        name: whole(tensor).to(torch.bfloat16 if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in model.state_dict().items()
        if name not in tied
    }
    from safetensors.torch import save

    config = (
        model.config.to_dict()
        | {"dtype": "bfloat16", "architectures": [type(model).__name__]}
        | dict(also or {})
    )
    if tokenizer is not None and config.get("eos_token_id") is None:
        config["eos_token_id"] = tokenizer.eos_token_id
    weights = save(
        {name: tensor.contiguous().cpu() for name, tensor in state.items()},
        metadata={"format": "pt"},
    )
    (folder / "model.safetensors").write_bytes(weights)  # save_file would lock others out
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor without gradient, gathered from all processes where it is sharded."""
    from torch.distributed.tensor import DTensor

    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()
