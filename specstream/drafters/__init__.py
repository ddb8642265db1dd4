"""Drafters: they propose, and never decide what is kept."""

from specstream.drafters.base import CanvasDrafter, Drafter, StoredDrafter
from specstream.drafters.block import BlockDrafter
from specstream.drafters.denoising import (
    FrozenEstimate,
    FrozenVelocity,
    IndependentDenoiser,
    StateDrafter,
)
from specstream.drafters.draft_model import CutDraftModel, DraftModel
from specstream.drafters.eagle import Eagle3
from specstream.drafters.first_block import FirstBlockDenoiser
from specstream.drafters.lookup_first import LookupFirst
from specstream.drafters.masked import MaskedDraftModel
from specstream.drafters.medusa import Medusa
from specstream.drafters.prompt_lookup import PromptLookup
from specstream.drafters.residual import ResidualDenoiser, WindowDenoiser
from specstream.drafters.streaming import SpeculativeStreaming
from specstream.drafters.translated import TranslatedDrafter

__all__ = [
    "BlockDrafter",
    "CanvasDrafter",
    "CutDraftModel",
    "DraftModel",
    "Drafter",
    "Eagle3",
    "FirstBlockDenoiser",
    "FrozenEstimate",
    "FrozenVelocity",
    "IndependentDenoiser",
    "LookupFirst",
    "MaskedDraftModel",
    "Medusa",
    "PromptLookup",
    "ResidualDenoiser",
    "SpeculativeStreaming",
    "StateDrafter",
    "StoredDrafter",
    "TranslatedDrafter",
    "WindowDenoiser",
]
