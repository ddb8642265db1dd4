"""Certainty is asked for where the draft is right already, and only there."""

from __future__ import annotations

import math

import pytest
import torch

from specstream.divergences import CrossEntropy, Divergence, DPace, EndToEndTV, ForwardKL
from specstream.training import Certainty


@pytest.mark.parametrize("base", [ForwardKL(), CrossEntropy(), ForwardKL(temperature=0.7)])
@pytest.mark.parametrize("weight", [0.0, 2.0, 0.3])
def test_the_value_is_the_divergence_and_the_entropy_of_what_is_right(
    base: Divergence, weight: float
) -> None:
    noise = torch.Generator().manual_seed(0)
    p, q = (torch.randn(40, 5, generator=noise, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(5, (40,), generator=noise)
    found = Certainty(base, weight)(p, q, labels)
    apart = base(p, q, labels)
    num_right = 0
    for i in range(40):
        expected = float(apart[i])
        scores = [math.exp(x / 0.5) for x in q[i].tolist()]
        if max(range(5), key=lambda v: scores[v]) == labels[i]:
            law = [x / sum(scores) for x in scores]
            expected -= weight * sum(x * math.log(x) for x in law)
            num_right += 1
        assert float(found[i]) == pytest.approx(expected, rel=1e-9)
    assert 3 < num_right < 20


def test_the_entropy_has_a_temperature_and_a_gradient_only_where_the_draft_is_right() -> None:
    q = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0]], requires_grad=True)
    labels = torch.tensor([0, 1])
    (gradient,) = torch.autograd.grad(Certainty(ForwardKL())(q.detach(), q, labels).sum(), q)
    assert gradient[0, 0] < -0.01 and gradient[0, 1] > 0.01  # surer of the first
    torch.testing.assert_close(gradient[1], torch.zeros(3), atol=1e-6, rtol=0)
    for temperature in (0.5, 1.0, 2.0):
        certainty = Certainty(ForwardKL(), 1.0, temperature=temperature)
        law = torch.distributions.Categorical(logits=q[:1].detach() / temperature)
        value = certainty(q[:1].detach(), q[:1].detach(), labels[:1])
        torch.testing.assert_close(value, law.entropy())


def test_a_token_that_is_never_predicted_leaves_numbers() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        q = torch.randn(6, 5).to(dtype)
        q[:, 1] = torch.finfo(dtype).min
        q = q.requires_grad_()
        labels = q.argmax(-1)
        value = Certainty(CrossEntropy())(None, q, labels)
        value.sum().backward()
        assert value.isfinite().all() and q.grad.isfinite().all()
        kept = [0, 2, 3, 4]
        law = (q.detach().float()[:, kept] / 0.5).softmax(-1)
        entropy = -(law * law.log()).sum(-1)
        expected = CrossEntropy()(None, q.detach(), labels) + 2 * entropy
        torch.testing.assert_close(value.detach(), expected)


def test_it_reads_a_target_if_the_divergence_does() -> None:
    assert Certainty().needs_target and Certainty() == Certainty(ForwardKL(), 2.0, temperature=0.5)
    assert not Certainty(CrossEntropy()).needs_target


def test_what_has_no_meaning_is_refused() -> None:
    for weight in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"weight must be 0 or positive, got {weight}"):
            Certainty(weight=weight)
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        Certainty(temperature=0)
    for nested in (DPace(), EndToEndTV()):
        with pytest.raises(ValueError, match="single positions, got one of blocks"):
            Certainty(nested)
