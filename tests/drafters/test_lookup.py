"""Prompt lookup, and a draft model that looks the prompt up first."""

from __future__ import annotations

import random

import pytest
import torch

from specstream.drafters import DraftModel, LookupFirst, PromptLookup
from specstream.generation.batch import Batch, Limits
from specstream.models import PretrainedLM
from specstream.sampling import Noise, Sampling
from specstream.structures import Context, Guarantee, Stats
from tests.toys import letters, spell, stood, toy_lm

VOCABULARY = 26


def context_of(texts: list[str]) -> Context:
    stats = Stats("text", Guarantee.EXACT_LAW)
    prompts = [spell(text) for text in texts]
    numbers = range(len(prompts))
    return Batch(prompts, numbers, 256, Limits(), letters(), stats, torch.device("cpu")).context


def guess(text: str, num_tokens: int = 4, min_ngram: int = 1, max_ngram: int = 3) -> str:
    """Return what prompt lookup drafts after `text`."""
    drafter = PromptLookup(None, min_ngram, max_ngram)
    draft = drafter.propose(
        context_of([text]), drafter.new_cache(1, 256), num_tokens, Sampling(), Noise(0)
    )
    assert draft.probs is None
    tokens = draft.tokens[0, : draft.lengths[0]].tolist()
    return "".join(chr(ord("a") + token) for token in tokens)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("abcdexyabc", "dexy"),  # what followed
        ("xabcyabczab", "czab"),  # the last occurrence, which goes on to the end
        ("abxcbyab", "xcby"),  # two letters before one
        ("ababab", "abab"),  # a copy that overtakes the end goes on with itself
        ("aaa", "aaaa"),
        ("abcd", ""),  # nothing recurs
        ("a", ""),
    ],
)
def test_the_guess_is_what_followed_last_time(text: str, expected: str) -> None:
    assert guess(text) == expected


def test_shorter_matches_than_the_least_are_no_guess() -> None:
    assert guess("abxcb", min_ngram=2) == ""
    assert guess("abxab", min_ngram=2) == "xabx"


def slow_guess(tokens: list[int], num_tokens: int, shortest: int, longest: int) -> list[int]:
    """The definition: search the whole row for its longest ending n-gram, last place first."""
    for n in range(longest, shortest - 1, -1):
        for end in range(len(tokens) - 1, n - 1, -1):
            if len(tokens) > n and tokens[end - n : end] == tokens[-n:]:
                grown = list(tokens)
                for i in range(num_tokens):
                    grown.append(grown[end + i])
                return grown[len(tokens) :]
    return []


@pytest.mark.parametrize("seed", range(5))
def test_the_growing_index_equals_a_search_of_the_whole_row(seed: int) -> None:
    source = random.Random(seed)
    drafter = PromptLookup(None, 2, 4)
    context = context_of(["a", "bcbc"])
    cache = drafter.new_cache(2, 256)
    for _ in range(40):
        for row in context.history:
            row += [source.randrange(3) for _ in range(source.randint(0, 4))]
        for row, found in zip(context.history, drafter.guesses(context, cache, 3), strict=True):
            assert found == slow_guess(row, 3, 2, 4)


def test_rows_with_and_without_a_guess_share_a_draft() -> None:
    drafter = PromptLookup(None, 2, 3)
    context = context_of(["abxab", "abcd"])
    draft = drafter.propose(context, drafter.new_cache(2, 256), 3, Sampling(), Noise(0))
    assert draft.lengths.tolist() == [3, 0]
    assert draft.tokens[0].tolist() == spell("xab")


@pytest.mark.parametrize(("shortest", "longest"), [(0, 2), (3, 2)])
def test_ngrams_that_make_no_sense_are_refused(shortest: int, longest: int) -> None:
    with pytest.raises(ValueError, match="need 1 <= min <= max"):
        PromptLookup(None, shortest, longest)


@pytest.fixture(scope="module")
def model() -> PretrainedLM:
    return toy_lm(VOCABULARY)


class Counting(DraftModel):
    """A draft model that counts its drafts."""

    runs = 0

    def propose(self, *arguments):
        self.runs += 1
        return super().propose(*arguments)


def test_a_copied_row_reports_a_one_hot_law_and_others_their_own(model: PretrainedLM) -> None:
    inner = Counting(model, lambda: model)
    drafter = LookupFirst(model, lambda _: inner, 2, 3)
    context = context_of(["abxab", "abcd"])
    draft = drafter.propose(context, drafter.new_cache(2, 256), 3, Sampling(), Noise(0))
    alone = inner.propose(
        context_of(["abxab", "abcd"]), inner.new_cache(2, 256), 3, Sampling(), Noise(0)
    )
    assert draft.tokens[0].tolist() == spell("xab")
    assert draft.probs is not None and alone.probs is not None
    assert torch.equal(draft.probs[0].argmax(-1), draft.tokens[0])
    assert torch.equal(draft.probs[0].sum(-1), torch.ones(3)) and draft.probs[0].max() == 1
    assert torch.equal(draft.tokens[1], alone.tokens[1])
    assert torch.equal(draft.probs[1], alone.probs[1])


def test_the_model_is_not_run_where_every_row_copies(model: PretrainedLM) -> None:
    inner = Counting(model, lambda: model)
    drafter = LookupFirst(model, lambda _: inner, 2, 3)
    cache = drafter.new_cache(2, 256)
    draft = drafter.propose(context_of(["abxab", "cdcd"]), cache, 3, Sampling(), Noise(0))
    drafter.observe(stood([3, 0]), cache)
    assert inner.runs == 0 and draft.probs is None
    cache = drafter.new_cache(2, 256)
    drafter.propose(context_of(["abxab", "abcd"]), cache, 3, Sampling(), Noise(0))
    assert inner.runs == 1


def test_a_row_that_copied_beside_one_that_did_not_is_read_again(model: PretrainedLM) -> None:
    """The model drafted its own tokens there too; what it read of them must not count as known."""
    inner = DraftModel(model, lambda: model)
    drafter = LookupFirst(model, lambda _: inner, 2, 3)
    context = context_of(["abxab", "abcd"])
    cache = drafter.new_cache(2, 256)
    drafter.propose(context, cache, 3, Sampling(), Noise(0))
    drafter.observe(stood([3, 3]), cache)
    assert cache.model.valid == [5, 4 + 2]  # committed; committed and the drafts that were read
