"""Published puzzles as benchmark prompts: evenly chosen, unseen in training, and read first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from specstream.benchmark.command import main
from specstream.benchmark.masked_prompts import PublishedPuzzles
from specstream.data import Countdown
from specstream.data.tokenizer import train_character_tokenizer
from specstream.processors import TextProcessor
from tests import test_benchmark_masked as shared
from tests.test_benchmark_masked import PLAIN, block, puzzles, write_study

models = shared.models
PROCESSOR = TextProcessor(train_character_tokenizer(["countdown 0123456789=+-*/()"]))


def write(path: Path, *records: dict[str, object]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_puzzles_are_chosen_evenly_and_only_as_many_as_there_are(tmp_path: Path) -> None:
    records = [{"numbers": [n, 2, 3], "target": n + 5} for n in (4, 5, 6, 7)]
    published = PublishedPuzzles(write(tmp_path / "four.jsonl", *records))
    found = published.read(2, "", PROCESSOR)
    assert [q.text for q in found] == ["countdown 4 2 3 = 9\n", "countdown 6 2 3 = 11\n"]
    with pytest.raises(ValueError, match="holds 4 different puzzles that training has not seen"):
        published.read(5, "", PROCESSOR)


def test_what_training_has_made_is_left_out(tmp_path: Path) -> None:
    source = Countdown(num_puzzles=1)
    text = next(source.documents(None)).segments[0].text
    numbers = [int(word) for word in text.split() if word.isdigit()]
    known = {"numbers": numbers[:3], "target": numbers[3]}
    path = write(tmp_path / "two.jsonl", known, {"numbers": [99, 98, 97], "target": 98})
    assert len(PublishedPuzzles(path).read(2, "", PROCESSOR)) == 2
    (left,) = PublishedPuzzles(path, [source]).read(1, "", PROCESSOR)
    assert left.text == "countdown 99 98 97 = 98\n"


def test_the_prompts_of_every_task_are_read_before_any_is_measured(
    models: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr("specstream.benchmark.masked_study.MaskedModels")
    damaged = tmp_path / "damaged.jsonl"
    damaged.write_text('{"numbers": [4, 2, 3], "target": 9}\n{"numbers"')
    later = block("benchmark.PublishedPuzzles", path=str(damaged))
    tasks = [puzzles(models), puzzles(models, name="later", prompts=later)]
    config = write_study(tmp_path, {}, PLAIN, tasks=tasks)
    assert main(["--config", config, "--output", str(tmp_path / "toy.json")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "damaged.jsonl" in line
