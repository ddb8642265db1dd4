"""int8 weights for linear layers through torchao, and an honest account of what was converted."""

from __future__ import annotations

from typing import Any

from torch import nn

METHODS = ("none", "int8_weight_only", "int8_dynamic")
REPORT = "quantization_report"


def quantize(model: nn.Module, method: str) -> None:
    """Convert the linear layers of `model` in place; `none` leaves it alone.

    int8_weight_only stores each weight row as int8 with one scale and multiplies in the model's
    own dtype.  In eager mode on a CPU it is slower than bfloat16: it pays compiled, or on a GPU.
    int8_dynamic also rounds what comes in, with one scale for each row, and multiplies in int8.
    Embeddings, norms and a head tied to the embeddings stay as they are.  Raises ValueError for
    an unknown method, and for a model that has nothing to convert.
    """
    if method not in METHODS:
        raise ValueError(f"quantize {method!r} is not one of {', '.join(METHODS)}")
    if method == "none":
        return
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        quantize_,
    )

    tied = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}

    def convertible(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and id(module.weight) not in tied

    linear = [m for name, m in model.named_modules() if convertible(m, name)]
    if not linear:
        raise ValueError(
            f"quantize {method!r}: {type(model).__name__} has no linear layer to convert"
        )
    total = sum(p.numel() for p in model.parameters())
    weights = sum(m.weight.numel() for m in linear)
    dynamic = method == "int8_dynamic"
    config = Int8DynamicActivationInt8WeightConfig() if dynamic else Int8WeightOnlyConfig()
    quantize_(model, config, filter_fn=convertible)
    report = {
        "method": method,
        "linear_layers": len(linear),
        "share_of_parameters": round(weights / total, 4) if total else 0.0,
    }
    setattr(model, REPORT, report)


def quantization_report(model: nn.Module) -> dict[str, Any] | None:
    """Return what `quantize` converted in `model` or in a part of it, None if nothing."""
    for module in model.modules():
        report = getattr(module, REPORT, None)
        if report is not None:
            return report
    return None
