"""Measure what the README claims.

    python -m specstream.benchmark --config configs/benchmark/X.yaml

Reading order: `prompts` (what is decoded), `pair` (the models), `methods` (who decodes), `runners`
(one warm decoder each), `timing` (alternating runs), `speed` (the table of speeds), `speed_rows`
(what is derived), `distillation` (the table of divergences), `questions`, `drafter_study`,
`paired_scores`, `target_quality`, `drafter_rows` and `drafter_records` (the table of drafters, with
task metrics), `masked_prompts`, `masked_methods`, `masked_study`, `masked_rows`, `masked_scores`
and `pareto` (the table of fillings: masked diffusion, quality against calls), `step_study` (a step
of both its models), `media_methods`, `media_checks`, `media_unverified`, `media_counts`,
`media_seconds`, `media_curves`, `media_solving`, `media_study`, `media_quality`, `media_rows` and
`media_records` (the tables of media: drafts that keep a law, refinements and students that keep
none, solvers that miss a solution), `rows` (the results file), `cells`, `text_tables`,
`masked_tables`, `media_cells`, `media_tables` and `tables` (its tables, and which rows a summary
names), `plots`, `masked_plots` and `media_plots`, `results_page` (all of it) and `readme` (the
summary), `command` (the command line).  `sweep` trains what `distillation` compares.
"""

from specstream.benchmark.distillation import DistillationStudy
from specstream.benchmark.drafter_study import DrafterStudy, JudgedTask
from specstream.benchmark.masked_methods import (
    DraftAndVerify,
    DrafterAlone,
    MaskedMethod,
    NestedSteps,
    PlainSampling,
    SelfSpeculative,
)
from specstream.benchmark.masked_prompts import (
    CanvasPrompts,
    HeldOutCanvases,
    NoPrompt,
    PublishedPuzzles,
    ReferencedPrompts,
)
from specstream.benchmark.masked_study import MaskedStudy, MaskedTask
from specstream.benchmark.media_curves import (
    AcceptByError,
    Picard,
    SolverCurve,
    SolverSteps,
    StepCache,
)
from specstream.benchmark.media_methods import (
    EqualRounds,
    EqualSeconds,
    FreeDraft,
    PlainSteps,
    SamplingMethod,
    TrainedDraft,
)
from specstream.benchmark.media_study import MediaStudy, MediaTask
from specstream.benchmark.media_unverified import Refined, Student
from specstream.benchmark.methods import (
    Drafted,
    Method,
    Plain,
    Speculative,
    Transformers,
    TransformersAssisted,
)
from specstream.benchmark.prompts import FilePrompts, HeldOutPrompts, PromptSource
from specstream.benchmark.questions import QuestionFile
from specstream.benchmark.speed import SpeedStudy
from specstream.benchmark.step_study import StepStudy
from specstream.benchmark.study import Study

__all__ = [
    "AcceptByError",
    "CanvasPrompts",
    "DistillationStudy",
    "DraftAndVerify",
    "Drafted",
    "DrafterAlone",
    "DrafterStudy",
    "EqualRounds",
    "EqualSeconds",
    "FilePrompts",
    "FreeDraft",
    "HeldOutCanvases",
    "HeldOutPrompts",
    "JudgedTask",
    "MaskedMethod",
    "MaskedStudy",
    "MaskedTask",
    "MediaStudy",
    "MediaTask",
    "Method",
    "NestedSteps",
    "NoPrompt",
    "Picard",
    "Plain",
    "PlainSampling",
    "PlainSteps",
    "PromptSource",
    "PublishedPuzzles",
    "QuestionFile",
    "ReferencedPrompts",
    "Refined",
    "SamplingMethod",
    "SelfSpeculative",
    "SolverCurve",
    "SolverSteps",
    "Speculative",
    "SpeedStudy",
    "StepCache",
    "StepStudy",
    "Student",
    "Study",
    "TrainedDraft",
    "Transformers",
    "TransformersAssisted",
]
