"""How good generated text is without references: solved puzzles, variety, a judge's surprise.

    entropy = TokenEntropy()
    entropy.update([[5, 7, 7], [3]])       # the tokens of each text
    entropy.compute()

Each of them can be fooled alone: a text of one likely word pleases a judge and has no entropy,
noise has entropy and displeases every judge.  What is decided outside of this layer, the rules of a
puzzle or the model that judges, is given as a function.  All states are sums or lists, so several
processes agree and the order of texts does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric


class Solved(Metric):
    """The share of puzzles that are solved by rule.

    `checker(prompt, text)` says whether a text obeys the rules of the puzzle that a prompt asks
    for; a puzzle with several solutions needs no list of them.
    """

    names = ("solved",)
    full_state_update = False
    higher_is_better = True
    num_solved: Tensor
    num_texts: Tensor

    def __init__(self, checker: Callable[[str, str], bool]) -> None:
        super().__init__()
        self.checker = checker
        for name in ("num_solved", "num_texts"):
            self.add_state(name, torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, prompts: Sequence[str], texts: Sequence[str]) -> None:
        """Add texts, each with the prompt that it answers."""
        for prompt, text in zip(prompts, texts, strict=True):
            self.num_solved += bool(self.checker(prompt, text))
            self.num_texts += 1

    def compute(self) -> dict[str, Tensor]:
        """Return the share by name, NaN before any text."""
        return {"solved": self.num_solved / self.num_texts}


class TokenEntropy(Metric):
    """The mean over texts of the entropy, in nats, of a text's own token histogram.

    As reported for MDLM (Sahoo et al. 2024) and the models after it: a text that repeats itself
    has little.  At most the logarithm of a text's length, so compare texts of one length.
    """

    full_state_update = False
    higher_is_better = True
    entropies: Tensor
    num_texts: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("entropies", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_texts", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, rows: Sequence[Sequence[int]]) -> None:
        """Add the tokens of each text; one without tokens has no entropy and counts."""
        for row in rows:
            counts = torch.tensor(list(row), dtype=torch.long).unique(return_counts=True)[1]
            self.entropies += torch.special.entr(counts / counts.sum()).sum().to(self.entropies)
            self.num_texts += 1

    def compute(self) -> Tensor:
        """Return the mean, NaN before any text."""
        return (self.entropies / self.num_texts).float()


class DistinctN(Metric):
    """Different n-grams of tokens over all n-grams of all texts together (Li et al. 2016).

    Pooled, so that texts which are each varied but all the same score low; it falls with the
    number of texts, so compare equal numbers.
    """

    full_state_update = False
    higher_is_better = True
    distinct: list[Tensor]
    total: Tensor

    def __init__(self, n: int = 2) -> None:
        super().__init__()
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        self.n = n
        self.add_state("distinct", [], dist_reduce_fx="cat")
        self.add_state("total", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, rows: Sequence[Sequence[int]]) -> None:
        """Add the tokens of each text; one of fewer than n tokens adds nothing."""
        for row in rows:
            if len(row) >= self.n:
                grams = torch.tensor(list(row), device=self.total.device).unfold(0, self.n, 1)
                self.distinct.append(grams.unique(dim=0))  # (N, n)
                self.total += len(grams)

    def compute(self) -> Tensor:
        """Return the share, NaN before any n-gram."""
        # after a synchronisation the list is one tensor
        parts = self.distinct if isinstance(self.distinct, list) else [self.distinct]
        num_distinct = len(torch.cat(parts).unique(dim=0)) if parts else 0
        return num_distinct / self.total


class JudgeNLL(Metric):
    """How surprised a causal language model is by texts: mean NLL a token, and bits a character.

    `judge(prompt, text)` returns the log-probabilities (N,) of the text's tokens after its prompt,
    in the judge's own tokens, so that models with different tokenizers can be compared; for that
    compare the bits a character.  Sums over all texts are divided, so long texts count more.
    """

    full_state_update = False
    higher_is_better = False
    nll: Tensor
    num_tokens: Tensor
    num_characters: Tensor

    def __init__(self, judge: Callable[[str, str], Tensor]) -> None:
        super().__init__()
        self.judge = judge
        self.add_state("nll", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("num_tokens", "num_characters"):
            self.add_state(name, torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, prompts: Sequence[str], texts: Sequence[str]) -> None:
        """Add texts, each with the prompt before it, which is not judged."""
        for prompt, text in zip(prompts, texts, strict=True):
            log_probs = self.judge(prompt, text)
            self.nll -= log_probs.double().sum().to(self.nll)
            self.num_tokens += log_probs.numel()
            self.num_characters += len(text)

    def compute(self) -> dict[str, Tensor]:
        """Return both means by name, NaN before any token."""
        bits = self.nll / math.log(2)
        return {
            "judge_nll": (self.nll / self.num_tokens).float(),
            "judge_bits_per_character": (bits / self.num_characters).float(),
        }
