"""Sources: what they yield, and that a held-out document stays held out."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from specstream.data import Document, PromptCompletion, RawText, Segment, StdlibSource
from specstream.data.preparation import HeldOut
from specstream.data.sources import held_out_position


def test_the_standard_library_gives_its_own_files_in_a_fixed_order() -> None:
    source = StdlibSource()
    keys = [path.as_posix() for path in source.files()]
    assert keys == sorted(keys)
    assert any(key.endswith("json/decoder.py") for key in keys)
    assert not [key for key in keys if "/site-packages/" in key or "/test/" in key]
    documents = list(StdlibSource(limit=3).documents(None))
    assert len(documents) == 3
    assert not documents[0].key.startswith("/")


def test_the_held_out_files_depend_on_nothing_but_their_names() -> None:
    held_out = HeldOut(validation=0.05, test=0.05)
    assert held_out_position("json/decoder.py") == held_out_position("json/decoder.py")
    splits = Counter(held_out.split_of(f"package/module_{i}.py") for i in range(4000))
    assert 150 < splits["validation"] < 250
    assert 150 < splits["test"] < 250
    # held in place: another split would leak held-out files into what was trained before
    names = ("json/decoder.py", "ast.py", "typing.py", "argparse.py", "zipfile.py")
    positions = [round(held_out_position(name), 4) for name in names]
    assert positions == [0.2312, 0.7069, 0.6435, 0.7861, 0.3493]


def test_a_lone_document_is_cut_at_lines_and_its_end_held_out() -> None:
    text = "".join(f"line {i}\n" for i in range(1000))
    lone = Document("key", (Segment(text, True),))
    dealt = dict(HeldOut(0.1, 0.05).deal(iter([lone])))
    assert "".join(dealt[s].text for s in ("train", "validation", "test")) == text
    assert 0.08 < len(dealt["validation"].text) / len(text) < 0.12
    assert all(part.text.endswith("\n") for part in dealt.values())


def test_raw_text_reads_a_field_and_stops_at_the_limit(write_jsonl) -> None:
    path = write_jsonl("a.jsonl", [{"body": "one"}, {"body": "two"}, {"body": "three"}])
    documents = list(RawText(path, field="body", limit=2).documents(None))
    assert [document.text for document in documents] == ["one", "two"]
    with pytest.raises(ValueError, match="field 'text' is missing; the record has body"):
        list(RawText(path).documents(None))
    with pytest.raises(ValueError, match="limit must be at least 1"):
        RawText(path, limit=0).check()


def test_prompts_are_given_and_completions_scored(questions: str) -> None:
    source = PromptCompletion(questions, prompt="Q: {question}\n", completion="{answer}")
    source.check()
    first, second = list(source.documents(None))[:2]
    assert first.segments == (
        Segment("Q: What is 0 and 0?\n", scored=False),
        Segment("It is 0.", scored=True),
    )
    assert first.key == second.key, "two completions of one prompt stay in one split"


def test_a_template_without_a_field_is_refused(questions: str) -> None:
    with pytest.raises(ValueError, match="prompt 'question' names no field"):
        PromptCompletion(questions, prompt="question", completion="{answer}").check()


def test_the_fingerprint_follows_content_and_options(write_jsonl) -> None:
    path = write_jsonl("a.jsonl", [{"text": "one"}])
    before = RawText(path).fingerprint()
    assert RawText(path).fingerprint() == before
    assert RawText(path, limit=1).fingerprint() != before
    Path(path).write_text('{"text": "something else"}\n')
    assert RawText(path).fingerprint() != before
    assert StdlibSource(limit=2).fingerprint() != StdlibSource(limit=3).fingerprint()
