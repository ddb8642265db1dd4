"""The law of whole pipelines: what they emit is distributed as the plain target's own law says.

Thousands of rows decode the same few prompts, each with its own noise; the joint counts of three
emitted tokens meet the exact law, computed without a cache, in a chi-square test.  The tokens are
taken from the first round on and across later rounds.  `LossyRule` must fail where others pass.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from specstream.drafters import Drafter, DraftModel, LookupFirst, PromptLookup
from specstream.generation import (
    AutoregressivePipeline,
    CostModelLength,
    DraftLength,
    FixedLength,
    Limits,
    SpeculativePipeline,
    StepCosts,
)
from specstream.models import PretrainedLM
from specstream.sampling import Sampling
from specstream.verification import BlockRejection, TokenRejection, TokenVerifier
from tests.toys import (
    VOCABULARY,
    LossyRule,
    chi_square,
    count_tokens,
    joint_law,
    letters,
    nearby,
    toy_lm,
)

ROWS = 2048
TOKENS = 5  # decoded for each row
RAGGED = ([0, 1, 2, 1, 2, 1], [3], [4, 4], [2, 0, 1, 3, 0, 1, 3, 0, 1])
COSTS = StepCosts(1.0, (0.0, 1.05, 1.1, 1.15, 1.2), (0.0, 0.2, 0.4, 0.6, 0.8))


@dataclass(frozen=True)
class Scenario:
    """What one run varies; everything else is the default."""

    drafter: str = "draft model"
    sampling: Sampling = field(default_factory=Sampling)
    lengths: DraftLength = field(default_factory=lambda: FixedLength(4))
    prompts: tuple[list[int], ...] = ([0, 1, 2],)


SCENARIOS = {
    "draft model": Scenario(),
    "draft model, ragged": Scenario(prompts=RAGGED),
    "draft model, T=0.7": Scenario(sampling=Sampling(0.7)),
    "draft model, top-k": Scenario(sampling=Sampling(top_k=3)),
    "draft model, top-p, ragged": Scenario(sampling=Sampling(0.7, top_p=0.8), prompts=RAGGED),
    "draft model, min-p": Scenario(sampling=Sampling(min_p=0.2)),
    "draft model, penalty, ragged": Scenario(
        sampling=Sampling(repetition_penalty=1.5), prompts=RAGGED
    ),
    "draft model, cost model, ragged": Scenario(lengths=CostModelLength(4), prompts=RAGGED),
    "draft model, one token": Scenario(lengths=FixedLength(1)),
    "lookup, ragged": Scenario("lookup", prompts=RAGGED),
    "lookup, T=0.7, top-k, penalty": Scenario(
        "lookup", Sampling(0.7, top_k=4, repetition_penalty=1.3), prompts=RAGGED
    ),
    "lookup, cost model": Scenario("lookup", lengths=CostModelLength(4), prompts=RAGGED),
    "lookup first, ragged": Scenario("lookup first", prompts=RAGGED),
    "lookup first, all options": Scenario(
        "lookup first",
        Sampling(0.7, top_k=4, top_p=0.95, min_p=0.02, repetition_penalty=1.2),
        CostModelLength(4),
        RAGGED,
    ),
}


@pytest.fixture(scope="module")
def target() -> PretrainedLM:
    return toy_lm()


def drafter_named(name: str, target: PretrainedLM) -> Drafter:
    """Build one of the three drafters, the model's laws near the target's."""
    if name == "lookup":
        return PromptLookup(target, 1, 3)
    model = DraftModel(target, lambda: nearby(target, 0.4))
    return model if name == "draft model" else LookupFirst(target, lambda _: model, 2, 3)


def p_values(pipeline: AutoregressivePipeline | SpeculativePipeline, scenario: Scenario, rows: int):
    """Return the p-values of tokens 0..2 and 2..4, all the scenario's prompts together."""
    kinds = len(scenario.prompts)
    assert rows % kinds == 0
    prompts = [scenario.prompts[row % kinds] for row in range(rows)]
    found = pipeline.complete(prompts, seed=7)
    first, later, first_law, later_law = [], [], [], []
    for kind, prompt in enumerate(scenario.prompts):
        law = joint_law(pipeline.target, prompt, pipeline.sampling, TOKENS) / kinds
        first.append(count_tokens(found[kind::kinds], slice(0, 3), VOCABULARY))
        later.append(count_tokens(found[kind::kinds], slice(2, 5), VOCABULARY))
        first_law.append(law.sum((3, 4)))
        later_law.append(law.sum((0, 1)))
    return (
        chi_square(torch.stack(first), torch.stack(first_law)),
        chi_square(torch.stack(later), torch.stack(later_law)),
    )


