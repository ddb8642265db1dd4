"""Rows of the table of drafters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from specstream.benchmark.rows import Agreement, Bound, Counts, Machine


@dataclass(frozen=True, slots=True)
class ExtraParameters:
    """What a drafter adds to its target: those of LoRA adapters apart, and the parts by name.

    `share_of_medusa` is without LoRA, over the 4 (D^2 + D V) of four Medusa heads.
    """

    extra_parameters: int = 0
    lora_parameters: int = 0
    share_of_medusa: float = 0.0
    parameter_parts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class JudgedText:
    """The task metric of a method's text and of its baseline's, and on how many prompts.

    A study that judges targets on more prompts than it times gives a method the figure of its
    target where it promises that target's text or law; `quality_prompts` says of each row what it
    is.  The differences are from the task's target on the same prompts, None for its own text, with
    95 % bootstrap intervals over prompts.
    """

    quality: dict[str, float]
    quality_plain: dict[str, float]
    quality_prompts: int
    quality_differences: dict[str, float] | None = None
    quality_intervals: dict[str, tuple[float, float]] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DrafterRow:
    """One drafter on one task: its speed, its calls, what it costs and how good the text is.

    `target` is whose text it decodes and `baseline` whose plain decoding it is compared with: the
    task's target unless the method names others.  `call_reduction` is how many more target calls a
    token plain decoding makes.  `agreement` and `identical_share` (of the prompts, ties not
    counted) are against plain decoding of `target`.
    """

    study: str = "drafters"
    task: str
    method: str
    role: str
    target: str
    baseline: str
    variant: str
    variants: dict[str, float]  # seconds of each
    sampling: str
    num_prompts: int
    prompt_tokens: float
    max_new_tokens: int
    repeats: int
    elements: int
    seconds: float
    tokens_per_second: float
    speedup_vs_plain: float
    speedup_interval: tuple[float, float] | None
    calls_per_token: float
    call_reduction: float
    counts: Counts
    bound: Bound
    judged: JudgedText
    agreement: Agreement
    identical_share: float | None
    parameters: ExtraParameters
    repeated_4grams: float | None
    machine: Machine
