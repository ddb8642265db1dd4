"""Tokenizers of characters and mask tokens, alone and in the data module."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from jsonargparse import ArgumentParser

from specstream.data import RawText, Sudoku, TextDataModule
from specstream.data import preparation as preparation_module
from specstream.data.cache import cache_key
from specstream.data.encoding import encode_documents, encode_texts
from specstream.data.preparation import FORMAT_VERSION
from specstream.data.sources import Document, Segment
from specstream.data.tokenizer import (
    END_OF_TEXT,
    MASK,
    load_tokenizer,
    tokenizer_fingerprint,
    train_character_tokenizer,
    with_mask_token,
)

TEXTS = [
    "two  blanks, a\ttab\r\nand\n\nlines ",
    " leading",
    "don't . stop , 's n't !",
    "\u00e9 e\u0301 \U0001f600\u200d\U0001f525 \u65e5\u672c",
    "<|endoftext|> ## </w> _\u2581\u0120",
]


def test_every_character_is_a_token_and_text_comes_back_exactly(tmp_path: Path) -> None:
    trained = train_character_tokenizer(iter(TEXTS))
    trained.save_pretrained(tmp_path)
    for tokenizer in (trained, load_tokenizer(str(tmp_path))):
        for text in [*TEXTS, "".join(TEXTS), "\n", " ", "  "]:
            [ids] = encode_texts(tokenizer, [text])
            assert len(ids) == len(text) and min(ids, default=3) > 2
            assert tokenizer.decode(ids) == text
            assert tokenizer.decode([0, *ids, 1, 0], skip_special_tokens=True) == text
        assert len(tokenizer) == 3 + len(set("".join(TEXTS)))
    assert tokenizer_fingerprint(load_tokenizer(str(tmp_path))) == tokenizer_fingerprint(trained)


def test_the_special_tokens_come_first(tmp_path: Path) -> None:
    train_character_tokenizer(["ba", "cab"]).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.get_vocab() == {END_OF_TEXT: 0, MASK: 1, "<|unk|>": 2, "a": 3, "b": 4, "c": 5}
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    assert tokenizer.mask_token_id == 1 and tokenizer.unk_token_id == 2
    assert tokenizer("cab")["input_ids"] == [0, 5, 3, 4], "a prompt starts as documents do"
    assert tokenizer("c?b", add_special_tokens=False)["input_ids"] == [5, 2, 4]
    assert tokenizer(f"c{MASK}")["input_ids"] == [0, 5, 1]


def test_a_prompt_of_characters_is_given_and_its_completion_scored() -> None:
    tokenizer = train_character_tokenizer(["12\n"])
    document = Document("key", (Segment("12\n", False), Segment("21", True)))
    [encoded] = encode_documents(tokenizer, [document])
    assert encoded.tokens.tolist() == [0, 4, 5, 3, 5, 4, 0]
    assert encoded.scored.tolist() == [False] * 4 + [True] * 3


def test_a_mask_token_is_added_once_and_to_a_copy(tokenizer, tmp_path: Path) -> None:
    size, fingerprint = len(tokenizer), tokenizer_fingerprint(tokenizer)
    masking = with_mask_token(tokenizer)
    assert masking.mask_token == MASK and masking.mask_token_id == size == len(masking) - 1
    assert len(tokenizer) == size and tokenizer.mask_token_id is None
    assert tokenizer_fingerprint(tokenizer) == fingerprint
    assert tokenizer_fingerprint(masking) != fingerprint, "prepared data is kept apart"
    assert with_mask_token(masking) is masking
    masking.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert again.mask_token_id == size
    text = "The cat sat\non the mat."
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.decode([*encode_texts(again, [text])[0], size], skip_special_tokens=True) == text


@pytest.fixture
def module(tmp_path: Path):
    """Make a data module with a cache of the test's own."""

    def make(source, **options) -> TextDataModule:
        options = {"sequence_length": 64, "cache_dir": str(tmp_path / "cache")} | options
        return TextDataModule([source], show_sample=False, **options)

    return make


