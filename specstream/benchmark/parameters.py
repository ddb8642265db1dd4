"""How many numbers a drafter adds to its target."""

from __future__ import annotations

from specstream.benchmark.drafter_records import ExtraParameters
from specstream.drafters import Drafter
from specstream.models import PretrainedLM

ADAPTERS = "adapters"  # the part that is low-rank adapters, which others call LoRA


def extra_parameters(drafter: Drafter, target: PretrainedLM) -> ExtraParameters:
    """Count what `drafter` holds beside the weights it shares with `target`.

    A drafter with a method `extra_parameters()` names its parts itself; of any other, the
    parameters that are not the very tensors of the target are counted.
    """
    named = getattr(drafter, "extra_parameters", None)
    if named is not None:
        parts: dict[str, int] = dict(named())
    else:
        parts = {}
        shared = {id(weight) for weight in target.parameters()}
        for name, weight in drafter.named_parameters():
            if id(weight) not in shared:
                part = ADAPTERS if "lora_" in name else type(drafter).__name__  # peft's names
                parts[part] = parts.get(part, 0) + weight.numel()
    adapters = parts.get(ADAPTERS, 0)
    extra = sum(parts.values()) - adapters
    return ExtraParameters(extra, adapters, extra / medusa_parameters(target), parts)


def medusa_parameters(target: PretrainedLM) -> int:
    """Return the size of four Medusa heads for `target`: 4 (D^2 + D V) (Cai et al. 2024)."""
    hidden = int(target.config.get_text_config().hidden_size)
    return 4 * (hidden * hidden + hidden * target.vocab_size)
