"""Train draft models and decode with them.  Importing this package has no side effect."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specstream.generation.loading import load_run as load_run

__all__ = ["load_run"]


def __getattr__(name: str) -> Any:
    if name == "load_run":
        from specstream.generation.loading import load_run

        return load_run
    raise AttributeError(f"module 'specstream' has no attribute {name!r}")
