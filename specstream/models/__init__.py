"""Networks and adapters: what a drafter or a target computes with."""

from specstream.models.cache import SlotCache
from specstream.models.codec import AutoencoderCodec, Codec, PixelCodec, TinyCodec
from specstream.models.consistency import ConsistencyModel
from specstream.models.denoiser import Denoiser
from specstream.models.latent_consistency import LatentConsistencyModel
from specstream.models.network_adapters import LowRankAdapters
from specstream.models.noise_schedule import (
    DiscreteSchedule,
    FlowSchedule,
    NoiseSchedule,
    SigmaSchedule,
)
from specstream.models.patch_transformer import PatchTransformer
from specstream.models.pretrained_denoiser import PretrainedDenoiser
from specstream.models.pretrained_lm import PretrainedLM, UntrainedLM
from specstream.models.pretrained_masked import (
    MaskedFromCausal,
    PretrainedMaskedLM,
    UntrainedMaskedLM,
)
from specstream.models.self_speculative import SelfSpeculativeHead

__all__ = [
    "AutoencoderCodec",
    "Codec",
    "ConsistencyModel",
    "Denoiser",
    "DiscreteSchedule",
    "FlowSchedule",
    "LatentConsistencyModel",
    "LowRankAdapters",
    "MaskedFromCausal",
    "NoiseSchedule",
    "PatchTransformer",
    "PixelCodec",
    "PretrainedDenoiser",
    "PretrainedLM",
    "PretrainedMaskedLM",
    "SelfSpeculativeHead",
    "SigmaSchedule",
    "SlotCache",
    "TinyCodec",
    "UntrainedLM",
    "UntrainedMaskedLM",
]
