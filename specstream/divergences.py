"""How far the draft's law is from the target's, per position, and what of it is minimised.

Reading order: `Divergence` (the interface), the divergences of one position, the two that aim at
the accepted length of a block, `chunked_divergence` (the LM head without its logits in memory).

How a training module uses it, for every divergence alike:

    measures = chunked_divergence(divergence, draft_hidden[mask], draft_head,
                                  target_hidden[mask], target_head, labels[mask])   # (N, C)
    loss = divergence.total(measures, mask) / num_scored   # num_scored: over all processes

p is the target, q the draft, a = sum over v of min(p, q) the acceptance probability of
verification (Leviathan et al. 2023).  Values are zero at p = q, and so is the gradient, except
for `CrossEntropy`, which is measured against data.  Gradients reach the draft only if the caller
runs the target without them, as `chunked_divergence` does.

Shapes: N scored positions, B rows, T positions, V vocabulary, D hidden, C measures of a position.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

Head = Callable[[Tensor], Tensor]  # (N, D) -> (N, V)


def acceptance(target_logits: Tensor, draft_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return a (...) = sum over v of min(p, q) = 1 - TV(p, q), from logits (..., V)."""
    return 1.0 - TotalVariation(temperature=temperature)(target_logits, draft_logits, None)


def _log_probs(logits: Tensor, temperature: float) -> Tensor:
    """Return log softmax in float32, or in float64 for float64 logits."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if temperature != 1:
        logits = logits / temperature
    return logits.log_softmax(-1)


@dataclass(frozen=True)
class Divergence(ABC):
    """What a draft model is trained to make small.

    `temperature` divides the logits of both models, as decoding at that temperature will; the
    value is not rescaled by its square.
    Raises `ValueError` for a temperature that is not positive.
    """

    temperature: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be positive, got {self.temperature}")

    @property
    def needs_target(self) -> bool:
        """Whether the target's logits are read; if not they may be None."""
        return True

    @abstractmethod
    def __call__(
        self, target_logits: Tensor | None, draft_logits: Tensor, labels: Tensor | None
    ) -> Tensor:
        """Return the value (N,) of each position: logits (N, V), labels (N,) of the data."""

    def measure(
        self, target_logits: Tensor | None, draft_logits: Tensor, labels: Tensor | None
    ) -> Tensor:
        """Return all that `total` needs to know of each position, (N, C); the value comes first."""
        return self(target_logits, draft_logits, labels).unsqueeze(-1)

    def total(self, measures: Tensor, mask: Tensor) -> Tensor:
        """Return the loss summed over scored positions, to be divided by their global number.

        measures (N, C) of the positions where mask (B, T) is True, in row-major order.
        """
        return measures[:, 0].sum()


@dataclass(frozen=True)
class CrossEntropy(Divergence):
    """-log q(label): ordinary language modelling, no target needed.

    The baseline that distillation has to beat; also what a draft model is pretrained with.
    """

    @property
    def needs_target(self) -> bool:
        """The data are the target here."""
        return False

    def __call__(
        self, target_logits: Tensor | None, draft_logits: Tensor, labels: Tensor | None
    ) -> Tensor:
        """Return -log q(label) (N,)."""
        assert labels is not None
        log_q = _log_probs(draft_logits, self.temperature)
        return functional.nll_loss(log_q, labels, reduction="none")


