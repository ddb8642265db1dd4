"""Logits to probabilities, probabilities to tokens, and the noise that decides between them.

Reading order: `Sampling` (the options), `probabilities` (the warpers), `draw` (inverse CDF),
`Noise` (every coin a pure function of what it is tossed for).

Temperature 0 is not a branch of the decoding loop: it is a one-hot law here, and everything that
is exact for laws is exact for it.  Shapes: B batch rows, K drafted elements, V vocabulary.
All of it runs inside `torch.compile(fullgraph=True)`: the options are Python constants and no
tensor's value decides the control flow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

COLDEST = 1e-4  # below it scaled logits overflow; temperature 0 says what was meant


@dataclass(frozen=True)
class Sampling:
    """How a law is made from logits; the defaults change nothing.

    `temperature` 0 is greedy; `top_k` 0, `top_p` 1, `min_p` 0 and `repetition_penalty` 1 are off.
    The meaning and the order (penalty, temperature, top-k, top-p, min-p) are those of
    `transformers`, so that one set of options means one law in both.

    Raises `ValueError` for an option outside its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not (self.temperature == 0 or COLDEST <= self.temperature < math.inf):
            raise ValueError(
                f"temperature must be 0 (greedy) or at least {COLDEST}, got {self.temperature}"
            )
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or positive, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], got {self.min_p}")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty must be positive, got {self.repetition_penalty}")

    @property
    def needs_history(self) -> bool:
        """Whether the law depends on which tokens came before, beyond the logits."""
        return self.repetition_penalty != 1

    @property
    def greedy(self) -> bool:
        """Whether every law is one-hot."""
        return self.temperature == 0


