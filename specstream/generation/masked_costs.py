"""What passes over canvases cost on this machine, for the cost model that text uses too.

Drafted are denoising steps.  Of nested steps each makes the target's pass one canvas larger; beside
a drafter a step costs the drafter's time, and the pass that scores the draft is always the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from specstream.drafters.base import CanvasDrafter
from specstream.generation.costs import cost_table, fastest, key_of, stored
from specstream.generation.lengths import DraftLength, StepCosts
from specstream.models.pretrained_masked import PretrainedMaskedLM
from specstream.sampling import Noise, Sampling
from specstream.structures import Canvas

WIDTH_STEP = 32  # positions; canvases are measured at widths rounded up to it


@dataclass(frozen=True, slots=True)
class TargetPass:
    """How a pipeline runs its target: what is timed, and what the times depend on beside it."""

    target: PretrainedMaskedLM
    run: Callable[[Tensor, Tensor], Tensor]  # (tokens (N, C), lengths (N,)) -> logits
    compiled: bool
    quantized: str
    rows: int  # canvases that are filled together

    def key(self, kind: str, lengths: DraftLength, width: int, *more: object) -> str:
        """Return the name of a table."""
        target = self.target
        network = (target.path, sum(p.numel() for p in target.parameters()), target.dtype)
        attention = target.config._attn_implementation
        parts = (kind, *network, attention, self.compiled, self.quantized, self.rows, width)
        return key_of(target.device, *parts, lengths.choices, *more)


def nested_costs(way: TargetPass, lengths: DraftLength, width: int) -> StepCosts:
    """Return the stored table of passes over 1 + k canvases for each of the rows."""
    target, rows = way.target, way.rows

    @torch.inference_mode()
    def measure() -> StepCosts:
        canvases = [_canvas(target, rows * (1 + k), width) for k in (0, *lengths.choices)]
        plain, *verify = fastest([lambda c=c: way.run(c.tokens, c.lengths) for c in canvases])
        return cost_table(plain, lengths, verify, [0.0] * len(verify))

    return stored(way.key("nested", lengths, width), lengths.max_tokens + 1, measure)


def drafted_costs(
    way: TargetPass, drafter: CanvasDrafter, lengths: DraftLength, width: int
) -> StepCosts:
    """Return the stored table of drafting k steps, and of scoring a draft that is shown whole."""
    target, rows = way.target, way.rows

    @torch.inference_mode()
    def measure() -> StepCosts:
        noise = Noise(0, target.device)
        canvas = _canvas(target, rows, width)
        cache = drafter.new_cache(rows, width)
        passes: list[Callable[[], object]] = [lambda: way.run(canvas.tokens, canvas.lengths)]
        for k in lengths.choices:
            passes.append(
                lambda n=k: drafter.propose(canvas, cache, [n] * rows, Sampling(0.0), noise)
            )
        plain, *draft = fastest(passes)
        return cost_table(plain, lengths, [plain] * len(draft), draft)

    rule = getattr(drafter, "unmasking", None)
    sizes = (sum(p.numel() for p in drafter.parameters()), str(drafter), rule)
    return stored(way.key("dual", lengths, width, *sizes), lengths.max_tokens + 1, measure)


def rounded(target: PretrainedMaskedLM, width: int) -> int:
    """Return the width that canvases of `width` positions are measured at."""
    width = -(-width // WIDTH_STEP) * WIDTH_STEP
    return width if target.max_positions is None else min(width, target.max_positions)


def _canvas(target: PretrainedMaskedLM, rows: int, width: int) -> Canvas:
    """Return canvases whose second half is masked."""
    tokens = torch.zeros(rows, width, dtype=torch.long, device=target.device)
    masked = torch.zeros_like(tokens, dtype=torch.bool)
    masked[:, width // 2 :] = True
    numbers: Tensor = torch.arange(rows, device=target.device)
    lengths, drawn = torch.full_like(numbers, width), torch.zeros_like(numbers)
    return Canvas(tokens.masked_fill(masked, target.mask_id), masked, lengths, numbers, drawn)
