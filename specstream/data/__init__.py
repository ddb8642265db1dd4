"""Lightning data modules and the text sources they read.

`TextDataModule` is imported on first use: the sources and prompt files do not need lightning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from specstream.data.sources import Document, Segment, StdlibSource, TextSource

if TYPE_CHECKING:
    from specstream.data.text import TextDataModule

__all__ = ["Document", "Segment", "StdlibSource", "TextDataModule", "TextSource"]


def __getattr__(name: str) -> Any:
    if name == "TextDataModule":
        from specstream.data.text import TextDataModule

        return TextDataModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
