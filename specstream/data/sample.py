"""Show a training sample with its loss mask, so that a wrong template is seen before training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from rich.text import Text

from specstream.data.packing import PADDING, PackedRows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SCORED = "bold green"
GIVEN = "dim"


def render_sample(
    tokenizer: PreTrainedTokenizerFast, rows: PackedRows, row: int = 0, max_tokens: int = 160
) -> Text:
    """Return the first document of a row, scored tokens in colour, given ones dim.

    Longer documents are cut after `max_tokens`.
    """
    own = np.flatnonzero(rows.documents[row] == 0)
    assert len(own), "a row holds at least one document"
    shown = own[:max_tokens]
    tokens, scored = rows.tokens[row, shown].tolist(), rows.scored[row, shown].tolist()
    text = Text()
    start = 0
    for stop in range(1, len(tokens) + 1):
        if stop == len(tokens) or scored[stop] != scored[start]:
            style = SCORED if scored[start] else GIVEN
            text.append(tokenizer.decode(tokens[start:stop]), style)
            start = stop
    if len(own) > max_tokens:
        text.append(" ...", GIVEN)
    return text


def describe_mask(rows: PackedRows) -> str:
    """Say which share of the tokens of all rows is scored, and which is padding."""
    padding = float((rows.documents == PADDING).mean())
    return f"{rows.scored.mean():.1%} scored, {padding:.1%} padding"
