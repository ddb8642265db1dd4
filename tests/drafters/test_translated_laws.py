"""A translated draft has no law over the target's tokens, and no rule may take it for one."""

from __future__ import annotations

import pytest

from specstream.drafters import TranslatedDrafter
from specstream.generation import DualDiffusionPipeline
from specstream.verification import ConfidenceThreshold, KLThreshold
from tests.drafters import test_translated as shared

lm = shared.lm


def test_a_rule_that_compares_laws_is_refused_where_there_is_none(lm: shared.Get) -> None:
    target, processor = lm("pairs"), shared.processor_of(lm("pairs"))
    drafter = TranslatedDrafter(target, lambda: lm("characters"))
    with pytest.raises(ValueError) as refused:
        DualDiffusionPipeline(target, drafter, processor, KLThreshold(0.5))
    assert str(refused.value) == (
        "KLThreshold compares laws, and TranslatedDrafter reports none over the target's tokens"
    )
    DualDiffusionPipeline(target, drafter, processor, ConfidenceThreshold(0.5))


def test_laws_are_compared_where_both_models_have_the_same_tokens(lm: shared.Get) -> None:
    target = lm("pairs")
    drafter = TranslatedDrafter(target, lambda: lm("pairs", 4))
    pipeline = DualDiffusionPipeline(target, drafter, shared.processor_of(target), KLThreshold(0.5))
    assert drafter.reports_law and pipeline.verifier.needs_draft_law
