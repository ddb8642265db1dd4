"""generate.py: options that no canvas, file or device can follow are one line each."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from specstream.cli import generate
from specstream.drafters import MaskedDraftModel
from specstream.drafters.loading import save_drafter
from specstream.drafters.self_speculative import save_head
from specstream.generation.command.options import make_parser, parse_options
from specstream.generation.masked_loading import is_masked_run
from specstream.models import PretrainedMaskedLM, SelfSpeculativeHead
from specstream.models.fingerprint import fingerprint
from tests.masked_toys import characters, masked_lm


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A masked target, a drafter of it and a head on it."""
    folder = tmp_path_factory.mktemp("options")
    target = folder / "target" / "model"
    masked_lm().save(target, characters().tokenizer)
    drafter = MaskedDraftModel(masked_lm(), lambda: masked_lm(1, block_length=8))
    save_drafter(folder / "drafter" / "draft", drafter, characters(), str(target))
    loaded = PretrainedMaskedLM(str(target), "float32")
    head = SelfSpeculativeHead(loaded)
    save_head(folder / "head" / "draft", head, str(target), fingerprint(loaded.model))
    return folder


def line_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run generate.py, which must fail in one line, and return that line."""
    assert generate(list(arguments)) == 2
    shown = capsys.readouterr()
    (line,) = shown.err.splitlines()
    assert shown.out == ""
    return line


MISTAKES = [
    ("target", "--canvas.steps 1000000000", "canvas.steps must be at most 9, the positions of the"),
    ("drafter", "--canvas.copies 1000000000", "canvas.copies must be at most 9"),
    ("drafter", "--canvas.max_target_calls 1000000000", "max_target_calls must be at most 9"),
    ("head", "--canvas.windows 1000000000", "canvas.windows must be at most 9"),
    ("target", "--device meta", "error: device 'meta' is not auto, cpu, cuda or cuda:N"),
    ("target", "--device xpu:0", "error: device 'xpu:0' is not auto, cpu, cuda or cuda:N"),
    ("target", "--stats /dev/null", "config error: stats: '/dev/null' is a device or the like"),
    ("target", "--prompt a[MASK]\u00e9", "error: the tokenizer has no token for '\u00e9'"),
    (
        "drafter",
        "--verifier ConfidenceThreshold --verifier.threshold 1.5",
        "config error: threshold must be in (0, 1], got 1.5",
    ),
    (
        "drafter",
        "--drafter specstream.models.UntrainedLM",
        "drafter: expected StoredDrafter or null, got 'specstream.models.UntrainedLM'",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("run", "options", "what"), MISTAKES)
def test_what_cannot_be_done_is_one_line(
    runs: Path, capsys: pytest.CaptureFixture[str], run: str, options: str, what: str
) -> None:
    start = ["--run", str(runs / run), "--max_new_tokens", "7", "--prompt", "a"]
    assert what in line_of(capsys, *start, *options.split())


def test_mps_where_it_is_not_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--run", "x", "--prompt", "a", "--device", "mps"]
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert line_of(capsys, *options) == "error: device 'mps' is not auto, cpu, cuda or cuda:N"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert parse_options(options).device == "mps"


def test_a_folder_that_may_not_be_written_is_said_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    for name, file in (("output", tmp_path / "x.png"), ("stats", tmp_path / "x.json")):
        line = line_of(
            capsys,
            "--target",
            "PretrainedDenoiser",
            "--target.path",
            "x",
            "--prompt",
            "a",
            f"--{name}",
            str(file),
        )
        assert line == f"config error: {name}: no permission to write in '{tmp_path}'"


def test_statistics_are_replaced_only_when_asked(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stats = tmp_path / "stats.json"
    stats.write_text("mine")
    start = ["--run", str(runs / "target"), "--prompt", "a[MASK:2]", "--stats", str(stats)]
    line = line_of(capsys, *start)
    assert line == f"config error: stats: '{stats}' exists; give --overwrite true to replace it"
    assert stats.read_text() == "mine"
    assert generate([*start, "--overwrite", "true"]) == 0
    assert json.loads(stats.read_text())["elements"] == 2


def test_a_head_in_float16_says_that_the_dtype_is_why(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(runs / "head", tmp_path / "head")
    record = run / "draft" / "specstream.json"
    found = json.loads(record.read_text())
    found["target"]["fingerprint"] = "0" * 16  # as if rounding had changed the name
    record.write_text(json.dumps(found))
    start = ["--run", str(run), "--prompt", "a[MASK]", "--dtype"]
    assert "give --dtype bfloat16 or float32" in line_of(capsys, *start, "float16")
    assert "give --dtype" not in line_of(capsys, *start, "float32")


def test_the_folder_of_a_llada_is_a_masked_run(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llada"}')
    assert is_masked_run(tmp_path)
    shutil.copy(runs / "target" / "model" / "config.json", tmp_path / "config.json")
    assert is_masked_run(tmp_path)


def test_the_help_explains_every_option_and_lists_no_modules_of_torch() -> None:
    shown = make_parser().format_help()
    assert "torch.nn." not in shown and "specstream.drafters.Eagle3" in shown
    explained = re.split(r"\n  (?=--)", shown.partition("\noptions:")[2])
    bare = [text.split()[0] for text in explained if re.match(r"\S+ [A-Z_]+\s+\(type:", text)]
    assert not bare
