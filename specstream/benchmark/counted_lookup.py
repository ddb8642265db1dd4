"""`LookupFirst` that also counts how often its draft model had to run, for the speed bound."""

from __future__ import annotations

from specstream.drafters import LookupFirst
from specstream.drafters.lookup_first import LookupFirstCache
from specstream.sampling import Noise, Sampling
from specstream.structures import Context, TokenDraft


class CountedLookupFirst(LookupFirst):
    """Drafts as `LookupFirst` does; a round in which every row copies costs no draft model."""

    rounds = 0
    model_rounds = 0

    @property
    def share_model(self) -> float:
        """Share of the rounds so far in which the draft model ran."""
        return self.model_rounds / self.rounds if self.rounds else 1.0

    def propose(
        self,
        context: Context,
        cache: LookupFirstCache,
        num_tokens: int,
        sampling: Sampling,
        noise: Noise,
    ) -> TokenDraft:
        draft = super().propose(context, cache, num_tokens, sampling, noise)
        self.rounds += 1
        self.model_rounds += cache.ran
        return draft
