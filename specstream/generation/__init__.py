"""Pipelines: they own caches and loops, and turn prompts into committed steps."""

from specstream.generation.autoregressive import AutoregressivePipeline
from specstream.generation.base import Pipeline, TextPipeline
from specstream.generation.batch import Limits
from specstream.generation.lengths import CostModelLength, DraftLength, FixedLength, StepCosts
from specstream.generation.speculative import SpeculativePipeline

__all__ = [
    "AutoregressivePipeline",
    "CostModelLength",
    "DraftLength",
    "FixedLength",
    "Limits",
    "Pipeline",
    "SpeculativePipeline",
    "StepCosts",
    "TextPipeline",
]
