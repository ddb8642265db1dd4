"""Filling a canvas by self-speculation (Campbell et al. 2025, SSMD, arXiv 2510.03929).

The law that is sampled, called the sequential law here.  The masked positions of a row are put in
a random order sigma, which is cut into windows by a cosine schedule; neither depends on a token.
For each window the trunk reads the canvas once, and the tokens of the window have the law

    prod over i of p(x_sigma(i) | states of the trunk, tokens of the window before i)

with p of the causal layer.  `speculate=False` samples just that, one causal pass a token.

Speculative sampling draws all that is left of a window from the trunk's own laws q, scores it by
one causal pass, accepts a prefix and corrects the token after it, until the window is full: the
same law in fewer passes, because an acceptance decides nothing else.  The trunk in particular is
not asked again before the window is full; more windows are closer to the model with one token a
pass and cost a trunk pass each.

The law of a row does not depend on its neighbours; rows of a batch share the trunk's passes, and so
a row whose window is full waits for the others.

Shapes: B rows, C positions of the canvas, N the most masks of a row, W windows, K the longest open
window, S the most that is left of one, V vocabulary, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from specstream.models.pretrained_masked import PretrainedMaskedLM
from specstream.models.self_speculative import SelfSpeculativeHead, relative_cost
from specstream.sampling import Noise, Role, Sampling, draw, probabilities
from specstream.structures import Guarantee, Law, TokenDraft, Verdict
from specstream.verification import TokenRejection, TokenVerifier

STRIDE = 2**15  # elements a round may use, so the longest canvas: a round fills one token at least


@dataclass(frozen=True, slots=True)
class FilledRound:
    """What one causal pass has settled, and the canvas after it."""

    tokens: Tensor  # (B, C) the canvas; what is still to be filled holds the mask token
    filled: Tensor  # (B, C) bool: the positions that this round has filled
    accepted: Tensor  # (B, C) bool: those that hold drafted tokens; at most one in a row does not
    tested: list[int]  # of each row: drafts that met a test that counted, the first rejected too
    stood: list[int]  # and how many of them stood


@dataclass(slots=True)
class FillCounts:
    """Counts of what a sampler has done so far.

    A pass over several rows is one call; `trunk_rows` and `causal_rows` count it once for each row
    that had something to fill.
    """

    trunk_calls: int = 0
    trunk_rows: int = 0
    causal_calls: int = 0
    causal_rows: int = 0
    filled: int = 0
    drafted: int = 0
    tested: int = 0
    accepted: int = 0

    @property
    def acceptance(self) -> float | None:
        """Accepted over tested drafts."""
        return self.accepted / self.tested if self.tested else None


@dataclass(slots=True)
class _Canvas:
    """The state of a batch that is being filled; all of it belongs to the sampler."""

    tokens: Tensor  # (B, C)
    lengths: Tensor  # (B,)
    prompts: Tensor  # (B,)
    order: Tensor  # (B, N) the masked positions of each row in order
    ends: Tensor  # (B, W) how many of them are filled after each window
    known: Tensor  # (B,) tokens of the canvas before it is filled
    done: Tensor  # (B,) positions of the order that are filled
    settled: list[int]  # the same on the host, so that no loop has to ask the device


@dataclass(frozen=True, slots=True)
class _Window:
    """The window that is being filled, as the trunk has read it."""

    first: Tensor  # (B,) where in the order it begins
    end: Tensor  # (B,) and where it ends
    ends: list[int]  # the same on the host
    places: Tensor  # (B, K) its positions of the canvas, in order
    real: Tensor  # (B, K) bool, a prefix
    hidden: Tensor  # (B, C, D) the trunk's states
    laws: Tensor  # (B, K, V) its laws q of the positions


class SelfSpeculativeSampler:
    """Fills masked positions by the sequential law of a trunk and its causal layer.

    `num_windows` trunk passes fill a row, fewer where it has fewer masks.  `sampling` shapes p and
    q alike.  With `TokenRejection` or `BlockRejection` the law is exact; `speculate=False` is the
    plain sampler of the same law.  `counts` runs on over all that is filled.

    Raises ValueError for num_windows below 1, a repetition penalty, and a verifier that does not
    take drafts drawn from q.
    """

    def __init__(
        self,
        trunk: PretrainedMaskedLM,
        head: SelfSpeculativeHead,
        sampling: Sampling | None = None,
        num_windows: int = 1,
        verifier: TokenVerifier | None = None,
        speculate: bool = True,
    ) -> None:
        self.trunk, self.head = trunk, head
        self.sampling = sampling if sampling is not None else Sampling()
        self.num_windows = num_windows
        self.verifier = verifier if verifier is not None else TokenRejection()
        self.speculate = speculate
        self.counts = FillCounts()
        if num_windows < 1:
            raise ValueError(f"num_windows must be at least 1, got {num_windows}")
        if self.sampling.needs_history:
            raise ValueError(
                "repetition_penalty must be 1 where a canvas is filled in random order, got "
                f"{self.sampling.repetition_penalty}"
            )
        if Law.DRAWN not in self.verifier.needs:
            raise ValueError(f"{type(self.verifier).__name__} does not take drafts that are drawn")
        self.relative_cost = relative_cost(trunk, head)

    @property
    def guarantee(self) -> Guarantee:
        """What is promised of the output, relative to the sequential law."""
        return self.verifier.guarantee if self.speculate else Guarantee.EXACT_LAW

    @property
    def full_passes(self) -> float:
        """All passes so far as passes of the full network, by their operations for a position."""
        return self.counts.trunk_calls + self.counts.causal_calls * self.relative_cost

    @property
    def full_row_passes(self) -> float:
        """The same, a pass counted once for each row that took part: work, where rows are many."""
        return self.counts.trunk_rows + self.counts.causal_rows * self.relative_cost

    def fill(
        self, tokens: Tensor, masked: Tensor, lengths: Tensor, prompts: Tensor, noise: Noise
    ) -> Iterator[FilledRound]:
        """Fill the positions `masked` (B, C) bool of canvases `tokens` (B, C), round by round.

        Beyond `lengths` (B,) a row is padding.  `prompts` (B,) key the coins.  Positions may hold
        masks and not be filled now; coins do not meet again as long as a canvas never has fewer
        tokens than before.  Nothing is yielded where nothing is masked.
        """
        assert tokens.shape[1] <= STRIDE, "coins of two rounds would meet"
        canvas = self._begin(tokens, masked, lengths, prompts, noise)
        for end, ends in zip(canvas.ends.unbind(1), canvas.ends.T.tolist(), strict=True):
            if canvas.settled == ends:
                return  # fewer masks than windows
            window = self._open(canvas, end, ends)
            while canvas.settled != ends:
                yield self._round(canvas, window, noise)

    @torch.no_grad()
    def _begin(
        self, tokens: Tensor, masked: Tensor, lengths: Tensor, prompts: Tensor, noise: Noise
    ) -> _Canvas:
        """Put the masked positions in order, and cut the order into windows."""
        steps = torch.arange(tokens.shape[1], device=tokens.device)
        inside = steps < lengths[:, None]
        masked = masked & inside
        tokens = tokens.masked_fill(masked, self.trunk.mask_id)
        totals = masked.sum(1)
        return _Canvas(
            tokens,
            lengths,
            prompts,
            random_order(masked, prompts, noise)[:, : max(int(totals.max()), 1)],
            window_ends(totals, self.num_windows),
            (inside & (tokens != self.trunk.mask_id)).sum(1),
            torch.zeros_like(lengths),
            [0] * len(lengths),
        )

    @torch.no_grad()
    def _open(self, canvas: _Canvas, end: Tensor, ends: list[int]) -> _Window:
        """Read the canvas with the trunk, in rows that have positions up to `end` (B,) to fill.

        `ends` is the same on the host.
        """
        first, last = canvas.done, canvas.order.shape[1] - 1
        sizes = [b - a for a, b in zip(canvas.settled, ends, strict=True)]
        index = first[:, None] + torch.arange(max(sizes), device=end.device)
        places, real = canvas.order.gather(1, index.clamp(max=last)), index < end[:, None]
        rows = torch.tensor([i for i, size in enumerate(sizes) if size], device=end.device)
        steps = torch.arange(canvas.tokens.shape[1], device=rows.device)
        documents = torch.where(steps < canvas.lengths[rows, None], 0, -1)
        seen = self.trunk.mask(documents, steps.expand_as(documents))
        found = self.trunk.hidden(canvas.tokens[rows], seen)
        hidden = found.new_zeros(*canvas.tokens.shape, found.shape[2]).index_copy(0, rows, found)
        laws = probabilities(self.trunk.head(_at(hidden, places)), self.sampling)
        self.counts.trunk_calls += 1
        self.counts.trunk_rows += len(rows)
        return _Window(first, end, ends, places, real, hidden, laws)

    @torch.no_grad()
    def _round(self, canvas: _Canvas, window: _Window, noise: Noise) -> FilledRound:
        """Score what is left of the window in one causal pass, and settle what stands."""
        places = window.places
        steps = torch.arange(places.shape[1], device=places.device)
        past = (canvas.done - window.first)[:, None]  # (B, 1) filled positions of the window
        left = window.end - canvas.done  # (B,) 0 in a row that is full
        elements = (canvas.known + canvas.done)[:, None] * STRIDE
        coins = elements + (steps - past).clamp(min=0)  # (B, K)
        drafted = draw(window.laws, noise.uniform(canvas.prompts, coins, Role.DRAFT))
        tokens = torch.where(steps < past, canvas.tokens.gather(1, places), drafted)
        states = self.head(window.hidden, places, tokens, window.real)

        open_ = [b - a for a, b in zip(canvas.settled, window.ends, strict=True)]
        num_shown = max(open_) if self.speculate else 0  # S
        index = past + steps[: max(num_shown, 1)]
        index = index.clamp(max=places.shape[1] - 1)  # (B, S) what is left, first of all
        p = probabilities(self.trunk.head(_at(states, index)), self.sampling)
        p = torch.cat([p, p[:, -1:]], 1)[:, : num_shown + 1]  # nothing follows a full window
        shown = index[:, :num_shown]
        draft = TokenDraft(
            tokens.gather(1, shown), _at(window.laws, shown), left.clamp(max=num_shown)
        )
        verdict = self.verifier(
            draft,
            p,
            noise.uniform(canvas.prompts, elements + steps[:num_shown], Role.ACCEPT),
            noise.uniform(canvas.prompts, elements[:, 0], Role.CORRECT),
        )
        return self._settle(canvas, open_, draft, verdict, places.gather(1, index))

    def _settle(
        self, canvas: _Canvas, left: list[int], draft: TokenDraft, verdict: Verdict, places: Tensor
    ) -> FilledRound:
        """Write the accepted tokens and the correction to the first of `places` (B, S); count.

        `left` says of each row how many positions of its window are not filled yet.
        """
        accepted = verdict.accepted.sum(1)
        stood = accepted.tolist()  # how long the next round's draft is: the host has to know
        shown = [min(size, draft.tokens.shape[1]) for size in left]
        tested = [min(held + 1, size) for held, size in zip(stood, shown, strict=True)]
        counts = [min(held + 1, size) for held, size in zip(stood, left, strict=True)]
        steps = torch.arange(places.shape[1], device=places.device)
        count = torch.tensor(counts, device=places.device)  # no correction of a full window
        drafted = torch.nn.functional.pad(
            draft.tokens, (0, places.shape[1] - draft.tokens.shape[1])
        )
        values = torch.where(steps < accepted[:, None], drafted, verdict.correction[:, None])
        width = canvas.tokens.shape[1]
        place = torch.where(steps < count[:, None], places, width)  # beyond the canvas: nowhere
        tokens = _written(canvas.tokens, place, values)
        none = torch.zeros_like(canvas.tokens, dtype=torch.bool)
        filled = _written(none, place, torch.ones_like(place, dtype=torch.bool))
        stands = _written(none, place, steps < accepted[:, None])
        canvas.tokens, canvas.done = tokens, canvas.done + count
        canvas.settled = [a + b for a, b in zip(canvas.settled, counts, strict=True)]
        self.counts.causal_calls += 1
        self.counts.causal_rows += sum(size > 0 for size in left)
        self.counts.filled += sum(counts)
        self.counts.drafted += sum(shown)
        self.counts.tested += sum(tested)
        self.counts.accepted += sum(stood)
        return FilledRound(tokens, filled, stands, tested, stood)


def random_order(masked: Tensor, prompts: Tensor, noise: Noise) -> Tensor:
    """Return all positions (B, C) of each row, the masked (B, C) bool first and in random order.

    A position's coin is keyed by prompt and position, so the order does not depend on the batch.
    """
    steps = torch.arange(masked.shape[1], device=masked.device)
    coins = noise.uniform(prompts, steps.expand_as(masked), Role.ORDER)
    return coins.masked_fill(~masked, math.inf).argsort(dim=1, stable=True)


def window_ends(totals: Tensor, num_windows: int) -> Tensor:
    """Return how many of `totals` (B,) masks are filled after each window, (B, num_windows).

    The share that is still masked after window s of W is cos(pi s / 2 W): few at first, when
    little is known.  A window fills one at least, as long as there is any.
    """
    windows = torch.arange(1, num_windows + 1, device=totals.device)
    masked = torch.cos(windows.double() * (math.pi / (2 * num_windows)))
    ends = (totals[:, None] * (1.0 - masked)).round().long()
    ends = (ends - windows).cummax(1).values.clamp(min=0) + windows
    return torch.minimum(ends, totals[:, None])


def _at(values: Tensor, index: Tensor) -> Tensor:
    """Return values (B, N, X) at index (B, M): (B, M, X)."""
    return values.gather(1, index[:, :, None].expand(-1, -1, values.shape[2]))


def _written(values: Tensor, places: Tensor, new: Tensor) -> Tensor:
    """Return values (B, C) with new (B, S) at places (B, S); what lies beyond C is left out."""
    room = torch.nn.functional.pad(values, (0, 1))
    return room.scatter(1, places, new)[:, :-1]