def test_sudokus_of_characters_are_rows_of_42_tokens(module, tmp_path: Path) -> None:
    data = module(Sudoku(num_puzzles=60), characters=True, pack=False, validation_fraction=0.2)
    assert data.tokenizer.mask_token_id == 1
    assert len(data.tokenizer) == 3 + len(set("sudoku \n01234"))
    rows = data.rows("train")
    assert ((rows.documents == 0).sum(axis=1) == 1 + 24 + 16 + 1).all()
    assert (np.array(rows.scored).sum(axis=1) == 17).all()
    prompt = data.tokenizer.decode(data.prompts(1)[0], skip_special_tokens=True)
    assert prompt.startswith("sudoku ") and len(prompt) == 24


def test_a_config_names_puzzles_and_options(module) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(TextDataModule, "data")
    puzzles = {"class_path": "specstream.data.Sudoku", "init_args": {"empty": [8, 9]}}
    options = {"sources": [puzzles], "characters": True, "mask_token": True}
    config = {"class_path": "specstream.data.TextDataModule", "init_args": options}
    data = parser.instantiate(parser.parse_object({"data": config})).data
    assert data.sources == [Sudoku(empty=(8, 9))]
    assert data.characters and data.mask_token


def test_characters_and_bpe_have_tokenizers_of_their_own(
    module, write_jsonl, sentences, tmp_path: Path
) -> None:
    source = RawText(write_jsonl("story.jsonl", [{"text": text} for text in sentences]))
    of_characters = module(source, characters=True)
    of_pieces = module(source, vocab_size=300)
    assert len(of_characters.tokenizer) < 60 and len(of_pieces.tokenizer) == 300
    assert module(source, characters=True, vocab_size=500).tokenizer.get_vocab() == (
        of_characters.tokenizer.get_vocab()
    )
    assert len(list(tmp_path.glob("cache/tokenizers/*"))) == 2


def test_a_mask_token_makes_prepared_data_of_its_own(
    module, write_jsonl, sentences, tmp_path: Path
) -> None:
    source = RawText(write_jsonl("story.jsonl", [{"text": text} for text in sentences]))
    plain, masking = module(source, vocab_size=300), module(source, vocab_size=300, mask_token=True)
    assert plain.tokenizer.mask_token_id is None
    assert masking.tokenizer.mask_token_id == 300 == len(masking.tokenizer) - 1
    assert (np.array(plain.rows("train").tokens) == masking.rows("train").tokens).all()
    assert len(list(tmp_path.glob("cache/text/*"))) == 2
    assert len(list(tmp_path.glob("cache/tokenizers/*"))) == 1, "the trained one is the same"
    of_characters = module(source, characters=True, mask_token=True)
    assert of_characters.tokenizer.mask_token_id == 1


def test_data_prepared_without_these_options_stays_valid(
    module, write_jsonl, sentences, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = RawText(write_jsonl("story.jsonl", [{"text": text} for text in sentences]))
    data = module(source, vocab_size=300)
    data.prepare_data()
    sources = [("RawText", source.fingerprint(), data.held_out)]
    [trained] = tmp_path.glob("cache/tokenizers/*")
    assert trained.name == cache_key([FORMAT_VERSION, 300, *sources])
    [prepared] = tmp_path.glob("cache/text/*")
    fingerprint = tokenizer_fingerprint(load_tokenizer(str(trained)))
    assert prepared.name == cache_key([FORMAT_VERSION, data.layout, fingerprint, *sources])
    monkeypatch.setattr(preparation_module, "encode_documents", None)
    module(source, tokenizer=str(trained)).prepare_data()


def test_characters_of_a_ready_made_tokenizer_are_refused(module, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="leave out one of characters and tokenizer"):
        module(Sudoku(num_puzzles=5), characters=True, tokenizer=str(tmp_path))
