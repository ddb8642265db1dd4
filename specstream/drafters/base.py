"""What a drafter is: it guesses cheaply and never decides what is kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from specstream.processors import TextProcessor
from specstream.sampling import Noise, Sampling
from specstream.structures import Context, Law, TokenDraft


class Drafter(nn.Module, ABC):
    """Proposes the next tokens of each row; its parameters are what training trains.

    A drafter is stateless: what it remembers of a batch lives in the cache that the pipeline owns.
    """

    law: ClassVar[Law]

    @abstractmethod
    def new_cache(self, batch_size: int, capacity: int) -> Any:
        """Return fresh state for `batch_size` rows of at most `capacity` tokens."""

    @abstractmethod
    def propose(
        self, context: Context, cache: Any, num_tokens: int, sampling: Sampling, noise: Noise
    ) -> TokenDraft:
        """Guess `num_tokens` tokens after each row's committed ones; only `cache` is changed.

        A row where nothing can be guessed gets a smaller length, down to 0.
        """

    def observe(self, accepted: Sequence[int], cache: Any) -> None:
        """Learn how many drafted tokens of each row stood; changes `cache` only."""

    @abstractmethod
    def check_target(self, target: nn.Module, processor: TextProcessor) -> None:
        """Raise ValueError in one line when this drafter cannot draft for `target`."""

    @abstractmethod
    def save(self, folder: Path, processor: TextProcessor) -> dict[str, Any]:
        """Write the weights; return the class_path/init_args block that builds it again."""