def speculative(
    target: PretrainedLM, scenario: Scenario, rule: TokenVerifier, batch_size: int = ROWS
) -> SpeculativePipeline:
    return SpeculativePipeline(
        target,
        drafter_named(scenario.drafter, target),
        letters(),
        rule,
        scenario.lengths,
        scenario.sampling,
        Limits(TOKENS),
        batch_size,
        costs=COSTS,
    )


@pytest.mark.parametrize("rule", [TokenRejection(), BlockRejection()], ids=["token", "block"])
@pytest.mark.parametrize("name", SCENARIOS)
def test_the_joint_law_of_speculative_text_is_the_targets(
    target: PretrainedLM, rule: TokenVerifier, name: str
) -> None:
    pipeline = speculative(target, SCENARIOS[name], rule)
    assert min(p_values(pipeline, SCENARIOS[name], ROWS)) > 0.01
    assert pipeline.stats.tested and pipeline.stats.acceptance not in (0, 1, None)


def test_the_joint_law_of_plain_text_is_the_targets(target: PretrainedLM) -> None:
    scenario = Scenario(sampling=Sampling(0.7, top_k=4, repetition_penalty=1.3), prompts=RAGGED)
    pipeline = AutoregressivePipeline(
        target, letters(), scenario.sampling, Limits(TOKENS), batch_size=ROWS
    )
    assert min(p_values(pipeline, scenario, ROWS)) > 0.01


def test_single_rows_have_the_targets_law(target: PretrainedLM) -> None:
    pipeline = speculative(target, Scenario(), BlockRejection(), batch_size=1)
    law = joint_law(target, [0, 1, 2], Sampling(), 2)
    found = pipeline.complete([[0, 1, 2]] * 128, seed=3)
    assert chi_square(count_tokens(found, slice(0, 2), VOCABULARY), law) > 0.01


@pytest.mark.parametrize("name", ["draft model", "draft model, top-k", "lookup, ragged"])
def test_a_lossy_rule_fails_the_same_test(target: PretrainedLM, name: str) -> None:
    pipeline = speculative(target, SCENARIOS[name], LossyRule())
    assert min(p_values(pipeline, SCENARIOS[name], ROWS)) < 1e-6


def test_a_drafter_that_misreports_its_law_fails_the_same_test(target: PretrainedLM) -> None:
    class Misreporting(DraftModel):
        def propose(self, *arguments):
            draft = super().propose(*arguments)
            flat = torch.full_like(draft.probs, 1 / VOCABULARY)
            return type(draft)(draft.tokens, flat, draft.lengths)

    pipeline = speculative(target, Scenario(), TokenRejection())
    pipeline.drafter = Misreporting(target, lambda: nearby(target, 0.4))
    assert min(p_values(pipeline, Scenario(), ROWS)) < 1e-6


def test_two_rounds_never_share_a_coin(target: PretrainedLM) -> None:
    """A coin used twice would tie a token to the one before it, whatever the model says."""
    flat = toy_lm(sharpness=1e-3)  # uniform laws: any dependence between tokens is the noise's
    pipeline = speculative(flat, Scenario(), BlockRejection())
    pipeline.drafter = DraftModel(flat, lambda: nearby(target, 0.4))
    found = pipeline.complete([[0]] * (2 * ROWS), seed=5)
    uniform = torch.full([VOCABULARY] * 3, VOCABULARY**-3.0, dtype=torch.float64)
    for start in range(TOKENS - 2):
        counts = count_tokens(found, slice(start, start + 3), VOCABULARY)
        assert chi_square(counts, uniform) > 0.01
