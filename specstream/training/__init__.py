"""LightningModules that train what `generation` decodes with.

Reading order: base (what a loss is), language_modeling, distillation; then what surrounds a run:
run_folder, checkpoints, history, provenance; command is the body of train.py.
"""

from specstream.training.base import LossSum, SummedLossModule
from specstream.training.language_modeling import LanguageModelingModule
from specstream.training.optimization import ConstantRate, Schedule, WarmupCosine

__all__ = [
    "ConstantRate",
    "LanguageModelingModule",
    "LossSum",
    "Schedule",
    "SummedLossModule",
    "WarmupCosine",
]
