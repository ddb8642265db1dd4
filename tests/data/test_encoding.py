"""From documents to tokens and masks, and the tokenizer itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from specstream.data import Document, Segment
from specstream.data.encoding import encode_documents, encode_texts, token_dtype
from specstream.data.tokenizer import (
    END_OF_TEXT,
    load_tokenizer,
    tokenizer_fingerprint,
    train_tokenizer,
)
from specstream.processors import TextProcessor


def pair(prompt: str, completion: str) -> Document:
    return Document(prompt, (Segment(prompt, False), Segment(completion, True)))


def test_a_trained_tokenizer_survives_saving_and_gives_text_back(tokenizer, tmp_path: Path) -> None:
    text = "def f(a , b):\n    return ' x .'  # ü\n"
    assert tokenizer.decode(encode_texts(tokenizer, [text])[0]) == text
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == tokenizer.pad_token_id == 0
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_fingerprint(load_tokenizer(str(tmp_path))) == tokenizer_fingerprint(tokenizer)


def test_training_a_tokenizer_twice_gives_the_same(tokenizer, sentences) -> None:
    again = train_tokenizer(sentences, vocab_size=300)
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(tokenizer)


def test_bad_tokenizers_are_one_clear_line(tmp_path: Path, tokenizer) -> None:
    with pytest.raises(ValueError, match="vocab_size must be at least 257, not 100"):
        train_tokenizer(["text"], vocab_size=100)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no tokenizer could be loaded from"):
        load_tokenizer(str(tmp_path / "empty"))
    tokenizer.save_pretrained(tmp_path / "cut")
    file = tmp_path / "cut" / "tokenizer.json"
    file.write_text(file.read_text()[:500])
    with pytest.raises(ValueError, match="no tokenizer could be loaded from"):
        load_tokenizer(str(tmp_path / "cut"))


def test_a_document_begins_with_bos_and_ends_with_a_scored_eos(tokenizer) -> None:
    [document] = encode_documents(tokenizer, [pair("The cat\n", "sat on the mat.")])
    assert document.tokens[0] == document.tokens[-1] == 0
    scored = tokenizer.decode(document.tokens[document.scored].tolist())
    assert scored == "sat on the mat." + END_OF_TEXT
    assert document.tokens.dtype == np.uint16
    assert document.coverage == (int(document.scored.sum()) - 1, len(document.tokens) - 2)


def test_a_prompt_has_the_same_tokens_in_training_and_decoding(tokenizer) -> None:
    # the blank would merge with the word behind it: the completion is then tokenised on its own
    for prompt in ("The cat\n", "The cat ", "The c"):
        [document] = encode_documents(tokenizer, [pair(prompt, "at sat on the mat.")])
        given = document.tokens[: document.prompt_length].tolist()
        assert given == TextProcessor(tokenizer).encode(prompt)
        assert tokenizer.decode(document.tokens.tolist()[1:-1]) == prompt + "at sat on the mat."


def test_special_tokens_written_in_plain_text_are_text(tokenizer) -> None:
    [document] = encode_documents(tokenizer, [pair("a<|endoftext|>", "b")])
    assert (document.tokens == 0).sum() == 2, "bos and eos only"


def test_plain_and_rendered_documents_mix_in_their_order(tokenizer) -> None:
    rendered = Document("k", (Segment("dog", False), Segment("owl" + END_OF_TEXT, True)), True)
    documents = [pair("cat", "mat"), rendered, pair("fox", "roof")]
    encoded = encode_documents(tokenizer, documents)
    texts = [tokenizer.decode(d.tokens.tolist()) for d in encoded]
    assert texts == [
        f"{END_OF_TEXT}catmat{END_OF_TEXT}",
        f"dogowl{END_OF_TEXT}",
        f"{END_OF_TEXT}foxroof{END_OF_TEXT}",
    ]


def test_ids_are_stored_in_the_smallest_type() -> None:
    assert token_dtype(65536) is np.uint16
    assert token_dtype(65537) is np.int32
