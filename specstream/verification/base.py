"""What a token verifier is: it decides which drafted tokens stand and what follows them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from specstream.structures import Guarantee, Law, TokenDraft, Verdict


class TokenVerifier(ABC):
    """A rule of acceptance: a frozen dataclass of its thresholds, without state.

    `guarantee` is what the rule promises about the law of the output, `needs` the laws of
    drafting for which it does.  Uniform numbers come as arguments, so that the rule is a pure
    function of tensors and compiles.
    """

    guarantee: ClassVar[Guarantee]
    needs: ClassVar[frozenset[Law]]
    trees: ClassVar[bool] = False  # whether it judges trees, of which a chain is one

    @abstractmethod
    def __call__(
        self, draft: TokenDraft, p: Tensor, noise_accept: Tensor, noise_correct: Tensor
    ) -> Verdict:
        """Return what of `draft` stands and the token that follows it.

        p (B, K+1, V), float32 or float64: the target's law after the first i drafted tokens, for
        i = 0..K, warped as the output is to be.  In a row whose draft is shorter than K nothing
        beyond its length is accepted, and what p holds beyond it does not matter, if finite.
        noise_accept (B, K) and noise_correct (B,): float64 uniforms in [0, 1), used once.
        """
