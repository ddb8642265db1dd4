"""Networks and adapters: what a drafter or a target computes with."""

from specstream.models.cache import SlotCache
from specstream.models.pretrained_lm import PretrainedLM, UntrainedLM

__all__ = ["PretrainedLM", "SlotCache", "UntrainedLM"]
