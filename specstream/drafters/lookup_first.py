"""A drafter that also looks the prompt up: a long copied guess where one is found, else its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specstream.drafters.base import Drafter
from specstream.drafters.prompt_lookup import LookupCache, PromptLookup
from specstream.processors import TextProcessor
from specstream.sampling import Noise, Sampling
from specstream.structures import Context, Law, Observation, TokenDraft


@dataclass(slots=True)
class LookupFirstCache:
    """The states of both drafters, and which rows the wrapped one drafted for last."""

    lookup: LookupCache
    model: Any
    ran: bool = False
    copied: list[bool] = field(default_factory=list)


class LookupFirst(Drafter):
    """Copies where the row's last `min_ngram` tokens or more occurred before, else asks `drafter`.

    Which of the two guesses depends on committed tokens only.  A copied row reports a one-hot q,
    so the verifiers' law holds for it as for drawn ones.  Where every row copies, the wrapped
    drafter is not run and later catches up in one pass.
    """

    law = Law.DRAWN

    def __init__(
        self,
        target: nn.Module,
        drafter: Callable[[nn.Module], Drafter],
        min_ngram: int = 6,
        max_ngram: int = 8,
    ) -> None:
        super().__init__()
        self.drafter = drafter(target)
        self.lookup = PromptLookup(target, min_ngram, max_ngram)
        if self.drafter.law is not Law.DRAWN:
            raise ValueError(f"{type(self.drafter).__name__} does not draw: nothing to look up for")
        if self.drafter.feature_layers:
            raise ValueError(f"{type(self.drafter).__name__} reads features: it cannot skip rounds")

    def new_cache(self, batch_size: int, capacity: int) -> LookupFirstCache:
        return LookupFirstCache(
            self.lookup.new_cache(batch_size, capacity),
            self.drafter.new_cache(batch_size, capacity),
        )

    def propose(
        self,
        context: Context,
        cache: LookupFirstCache,
        num_tokens: int,
        sampling: Sampling,
        noise: Noise,
    ) -> TokenDraft:
        guesses = self.lookup.guesses(context, cache.lookup, num_tokens)
        copied = self.lookup.draft(context, guesses)
        cache.ran = not all(guesses)
        cache.copied = [bool(guess) for guess in guesses]
        if not cache.ran:
            return copied
        drawn = self.drafter.propose(context, cache.model, num_tokens, sampling, noise)
        if not any(guesses):
            return drawn
        if drawn.tokens.shape[1] == 0:
            return copied
        assert drawn.probs is not None
        found = torch.tensor(cache.copied, device=drawn.tokens.device)
        return TokenDraft(
            torch.where(found[:, None], copied.tokens, drawn.tokens),
            torch.where(found[:, None, None], _one_hot(copied.tokens, drawn.probs), drawn.probs),
            torch.where(found, copied.lengths, drawn.lengths),
        )

    def observe(self, observation: Observation, cache: LookupFirstCache) -> None:
        if cache.ran:  # where a row copied, the wrapped drafter has read tokens that do not stand
            rows = zip(observation.accepted, cache.copied, strict=True)
            own = [0 if copied else accepted for accepted, copied in rows]
            self.drafter.observe(replace(observation, accepted=own), cache.model)

    def check_target(self, target: nn.Module, processor: TextProcessor) -> None:
        self.drafter.check_target(target, processor)

    def save(self, folder: Path, processor: TextProcessor) -> dict[str, Any]:
        """Write the wrapped drafter: looking up is a choice of decoding, with nothing to store."""
        return self.drafter.save(folder, processor)


def _one_hot(tokens: Tensor, like: Tensor) -> Tensor:
    return F.one_hot(tokens, like.shape[-1]).to(like.dtype)
