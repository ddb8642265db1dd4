"""Why two greedy texts part: do the target's logits hold the two tokens for equal?

The target's passes over one token and over several round differently; where its two best logits
lie within the rounding of their dtype, either token is its greedy choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from specstream.models.cache import bucket
from specstream.models.pretrained_lm import PretrainedLM
from specstream.sampling import penalised

TIE_STEPS = 4  # rounding steps of the dtype, at the size of the best logit, within which two tie


@dataclass(frozen=True, slots=True)
class Gap:
    """How far apart two tokens' logits are, and the distance up to which they tie."""

    size: float
    tolerance: float

    @property
    def is_tie(self) -> bool:
        """Whether rounding explains the gap."""
        return self.size <= self.tolerance


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Return where the texts first differ; None where one is the beginning of the other."""
    pairs = zip(one, other, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), None)


@torch.inference_mode()
def logit_gap(
    target: PretrainedLM,
    before: Sequence[int],
    one: int,
    other: int,
    repetition_penalty: float = 1.0,
) -> Gap:
    """Return the gap between two tokens after the tokens `before`, prompt included."""
    tokens = torch.tensor([list(before)], device=target.device)
    capacity = bucket(len(before), len(before) + 10**9)
    cache = target.new_cache(1, capacity)
    zero = torch.zeros(1, dtype=torch.long, device=tokens.device)
    logits = target.extend(tokens, zero, cache, capacity, num_logits=1)[0, -1].float()  # (V,)
    tolerance = TIE_STEPS * torch.finfo(target.dtype).eps * float(logits.abs().max())
    seen = torch.zeros_like(logits, dtype=torch.bool).index_fill(0, tokens[0], True)
    scores = torch.where(seen, penalised(logits, repetition_penalty), logits)
    return Gap(abs(float(scores[one] - scores[other])), tolerance)
