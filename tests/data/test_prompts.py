"""Prompt files: in order, and with the line number when a line is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from specstream.data import PromptFile


def test_prompts_come_in_the_order_of_the_file(write_jsonl) -> None:
    path = write_jsonl("p.jsonl.gz", [{"prompt": f"number {i}"} for i in range(5)])
    assert PromptFile(path).read() == [f"number {i}" for i in range(5)]
    assert PromptFile(path, limit=2).read() == ["number 0", "number 1"]


def test_a_template_makes_prompts_from_other_fields(write_jsonl) -> None:
    path = write_jsonl("p.jsonl", [{"turns": ["first", "second"]}])
    assert PromptFile(path, prompt="Q: {turns[0]}\n").read() == ["Q: first\n"]


def test_wrong_prompt_files_are_one_clear_line(write_jsonl, tmp_path: Path) -> None:
    path = write_jsonl("p.jsonl", [{"prompt": "a"}, {"text": "b"}])
    with pytest.raises(ValueError, match=r"p\.jsonl' line 2: field 'prompt' is missing; .* text$"):
        PromptFile(path).read()
    with pytest.raises(ValueError, match="does not exist"):
        PromptFile(str(tmp_path / "q.jsonl")).read()
    with pytest.raises(ValueError, match="holds no prompts"):
        PromptFile(write_jsonl("empty.jsonl", [])).read()
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a"}\n{"prompt": \n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        PromptFile(str(broken)).read()
    with pytest.raises(ValueError, match="limit must be at least 1"):
        PromptFile(path, limit=0).read()
