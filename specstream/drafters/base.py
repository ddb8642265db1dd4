"""What a drafter is: it guesses cheaply and never decides what is kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from specstream.models.walk import Rider
from specstream.processors import TextProcessor
from specstream.sampling import Noise, Sampling
from specstream.structures import (
    MAX_DRAFT,
    Canvas,
    CanvasDraft,
    Context,
    Law,
    Observation,
    TokenDraft,
)


class StoredDrafter(nn.Module, ABC):
    """What drafters of every kind share: a target that they fit, and a folder that keeps them."""

    @abstractmethod
    def check_target(self, target: nn.Module, processor: TextProcessor) -> None:
        """Raise ValueError in one line when this drafter cannot draft for `target`."""

    @abstractmethod
    def save(self, folder: Path, processor: TextProcessor) -> dict[str, Any]:
        """Write the weights; return the class_path/init_args block that builds it again."""


class Drafter(StoredDrafter):
    """Proposes the next tokens of each row; its parameters are what training trains.

    A drafter is stateless: what it remembers of a batch lives in the cache that the pipeline owns.
    """

    law: ClassVar[Law]
    trees: bool = False  # whether it drafts trees: the verifier must judge them
    max_tokens: int = MAX_DRAFT  # the longest chain, or path of a tree, that it can draft
    # target layers whose hidden states it reads, as `models.walk` numbers them
    feature_layers: tuple[int, ...] = ()

    @abstractmethod
    def new_cache(self, batch_size: int, capacity: int) -> Any:
        """Return fresh state for `batch_size` rows of at most `capacity` tokens."""

    @abstractmethod
    def propose(
        self, context: Context, cache: Any, num_tokens: int, sampling: Sampling, noise: Noise
    ) -> TokenDraft:
        """Guess `num_tokens` tokens after each row's committed ones; only `cache` is changed.

        For a tree `num_tokens` is its height.  A row where nothing can be guessed gets a smaller
        length, down to 0.
        """

    def read_prompt(self, features: Tensor, first: int, cache: Any) -> None:
        """Learn features (B, T, F) of the prompt's places first..first+T-1; changes `cache` only.

        In a row that ends earlier the rest is padding, observed anew when the row gets there.
        Called only where `feature_layers` are asked for.
        """

    def observe(self, observation: Observation, cache: Any) -> None:
        """Learn what the target's pass taught; changes `cache` only.

        Called after every round in which some row wanted a draft, and after every round if
        `feature_layers` are asked for.
        """

    def attach(self) -> Rider | None:
        """Return what rides along in target passes, to be observed after; None: nothing."""
        return None

    def num_slots(self, num_tokens: int) -> int:
        """Return how many cache slots a target pass over a draft of `num_tokens` writes."""
        return num_tokens + 1


class CanvasDrafter(StoredDrafter):
    """Guesses tokens at masked positions of canvases, anywhere; stateless like `Drafter`.

    `reports_law` says whether a draft's `probs` are the laws that its tokens were drawn from.
    """

    @property
    def reports_law(self) -> bool:
        return True

    @abstractmethod
    def new_cache(self, batch_size: int, capacity: int) -> Any:
        """Return fresh state for `batch_size` canvases of at most `capacity` positions."""

    @abstractmethod
    def propose(
        self,
        canvas: Canvas,
        cache: Any,
        num_steps: Sequence[int],
        sampling: Sampling,
        noise: Noise,
    ) -> CanvasDraft:
        """Make so many denoising steps in each row, 0 none; changes `cache` and `canvas.drawn`."""
