"""Real pretrained weights: the 260 thousand parameters of stories260K tell their story."""

from __future__ import annotations

from pathlib import Path

import pytest

from specstream.drafters import CutDraftModel, PromptLookup
from specstream.generation import (
    AutoregressivePipeline,
    FixedLength,
    Limits,
    SpeculativePipeline,
)
from specstream.models import PretrainedLM
from specstream.processors import TextProcessor
from specstream.sampling import Sampling
from specstream.verification import BlockRejection
from tests.llama2c import Pieces, load_llama2c

ROOT = Path(__file__).resolve().parents[2]
PLACES = (ROOT / "models", ROOT.parent / "shared" / "models")
FOLDER = next((p / "stories260k" for p in PLACES if (p / "stories260k").is_dir()), None)
STORY = ", there was a little girl named Lily. She loved to play outside in the park."
GREEDY = Sampling(temperature=0.0)

pytestmark = pytest.mark.skipif(FOLDER is None, reason="no models/stories260k beside the code")


@pytest.fixture(scope="module")
def stories() -> PretrainedLM:
    assert FOLDER is not None
    return load_llama2c(FOLDER / "stories260K.bin")


@pytest.fixture(scope="module")
def words() -> TextProcessor:
    assert FOLDER is not None
    return TextProcessor(Pieces(FOLDER / "tok512.bin"))  # type: ignore[arg-type]


def test_the_greedy_story_is_the_published_one(stories: PretrainedLM, words: TextProcessor) -> None:
    plain = AutoregressivePipeline(stories, words, GREEDY, Limits(64, ("park.",)))
    assert plain.complete(["Once upon a time"])[0].text + "park." == STORY


@pytest.mark.parametrize("name", ["cut", "lookup"])
def test_a_drafter_tells_the_same_story_with_fewer_passes_a_row(
    stories: PretrainedLM, words: TextProcessor, name: str
) -> None:
    drafter = CutDraftModel(stories, 3, 1) if name == "cut" else PromptLookup(stories)
    prompts = ["Once upon a time", "Lily and Tom", "The dog was"]
    plain = AutoregressivePipeline(stories, words, GREEDY, Limits(48), 3)
    fast = SpeculativePipeline(
        stories, drafter, words, BlockRejection(), FixedLength(3), GREEDY, Limits(48), 3
    )
    assert [c.text for c in fast.complete(prompts)] == [c.text for c in plain.complete(prompts)]
    assert fast.stats.accepted_length is not None and fast.stats.accepted_length > 1.1
