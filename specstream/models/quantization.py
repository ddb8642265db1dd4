"""int8 weights for linear layers through torchao, and an honest account of what was converted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

Method = Literal["int8_weight_only", "int8_dynamic"]
METHODS = ("none", "int8_weight_only", "int8_dynamic")
USUAL: Method = "int8_weight_only"
REPORT = "quantization_report"
IN_INT8 = " (target in int8)"  # ends the name of the law that a converted target has
BFLOAT16 = 2  # bytes a number
CONVOLUTIONS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)


def quantize(model: nn.Module, method: str) -> None:
    """Convert the linear layers of `model` in place; `none` leaves it alone.

    int8_weight_only stores each weight row as int8 with one scale and multiplies in the model's
    own dtype.  In eager mode on a CPU it is slower than bfloat16: it pays compiled, or on a GPU.
    int8_dynamic also rounds what comes in, with one scale for each row, and multiplies in int8.
    Biases, embeddings, norms and a head tied to the embeddings stay as they are.  Raises ValueError
    for an unknown method, and for a model that has nothing to convert.
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

    embedded = embedded_weights(model)

    def convertible(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and id(module.weight) not in embedded

    if not any(convertible(module, name) for name, module in model.named_modules()):
        raise ValueError(
            f"quantize {method!r}: {type(model).__name__} has no linear layer to convert"
        )
    dynamic = method == "int8_dynamic"
    config = Int8DynamicActivationInt8WeightConfig() if dynamic else Int8WeightOnlyConfig()
    quantize_(model, config, filter_fn=convertible)
    setattr(model, REPORT, {"method": method} | account(model))


def account(model: nn.Module) -> dict[str, Any]:
    """Count what of a model is int8, in numbers and bytes, and what is not, by kind.

    `bytes` are those of all that torchao holds in place of the converted weights, its scales and
    zero points included; `bytes_in_bfloat16` those of the same weights at two bytes a number,
    whatever they were converted from.  Shares are of the model's parameters.  A matrix that is both
    embedding and head is a `tied_head`.
    """
    from torchao.utils import TorchAOBaseTensor

    shared = embedded_weights(model) & {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)
    }
    converted: list[Tensor] = []
    left: Counter[str] = Counter()
    seen: set[int] = set()
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if id(weight) in seen:
                continue
            seen.add(id(weight))
            if isinstance(weight, TorchAOBaseTensor):
                converted.append(weight)
            else:
                kind = "tied_head" if id(weight) in shared else kind_of(module, name)
                left[kind] += weight.numel()
    numbers = sum(weight.numel() for weight in converted)
    total = numbers + left.total()
    before, after = BFLOAT16 * numbers, sum(held_bytes(weight) for weight in converted)
    return {
        "linear_layers": len(converted),
        "share_of_parameters": round(numbers / total, 4) if total else 0.0,
        "bytes_in_bfloat16": before,
        "bytes": after,
        "bytes_ratio": round(after / before, 4) if before else None,
        "not_converted": {kind: round(count / total, 4) for kind, count in left.most_common()},
    }


def embedded_weights(model: nn.Module) -> set[int]:
    """Return which tensors are tables of embeddings, by their `id`."""
    return {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}


def kind_of(module: nn.Module, name: str) -> str:
    """Say what a parameter of `module` is; a norm is known by the name of its class."""
    if isinstance(module, nn.Embedding):
        return "embeddings"
    if isinstance(module, CONVOLUTIONS):
        return "convolutions"
    if "Norm" in type(module).__name__:
        return "norms"
    return "biases" if isinstance(module, nn.Linear) and name == "bias" else "others"


def held_bytes(weight: Tensor) -> int:
    """Return the bytes of a tensor, of torchao's those of the tensors that it is made of."""
    if not hasattr(weight, "__tensor_flatten__"):
        return weight.numel() * weight.element_size()
    names, _ = weight.__tensor_flatten__()
    return sum(held_bytes(getattr(weight, name)) for name in names)


def quantization_report(model: nn.Module) -> dict[str, Any] | None:
    """Return what `quantize` converted in `model` or in a part of it, None if nothing."""
    for module in model.modules():
        report = getattr(module, REPORT, None)
        if report is not None:
            return report
    return None


def quantized_law(law: str, quantized: Mapping[str, Any]) -> str:
    """Name the law that a guarantee speaks of, of a target that may be among the `quantized`."""
    return law + IN_INT8 if "target" in quantized else law


def bytes_ratio(quantized: Mapping[str, Any]) -> float | None:
    """Return the bytes of all that was converted over those of bfloat16; None where nothing was.

    `quantized` holds reports by role, as `Stats.quantized` does.
    """
    before = sum(made.get("bytes_in_bfloat16", 0) for made in quantized.values())
    after = sum(made.get("bytes", 0) for made in quantized.values())
    return after / before if before else None
