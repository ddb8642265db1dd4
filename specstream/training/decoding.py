"""Validation that really decodes held-out prompts, speculatively and plainly, as trained so far.

Logged: val/alpha_1.., val/tau, val/speedup (seconds of plain over speculative decoding, the models
in their training dtypes and nothing compiled: rough, the benchmark measures), and samples in
samples.jsonl and, where the logger is W&B, a table.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from specstream.generation import AutoregressivePipeline, FixedLength, Limits, SpeculativePipeline
from specstream.metrics import Acceptance, AcceptedLength, Speedup
from specstream.sampling import Sampling
from specstream.structures import Completion, Origin
from specstream.training.samples import write_samples
from specstream.training.sharding import is_sharded

if TYPE_CHECKING:
    from specstream.training.draft_module import DraftModule


@dataclass(frozen=True)
class HeldOutDecoding:
    """What validation decodes: so many held-out prompts, each continued by so many tokens.

    `num_drafted` tokens are drafted a round.  The prompts and their noise are the same every time,
    so the curves compare drafters, not prompts.
    """

    num_prompts: int = 8
    max_new_tokens: int = 64
    num_drafted: int = 5
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_prompts", "max_new_tokens", "num_drafted"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def check(self, module: DraftModule) -> None:
        """Raise ValueError for what the drafter, the target or the data do not allow."""
        assert module.drafter is not None and module.target is not None
        most, kind = module.drafter.max_tokens, type(module.drafter).__name__
        if self.num_drafted > most:
            raise ValueError(
                f"decoding: num_drafted {self.num_drafted} is more than the {most} tokens that "
                f"this {kind} drafts"
            )
        limits = Limits(self.max_new_tokens)
        plain = AutoregressivePipeline(module.target, module.processor, self.sampling, limits)
        try:
            for prompt in module.trainer.datamodule.prompts(self.num_prompts):  # type: ignore[attr-defined]
                plain.encode(prompt)
        except ValueError as error:
            raise ValueError(f"decoding: {error}") from error

    def run(self, module: DraftModule) -> None:
        """Decode this process's share of the prompts, and log what all processes found."""
        prompts = module.trainer.datamodule.prompts(self.num_prompts)  # type: ignore[attr-defined]
        rank, world = module.trainer.global_rank, module.trainer.world_size
        if is_sharded(module):
            rank, world = 0, 1  # sharded layers: every process takes part in every pass
        indices = list(range(len(prompts)))[rank::world]
        limits = Limits(self.max_new_tokens, ignore_eos=True)
        speculative = module.pipeline(self.sampling, limits, FixedLength(self.num_drafted))
        plain = AutoregressivePipeline(
            speculative.target, speculative.processor, self.sampling, limits
        )
        mine = [prompts[i] for i in indices]
        with torch.autocast(module.device.type, enabled=False):
            drafted = speculative.complete(mine, seed=self.seed, indices=indices)
            undrafted = plain.complete(mine, seed=self.seed, indices=indices)
        self._log(module, speculative, plain)
        rows = [
            self._row(module, prompts[a.prompt], a, b)
            for a, b in zip(drafted, undrafted, strict=True)
        ]
        if module.trainer.is_global_zero:
            write_samples(module, rows)

    def _log(
        self, module: DraftModule, speculative: SpeculativePipeline, plain: AutoregressivePipeline
    ) -> None:
        stats, device = speculative.stats, module.device
        acceptance = Acceptance(self.num_drafted).to(device)
        tested, accepted = (
            torch.tensor(n, dtype=torch.long) for n in (stats.tested, stats.accepted)
        )
        acceptance.update(tested, accepted)  # of no prompts too: `compute` waits for every process
        tau, speedup = AcceptedLength().to(device), Speedup().to(device)
        tau.update(stats.full_committed, stats.full_rounds)
        speedup.update(plain.stats.seconds, stats.seconds)
        values = {"tau": tau.compute(), "speedup": speedup.compute()}
        found = acceptance.compute()
        values |= {k: v for k, v in found.items() if not k.startswith("prefix")}
        for name, value in values.items():
            module.log(f"val/{name}", value.float(), sync_dist=True)

    def _row(
        self, module: DraftModule, prompt: list[int], speculative: Completion, plain: Completion
    ) -> dict[str, object]:
        accepted = speculative.origins.count(Origin.ACCEPTED) / max(len(speculative.tokens), 1)
        return {
            "step": module.trainer.global_step,
            "prompt": module.processor.decode(prompt),
            "speculative": speculative.text,
            "accepted": round(accepted, 3),  # share of the tokens that the drafter guessed
            "plain": plain.text,
        }
