"""How good the text of each target of a task is, on more questions than can be timed.

The drafters that are timed give their target's text, or a text of its law, so the task metric is
the target's: it is measured once, plainly and in batches, and costs no timed run.

Shapes: N questions, M scores of a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from specstream.benchmark.pair import Pair
from specstream.benchmark.paired_scores import Difference, Scores, difference, text_scores
from specstream.benchmark.questions import Question
from specstream.generation import AutoregressivePipeline, Limits
from specstream.metrics import TextQuality
from specstream.processors import TextProcessor
from specstream.sampling import Sampling

BATCH_SIZE = 16  # questions that are answered together


@dataclass(frozen=True)
class AnswerScores:
    """The scores of the answers to the same questions, under their names."""

    names: tuple[str, ...]
    values: NDArray[np.float64]  # (N, M)

    @property
    def means(self) -> dict[str, float]:
        """The task metric, as means over the questions."""
        return dict(zip(self.names, self.values.mean(0).tolist(), strict=True))

    def minus(self, other: AnswerScores) -> dict[str, Difference]:
        """Return how much better these are than others, question by question."""
        ones = np.ones(len(self.values))
        columns = zip(self.names, self.values.T, other.values.T, strict=True)
        return {
            name: difference(Scores(ours, ones), [(Scores(theirs, ones), 1.0)])
            for name, ours, theirs in columns
        }


def judge_tokens(
    quality: TextQuality,
    processor: TextProcessor,
    questions: Sequence[Question],
    answers: Sequence[Sequence[int]],
) -> AnswerScores:
    """Judge decoded answers by the references of their questions."""
    texts = [processor.decode(list(tokens)) for tokens in answers]
    values = text_scores(quality, texts, [question.references for question in questions])
    return AnswerScores(quality.names, values)


@dataclass(frozen=True)
class TargetJudge:
    """Answers questions with a target alone, under one law, and judges what it says."""

    quality: TextQuality
    questions: Sequence[Question]
    sampling: Sampling
    limits: Limits
    seed: int

    def __call__(self, pair: Pair) -> AnswerScores:
        """Return the scores of a target; ValueError for a question that it has no room for."""
        pipeline = AutoregressivePipeline(
            pair.target, pair.processor, self.sampling, self.limits, BATCH_SIZE
        )
        done = pipeline.complete([question.prompt for question in self.questions], seed=self.seed)
        answers = [completion.tokens for completion in done]
        return judge_tokens(self.quality, pair.processor, self.questions, answers)
