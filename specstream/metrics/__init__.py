"""Metrics through torchmetrics: how decoding went, and how good what was decoded is.

`decoding` holds the counts of speculative decoding, `text` the task metrics of generated text,
`samples` what can be said of a text without references.
"""

from specstream.metrics.decoding import Acceptance, AcceptedLength, Speedup
from specstream.metrics.samples import DistinctN, JudgeNLL, Solved, TokenEntropy
from specstream.metrics.text import ExactMatch, Rouge, TextQuality

__all__ = [
    "Acceptance",
    "AcceptedLength",
    "DistinctN",
    "ExactMatch",
    "JudgeNLL",
    "Rouge",
    "Solved",
    "Speedup",
    "TextQuality",
    "TokenEntropy",
]
