"""docs/data.md is held to the code: its configs parse and its conversion script runs."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser

from specstream.data import PromptCompletion, TextDataModule

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


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
    [script] = blocks("python")
    exec(compile(script, "data.md", "exec"), {})
    pair = PromptCompletion("data/e2e_nlg/dev.jsonl.gz", prompt="{mr}\n", completion="{ref}")
    [document] = pair.documents(None)
    assert document.text == 'name[A], area[B]\nA "is" in B, ü.'
    answered = gzip.decompress(Path("data/alpaca/train.jsonl.gz").read_bytes())
    assert answered.count(b"\n") == 1, "records without an output are left out"
