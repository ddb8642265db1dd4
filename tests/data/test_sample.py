"""The printed sample: what is scored is seen."""

from __future__ import annotations

from specstream.data import Document, Segment
from specstream.data.encoding import encode_documents
from specstream.data.packing import pack_best_fit
from specstream.data.progress import SlowProgress
from specstream.data.sample import GIVEN, SCORED, describe_mask, render_sample


def test_scored_tokens_are_coloured_and_given_ones_dim(tokenizer) -> None:
    document = Document("k", (Segment("The cat\n", False), Segment("sat [red]there.", True)))
    rows = pack_best_fit(encode_documents(tokenizer, [document]), 64, padding_token=0)
    text = render_sample(tokenizer, rows)
    assert text.plain == "<|endoftext|>The cat\nsat [red]there.<|endoftext|>"
    styled = {str(span.style): text.plain[span.start : span.end] for span in text.spans}
    assert styled == {
        GIVEN: "<|endoftext|>The cat\n",
        SCORED: "sat [red]there.<|endoftext|>",
    }
    assert render_sample(tokenizer, rows, max_tokens=3).plain.endswith(" ...")
    assert "scored" in describe_mask(rows) and "padding" in describe_mask(rows)


def test_quick_work_shows_no_progress(capsys) -> None:
    with SlowProgress("Working") as progress:
        progress.show("on it")
    assert capsys.readouterr().out == ""


def test_slow_work_shows_how_far_it_is(capsys, monkeypatch) -> None:
    monkeypatch.setattr("specstream.data.progress.PATIENCE", -1.0)
    with SlowProgress("Working") as progress:
        progress.show("on it: 3 documents")
    assert "Working on it: 3 documents" in capsys.readouterr().out
