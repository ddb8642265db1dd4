"""Pipelines: they own caches and loops, and turn prompts into committed steps."""

from specstream.generation.autoregressive import AutoregressivePipeline
from specstream.generation.base import Pipeline, TextPipeline
from specstream.generation.batch import Limits
from specstream.generation.dual_diffusion import DualDiffusionPipeline
from specstream.generation.free_dave import FreeDavePipeline
from specstream.generation.lengths import CostModelLength, DraftLength, FixedLength, StepCosts
from specstream.generation.masked import MaskedPipeline, Sampler
from specstream.generation.self_speculative import SelfSpeculativeSampler
from specstream.generation.self_speculative_pipeline import SelfSpeculativePipeline
from specstream.generation.speculative import SpeculativePipeline

__all__ = [
    "AutoregressivePipeline",
    "CostModelLength",
    "DraftLength",
    "DualDiffusionPipeline",
    "FixedLength",
    "FreeDavePipeline",
    "Limits",
    "MaskedPipeline",
    "Pipeline",
    "Sampler",
    "SelfSpeculativePipeline",
    "SelfSpeculativeSampler",
    "SpeculativePipeline",
    "StepCosts",
    "TextPipeline",
]
