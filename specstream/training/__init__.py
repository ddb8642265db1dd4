"""LightningModules that train what `generation` decodes with.

Reading order: base (what a loss is), language_modeling, draft_module, distillation; streaming,
medusa, eagle and block train what lives on the target's states; decoding and on_policy beside
them; then what surrounds a run: run_folder, checkpoints, averaging, compilation, history,
wandb_run, provenance; command is the body of train.py.
"""

from specstream.training.averaging import WeightAveraging
from specstream.training.base import LossSum, SummedLossModule
from specstream.training.block import AcceptedLengthWeights, BlockModule, ExponentialDecay
from specstream.training.certainty import Certainty
from specstream.training.compilation import CompileLayers
from specstream.training.consistency import ConsistencyModule
from specstream.training.decoding import HeldOutDecoding
from specstream.training.denoising import DenoisingModule
from specstream.training.distillation import DistillationModule
from specstream.training.draft_module import DraftModule
from specstream.training.eagle import Eagle3Module
from specstream.training.filling import HeldOutFilling
from specstream.training.language_modeling import LanguageModelingModule
from specstream.training.latent_consistency import LatentConsistencyModule
from specstream.training.masked_diffusion import MaskedDiffusionModule
from specstream.training.medusa import MedusaModule
from specstream.training.optimization import ConstantRate, Schedule, WarmupCosine
from specstream.training.residual import ResidualModule
from specstream.training.sampling import HeldOutSampling
from specstream.training.self_speculative import SelfSpeculativeModule
from specstream.training.step_losses import RejectionProbability, SquaredError
from specstream.training.streaming import StreamingModule
from specstream.training.trajectories import TargetTrajectories
from specstream.training.wandb_run import WandbRun

__all__ = [
    "AcceptedLengthWeights",
    "BlockModule",
    "Certainty",
    "CompileLayers",
    "ConsistencyModule",
    "ConstantRate",
    "DenoisingModule",
    "DistillationModule",
    "DraftModule",
    "Eagle3Module",
    "ExponentialDecay",
    "HeldOutDecoding",
    "HeldOutFilling",
    "HeldOutSampling",
    "LanguageModelingModule",
    "LatentConsistencyModule",
    "LossSum",
    "MaskedDiffusionModule",
    "MedusaModule",
    "RejectionProbability",
    "ResidualModule",
    "Schedule",
    "SelfSpeculativeModule",
    "SquaredError",
    "StreamingModule",
    "SummedLossModule",
    "TargetTrajectories",
    "WandbRun",
    "WarmupCosine",
    "WeightAveraging",
]
