"""Metrics through torchmetrics: how decoding went, and how good what was decoded is.

`decoding` holds the counts of speculative decoding, `text` the task metrics of generated text.
"""

from specstream.metrics.decoding import Acceptance, AcceptedLength, Speedup
from specstream.metrics.text import ExactMatch, Rouge, TextQuality

__all__ = [
    "Acceptance",
    "AcceptedLength",
    "ExactMatch",
    "Rouge",
    "Speedup",
    "TextQuality",
]
