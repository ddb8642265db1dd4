"""Networks and adapters: what a drafter or a target computes with."""

from specstream.models.cache import SlotCache
from specstream.models.pretrained_lm import PretrainedLM, UntrainedLM
from specstream.models.pretrained_masked import (
    MaskedFromCausal,
    PretrainedMaskedLM,
    UntrainedMaskedLM,
)
from specstream.models.self_speculative import SelfSpeculativeHead

__all__ = [
    "MaskedFromCausal",
    "PretrainedLM",
    "PretrainedMaskedLM",
    "SelfSpeculativeHead",
    "SlotCache",
    "UntrainedLM",
    "UntrainedMaskedLM",
]
