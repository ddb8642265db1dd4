"""What stands of a drafted canvas: each rule by hand, and what all of them must respect."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from torch import Tensor

from specstream.structures import CanvasDraft, Guarantee
from specstream.verification import (
    CanvasVerifier,
    ConfidenceThreshold,
    DisagreementWithConfidence,
    ExactMatch,
    KLThreshold,
    NoVerification,
    TrustVerifier,
    masked,
)

RULES = [
    ExactMatch(),
    ConfidenceThreshold(),
    ConfidenceThreshold(0.3),
    DisagreementWithConfidence(),
    DisagreementWithConfidence(0.0),
    DisagreementWithConfidence(1.0),
    KLThreshold(0.0),
    KLThreshold(0.5),
    TrustVerifier(),
    NoVerification(),
]


def random_draft(rows: int = 50, size: int = 12, vocabulary: int = 6) -> tuple[CanvasDraft, Tensor]:
    """Return a draft with garbage where nothing was drafted, and the target's laws."""
    noise = torch.Generator().manual_seed(0)
    scores = torch.randn(rows, size, vocabulary, generator=noise) * 2
    p = scores.softmax(-1)
    q = (scores + torch.randn(scores.shape, generator=noise)).softmax(-1)
    q[: rows // 5] = p[: rows // 5]  # here they agree
    drafted = torch.rand(rows, size, generator=noise) < 0.6
    drafted[0] = False
    tokens = torch.where(torch.rand(rows, size, generator=noise) < 0.6, p.argmax(-1), q.argmax(-1))
    steps = torch.where(drafted, torch.randint(0, 4, (rows, size), generator=noise), -1)
    q = q.masked_fill(~drafted[..., None], math.nan)
    p = p.masked_fill(~drafted[..., None], math.nan)
    return CanvasDraft(tokens, drafted, steps, q), p


def one_row(laws: list[list[float]], tokens: list[int], q: list[list[float]] | None = None,
            drafted: list[bool] | None = None) -> tuple[CanvasDraft, Tensor]:  # fmt: skip
    """Return a draft of one row, of which all is drafted if nothing else is said."""
    p = torch.tensor([laws], dtype=torch.float64)
    probs = p if q is None else torch.tensor([q], dtype=torch.float64)
    which = torch.tensor([drafted or [True] * len(tokens)])
    return CanvasDraft(torch.tensor([tokens]), which, which.long() - 1, probs), p


def kept(rule: CanvasVerifier, draft: CanvasDraft, p: Tensor) -> list[int]:
    return torch.nonzero(rule(draft, p).kept[0])[:, 0].tolist()


LAWS = [[0.75, 0.25, 0.0], [0.25, 0.5, 0.25], [0.125, 0.0, 0.875], [0.25, 0.375, 0.375]]


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_only_drafted_positions_are_kept_and_the_rest_of_the_canvas_is_untouched(
    rule: CanvasVerifier,
) -> None:
    draft, p = random_draft()
    verdict = rule(draft, p)
    assert verdict.kept.dtype == torch.bool
    assert not (verdict.kept & ~draft.drafted).any()
    assert torch.equal(verdict.tokens[~draft.drafted], draft.tokens[~draft.drafted])
    assert verdict.kept[1:].any() and rule.guarantee is Guarantee.HEURISTIC


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_draft_of_nothing_changes_nothing(rule: CanvasVerifier) -> None:
    draft, p = one_row(LAWS, [0, 1, 2, 0], drafted=[False] * 4)
    verdict = rule(draft, p)
    assert not verdict.kept.any() and torch.equal(verdict.tokens, draft.tokens)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_row_does_not_depend_on_its_neighbours(rule: CanvasVerifier) -> None:
    draft, p = random_draft(rows=10)
    verdict = rule(draft, p)
    for i in range(10):
        row = CanvasDraft(*(part[i : i + 1] for part in
                            (draft.tokens, draft.drafted, draft.steps, draft.probs)))  # fmt: skip
        alone = rule(row, p[i : i + 1])
        assert torch.equal(alone.kept[0], verdict.kept[i])
        assert torch.equal(alone.tokens[0], verdict.tokens[i])


def test_exact_match_keeps_the_targets_best_tokens() -> None:
    draft, p = one_row(LAWS, [0, 0, 2, 1])
    assert kept(ExactMatch(), draft, p) == [0, 2, 3]
    assert torch.equal(ExactMatch()(draft, p).tokens, draft.tokens)
    assert kept(ExactMatch(), *one_row(LAWS, [0, 0, 2, 2])) == [0, 2]  # the lowest id wins a tie


def test_a_confidence_threshold_keeps_what_the_target_finds_as_likely() -> None:
    draft, p = one_row(LAWS, [0, 1, 2, 2])
    assert kept(ConfidenceThreshold(0.75), draft, p) == [0, 2]  # the threshold included
    assert kept(ConfidenceThreshold(0.375), draft, p) == [0, 1, 2, 3]
    assert kept(ConfidenceThreshold(), draft, p) == []


def test_disagreement_counts_only_where_the_target_is_confident() -> None:
    draft, p = one_row(LAWS, [1, 0, 2, 0])  # the target would rather have 0, 1, 2, 1
    assert kept(DisagreementWithConfidence(0.5), draft, p) == [2, 3]  # the threshold included
    assert kept(DisagreementWithConfidence(0.75), draft, p) == [1, 2, 3]
    assert kept(DisagreementWithConfidence(0.8), draft, p) == [0, 1, 2, 3]
    agreed, laws = one_row(LAWS, [0, 1, 2, 1])
    assert kept(DisagreementWithConfidence(0.0), agreed, laws) == [0, 1, 2, 3]


def test_disagreement_without_a_threshold_is_exact_match() -> None:
    draft, p = random_draft()
    assert torch.equal(DisagreementWithConfidence(0.0)(draft, p).kept, ExactMatch()(draft, p).kept)


def test_a_higher_threshold_of_disagreement_keeps_more_and_of_confidence_less() -> None:
    draft, p = random_draft()
    thresholds = [0.1, 0.3, 0.5, 0.7, 0.9]
    bold = [int(DisagreementWithConfidence(t)(draft, p).kept.sum()) for t in thresholds]
    shy = [int(ConfidenceThreshold(t)(draft, p).kept.sum()) for t in thresholds]
    assert bold == sorted(bold) and bold[0] < bold[-1]
    assert shy == sorted(shy, reverse=True) and shy[0] > shy[-1]


def test_the_divergence_is_that_of_the_target_from_the_drafter() -> None:
    p, q = [0.5, 0.25, 0.25], [0.25, 0.25, 0.5]
    nats = 0.5 * math.log(2) - 0.25 * math.log(2)
    for size in (-1e-9, 1e-9):
        stands = kept(KLThreshold(nats + size), *one_row([p], [0], [q])) == [0]
        assert stands is (size > 0)
    lopsided, even = [0.75, 0.25, 0.0], [0.25, 0.5, 0.25]
    forward = 0.75 * math.log(3) + 0.25 * math.log(0.5)
    assert kept(KLThreshold(forward + 1e-9), *one_row([lopsided], [0], [even])) == [0]
    assert kept(KLThreshold(forward + 1e-9), *one_row([even], [0], [lopsided])) == []


def test_equal_laws_have_no_divergence_at_all() -> None:
    p = (torch.randn(1, 500, 40, generator=torch.Generator().manual_seed(1)) * 12).softmax(-1)
    p[0, 0] = torch.eye(40)[3]
    everything = torch.ones(1, 500).bool()
    draft = CanvasDraft(p.argmin(-1), everything, everything.long(), p)
    assert KLThreshold(0.0)(draft, p).kept.all()


def test_a_drafters_zero_costs_much_but_not_infinitely_much() -> None:
    draft, p = one_row([[0.5, 0.5]], [0], [[1.0, 0.0]])
    cost = 0.5 * math.log(0.5) + 0.5 * math.log(0.5 / masked.SMALLEST_Q)
    assert kept(KLThreshold(cost - 1e-6), draft, p) == []
    assert kept(KLThreshold(cost + 1e-6), draft, p) == [0]
    for dtype in (torch.float32, torch.float64):
        law = torch.tensor([[[0.0, 1.0]]], dtype=dtype)
        certain = CanvasDraft(draft.tokens, draft.drafted, draft.steps, law.flip(-1))
        assert KLThreshold(28.0)(certain, law).kept.all()


def test_trust_puts_the_targets_best_tokens_where_something_was_drafted() -> None:
    draft, p = one_row(LAWS, [2, 2, 2, 2], drafted=[True, False, True, True])
    verdict = TrustVerifier()(draft, p)
    assert torch.equal(verdict.kept, draft.drafted)
    assert verdict.tokens.tolist() == [[0, 2, 2, 1]]
    assert draft.tokens.tolist() == [[2, 2, 2, 2]]


def test_only_no_verification_does_without_the_target() -> None:
    draft, _ = random_draft()
    verdict = NoVerification()(draft, None)
    assert torch.equal(verdict.kept, draft.drafted) and torch.equal(verdict.tokens, draft.tokens)
    assert [type(rule) for rule in RULES if not rule.needs_target] == [NoVerification]


def test_every_rule_of_the_module_is_tested_here() -> None:
    classes = {
        cls for _, cls in inspect.getmembers(masked, inspect.isclass)
        if issubclass(cls, CanvasVerifier) and not inspect.isabstract(cls)
    }  # fmt: skip
    assert classes == {type(rule) for rule in RULES}


@pytest.mark.parametrize("rule", [DisagreementWithConfidence(), KLThreshold(0.5), TrustVerifier()],
                         ids=repr)  # fmt: skip
def test_the_rules_compile_to_one_graph(rule: CanvasVerifier) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(rule.__call__, fullgraph=True, dynamic=False, backend="aot_eager")
    draft, p = random_draft(rows=4)
    made, plain = compiled(draft, p), rule(draft, p)
    assert torch.equal(made.kept, plain.kept) and torch.equal(made.tokens, plain.tokens)


@pytest.mark.parametrize("rule, threshold, message", [
    (ConfidenceThreshold, 0.0, "threshold must be in (0, 1], got 0.0"),
    (ConfidenceThreshold, 1.5, "threshold must be in (0, 1], got 1.5"),
    (ConfidenceThreshold, math.nan, "threshold must be in (0, 1], got nan"),
    (DisagreementWithConfidence, -0.1, "threshold must be in [0, 1], got -0.1"),
    (DisagreementWithConfidence, 1.1, "threshold must be in [0, 1], got 1.1"),
    (KLThreshold, -1.0, "threshold must not be negative, got -1.0"),
    (KLThreshold, math.nan, "threshold must not be negative, got nan"),
])  # fmt: skip
def test_thresholds_outside_their_range_are_refused(
    rule: type[CanvasVerifier], threshold: float, message: str
) -> None:
    with pytest.raises(ValueError) as caught:
        rule(threshold)  # type: ignore[call-arg]
    assert str(caught.value) == message
