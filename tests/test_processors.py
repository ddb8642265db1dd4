"""The boundary of text: what was committed becomes printable once, whole and in order."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from specstream.data.tokenizer import train_tokenizer
from specstream.processors import REPLACEMENT, WINDOW, TextProcessor, TextStream
from tests.toys import letters, spell

TEXT = "naïve café, 漢字 and 🙂🙃! Ünïcödé → \u00a0end\n\tx"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and little more, so that one character is several tokens."""
    return train_tokenizer(["the end and the end"], 260)


@pytest.fixture(scope="module")
def words(tokenizer: PreTrainedTokenizerFast) -> TextProcessor:
    return TextProcessor(tokenizer)


def chunks(tokens: list[int], source: random.Random) -> list[list[int]]:
    """Cut tokens into blocks of random sizes, as rounds commit them."""
    found, place = [], 0
    while place < len(tokens):
        size = source.randint(1, 4)
        found.append(tokens[place : place + size])
        place += size
    return found


def stream(words: TextProcessor, blocks: list[list[int]], stop: tuple[str, ...] = ()) -> list[str]:
    """Push the blocks of one row and return the pieces, the last one final."""
    text, pieces = TextStream(words, stop), []
    for block in blocks:
        stopped = text.push(block)
        if stopped is not None:
            break
        pieces.append(text.take())
    text.close()
    return [*pieces, text.take(final=True)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("stop", [(), ("never",)])
def test_characters_split_over_tokens_appear_whole(
    words: TextProcessor, seed: int, stop: tuple[str, ...]
) -> None:
    tokens = words.encode(TEXT)
    assert len(tokens) > len(TEXT), "characters are split"
    pieces = stream(words, chunks(tokens, random.Random(seed)), stop)
    assert "".join(pieces) == words.decode(tokens) == TEXT
    assert not any(REPLACEMENT in piece for piece in pieces)


def test_one_token_at_a_time_shows_each_character_with_its_last_byte(words: TextProcessor) -> None:
    pieces = stream(words, [[token] for token in words.encode("é🙂")])
    assert [piece for piece in pieces if piece] == ["é", "🙂"]


@pytest.mark.parametrize("seed", range(20))
def test_bytes_that_are_no_text_still_add_up(words: TextProcessor, seed: int) -> None:
    source = random.Random(seed)
    tokens = [source.randrange(1, 260) for _ in range(40)]
    assert "".join(stream(words, chunks(tokens, source))) == words.decode(tokens)


def test_an_unfinished_character_is_shown_at_the_end_only(words: TextProcessor) -> None:
    tokens = words.encode("a🙂")[:-1]
    pieces = stream(words, [[token] for token in tokens])
    assert set(pieces[:-1]) <= {"", "a"} and pieces[-1] == REPLACEMENT
    assert "".join(pieces) == words.decode(tokens)


def test_special_tokens_are_not_text(words: TextProcessor) -> None:
    end = next(iter(words.eos_ids))
    assert "".join(stream(words, [words.encode("ab"), [end], words.encode("cd")])) == "abcd"


@pytest.fixture
def pieces_of_words() -> TextProcessor:
    """A space belongs to a word's start, and is not shown at the start of a text."""
    from tokenizers import Tokenizer, decoders, models

    inner = Tokenizer(
        models.WordLevel({"<unk>": 0, "▁the": 1, "▁cat": 2, "s": 3, "▁sat": 4}, "<unk>")
    )
    inner.decoder = decoders.Metaspace()
    return TextProcessor(PreTrainedTokenizerFast(tokenizer_object=inner))


def test_pieces_of_words_are_joined_as_the_tokenizer_joins_them(
    pieces_of_words: TextProcessor,
) -> None:
    """Spaces that belong to a word's start are not lost between blocks."""
    pieces = stream(pieces_of_words, [[1], [2], [3, 4], [3]])
    assert pieces == ["the", " cat", "s sat", "s", ""]


@pytest.mark.parametrize("size", [1, 3, WINDOW, WINDOW + 1])
def test_no_space_is_lost_where_a_decoding_window_starts(
    pieces_of_words: TextProcessor, size: int
) -> None:
    tokens = [1, 2, 3, 4] * WINDOW
    blocks = [tokens[i : i + size] for i in range(0, len(tokens), size)]
    assert "".join(stream(pieces_of_words, blocks)) == " ".join(["the cats sat"] * WINDOW)


def test_text_is_decoded_when_it_is_asked_for_and_in_short_windows(
    words: TextProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    decode, tokens = words.decode, words.encode("the end" * WINDOW)
    monkeypatch.setattr(words, "decode", lambda part: (sizes.append(len(part)), decode(part))[1])
    late, early = TextStream(words), TextStream(words)
    for token in tokens:
        late.push([token])
    assert sizes == []
    late.take()
    assert set(sizes) == {len(tokens)}
    sizes.clear()
    for token in tokens:
        early.push([token])
        early.take()
    assert max(sizes) == WINDOW + 1 and len(sizes) < 1.2 * len(tokens)


@pytest.mark.parametrize(
    ("stop", "text", "shown"),
    [
        (("cd",), "abxxcdyy", "abxx"),
        (("abc", "bcd"), "xabcd", "x"),
        (("aab",), "aaab", "a"),
        (("zz",), "abcz", "abcz"),
        (("ccd", "cdd"), "abccdd", "ab"),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_stop_strings_cut_the_text_whatever_the_blocks(
    stop: tuple[str, ...], text: str, shown: str, size: int
) -> None:
    tokens = spell(text)
    blocks = [tokens[i : i + size] for i in range(0, len(tokens), size)]
    pieces = stream(letters(), blocks, stop)
    assert "".join(pieces) == shown


def test_what_may_become_a_stop_string_is_held_back() -> None:
    pieces = stream(letters(), [[token] for token in spell("abababc")], ("ababc",))
    assert pieces == ["", "", "", "", "ab", "", ""]


def test_a_stop_string_inside_a_multi_byte_text_is_found(words: TextProcessor) -> None:
    blocks = [[token] for token in words.encode("né → x 漢字 y")]
    assert "".join(stream(words, blocks, ("漢字",))) == "né → x "


def test_tokens_kept_at_a_stop_are_those_up_to_its_last() -> None:
    text = TextStream(letters(), ("cd",))
    assert text.push(spell("abc")) is None
    assert text.push(spell("dxy")) == 1
    assert text.tokens == spell("abcd")


def test_prompts_are_text_or_tokens(words: TextProcessor) -> None:
    assert words.encode([5, 6]) == [5, 6]
    start = next(iter(words.eos_ids))
    assert words.encode("the")[0] == start, "a prompt starts as documents do"
    assert words.decode(words.encode("the end")) == "the end"


def test_a_chat_prompt_goes_through_the_template(tokenizer: PreTrainedTokenizerFast) -> None:
    words = TextProcessor(tokenizer)
    with pytest.raises(ValueError, match="chat is on, but the tokenizer has no chat template"):
        words.encode("hi", chat=True)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}[go]"
    try:
        assert tokenizer.decode(words.encode("hi", chat=True)) == "<user>hi[go]"
    finally:
        tokenizer.chat_template = None


def test_a_saved_tokenizer_is_loaded_again(tmp_path: Path, words: TextProcessor) -> None:
    words.save(tmp_path)
    again = TextProcessor.from_pretrained(str(tmp_path))
    assert again.encode(TEXT) == words.encode(TEXT) and again.eos_ids == words.eos_ids


def test_a_models_own_files_add_their_ends_of_sequence(
    tmp_path: Path, words: TextProcessor
) -> None:
    words.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    assert TextProcessor.from_pretrained(str(tmp_path)).eos_ids == {0, 5, 6, 7}
    (tmp_path / "generation_config.json").write_text("{}")
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": None}))
    assert TextProcessor.from_pretrained(str(tmp_path)).eos_ids == {0}
    (tmp_path / "generation_config.json").write_text('{"eos_token')
    with pytest.raises(ValueError, match=r"generation_config\.json of .* is damaged"):
        TextProcessor.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("damage", ["missing", "cut off"])
def test_a_tokenizer_that_cannot_be_loaded_is_named_in_one_line(
    tmp_path: Path, words: TextProcessor, damage: str
) -> None:
    if damage == "cut off":
        words.save(tmp_path)
        file = tmp_path / "tokenizer.json"
        file.write_text(file.read_text()[:300])
    with pytest.raises(ValueError, match="no tokenizer could be loaded from") as refusal:
        TextProcessor.from_pretrained(str(tmp_path))
    assert "\n" not in str(refusal.value)
