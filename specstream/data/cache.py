"""Keep what took long to make: a folder for each content, complete or not there at all."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path


def cache_folder(option: str | None) -> Path:
    """Return the cache folder: the option, else `$XDG_CACHE_HOME/specstream` or ~/.cache's."""
    if option is not None:
        return Path(option).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "specstream"


def cache_key(parts: Sequence[object]) -> str:
    """Return a name for a content described by `parts`, whose repr must be stable."""
    return hashlib.sha256(repr(list(parts)).encode()).hexdigest()[:24]


def build_once(folder: Path, build: Callable[[Path], None]) -> None:
    """Fill `folder` with `build(temporary)` unless it exists.

    The temporary folder lies beside it and is renamed when complete, so that neither a crash nor
    another process leaves half a result; of two processes that build at once the first wins.
    Raises ValueError when the disk does not take it.
    """
    if folder.is_dir():
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise ValueError(_unwritable(folder, error)) from error
    try:
        build(temporary)
        temporary.chmod(0o755)  # mkdtemp's folders are private
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    except OSError as error:
        raise ValueError(_unwritable(folder, error)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _unwritable(folder: Path, error: OSError) -> str:
    return (
        f"the prepared data could not be written to '{folder}': {error.strerror or error}; "
        "free some space or choose another cache_dir"
    )
