"""The cache: a folder is complete or not there, whoever crashes or competes."""

from __future__ import annotations

from pathlib import Path

import pytest

from specstream.data.cache import build_once, cache_folder, cache_key


def test_a_folder_is_built_once(tmp_path: Path) -> None:
    calls = []

    def build(folder: Path) -> None:
        calls.append(folder)
        (folder / "a").write_text("done")

    for _ in range(2):
        build_once(tmp_path / "deep" / "x", build)
    assert len(calls) == 1
    assert (tmp_path / "deep" / "x" / "a").read_text() == "done"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["x"]


def test_a_crash_leaves_nothing(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "a").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_once(tmp_path / "x", build)
    assert list(tmp_path.iterdir()) == []


def test_of_two_builders_the_first_wins(tmp_path: Path) -> None:
    def other(folder: Path) -> None:
        (folder / "a").write_text("first")

    def build(folder: Path) -> None:
        (folder / "a").write_text("second")
        build_once(tmp_path / "x", other)

    build_once(tmp_path / "x", build)
    assert (tmp_path / "x" / "a").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_full_disk_is_one_clear_line(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(ValueError, match="No space left on device; free some space or choose"):
        build_once(tmp_path / "x", build)
    assert list(tmp_path.iterdir()) == []


def test_the_cache_folder_is_the_option_or_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder("/somewhere") == Path("/somewhere")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache_folder(None) == Path("/caches/specstream")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder(None) == Path.home() / ".cache" / "specstream"


def test_keys_differ_with_their_parts() -> None:
    assert cache_key([1, "a"]) == cache_key([1, "a"])
    assert cache_key([1, "a"]) != cache_key([1, "b"]) != cache_key(["1", "a"])
