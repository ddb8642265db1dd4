"""The records that every layer speaks in: drafts, verdicts, steps, statistics and guarantees.

Shapes: B batch rows, K drafted elements, V vocabulary, S a state of denoising.  Nothing here
computes; nothing here imports more than torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor

MAX_DRAFT = 64  # the most tokens drafted in one round


class Law(Enum):
    """How a drafter comes by its guesses, which decides which verifiers are exact for it."""

    DRAWN = "drawn"  # sampled from the distribution that the draft reports as `probs`
    DETERMINISTIC = "deterministic"  # a function of earlier tokens: q is one-hot
    GAUSSIAN = "gaussian"  # states drawn from Gaussians with reported means and standard deviations


class Guarantee(Enum):
    """What a run promises about its output, relative to the target as it is named and run."""

    EXACT_LAW = "exact law"  # the output's law is the target's
    EXACT_GREEDY = "exact greedy"  # the output is the target's own greedy trajectory
    GROUP_EXACT = "group exact"  # the law of groups of tokens is the target's, not of their members
    BOUNDED_ERROR = "bounded error"  # each step is the target's, of what is within a tolerance
    HEURISTIC = "heuristic"  # no promise: judged by quality metrics only

    @staticmethod
    def combine(parts: Iterable[Guarantee]) -> Guarantee:
        """Return what a pipeline built from `parts` can still promise.

        EXACT_LAW yields to EXACT_GREEDY; GROUP_EXACT and BOUNDED_ERROR survive only beside
        EXACT_LAW; every other mixture is HEURISTIC.
        """
        distinct = set(parts) - {Guarantee.EXACT_LAW}
        if not distinct:
            return Guarantee.EXACT_LAW
        return distinct.pop() if len(distinct) == 1 else Guarantee.HEURISTIC


class Origin(Enum):
    """Where a committed token came from; `--show_drafts` colours by it."""

    ACCEPTED = "accepted"  # drafted, and it stood
    CORRECTION = "correction"  # the target's token in place of the first rejected draft
    BONUS = "bonus"  # the target's token after a wholly accepted draft
    PLAIN = "plain"  # the target's token where nothing was drafted


@dataclass(frozen=True, slots=True)
class TokenDraft:
    """K drafted tokens and the law each was drawn from.  A chain is a tree with one branch.

    The nodes of a tree are ordered by depth, so that a shorter length cuts its deepest nodes.
    """

    tokens: Tensor  # (B, K)
    # (B, K, V), the paper's q; None: the drafter is deterministic, q is one-hot
    probs: Tensor | None
    lengths: Tensor  # (B,) how many of the K are real in each row
    # (B, K) parent node, -1 for the last committed token; None: a chain
    parents: Tensor | None = None
    height: int | None = None  # nodes on a tree's longest path; None: a chain, K


@dataclass(frozen=True, slots=True)
class StateDraft:
    """K drafted denoising steps: the states, and the Gaussian each was drawn from."""

    states: Tensor  # (B, K, *S)
    means: Tensor  # (B, K, *S)
    lengths: Tensor  # (B,) how many of the K are real in each row


@dataclass(frozen=True, slots=True)
class StateVerdict:
    """Which drafted states stand, and the state that follows the last that does."""

    accepted: Tensor  # (B, K) bool, a prefix
    correction: Tensor  # (B, *S)


@dataclass(frozen=True, slots=True)
class KnownParts:
    """What of each sample is given beforehand; the rest is to be made."""

    data: Tensor  # (B, *S) anything where it is not given
    given: Tensor  # (B, 1, *A) or (B, *S) bool

    def check(self, num_samples: int, shape: tuple[int, ...]) -> None:
        """Raise ValueError unless these are parts of so many states of `shape`, S."""
        data, given = tuple(self.data.shape), tuple(self.given.shape)
        whole = (num_samples, *shape)
        if data != whole or given not in (whole, (num_samples, 1, *shape[1:])):
            raise ValueError(
                f"known: data of {list(data)} and a mask of {list(given)} are no parts of "
                f"{num_samples} states of {list(shape)}"
            )
        if self.given.dtype != torch.bool:
            raise ValueError(f"known: the mask must be bool, not {self.given.dtype}")

    def hold(self, estimates: Tensor) -> Tensor:
        """Return estimates of the data (B, *S) with the given data in their places."""
        return torch.where(self.given, self.data.to(estimates), estimates)

    def rows(self, chosen: Tensor | slice) -> KnownParts:
        """Return the rows of an index (R,)."""
        return KnownParts(self.data[chosen], self.given[chosen])

    def to(self, device: torch.device) -> KnownParts:
        """Return the parts on another device."""
        return KnownParts(self.data.to(device), self.given.to(device))


@dataclass(slots=True)
class StateContext:
    """The states of a batch that is denoised, and what the target last said of each row."""

    states: Tensor  # (B, *S)
    steps: Tensor  # (B,) denoising steps done
    samples: Tensor  # (B,) index of each row's sample, which keys its noise
    drawn: Tensor  # (B,) states drawn for the row so far, to number the next
    condition: dict[str, Tensor]  # of the network, B rows each
    seen: Tensor  # (B, *S) the last state that the target has evaluated
    seen_steps: Tensor  # (B,) where it stood; -1: there is none yet
    estimates: Tensor  # (B, *S) the target's estimate of the data there
    known: KnownParts | None = None  # of the samples; None: all is to be made
    features: Tensor | None = None  # (B, T, D) what is read of the target's thoughts there

    def rows(self, chosen: Tensor) -> StateContext:
        """Return the rows of an index (R,), as a copy."""
        return StateContext(
            self.states[chosen],
            self.steps[chosen],
            self.samples[chosen],
            self.drawn[chosen],
            {name: value[chosen] for name, value in self.condition.items()},
            self.seen[chosen],
            self.seen_steps[chosen],
            self.estimates[chosen],
            None if self.known is None else self.known.rows(chosen),
            None if self.features is None else self.features[chosen],
        )


@dataclass(frozen=True, slots=True)
class StateStep:
    """What one round did to one sample: so many steps drafted, kept and done in all.

    `estimate` is a view of what the sampler goes on writing: who keeps it sees what was said last.
    """

    sample: int
    drafted: int
    accepted: int
    done: int
    finished: bool
    estimate: Tensor = field(compare=False, repr=False)  # (*S) of the data, as last said


@dataclass(frozen=True, slots=True)
class Verdict:
    """Which drafted elements stand, and what the target puts after the last that does."""

    accepted: Tensor  # (B, K) bool; for a chain a prefix
    correction: Tensor  # (B,) the token after the accepted prefix


@dataclass(slots=True)
class Canvas:
    """The canvases of a batch: texts of which some positions are masked, filled in any order.

    C is the width of the widest row.
    """

    tokens: Tensor  # (B, C) the mask token where masked; beyond a row's length, anything
    masked: Tensor  # (B, C) bool: positions that are to be filled yet
    lengths: Tensor  # (B,) positions of each row
    prompts: Tensor  # (B,) index of each row's prompt, which keys its noise
    drawn: Tensor  # (B,) denoising steps that have drawn tokens for the row so far

    def elements(self) -> Tensor:
        """Number the draws of a row's next step, (B, C), to key their noise: none is used twice.

        The numbers depend on nothing of the row's neighbours.
        """
        steps = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return self.drawn[:, None] * self.lengths[:, None] + steps


@dataclass(frozen=True, slots=True)
class CanvasStep:
    """What one round did to one prompt's canvas; positions count from the canvas's first."""

    prompt: int
    tokens: list[int]  # the canvas after the round, mask tokens included
    drafted: list[int]  # positions that the drafter guessed in this round
    filled: list[int]  # positions that hold a token from this round on
    remasked: list[int]  # drafted positions that are masked again
    replaced: list[int]  # drafted positions that hold the target's token instead
    finished: bool


@dataclass(frozen=True, slots=True)
class CanvasDraft:
    """A canvas of a masked diffusion model with guesses in place of some of its masks.

    C positions; unlike the tokens of a chain, drafted ones lie anywhere and each is judged alone.
    """

    tokens: Tensor  # (B, C) the canvas with the drafted tokens in place
    drafted: Tensor  # (B, C) bool: which of them this round has drafted
    steps: Tensor  # (B, C) the denoising step of this round that drew each, 0 the first; else -1
    probs: Tensor  # (B, C, V) the drafter's law of each when it was drawn


@dataclass(frozen=True, slots=True)
class CanvasVerdict:
    """Which drafted positions of a canvas stand, and what it holds there.  The rest is remasked."""

    kept: Tensor  # (B, C) bool: of the drafted positions, those that are not masked again
    tokens: Tensor  # (B, C) the canvas, with the target's tokens where they replace drafted ones


@dataclass(frozen=True, slots=True)
class Observation:
    """What a target pass taught about the last committed token and the drafted ones that stood.

    W is the most tokens that could have stood, F the hidden states of the drafter's feature
    layers side by side.
    """

    start: Tensor  # (B,) place of the token that was the last committed one before the pass
    counts: Tensor  # (B,) drafted tokens that stood
    accepted: Sequence[int]  # the same on the host
    # (B,) how many tokens, of a tree how deep, each row wanted; None: no row wanted any
    wanted: Tensor | None
    features: Tensor | None = None  # (B, W+1, F) at that token and those that stood, in order
    riders: Tensor | None = None  # (B, R, D) the drafter's states at the last that stood


@dataclass(frozen=True, slots=True)
class Step:
    """What one round commits for one prompt; `text` is what newly became printable."""

    prompt: int
    tokens: list[int]
    origins: list[Origin]
    text: str
    finished: bool


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished continuation: its text, its tokens and where each token came from."""

    prompt: int
    text: str
    tokens: list[int]
    origins: list[Origin]


