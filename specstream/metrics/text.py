"""How good generated text is, against references: ROUGE and exact match.

    quality = Rouge()
    quality.update(texts, references)      # several references for each text: the best counts
    quality.compute()                      # {"rouge1": ..., "rougeLsum": ...}, each in 0..1

A score is a mean over texts, kept as sums, so several processes agree and the order of texts does
not matter.  Nothing is downloaded: sentences are split by a rule, words are not stemmed.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

TITLES = "".join(rf"(?<!\b{title}\.)" for title in ("Mr", "Mrs", "Ms", "Dr"))
SENTENCE_END = re.compile(rf"\n|(?<=[.!?]){TITLES}\s+")


class TextQuality(Metric):
    """The mean over texts of one or several scores, each in 0..1 and named in `names`."""

    names: ClassVar[tuple[str, ...]]
    full_state_update = False
    higher_is_better = True
    sums: Tensor  # (len(names),)
    num_texts: Tensor

    def __init__(self) -> None:
        super().__init__()
        zeros = torch.zeros(len(self.names), dtype=torch.float64)
        self.add_state("sums", zeros, dist_reduce_fx="sum")
        self.add_state("num_texts", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, texts: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        """Add texts, each with all its references, of which there must be one at least."""
        for text, wanted in zip(texts, references, strict=True):
            assert wanted and not isinstance(wanted, str)
            self.sums += torch.tensor(self.scores(text, wanted)).to(self.sums)
            self.num_texts += 1

    def compute(self) -> dict[str, Tensor]:
        """Return the means by name, NaN before any text."""
        return dict(zip(self.names, (self.sums / self.num_texts).float(), strict=True))

    @abstractmethod
    def scores(self, text: str, references: Sequence[str]) -> list[float]:
        """Return the scores of one text in the order of `names`."""


class ExactMatch(TextQuality):
    """The share of texts that are one of their references to the letter.

    Runs of white space count as one blank and none at the ends; case counts.
    """

    names = ("exact_match",)

    def scores(self, text: str, references: Sequence[str]) -> list[float]:
        plain = " ".join(text.split())
        return [float(any(plain == " ".join(wanted.split()) for wanted in references))]


class Rouge(TextQuality):
    """ROUGE-1 and ROUGE-Lsum as F-measures (Lin 2004); of several references the best, for each.

    Words are runs of a-z and 0-9 in lower case, as in the `rouge-score` package.  A sentence ends
    at a line break, or at a full stop, question or exclamation mark before white space, the common
    titles (Mr., Dr., ..) excepted.
    """

    names = ("rouge1", "rougeLsum")

    def scores(self, text: str, references: Sequence[str]) -> list[float]:
        from torchmetrics.functional.text import rouge_score

        found = rouge_score(text, list(references), accumulate="best", rouge_keys="rouge1")
        summary = max(rouge_lsum(text, wanted) for wanted in references)
        return [float(found["rouge1_fmeasure"]), summary]


def rouge_lsum(text: str, reference: str) -> float:
    """Return the summary-level ROUGE-L of a text as an F-measure with beta = 1.

    Lin 2004, section 3.2: a word of a reference sentence is found if it stands in a longest common
    subsequence with any sentence of the text.  A word counts as often as both texts hold it, as in
    the `rouge-score` package.
    """
    written = [words(sentence) for sentence in SENTENCE_END.split(text)]
    expected = [words(sentence) for sentence in SENTENCE_END.split(reference)]
    num_written, num_expected = sum(map(len, written)), sum(map(len, expected))
    left = Counter(w for s in written for w in s) & Counter(w for s in expected for w in s)
    hits = 0
    for sentence in expected:
        found = set().union(*(common_places(sentence, other) for other in written))
        for place in sorted(found):
            if left[sentence[place]] > 0:
                left[sentence[place]] -= 1
                hits += 1
    return 2 * hits / (num_written + num_expected) if hits else 0.0


def words(text: str) -> list[str]:
    """Return the words that ROUGE compares."""
    return re.findall(r"[a-z0-9]+", text.lower())


def common_places(sentence: Sequence[str], other: Sequence[str]) -> set[int]:
    """Return the places in `sentence` of one longest common subsequence with `other`."""
    lengths = [[0] * (len(other) + 1) for _ in range(len(sentence) + 1)]  # of each two beginnings
    for i, word in enumerate(sentence):
        for j, another in enumerate(other):
            best = max(lengths[i][j + 1], lengths[i + 1][j])
            lengths[i + 1][j + 1] = lengths[i][j] + 1 if word == another else best
    places: set[int] = set()
    i, j = len(sentence), len(other)
    while i and j:
        if sentence[i - 1] == other[j - 1]:
            i, j = i - 1, j - 1
            places.add(i)
        elif lengths[i][j - 1] > lengths[i - 1][j]:
            j -= 1
        else:
            i -= 1
    return places
