"""docs/data.md is held to the code: its configs parse and its conversion script runs."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser

from specstream.data import PromptCompletion, RawText, TextDataModule

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("block", blocks("yaml"))
def test_every_config_of_the_page_parses(block: str) -> None:
    config = yaml.safe_load(block)
    if "sources" in config:
        config = {"data": {"class_path": "specstream.data.TextDataModule", "init_args": config}}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(TextDataModule, "data")
    assert parser.parse_object(config).data.init_args.sources


def test_the_conversion_script_writes_what_the_configs_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("trainset.csv", "devset.csv", "testset_w_refs.csv"):
        Path(name).write_text('mr,ref\n"name[A], area[B]","A ""is"" in B, ü."\n', encoding="utf-8")
    answers = [{"instruction": "i", "input": "", "output": o} for o in ("yes", "")]
    Path("alpaca_data.json").write_text(json.dumps(answers))
    stories = "".join(f"Story {n}.\n\nThe end.\n<|endoftext|>\n" for n in range(203))
    Path("TinyStories-train.txt").write_text(stories + "Story cut o")
    [script] = blocks("python")
    exec(compile(script, "data.md", "exec"), {})
    pair = PromptCompletion("data/e2e_nlg/dev.jsonl.gz", prompt="{mr}\n", completion="{ref}")
    [document] = pair.documents(None)
    assert document.text == 'name[A], area[B]\nA "is" in B, ü.'
    answered = gzip.decompress(Path("data/alpaca/train.jsonl.gz").read_bytes())
    assert answered.count(b"\n") == 1, "records without an output are left out"
    held_out = list(RawText("data/tinystories/heldout.jsonl.gz").documents(None))
    assert len(held_out) == 200 and held_out[-1].text == "Story 202.\n\nThe end."
    assert len(list(RawText("data/tinystories/train.jsonl.gz").documents(None))) == 3


def test_the_page_says_where_the_data_of_every_config_comes_from() -> None:
    configs = (ROOT / "configs").rglob("*.yaml")
    folders = {name for path in configs for name in re.findall(r"data/(\w+)/", path.read_text())}
    assert {"gsm8k", "tinystories", "dllm_planning"} <= folders
    described = set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE))
    assert folders <= described