@dataclass(slots=True)
class Stats:
    """Counts of one run, from which every published number is derived (see `metrics`)."""

    modality: str
    guarantee: Guarantee
    prompts: int = 0
    elements: int = 0  # tokens committed
    target_calls: int = 0  # sequential target passes after the prefill
    target_rows: int = 0  # positions those passes evaluated, over the rows that still decoded
    draft_calls: int = 0  # `propose` calls: rounds of a batch in which some row wanted a draft
    seconds: float = 0.0
    tested: list[int] = field(default_factory=list)  # by position: drafts reached by verification
    accepted: list[int] = field(default_factory=list)  # by position: drafts that stood
    full_rounds: int = 0  # row-rounds not cut by EOS, a stop string or the limit
    full_committed: int = 0  # tokens committed in those
    plain_rounds: int = 0  # row-rounds in which nothing was drafted
    draft_lengths: int = 0  # drafted tokens, over full rounds
    law: str = "the target's"  # the law that the guarantee is about
    # passes of the whole target over one row: copies of a row in one call count each
    full_passes: float | None = None
    quantized: dict[str, object] = field(default_factory=dict)  # what torchao converted, by role
    # of drafting, as measured costs predict it: its seconds over those of plain sampling
    predicted_ratio: float | None = None
    predicted_at: float | None = None  # the acceptance that this supposes

    @property
    def acceptance(self) -> float | None:
        """Accepted over tested drafts, the first rejected counted as tested."""
        return sum(self.accepted) / sum(self.tested) if sum(self.tested) else None

    @property
    def alphas(self) -> list[float]:
        """alpha_i: acceptance of the i-th drafted token given that all before it stood."""
        return [a / t for a, t in zip(self.accepted, self.tested, strict=True) if t]

    @property
    def accepted_length(self) -> float | None:
        """tau: tokens a target pass commits, correction or bonus included, over full rounds."""
        return self.full_committed / self.full_rounds if self.full_rounds else None

    @property
    def mean_length(self) -> float | None:
        """Mean number of drafted tokens in a full round."""
        return self.draft_lengths / self.full_rounds if self.full_rounds else None

    @property
    def share_plain(self) -> float | None:
        """Share of full rounds in which nothing was drafted: not asked for, or not found."""
        return self.plain_rounds / self.full_rounds if self.full_rounds else None

    def as_dict(self) -> dict[str, object]:
        """Return the `--stats` object: the same keys in every modality."""
        return {
            "modality": self.modality,
            "guarantee": self.guarantee.value,
            "law": self.law,
            "prompts": self.prompts,
            "elements": self.elements,
            "target_calls": self.target_calls,
            "target_rows": self.target_rows,
            "full_passes": self.full_passes,
            "draft_calls": self.draft_calls,
            "acceptance": self.acceptance,
            "accepted_length": self.accepted_length,
            "alphas": self.alphas,
            "mean_length": self.mean_length,
            "share_plain": self.share_plain,
            "seconds": self.seconds,
            "elements_per_second": self.elements / self.seconds if self.seconds else None,
            "quantized": self.quantized,
            "predicted_ratio": self.predicted_ratio,
            "predicted_at": self.predicted_at,
        }


@dataclass(slots=True)
class Context:
    """The committed tokens of a batch: what a drafter may look at, and what a pipeline extends."""

    tokens: Tensor  # (B, C) committed tokens; beyond a row's length, anything
    lengths: Tensor  # (B,) committed tokens in each row
    prompts: Tensor  # (B,) index of each row's prompt, which keys its noise
    active: Tensor  # (B,) bool, rows that still decode
    seen: Tensor | None  # (B, V) bool, tokens that a row holds; kept for warpers with memory only
    history: list[list[int]]  # the committed tokens once more, on the host
    wanted: Tensor | None = None  # (B,) tokens, of a tree depths, that each row wants this round
    compiled: bool = False  # whether passes of fixed shape run compiled

    def elements(self, num_tokens: int) -> Tensor:
        """Number the next `num_tokens` tokens of each row, (B, num_tokens), to key their noise.

        A row grows in every round, so the numbers of two rounds never meet and no coin is reused
        after a rejection, as block verification needs.
        """
        steps = torch.arange(num_tokens, device=self.lengths.device)
        return self.lengths[:, None] * MAX_DRAFT + steps
