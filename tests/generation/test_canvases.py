"""Prompts become canvases and filled canvases become text."""

from __future__ import annotations

import pytest
import torch

from specstream.generation import MaskedPipeline, Sampler
from specstream.generation.batch import Limits
from specstream.generation.canvases import (
    CanvasPrompt,
    complete_canvas,
    encode_canvas,
    make_canvas,
    mask_blocks,
)
from specstream.structures import Origin
from specstream.unmasking import StaticSchedule
from tests.masked_toys import EOS, MASK, ScriptedMasked, characters, spelled

LIMITS = Limits(max_new_tokens=4)


def encode(prompt: object) -> CanvasPrompt:
    return encode_canvas(characters(), prompt, MASK, LIMITS)  # type: ignore[arg-type]


def test_a_prompt_without_masks_is_continued_by_as_many_as_the_limit_allows() -> None:
    assert encode("ab") == CanvasPrompt([EOS, *spelled("ab"), *[MASK] * 4], 3)
    assert encode(spelled("ab")) == CanvasPrompt([*spelled("ab"), *[MASK] * 4], 2)


def test_masks_stand_where_a_text_names_them() -> None:
    a, b, c = spelled("abc")
    assert encode("a[MASK]b[MASK:3]c") == CanvasPrompt([EOS, a, MASK, b, *[MASK] * 3, c], None)
    assert encode("[MASK]a") == CanvasPrompt([EOS, MASK, a], None)
    assert encode("[MASK][MASK:2]") == CanvasPrompt([EOS, *[MASK] * 3], None)
    assert encode("a[MASK:0002]") == CanvasPrompt([EOS, a, MASK, MASK], None)
    assert encode("a<|mask|>b") == CanvasPrompt([EOS, a, MASK, b], None)


def test_mask_tokens_of_a_list_are_filled_where_they_are() -> None:
    tokens = [MASK, *spelled("ab"), MASK]
    assert encode(tokens) == CanvasPrompt(tokens, None)
    assert encode(tuple(tokens)) == CanvasPrompt(tokens, None)


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ([], "empty"),
        ("a[MASK:0]b", "no masked token"),
        ("a[MASK]\ud800", "no text"),
        ("a[MASK:99999999999999]", "more masked tokens than 1048576"),
        (f"a[MASK:{'9' * 5000}]", "more masked tokens than 1048576"),
        ("a[MASK:1000000]b[MASK:1000000]", "more masked tokens than 1048576"),
    ],
)
def test_what_is_no_canvas_is_refused_in_one_line(prompt: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        encode(prompt)
    assert "\n" not in str(caught.value)


def test_padding_is_never_masked_even_where_it_looks_like_a_mask() -> None:
    prompts = [CanvasPrompt([5, 0, 5], 1), CanvasPrompt([0], None)]
    canvas = make_canvas(prompts, [7, 9], mask_id=0, device=torch.device("cpu"))
    assert canvas.masked.tolist() == [[False, True, False], [True, False, False]]
    assert canvas.lengths.tolist() == [3, 1] and canvas.prompts.tolist() == [7, 9]


def test_blocks_count_from_each_rows_first_mask() -> None:
    masked = torch.tensor([[0, 0, 1, 1, 1, 1, 0], [1, 0, 0, 0, 1, 0, 1], [0] * 7]).bool()
    numbers, totals = mask_blocks(masked, 2)
    assert numbers[masked].tolist() == [0, 0, 1, 1, 0, 2, 3]
    assert totals[:2].tolist() == [[2, 2, 0, 0], [1, 0, 1, 1]] and not totals[2].any()
    numbers, totals = mask_blocks(masked, None)
    assert not numbers.any() and totals.tolist() == [[4], [3], [0]]


def finished(prompt: CanvasPrompt, tokens: list[int], ignore_eos: bool = False) -> tuple[str, int]:
    places = [i for i, token in enumerate(prompt.tokens) if token == MASK]
    origins = dict.fromkeys(reversed(places), Origin.PLAIN)
    found = complete_canvas(characters(), prompt, 3, tokens, origins, ignore_eos)
    assert found.prompt == 3 and len(found.tokens) == len(found.origins)
    assert found.tokens == [tokens[i] for i in places[: len(found.tokens)]]
    return found.text, len(found.tokens)


def test_a_continuation_ends_before_the_end_of_text() -> None:
    a, b = spelled("ab")
    prompt = encode("ab")
    assert finished(prompt, [EOS, a, b, a, EOS, b, b]) == ("a", 2)  # the end itself is a token
    assert finished(prompt, [EOS, a, b, EOS, a, a, a]) == ("", 1)
    assert finished(prompt, [EOS, a, b, a, a, b, b]) == ("aabb", 4)


def test_ignore_eos_keeps_what_follows_the_end_of_text() -> None:
    a, b = spelled("ab")
    assert finished(encode("ab"), [EOS, a, b, a, EOS, b, b], ignore_eos=True) == ("abb", 4)


def test_infilling_keeps_all_of_a_text_whatever_was_filled_in() -> None:
    a, b = spelled("ab")
    assert finished(encode("a[MASK:2]b"), [EOS, a, EOS, a, b]) == ("aab", 2)
    assert finished(encode([a, EOS, MASK, b]), [a, EOS, b, b]) == ("abb", 1)


def test_a_pipeline_returns_the_texts_of_its_canvases() -> None:
    a, b, c = spelled("abc")
    script = [EOS, a, b, c, a, EOS, b]
    for ignore_eos, text in ((False, "bca"), (True, "bcab")):
        sampler = Sampler(StaticSchedule(2), limits=Limits(5, ignore_eos=ignore_eos))
        pipeline = MaskedPipeline(ScriptedMasked(script), characters(), sampler, batch_size=3)
        prompts = ["a", [EOS, a], "[MASK]b[MASK]"]
        found = pipeline.complete(prompts, indices=[5, 2, 8])
        assert [completion.prompt for completion in found] == [5, 2, 8]
        assert [completion.text for completion in found] == [text, text, "abc"]
        assert [len(completion.tokens) for completion in found[:2]] == [4 + ignore_eos] * 2
        assert found[2].tokens == [a, c]
