"""What canvases cost is measured once, off the clock, and kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from specstream.drafters import MaskedDraftModel
from specstream.generation import (
    CostModelLength,
    DualDiffusionPipeline,
    FreeDavePipeline,
    Limits,
    Sampler,
)
from specstream.generation.masked_costs import (
    TargetPass,
    drafted_costs,
    nested_costs,
    rounded,
)
from tests.masked_toys import characters, masked_lm


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "specstream" / "costs"


def test_tables_hold_the_lengths_that_may_be_chosen_and_are_stored(cache: Path) -> None:
    target, lengths = masked_lm(), CostModelLength(4, every=2)
    way = TargetPass(target, target.forward, False, "", 1)
    nested = nested_costs(way, lengths, 32)
    assert len(nested.verify) == len(nested.draft) == 5
    assert nested.verify[4] > 0 and set(nested.draft) == {0.0}
    drafter = MaskedDraftModel(target, lambda: masked_lm(block_length=4))
    drafted = drafted_costs(way, drafter, lengths, 32)
    assert 0 < drafted.draft[2] < drafted.draft[4]
    assert drafted.verify[2] == drafted.verify[4]
    assert len(list(cache.iterdir())) == 2
    assert nested_costs(way, lengths, 32) == nested  # not measured again
    assert rounded(target, 20) == 32


def test_pipelines_whose_steps_are_chosen_measure_what_they_need(cache: Path) -> None:
    target, sampler = masked_lm(), Sampler(limits=Limits(8))
    drafter = MaskedDraftModel(target, lambda: masked_lm(block_length=4))
    pair = DualDiffusionPipeline(
        target, drafter, characters(), lengths=CostModelLength(2), copies=1, sampler=sampler
    )
    nested = FreeDavePipeline(target, characters(), CostModelLength(2), sampler)
    for pipeline in (pair, nested):
        (found,) = pipeline.complete(["ab"])
        assert len(found.tokens) <= 8 and pipeline.costs is not None
        assert pipeline.stats.seconds > 0
    assert len(list(cache.iterdir())) == 2


def test_a_draft_of_several_copies_has_no_step_of_the_targets_to_count() -> None:
    drafter = MaskedDraftModel(masked_lm(), lambda: masked_lm(block_length=4))
    for corruption, copies in ((0.1, 2), (0.0, None)):
        target = masked_lm(corruption=corruption)
        with pytest.raises(ValueError, match="with copies 1 only"):
            DualDiffusionPipeline(
                target, drafter, characters(), lengths=CostModelLength(2), copies=copies
            )
