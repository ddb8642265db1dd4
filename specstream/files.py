"""Files and folders that are written whole or not at all, and read with one line of error.

Also the packages that know the formats of videos and sounds, or one line where they are missing.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

LONGEST_REASON = 200


def write_whole(path: Path, text: str) -> None:
    """Write under a temporary name and rename, so that what was there survives a full disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """Give an empty folder to write, which takes the place of `folder` only once all is written."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if folder.exists():
            old = temporary.with_name(f"{temporary.name}.old")
            folder.rename(old)
            temporary.rename(folder)
            shutil.rmtree(old)
        else:
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_table(file: Path) -> dict[str, Any]:
    """Return the keys and values of a JSON file; ValueError naming it where it holds no table."""
    with one_line(f"{str(file)!r} is damaged"):
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"it holds {json.dumps(found)[:20]}, not a table of keys")
    return found


@contextmanager
def one_line(what: str) -> Iterator[None]:
    """Turn whatever a library raises over a user's file into a ValueError: `what`, and why.

    Every kind of error, because each library has its own for a damaged file.
    """
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what}: {first_line(error)}") from error


def video_package() -> ModuleType:
    """Return the package that runs ffmpeg; ValueError where it, or ffmpeg, is missing."""
    try:
        import imageio_ffmpeg

        imageio_ffmpeg.get_ffmpeg_exe()
    except ModuleNotFoundError as error:
        raise ValueError(
            "videos need the package imageio-ffmpeg, which is not installed"
        ) from error
    except (RuntimeError, OSError) as error:
        raise ValueError("videos need ffmpeg, which is not installed") from error
    return imageio_ffmpeg


def sound_package() -> ModuleType:
    """Return the package that reads and writes wav; ValueError where it is missing."""
    try:
        import soundfile
    except (ModuleNotFoundError, OSError) as error:
        raise ValueError("sounds need the package soundfile, which is not installed") from error
    return soundfile


def first_line(error: Exception) -> str:
    """Return what an error says, without the advice that follows it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    text = f"no key {text}" if isinstance(error, KeyError) else text
    return text if len(text) <= LONGEST_REASON else text[: LONGEST_REASON - 3] + "..."


def is_hub_id(path: str) -> bool:
    """Whether a path that is no folder may name a model of the hub.

    Where its first part is a folder here, it is a misspelt path.
    """
    if path.startswith((".", "/")) or path.count("/") != 1:
        return False
    return not Path(path.partition("/")[0]).is_dir()
