"""Lightning data modules and the text sources they read.

Reading order: `sources` (what text; more of it in `chat`, `docstrings` and `planning`),
`encoding` (tokens and mask), `packing` (rows), `preparation` (splits on disk), `loader` (the order
of batches), `text` (the data module).  `TextDataModule` is imported on first use: sources and
prompt files do not need lightning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from specstream.data.chat import ChatMessages
from specstream.data.docstrings import Docstrings
from specstream.data.planning import Countdown, Sudoku
from specstream.data.prompts import PromptFile
from specstream.data.sources import (
    Document,
    PromptCompletion,
    RawText,
    Segment,
    StdlibSource,
    TextSource,
)

if TYPE_CHECKING:
    from specstream.data.text import TextDataModule

__all__ = [
    "ChatMessages",
    "Countdown",
    "Docstrings",
    "Document",
    "PromptCompletion",
    "PromptFile",
    "RawText",
    "Segment",
    "StdlibSource",
    "Sudoku",
    "TextDataModule",
    "TextSource",
]


def __getattr__(name: str) -> Any:
    if name == "TextDataModule":
        from specstream.data.text import TextDataModule

        return TextDataModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
