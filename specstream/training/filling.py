"""Validation of masked diffusion models that really fills held-out canvases, as trained so far.

Logged: val/solved where the prompts are puzzles, and for a drafter beside its target val/acceptance
and val/call_ratio (target calls of the plain sampler over those with drafts); samples go to
samples.jsonl and, where the logger is W&B, into a table.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torchmetrics import MeanMetric

from specstream.data.planning import COUNTDOWN_PROMPT, SUDOKU_PROMPT, solved
from specstream.generation.batch import Limits
from specstream.generation.dual_diffusion import DualDiffusionPipeline
from specstream.generation.masked import MaskedPipeline, Sampler
from specstream.sampling import Sampling
from specstream.structures import Completion
from specstream.training.samples import write_samples
from specstream.unmasking import StaticSchedule, Unmasking

if TYPE_CHECKING:
    from specstream.training.masked_diffusion import MaskedDiffusionModule


@dataclass(frozen=True)
class HeldOutFilling:
    """What validation fills: so many masks behind each of so many held-out prompts.

    `unmasking`, `sampling` and `block_tokens` are the target's, or of a model without a target its
    own.  The prompts and their noise are the same every time.
    """

    num_prompts: int = 16
    max_new_tokens: int = 128
    unmasking: Unmasking = field(default_factory=lambda: StaticSchedule(32))
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=0.0))
    block_tokens: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_prompts < 1:
            raise ValueError(f"num_prompts must be at least 1, got {self.num_prompts}")
        self.sampler()  # what it refuses is refused here
        if self.block_tokens is not None and self.max_new_tokens % self.block_tokens:
            raise ValueError(
                f"block_tokens {self.block_tokens} does not divide max_new_tokens "
                f"{self.max_new_tokens}"
            )

    def sampler(self) -> Sampler:
        """Return how the canvases are filled."""
        limits = Limits(self.max_new_tokens)
        return Sampler(self.unmasking, self.sampling, limits, self.block_tokens)

    def check(self, module: MaskedDiffusionModule) -> None:
        """Raise ValueError for what the models or the data do not allow."""
        try:
            pipeline = self.pipelines(module)[0]
            for prompt in module.trainer.datamodule.prompts(self.num_prompts):  # type: ignore[attr-defined]
                pipeline.encode(prompt)
        except ValueError as error:
            raise ValueError(f"decoding: {error}") from error

    def pipelines(self, module: MaskedDiffusionModule) -> list[MaskedPipeline]:
        """Return who fills: the plain sampler, and with a drafter the pair."""
        bidirectional = module.target if module.target is not None else module.model
        assert bidirectional is not None
        processor, rows = module.processor, self.num_prompts
        plain = MaskedPipeline(bidirectional, processor, self.sampler(), rows)
        if module.target is None:
            return [plain]
        drafter = module.drafter()
        pair = DualDiffusionPipeline(
            module.target, drafter, processor, sampler=self.sampler(), batch_size=rows
        )
        return [plain, pair]

    def run(self, module: MaskedDiffusionModule) -> None:
        """Fill this process's share of the prompts, and log what all processes found."""
        prompts = module.trainer.datamodule.prompts(self.num_prompts)  # type: ignore[attr-defined]
        rank, world = module.trainer.global_rank, module.trainer.world_size
        indices = list(range(len(prompts)))[rank::world]
        mine = [prompts[i] for i in indices]
        pipelines = self.pipelines(module)
        with torch.autocast(module.device.type, enabled=False):
            found = [p.complete(mine, seed=self.seed, indices=indices) for p in pipelines]
        texts = [module.processor.decode(prompt) for prompt in prompts]
        self._log(module, pipelines, found, texts)
        if module.trainer.is_global_zero:
            rows = [
                self._row(module, texts, *completions) for completions in zip(*found, strict=True)
            ]
            write_samples(module, rows)

    def _log(
        self,
        module: MaskedDiffusionModule,
        pipelines: list[MaskedPipeline],
        found: list[list[Completion]],
        texts: list[str],
    ) -> None:
        names = ["solved"] if len(pipelines) == 1 else ["solved", "acceptance", "call_ratio"]
        means = {name: MeanMetric().to(module.device) for name in names}
        for completion in found[-1]:
            prompt = texts[completion.prompt]
            if is_puzzle(prompt):
                means["solved"].update(float(solved(prompt, completion.text)))
        if len(pipelines) == 2:
            plain, pair = (pipeline.stats for pipeline in pipelines)
            means["acceptance"].update(pair.acceptance or 0.0, weight=sum(pair.tested))
            calls = pair.target_calls  # as weights they make a ratio of all processes' sums
            means["call_ratio"].update(plain.target_calls / max(calls, 1), weight=calls)
        for name, mean in means.items():
            mean.update(0.0, weight=0.0)  # it may have seen nothing here
            value = mean.compute()  # waits for every process, and is the same in all of them
            if not bool(value.isnan()):
                module.log(f"val/{name}", value, sync_dist=True)

    def _row(
        self, module: MaskedDiffusionModule, texts: list[str], *completions: Completion
    ) -> dict[str, object]:
        names = ("filled", "filled_with_drafts")
        return {
            "step": module.trainer.global_step,
            "prompt": texts[completions[0].prompt],
            **{name: c.text for name, c in zip(names, completions, strict=False)},
        }


def is_puzzle(prompt: str) -> bool:
    """Whether a prompt is one whose answer is checked by rule."""
    return bool(SUDOKU_PROMPT.fullmatch(prompt) or COUNTDOWN_PROMPT.fullmatch(prompt))
