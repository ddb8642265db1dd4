"""When a run folder may be written, and what replacing it removes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from specstream.training.provenance import provenance, write_provenance
from specstream.training.run_folder import RunFolder


@pytest.fixture
def old_run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    for name in ("draft", "target"):
        (folder.path / name).mkdir(parents=True)
    for name in ("last.ckpt", "config.yaml", "notes.txt"):
        (folder.path / name).write_text("")
    return folder


def test_a_new_run_starts_anew_and_creates_nothing(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "new")
    assert folder.open(overwrite=False, ckpt_path=None) is None
    assert not folder.path.exists()


def test_a_run_that_exists_is_refused(old_run: RunFolder) -> None:
    with pytest.raises(ValueError, match="exists already; give --ckpt_path last"):
        old_run.open(overwrite=False, ckpt_path=None)


def test_resuming_is_not_overwriting(old_run: RunFolder) -> None:
    assert old_run.open(overwrite=False, ckpt_path="last") == old_run.last
    with pytest.raises(ValueError, match=r"no checkpoint .*best\.ckpt; there is .*last\.ckpt"):
        old_run.open(overwrite=False, ckpt_path="best")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_overwriting_replaces_what_a_run_wrote_and_nothing_else(old_run: RunFolder) -> None:
    assert old_run.open(overwrite=True, ckpt_path=None) is None
    old_run.best.mkdir()  # as of a sharded model
    (old_run.best / "shard").touch()
    old_run.set_aside()
    assert names(old_run.path) == {"notes.txt", ".replaced"}
    assert names(old_run.replaced) == {
        "config.yaml", "draft", "target", "last.ckpt", "best.ckpt"
    }  # fmt: skip
    old_run.last.touch()
    old_run.settle()
    assert names(old_run.path) == {"notes.txt", "last.ckpt"}


def test_a_run_that_was_set_aside_comes_back_where_nothing_was_saved(
    old_run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    before = names(old_run.path)
    old_run.set_aside()
    for name in ("config.yaml", "metrics.jsonl"):
        (old_run.path / name).write_text("of the run that failed")
    old_run.settle()
    assert names(old_run.path) == before
    assert (old_run.path / "config.yaml").read_text() == ""
    assert capsys.readouterr().out.endswith("holds the run before again\n")


def test_a_run_set_aside_survives_successors_that_are_killed(old_run: RunFolder) -> None:
    for _ in range(2):
        old_run.set_aside()
        (old_run.path / "config.yaml").write_text("of a run that was killed")
    assert names(old_run.replaced) == {"config.yaml", "draft", "target", "last.ckpt"}
    assert (old_run.replaced / "config.yaml").read_text() == ""
    with pytest.raises(ValueError, match=r"; the run before it lies in .*/run/\.replaced$"):
        old_run.open(overwrite=False, ckpt_path=None)
    with pytest.raises(ValueError, match=r"no checkpoint .*; there is .*\.replaced/last\.ckpt"):
        old_run.open(overwrite=False, ckpt_path="last")


def test_what_breaks_off_the_setting_aside_loses_nothing(
    old_run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = names(old_run.path)
    rename, moved = Path.rename, []

    def break_off(path: Path, target: Path) -> Path:
        if moved:
            raise KeyboardInterrupt
        moved.append(path)
        return rename(path, target)

    def set_partly_aside() -> None:
        moved.clear()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Path, "rename", break_off)
            old_run.set_aside()

    set_partly_aside()
    assert old_run.exists()
    old_run.settle()
    assert names(old_run.path) == before
    set_partly_aside()
    old_run.set_aside()  # a later start takes it up
    assert names(old_run.replaced) == {"config.yaml", "draft", "target", "last.ckpt"}


def test_a_folder_with_other_files_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("")
    assert not RunFolder(tmp_path).exists()


@pytest.mark.parametrize("place", ["", ".", "..", "/", "../../"])
def test_a_run_is_not_the_working_directory_nor_around_it(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="is the working directory or holds it; give a folder"):
        RunFolder(Path(place)).open(overwrite=True, ckpt_path=None)


def test_a_run_is_no_file_and_not_below_one(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ValueError, match=f"cannot be a folder: {tmp_path}/file is a file"):
            RunFolder(path).open(overwrite=True, ckpt_path=None)


def test_a_run_that_cannot_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="cannot be used: File name too long"):
        RunFolder(tmp_path / ("long" * 100)).open(overwrite=False, ckpt_path=None)
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(ValueError, match=f"cannot be written: no permission in {tmp_path}"):
        RunFolder(tmp_path / "a" / "b").open(overwrite=False, ckpt_path=None)


def test_provenance_does_without_git_and_keeps_the_first_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    assert provenance(3, ["train.py"])["git_commit"] is None
    path = tmp_path / "provenance.json"
    first = write_provenance(path, 3, resumed=False)
    write_provenance(path, 4, resumed=True)
    facts = json.loads(path.read_text())
    assert facts["seed"] == first["seed"] == 3
    assert [later["seed"] for later in facts["resumed"]] == [4]
    assert facts["versions"]["torch"] and facts["cpu_cores"] >= 1
