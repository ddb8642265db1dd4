"""Where a row ends: nothing follows EOS, a stop string or the limit, even inside a drafted block.

The target is a script, so every end can be put at a chosen place of a block.
"""

from __future__ import annotations

import pytest

from specstream.drafters import DraftModel
from specstream.generation import (
    AutoregressivePipeline,
    FixedLength,
    Limits,
    SpeculativePipeline,
)
from specstream.sampling import Sampling
from specstream.structures import Origin, Step
from tests.toys import ScriptedLM, letters, spell

PROMPT = spell("xy")
TEXT = "abcdefghijklmnop"
EOS = spell("e")[0]


def pipeline(
    limits: Limits,
    num_drafted: int = 4,
    wrong: str = "",
    eos: int | None = None,
    batch_size: int = 1,
) -> SpeculativePipeline:
    """Decode `TEXT`; the drafter knows it but for the letters in `wrong`."""
    script = PROMPT + spell(TEXT)
    guess = PROMPT + spell("".join("z" if letter in wrong else letter for letter in TEXT))
    target, draft = ScriptedLM(script), ScriptedLM(guess)
    return SpeculativePipeline(
        target, DraftModel(target, lambda: draft), letters(eos), None, FixedLength(num_drafted),
        Sampling(temperature=0.0), limits, batch_size,
    )  # fmt: skip


def run(pipe: SpeculativePipeline) -> list[Step]:
    return list(pipe.generate([PROMPT]))


def joined(steps: list[Step]) -> tuple[str, str]:
    """Return the printed text and the letters of the committed tokens."""
    committed = [token for step in steps for token in step.tokens]
    return "".join(step.text for step in steps), "".join(chr(ord("a") + t) for t in committed)


@pytest.mark.parametrize("num_drafted", [0, 1, 2, 3, 4, 5, 6, 20])
def test_nothing_follows_eos_wherever_in_a_block_it_stands(num_drafted: int) -> None:
    steps = run(pipeline(Limits(12), num_drafted, eos=EOS))
    assert joined(steps) == ("abcd", "abcde")
    assert [step.finished for step in steps] == [False] * (len(steps) - 1) + [True]


def test_the_origin_of_the_last_token_is_where_it_came_from() -> None:
    origins = {
        "accepted": run(pipeline(Limits(12), 6, eos=EOS))[-1].origins,
        "correction": run(pipeline(Limits(12), 6, wrong="e", eos=EOS))[-1].origins,
        "bonus": run(pipeline(Limits(12), 4, eos=EOS))[-1].origins,
    }
    for name, found in origins.items():
        assert found == [Origin.ACCEPTED] * 4 + [Origin(name)]
    assert run(pipeline(Limits(12), 0, eos=EOS))[-1].origins == [Origin.PLAIN]


def test_eos_is_a_token_like_others_where_it_is_ignored() -> None:
    steps = run(pipeline(Limits(7, ignore_eos=True), eos=EOS))
    assert joined(steps) == ("abcdfg", "abcdefg")


@pytest.mark.parametrize("num_drafted", [0, 1, 3, 4, 20])
@pytest.mark.parametrize("limit", range(1, 8))
def test_the_limit_is_never_overshot_and_always_reached(limit: int, num_drafted: int) -> None:
    pipe = pipeline(Limits(limit), num_drafted)
    steps = run(pipe)
    assert joined(steps) == (TEXT[:limit], TEXT[:limit])
    assert pipe.stats.elements == limit
    assert all(len(step.origins) == len(step.tokens) > 0 for step in steps)


@pytest.mark.parametrize("num_drafted", [0, 1, 2, 3, 5, 9])
@pytest.mark.parametrize(
    ("stop", "text", "tokens"),
    [
        (("def",), "abc", "abcdef"),
        (("a",), "", "a"),
        (("hi", "gh"), "abcdef", "abcdefgh"),
        (("ij", "hijk"), "abcdefgh", "abcdefghij"),
    ],
)
def test_a_stop_string_ends_the_row_and_is_never_shown(
    stop: tuple[str, ...], text: str, tokens: str, num_drafted: int
) -> None:
    """Its tokens fall into one block or several, by the draft length."""
    steps = run(pipeline(Limits(14, stop), num_drafted))
    assert joined(steps) == (text, tokens)
    assert [step.finished for step in steps] == [False] * (len(steps) - 1) + [True]


def test_the_start_of_a_stop_string_is_held_back_until_it_is_decided() -> None:
    steps = run(pipeline(Limits(6, ("cdx", "ez")), num_drafted=0))
    assert [step.text for step in steps] == ["a", "b", "", "", "cd", "ef"]


def test_eos_before_a_stop_string_wins_and_frees_what_was_held_back() -> None:
    steps = run(pipeline(Limits(12, ("cdef",)), num_drafted=9, eos=EOS))
    assert joined(steps) == ("abcd", "abcde")


def test_the_limit_frees_what_was_held_back() -> None:
    steps = run(pipeline(Limits(4, ("cdef",)), num_drafted=2))
    assert joined(steps) == ("abcd", "abcd")


def test_a_row_that_ended_leaves_its_neighbours_alone() -> None:
    script = ScriptedLM(spell("xyabcdefghijklmnop"))
    pipe = SpeculativePipeline(
        script, DraftModel(script, lambda: script), letters(EOS), None, FixedLength(3),
        Sampling(temperature=0.0), Limits(5), batch_size=2,
    )  # fmt: skip
    steps = list(pipe.generate([spell("xy"), spell("xyabcde")]))
    ended = [i for i, step in enumerate(steps) if step.prompt == 0 and step.finished]
    assert joined([s for s in steps if s.prompt == 0]) == ("abcd", "abcde")
    assert joined([s for s in steps if s.prompt == 1]) == ("fghij", "fghij")
    assert not [step for step in steps[ended[0] + 1 :] if step.prompt == 0]
    assert pipe.stats.elements == 10


def test_a_single_prompt_token_is_enough() -> None:
    target = ScriptedLM(spell("abcd"))
    assert (
        AutoregressivePipeline(target, letters(), limits=Limits(3)).complete([[0]])[0].text == "bcd"
    )


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Limits(0), "max_new_tokens must be at least 1, not 0"),
        (lambda: Limits(1, ("",)), "a stop string must not be empty"),
        (lambda: pipeline(Limits(), batch_size=0), "batch_size must be at least 1, not 0"),
    ],
)
def test_limits_that_make_no_sense_are_refused(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
