"""What makes a block sequential: a bias from the token before, and a head that says when to stop.

All positions of a block are computed at once, so none knows what another drew, and the further a
position is from the anchor the less its law fits the tokens drawn before it.  DSpark (Cheng et al.
2026, arXiv 2607.05147) mends that after the fact, at the price of one small product a token.

Shapes: B rows, K positions, D hidden, V vocabulary, r rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from specstream.sampling import Sampling, draw, probabilities


class MarkovHead(nn.Module):
    """A low-rank matrix of biases: row x holds what to add to the logits after token x.

    B = U W with U (V, r) and W (r, V) ("vanilla" Markov head of DSpark).  W starts at zero, so a
    fresh head changes nothing.
    """

    def __init__(self, vocab_size: int, rank: int) -> None:
        super().__init__()
        self.previous = nn.Embedding(vocab_size, rank)
        self.bias = nn.Linear(rank, vocab_size, bias=False)
        nn.init.normal_(self.previous.weight, std=rank**-0.5)
        nn.init.zeros_(self.bias.weight)

    def embed(self, previous: Tensor) -> Tensor:
        """Return the rows of U (..., r) of the tokens drawn before (...)."""
        return self.previous(previous)

    def forward(self, embedded: Tensor) -> Tensor:
        """Return the biases (..., V) of what `embed` returned."""
        return self.bias(embedded)


class ConfidenceHead(nn.Module):
    """c_k = sigmoid(w [h_k, U x_{k-1}] + b): how likely the token drafted at position k stands.

    It is asked before that token is drawn, and knows the block's state there and the token before.
    A fresh head says one half.
    """

    def __init__(self, hidden_size: int, rank: int) -> None:
        super().__init__()
        self.proj = nn.Linear(hidden_size + rank, 1)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, states: Tensor) -> Tensor:
        """Return logits (...) of the states (..., D + r), the token's embedding behind."""
        return self.proj(states)[..., 0]


def draw_in_turn(
    base: Tensor,
    markov: MarkovHead,
    anchors: Tensor,
    seen: Tensor | None,
    coins: Tensor,
    sampling: Sampling,
) -> tuple[Tensor, Tensor]:
    """Draw tokens (B, K) one after the other, each from its law (B, V) given the one before.

    base (B, K, V) are the logits without the Markov bias, anchors (B, 1) the tokens before the
    first, seen (B, V) the tokens of each row where a warper asks, and coins (B, K).
    """
    token, tokens, probs = anchors[:, 0], [], []
    for i in range(base.shape[1]):
        q = probabilities(base[:, i] + markov(markov.embed(token)), sampling, seen)
        token = draw(q, coins[:, i])
        tokens.append(token)
        probs.append(q)
        if seen is not None:
            seen = seen.scatter(1, token[:, None], True)
    return torch.stack(tokens, 1), torch.stack(probs, 1)


def confident_lengths(logits: Tensor, threshold: float) -> Tensor:
    """Return how many positions (B,) come before the product of c falls below `threshold`.

    logits (B, K) of the confidence head.  The output's law stays the target's: whether position k
    is drafted depends on the context and the tokens before k, never on the token drawn at k.  So
    given that it is drafted its token still has the reported law q, for which accepting with
    min(1, p / q) and correcting from the rest is exact; and given that it is not, the target draws
    that token itself from p.  Had the decision seen the token, dropping the tokens it distrusts
    would have made the others likelier than q says.
    """
    chances = logits.float().sigmoid().cumprod(1)  # never grows, so what passes is a prefix
    return (chances >= threshold).sum(1)


def with_previous(hidden: Tensor, markov: MarkovHead | None, previous: Tensor) -> Tensor:
    """Put the embeddings of the tokens before (...) behind the states (..., D): (..., D + r)."""
    if markov is None:
        return hidden
    return torch.cat([hidden, markov.embed(previous).to(hidden.dtype)], -1)
