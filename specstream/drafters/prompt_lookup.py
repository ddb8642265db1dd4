"""Prompt lookup: continue as the same n-gram continued last time (Saxena 2023; no weights)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from specstream.drafters.base import Drafter
from specstream.processors import TextProcessor
from specstream.sampling import Noise, Sampling
from specstream.structures import Context, Law, TokenDraft


@dataclass(slots=True)
class NGramIndex:
    """Where each n-gram of one row last ended, by n; grows with the row."""

    ends: dict[int, dict[tuple[int, ...], int]]
    indexed: int = 0  # tokens already in the index

    def update(self, tokens: list[int]) -> None:
        """Index all n-grams that end before the last token (the last has no continuation yet)."""
        for end in range(self.indexed + 1, len(tokens)):
            for n, table in self.ends.items():
                if end >= n:
                    table[tuple(tokens[end - n : end])] = end
        self.indexed = max(self.indexed, len(tokens) - 1)

    def find(self, tokens: list[int]) -> int | None:
        """Return where the longest known n-gram at the end of `tokens` ended before."""
        for n in sorted(self.ends, reverse=True):
            end = self.ends[n].get(tuple(tokens[-n:])) if len(tokens) > n else None
            if end is not None:
                return end
        return None


@dataclass(slots=True)
class LookupCache:
    """One index a row."""

    rows: list[NGramIndex] = field(default_factory=list)


class PromptLookup(Drafter):
    """Copies what followed the last occurrence of the row's final n-gram, longest n first.

    `min_ngram` and `max_ngram` bound n.  Deterministic, so q is one-hot and every verifier that
    takes deterministic drafts keeps the target's law.
    """

    law = Law.DETERMINISTIC

    def __init__(
        self, target: nn.Module | None = None, min_ngram: int = 2, max_ngram: int = 4
    ) -> None:
        super().__init__()
        if not 1 <= min_ngram <= max_ngram:
            raise ValueError(
                f"min_ngram {min_ngram} and max_ngram {max_ngram} need 1 <= min <= max"
            )
        self.min_ngram = min_ngram
        self.max_ngram = max_ngram

    def new_cache(self, batch_size: int, capacity: int) -> LookupCache:
        sizes = range(self.min_ngram, self.max_ngram + 1)
        return LookupCache([NGramIndex({n: {} for n in sizes}) for _ in range(batch_size)])

    def propose(
        self,
        context: Context,
        cache: LookupCache,
        num_tokens: int,
        sampling: Sampling,
        noise: Noise,
    ) -> TokenDraft:
        return self.draft(context, self.guesses(context, cache, num_tokens))

    def draft(self, context: Context, guesses: list[list[int]]) -> TokenDraft:
        """Return `guesses` as a draft as wide as the longest of them."""
        device = context.tokens.device
        width = max(len(guess) for guess in guesses)
        padded = [guess + [0] * (width - len(guess)) for guess in guesses]
        return TokenDraft(
            tokens=torch.tensor(padded, dtype=torch.long, device=device).view(len(padded), width),
            probs=None,
            lengths=torch.tensor([len(guess) for guess in guesses], device=device),
        )

    def guesses(self, context: Context, cache: LookupCache, num_tokens: int) -> list[list[int]]:
        """Return up to `num_tokens` copied tokens for each row, none where no n-gram recurs."""
        found = []
        for index, tokens in zip(cache.rows, context.history, strict=True):
            index.update(tokens)
            end = index.find(tokens)
            found.append([] if end is None else _continue(tokens, end, num_tokens))
        return found

    def check_target(self, target: nn.Module, processor: TextProcessor) -> None:
        """Any target will do."""

    def save(self, folder: Path, processor: TextProcessor) -> dict[str, Any]:
        return {
            "class_path": "specstream.drafters.PromptLookup",
            "init_args": {"min_ngram": self.min_ngram, "max_ngram": self.max_ngram},
        }


def _continue(tokens: list[int], end: int, num_tokens: int) -> list[int]:
    """Copy from `end` on; where the copy reaches the end of the row it goes on with itself."""
    guess: list[int] = []
    for i in range(num_tokens):
        place = end + i
        guess.append(tokens[place] if place < len(tokens) else guess[place - len(tokens)])
    return guess