@dataclass(frozen=True)
class TargetDivergence(Divergence):
    """A divergence of the two laws at one position, whatever the data say there."""

    @abstractmethod
    def between(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Return the divergence (N,) of the target's and the draft's log laws (N, V)."""

    def __call__(
        self, target_logits: Tensor | None, draft_logits: Tensor, labels: Tensor | None
    ) -> Tensor:
        """Return `between` (N,) of the laws that the logits make."""
        assert target_logits is not None
        log_p = _log_probs(target_logits, self.temperature)
        return self.between(log_p, _log_probs(draft_logits, self.temperature))


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p || q) (N,) of log laws (N, V)."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _total_variation(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return sum |p - q| / 2 (N,) of log laws (N, V)."""
    return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2


@dataclass(frozen=True)
class ForwardKL(TargetDivergence):
    """KL(p || q) = sum p log(p / q): covers all that the target may say (Hinton et al. 2015).

    The default: smooth, robust from a cold start.  It bounds the acceptance only from afar
    (Pinsker: TV <= sqrt(KL / 2)), so a small draft model spends capacity on rare tokens.
    """

    def between(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Return KL(p || q) (N,)."""
        return _kl(log_p, log_q)


@dataclass(frozen=True)
class ReverseKL(TargetDivergence):
    """KL(q || p) = sum q log(q / p): seeks what the target surely says (Gu et al. 2024, MiniLLM).

    For greedy decoding and small drafts; best on the drafter's own continuations.
    """

    def between(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Return KL(q || p) (N,)."""
        return _kl(log_q, log_p)


@dataclass(frozen=True)
class JSD(TargetDivergence):
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q.

    Agarwal et al. 2024 (GKD), equation 1: divided by beta it tends to forward KL for beta to 0,
    and by 1 - beta to reverse KL for beta to 1; bounded, and finite where one law is zero.
    Raises `ValueError` for a beta outside (0, 1); at the ends use the two KLs.
    """

    beta: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.beta < 1:
            raise ValueError(f"beta must be in (0, 1), got {self.beta}: use ForwardKL or ReverseKL")

    def between(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Return the generalised Jensen-Shannon divergence (N,)."""
        log_m = torch.logaddexp(log_p + math.log(self.beta), log_q + math.log1p(-self.beta))
        return self.beta * _kl(log_p, log_m) + (1 - self.beta) * _kl(log_q, log_m)


@dataclass(frozen=True)
class TotalVariation(TargetDivergence):
    """TV = sum |p - q| / 2 = 1 - a: exactly the probability that verification rejects.

    What decoding wants (Zhou et al. 2024, DistillSpec), but its gradient is small where the draft
    is far off; start from a pretrained draft, or use `LKHybrid`.
    """

    def between(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Return TV(p, q) (N,)."""
        return _total_variation(log_p, log_q)


@dataclass(frozen=True)
class NegativeLogAcceptance(TargetDivergence):
    """-log a: the gradient of TV divided by a, so that it does not vanish where a is small.

    Samarin et al. 2026 (LK losses, arXiv 2602.23881).  For a one-hot target it is cross-entropy.
    """

    def between(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Return -log a (N,), formed in the log domain, where a cannot underflow."""
        return -torch.minimum(log_p, log_q).logsumexp(-1)


@dataclass(frozen=True)
class LKHybrid(TargetDivergence):
    """l KL(p || q) + (1 - l) TV with l = exp(-eta a), a held constant.

    Samarin et al. 2026 (arXiv 2602.23881): KL's gradient while the draft is far off, TV's aim
    once it is near.  The paper's eta is 3.
    Raises `ValueError` for a negative eta.
    """

    eta: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.eta < math.inf:
            raise ValueError(f"eta must be 0 or positive, got {self.eta}")

    def between(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Return the blend (N,)."""
        variation = _total_variation(log_p, log_q)
        blend = (-self.eta * (1 - variation.detach())).exp()
        return blend * _kl(log_p, log_q) + (1 - blend) * variation


@dataclass(frozen=True)
class _Blocks:
    """All blocks of `gamma` consecutive scored positions, one starting at each of them.

    A draft model trained with teacher forcing has no fixed blocks: in decoding a round may start
    anywhere.  So every scored position starts one, which runs over the next `gamma` positions or
    to the end of its run of scored positions, whichever comes first: a block never crosses an
    unscored position, hence never a document, a prompt or a row.
    """

    index: Tensor  # (N, gamma) the scored position that stands at each place of a block
    inside: Tensor  # (N, gamma) bool, False beyond the end of the run

    @staticmethod
    def of(mask: Tensor, gamma: int) -> _Blocks:
        """Return the blocks of mask (B, T)."""
        scored = functional.pad(mask, (0, gamma - 1)).unfold(1, gamma, 1)  # (B, T, gamma)
        inside = scored[mask].to(torch.uint8).cumprod(-1).bool()  # (N, gamma)
        # Within a run the next position is the next scored one, so ranks count on.
        ranks = torch.arange(len(inside), device=mask.device).unsqueeze(-1)
        index = ranks + torch.arange(gamma, device=mask.device)
        return _Blocks(index.clamp(max=len(inside) - 1), inside)

    def gather(self, values: Tensor) -> Tensor:
        """Return values (N,) laid out in blocks (N, gamma), 0 beyond the end of a run."""
        return torch.where(self.inside, values[self.index], 0.0)

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean (N,) of values (N, gamma), 0 beyond the end, over each block."""
        return values.sum(-1) / self.inside.sum(-1)


def _check_gamma(gamma: int) -> None:
    """Raise `ValueError` unless a block has a position."""
    if gamma < 1:
        raise ValueError(f"gamma, the length of a block, must be at least 1, got {gamma}")


@dataclass(frozen=True)
class EndToEndTV(TotalVariation):
    """1 - (1 / gamma) sum over j of a_1 .. a_j: minus the expected accepted length of a block.

    The end-to-end total variation of AngelSpec (2026).  A round of speculative decoding commits
    1 + sum over j of a_1 .. a_j tokens, and this is that sum, so later positions count only as far
    as they are reached.  Averaged over all blocks (see `_Blocks`); a block cut short by the end of
    its run is divided by its own length, so the loss is 0 at p = q and 1 at worst.  The value of
    a position is its total variation.
    Choose it to finish a draft model that is already good, for a draft length near gamma.
    Raises `ValueError` for a gamma below 1.
    """

    gamma: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_gamma(self.gamma)

    def total(self, measures: Tensor, mask: Tensor) -> Tensor:
        """Return the sum over blocks; see `Divergence.total`."""
        blocks = _Blocks.of(mask, self.gamma)
        prefixes = blocks.gather(1.0 - measures[:, 0]).cumprod(-1)  # (N, gamma)
        return (1.0 - blocks.mean(prefixes)).sum()


@dataclass(frozen=True)
class DPace(Divergence):
    """Another divergence, each position weighted by how much accepted length hangs on it.

    D-PACE (2026): with c_i the confidence that the draft's token at position i of a block will
    stand, c' = (1 - smoothing) c + smoothing, and prefixes P_j = c'_1 .. c'_j, position i weighs
    sum over j >= i of P_j, without gradient.  With the negative log confidence as divergence and
    no smoothing, the gradient is exactly that of the expected accepted length.  Averaged over all
    blocks, each divided by its length (see `_Blocks`).

    `confidence`: "acceptance" is a, which needs the target; "likelihood" is q(label), as
    published.  It is taken at `temperature`; the divergence inside has its own.  Choose it to
    start from scratch, where `EndToEndTV` would be too flat.
    Raises `ValueError` for a gamma below 1, a smoothing outside [0, 1] or a nested block loss.
    """

    divergence: Divergence = field(default_factory=ForwardKL)
    gamma: int = 5
    smoothing: float = 0.5
    confidence: Literal["acceptance", "likelihood"] = "acceptance"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_gamma(self.gamma)
        if not 0 <= self.smoothing <= 1:
            raise ValueError(f"smoothing must be in [0, 1], got {self.smoothing}")
        if self.confidence not in ("acceptance", "likelihood"):
            names = "'acceptance' or 'likelihood'"
            raise ValueError(f"confidence must be {names}, got {self.confidence!r}")
        if isinstance(self.divergence, EndToEndTV | DPace):
            raise ValueError("DPace weighs a divergence of single positions, got one of blocks")

    @property
    def needs_target(self) -> bool:
        """Whether the divergence or the confidence reads the target's logits."""
        return self.divergence.needs_target or self.confidence == "acceptance"

    def __call__(
        self, target_logits: Tensor | None, draft_logits: Tensor, labels: Tensor | None
    ) -> Tensor:
        """Return the inner divergence (N,), not weighted."""
        return self.divergence(target_logits, draft_logits, labels)

    def measure(
        self, target_logits: Tensor | None, draft_logits: Tensor, labels: Tensor | None
    ) -> Tensor:
        """Return the inner divergence and the confidence, (N, 2)."""
        value = self(target_logits, draft_logits, labels)
        with torch.no_grad():
            if self.confidence == "acceptance":
                assert target_logits is not None
                confidence = acceptance(target_logits, draft_logits, self.temperature)
            else:
                surprise = CrossEntropy(temperature=self.temperature)
                confidence = surprise(None, draft_logits, labels).neg().exp()
        return torch.stack([value, confidence], dim=-1)

    def total(self, measures: Tensor, mask: Tensor) -> Tensor:
        """Return the weighted sum over blocks; see `Divergence.total`."""
        blocks = _Blocks.of(mask, self.gamma)
        confidence = measures[:, 1].detach()
        confidence = confidence + self.smoothing * (1.0 - confidence)
        prefixes = blocks.gather(confidence).cumprod(-1)  # (N, gamma)
        weights = prefixes.flip(-1).cumsum(-1).flip(-1)
        values = blocks.gather(measures[:, 0])
        return blocks.mean(weights * values).sum()


def chunked_divergence(
    divergence: Divergence,
    draft_hidden: Tensor,
    draft_head: Head,
    target_hidden: Tensor | None,
    target_head: Head | None,
    labels: Tensor | None,
    chunk: int = 1024,
) -> Tensor:
    """Return `divergence.measure` (N, C), with logits only ever made for `chunk` positions.

    draft_hidden (N, D) and target_hidden (N, Dt) are last hidden states, labels (N,).  Where
    gradients are wanted each chunk is checkpointed: the backward pass makes its logits again, at
    the price of one more product with each head, so (N, V) never exists, in any precision.  The
    target runs without gradients.
    """
    assert chunk > 0

    def measure(draft: Tensor | None, target: Tensor | None, wanted: Tensor | None) -> Tensor:
        assert draft is not None
        target_logits = None
        if divergence.needs_target:
            assert target is not None and target_head is not None
            with torch.no_grad():
                target_logits = target_head(target)
        return divergence.measure(target_logits, draft_head(draft), wanted)

    count = len(draft_hidden)
    remake = torch.is_grad_enabled() and count > chunk
    pieces = []
    for start in range(0, max(count, 1), chunk):
        columns = (draft_hidden, target_hidden, labels)
        part = [None if x is None else x[start : start + chunk] for x in columns]
        made = checkpoint(measure, *part, use_reentrant=False) if remake else measure(*part)
        pieces.append(made)
    return torch.cat(pieces)
