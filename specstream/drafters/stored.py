"""The weights of a drafter that is no model of its own: one safetensors file in `draft/`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from specstream.models.saving import whole


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write `tensors` to `path`, numbers with a fraction in bfloat16."""
    from safetensors.torch import save

    contents = {
        name: whole(tensor)
        .to(torch.bfloat16 if tensor.is_floating_point() else tensor.dtype)
        .contiguous()
        .cpu()
        for name, tensor in tensors.items()
    }
    path.write_bytes(save(contents, metadata={"format": "pt"}))  # save_file would lock others out


@torch.no_grad()
def read_tensors(path: Path, own: Mapping[str, Tensor]) -> None:
    """Copy the tensors of `path` into `own`, a drafter's tensors by name.

    Raises ValueError in one line for a file that is missing, damaged, or of another drafter.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read {str(path)!r}: {error}") from error
    mine = {name: tuple(tensor.shape) for name, tensor in own.items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if mine != found:
        name = min(n for n in mine | found if mine.get(n) != found.get(n))
        raise ValueError(
            f"{str(path)!r} holds the weights of another drafter: {name} is "
            f"{found.get(name, 'missing')} there and {mine.get(name, 'missing')} here"
        )
    for name, tensor in own.items():
        if not tensors[name].isfinite().all():
            raise ValueError(f"{str(path)!r} is damaged: {name} holds numbers that are not finite")
        tensor.copy_(tensors[name])
