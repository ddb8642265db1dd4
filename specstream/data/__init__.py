"""Lightning data modules and the text sources they read.

Reading order: `sources` (what text; more of it in `chat`, `docstrings` and `planning`),
`encoding` (tokens and mask), `packing` (rows), `preparation` (splits on disk), `loader` (the order
of batches), `text` (the data module); `media_arrays`, `media_sources`, `caption_records`,
`real_media` and `sounds`
for images, videos and sounds, and `media` for batches of them; `captions` for texts that a target
makes samples of.
The data modules are imported on first use: sources and prompt files do not need lightning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from specstream.data.chat import ChatMessages
from specstream.data.docstrings import Docstrings
from specstream.data.media_sources import Digits, ImageArrays, MediaSource, MovingDigits, Samples
from specstream.data.planning import Countdown, Sudoku
from specstream.data.prompts import PromptFile
from specstream.data.real_media import CaptionedImages, MovingImages, VideoArrays
from specstream.data.sounds import Spectrograms, Tones
from specstream.data.sources import (
    Document,
    PromptCompletion,
    RawText,
    Segment,
    StdlibSource,
    TextSource,
)

if TYPE_CHECKING:
    from specstream.data.captions import CaptionDataModule
    from specstream.data.media import MediaDataModule
    from specstream.data.text import TextDataModule

__all__ = [
    "CaptionDataModule",
    "CaptionedImages",
    "ChatMessages",
    "Countdown",
    "Digits",
    "Docstrings",
    "Document",
    "ImageArrays",
    "MediaDataModule",
    "MediaSource",
    "MovingDigits",
    "MovingImages",
    "PromptCompletion",
    "PromptFile",
    "RawText",
    "Samples",
    "Segment",
    "Spectrograms",
    "StdlibSource",
    "Sudoku",
    "TextDataModule",
    "TextSource",
    "Tones",
    "VideoArrays",
]


def __getattr__(name: str) -> Any:
    if name == "TextDataModule":
        from specstream.data.text import TextDataModule

        return TextDataModule
    if name == "MediaDataModule":
        from specstream.data.media import MediaDataModule

        return MediaDataModule
    if name == "CaptionDataModule":
        from specstream.data.captions import CaptionDataModule

        return CaptionDataModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
