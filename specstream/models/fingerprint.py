"""A short name for the weights of a model, by which a head knows the target it was trained for."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from specstream.models.saving import whole

PROBED = 64  # values read of each tensor: enough to tell two trainings apart, cheap for any size


def rounding(model: nn.Module) -> str:
    """Return what to add where a name is not the expected one: float16 rounds a name away."""
    if any(parameter.dtype == torch.float16 for parameter in model.parameters()):
        return "; in float16 no model is known again: give --dtype bfloat16 or float32"
    return ""


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """Return 16 hex digits that depend on every tensor's name, shape and first values.

    The values are taken in bfloat16, so that a model has one name in whatever precision it is
    loaded; its int8 version has another, so name it before it is quantised.
    """
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not tensor.is_floating_point():
            continue
        values = whole(tensor).flatten()[:PROBED].to(torch.bfloat16).cpu()
        found.update(f"{name}{tuple(tensor.shape)}".encode())
        found.update(values.view(torch.int16).numpy().tobytes())
    return found.hexdigest()[:16]