def probabilities(logits: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Tensor:
    """Return the law (..., V) that `sampling` makes of `logits` (..., V).

    `seen` (..., V) bool marks the tokens of prompt, output and drafted ancestors; it is needed
    only if `sampling.needs_history`.  The result is float32, or float64 for float64 logits.
    At temperature 0 the lowest id wins a tie.
    """
    scores = logits if logits.dtype == torch.float64 else logits.float()
    if sampling.needs_history:
        if seen is None:
            raise ValueError("a repetition penalty needs `seen`, the tokens so far, got None")
        scores = torch.where(seen, penalised(scores, sampling.repetition_penalty), scores)
    if sampling.greedy:
        best = scores.argmax(-1, keepdim=True)
        return torch.zeros_like(scores).scatter(-1, best, 1.0)
    if sampling.temperature != 1:
        scores = scores / sampling.temperature
    cutoff = _cutoff(scores, sampling)
    if cutoff is not None:
        scores = scores.masked_fill(scores < cutoff, -math.inf)
    return scores.softmax(-1)


def penalised(scores: Tensor, penalty: float) -> Tensor:
    """Return the scores of tokens already in the text (Keskar et al. 2019, CTRL)."""
    return torch.where(scores > 0, scores / penalty, scores * penalty)


def _cutoff(scores: Tensor, sampling: Sampling) -> Tensor | None:
    """Return the score (..., 1) under which a token is dropped, None if nothing is.

    Top-k, top-p and min-p all keep the best tokens, so together they are one threshold: no
    scatter back from sorted order, one mask, one softmax.  Tokens that tie with the last one
    kept stay, so the law does not depend on the order of a sort (with float logits of a bf16
    model ties are common).  Top-p sorts only what top-k has left.
    """
    size = scores.shape[-1]
    truncates = 0 < sampling.top_k < size
    if truncates:
        best = scores.topk(sampling.top_k, dim=-1).values  # (..., k) descending
    elif sampling.top_p < 1:
        best = _descending(scores.detach())  # (..., V)
    elif sampling.min_p > 0:
        best = scores.amax(-1, keepdim=True)  # (..., 1)
    else:
        return None
    cutoff = best[..., -1:] if truncates else None
    if sampling.top_p < 1:
        mass = best.softmax(-1)
        better = mass.cumsum(-1) - mass  # what the tokens above it hold
        better[..., 0] = 0.0  # rounding must not drop the best
        kept = best.masked_fill(better >= sampling.top_p, math.inf)
        cutoff = kept.amin(-1, keepdim=True)  # the worst token kept
    if sampling.min_p > 0:
        floor = best[..., :1] + math.log(sampling.min_p)
        cutoff = floor if cutoff is None else torch.maximum(cutoff, floor)
    return cutoff


@torch.library.custom_op("specstream::descending", mutates_args=())
def _descending(scores: Tensor) -> Tensor:
    """Return the scores (..., V) sorted, best first.

    On a CPU numpy sorts, with vector instructions: a tenth to a thirtieth of the time of
    `torch.sort` (6 rows of 2048: 0.03 against 0.8 ms; of 150 k: 7 against 100 ms).  A custom
    operator keeps that inside a compiled graph, where numpy would be traced into `torch.sort`.
    """
    if scores.device.type == "cpu":
        return torch.from_numpy(np.sort(-scores.numpy())).neg_()
    return scores.sort(dim=-1, descending=True).values


@_descending.register_fake
def _(scores: Tensor) -> Tensor:
    return torch.empty_like(scores, memory_format=torch.contiguous_format)


def draw(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Return one token (...) from each law (..., V) by inverting its CDF at `uniforms` (...).

    `uniforms` are float64 in [0, 1).  `probs` need not be normalised, only have a positive sum.
    The CDF is summed in float64: in float32 the tail of a vocabulary of 100 k tokens would be
    off by more than its own mass.  A token of probability 0 is never returned: the first index
    whose CDF *exceeds* u * total is one where the CDF grew, and u * total < total holds in
    float64 for every u < 1.
    """
    cdf = probs.cumsum(-1, dtype=torch.float64)
    threshold = cdf[..., -1:] * uniforms.unsqueeze(-1)
    if probs.device.type == "cpu":
        return torch.searchsorted(cdf, threshold, right=True).squeeze(-1)
    # A parallel scan rounds neighbours differently: the CDF may creep where probs is 0.
    return ((cdf > threshold) & (probs > 0)).to(torch.uint8).argmax(-1)


class Role(IntEnum):
    """What a random number decides; numbers of different roles are independent."""

    DRAFT = 0  # which token the drafter guesses
    ACCEPT = 1  # whether a guess stands
    CORRECT = 2  # which token replaces it, or follows the last
    ORDER = 3  # which position of a canvas comes first
    MASK = 4  # which positions a training example hides
    START = 5  # the state of noise that a sample is denoised from
    KNOWN = 6  # the noise of what is given of a sample, at each denoising step


_GOLDEN = 0x9E3779B97F4A7C15
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_WORD = (1 << 64) - 1


def _signed(word: int) -> int:
    """Return the int64 with the bits of the unsigned 64-bit `word`."""
    return word - (1 << 64) if word >> 63 else word


def _mix_int(word: int) -> int:
    """Return splitmix64's finaliser of a Python integer, as `_mix` does it for tensors."""
    word &= _WORD
    word = ((word ^ (word >> 30)) * _MIX[0]) & _WORD
    word = ((word ^ (word >> 27)) * _MIX[1]) & _WORD
    return word ^ (word >> 31)


def _shift(words: Tensor, bits: int) -> Tensor:
    """Return the logical right shift; int64 has only the arithmetic one."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)


def _mix(words: Tensor) -> Tensor:
    """Return splitmix64's finaliser (Steele, Lea and Flood 2014; Stafford's variant 13)."""
    words = (words ^ _shift(words, 30)) * _signed(_MIX[0])
    words = (words ^ _shift(words, 27)) * _signed(_MIX[1])
    return words ^ _shift(words, 31)


class Noise:
    """Uniform random numbers keyed by (seed, prompt, element, role), with no state.

    A counter-based generator (Salmon et al. 2011 made the case; the hash is splitmix64): the
    number for a key is the same whatever else is computed, so a row's output does not depend on
    its neighbours in the batch, on the number of devices or on the order of prompts.

    An element must be used once for each role.  A position that is drafted again after a
    rejection is a *new* element: count what was drafted, not where it stands in the text.  (A
    discarded draft has taken part in the decision to discard it, so its coins are spent.)

    The keys are a tensor, so a compiled graph serves every seed.  `device` is where numbers
    are made.
    """

    def __init__(self, seed: int, device: torch.device | str = "cpu") -> None:
        keys = [_mix_int(_mix_int(seed + _GOLDEN) + _GOLDEN * (role + 1)) for role in Role]
        self.seed = seed
        self.keys = torch.tensor([_signed(key) for key in keys], device=device)  # (R,)

    def normal(self, prompts: Tensor, elements: Tensor, shape: Sequence[int], role: Role) -> Tensor:
        """Return standard normal numbers, float64 (*elements.shape, *shape), one field an element.

        prompts (B,) and elements (B, ...) as in `uniform`; by Box and Muller (1958).
        """
        counters = _counters(prompts, elements)
        words = _mix(counters + self.keys[int(role)])
        size = math.prod(shape)
        places = torch.arange(2 * ((size + 1) // 2), device=words.device) * _signed(_GOLDEN)
        bits = _shift(_mix(words[..., None] + places + _signed(_MIX[0])), 11)
        first, second = (bits.to(torch.float64) * 2.0**-53).chunk(2, dim=-1)
        radius = (-2 * torch.log1p(-first)).sqrt()  # of 1 - u, which is never 0
        angle = 2 * math.pi * second
        fields = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=-1)
        return fields[..., :size].reshape(*elements.shape, *shape)

    def uniform(self, prompts: Tensor, elements: Tensor, role: Role) -> Tensor:
        """Return float64 numbers in [0, 1) of the shape of `elements`.

        prompts (B,) int64 and elements (B, ...) int64 are below 2^31.
        """
        return _uniform(self.keys[int(role)], prompts, elements)


def _uniform(keys: Tensor, prompts: Tensor, elements: Tensor) -> Tensor:
    """Return the number in [0, 1) with 53 random bits for each key and counter."""
    bits = _shift(_mix(_counters(prompts, elements) + keys), 11)
    return bits.to(torch.float64) * 2.0**-53


def _counters(prompts: Tensor, elements: Tensor) -> Tensor:
    """Return a word for each (prompt, element), of the shape of `elements`."""
    high = (prompts << 32).view(-1, *[1] * (elements.dim() - 1))
    return (high + elements) * _signed(_GOLDEN)
