"""Each divergence: its value, its gradient, zero at p = q, and the LM head in chunks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from specstream.divergences import (
    JSD,
    CrossEntropy,
    Divergence,
    DPace,
    EndToEndTV,
    ForwardKL,
    LKHybrid,
    NegativeLogAcceptance,
    ReverseKL,
    TotalVariation,
    acceptance,
    chunked_divergence,
)

AGAINST_TARGET = [
    ForwardKL(),
    ReverseKL(),
    JSD(),
    JSD(beta=0.1),
    TotalVariation(),
    NegativeLogAcceptance(),
    LKHybrid(),
    EndToEndTV(gamma=3),
    DPace(gamma=3),
    DPace(TotalVariation(), gamma=2, confidence="likelihood"),
    ForwardKL(temperature=2.0),
]
ALL = [CrossEntropy(), DPace(CrossEntropy(), confidence="likelihood"), *AGAINST_TARGET]
MASK = torch.tensor([[0, 1, 1, 1, 1, 0, 1, 1], [1, 0, 1, 1, 1, 1, 1, 0]], dtype=torch.bool)
NUM_SCORED = int(MASK.sum())


def logits(seed: int, size: int = NUM_SCORED, vocabulary: int = 7) -> Tensor:
    noise = torch.Generator().manual_seed(seed)
    return torch.randn(size, vocabulary, generator=noise, dtype=torch.float64) * 2


def labels(size: int = NUM_SCORED) -> Tensor:
    return torch.arange(size) % 7


def total(divergence: Divergence, target: Tensor, draft: Tensor) -> Tensor:
    return divergence.total(divergence.measure(target, draft, labels()), MASK)


@pytest.mark.parametrize("divergence", ALL, ids=repr)
def test_the_gradient_is_right(divergence: Divergence) -> None:
    target, draft = logits(0), logits(1).requires_grad_()
    if isinstance(divergence, LKHybrid | DPace):  # weights are held constant: compare by hand
        grad = torch.autograd.grad(total(divergence, target, draft), draft)[0]
        assert grad.isfinite().all() and grad.abs().sum() > 0
    else:
        assert torch.autograd.gradcheck(lambda x: total(divergence, target, x), draft)


@pytest.mark.parametrize("divergence", AGAINST_TARGET, ids=repr)
def test_value_and_gradient_are_zero_where_the_draft_equals_the_target(
    divergence: Divergence,
) -> None:
    draft = logits(0).requires_grad_()
    value = total(divergence, logits(0), draft)
    assert abs(value.item()) < 1e-12
    assert torch.autograd.grad(value, draft)[0].abs().max() < 1e-12


@pytest.mark.parametrize("divergence", AGAINST_TARGET, ids=repr)
def test_a_step_down_the_gradient_raises_acceptance(divergence: Divergence) -> None:
    target, draft = logits(0), logits(1).requires_grad_()
    start = acceptance(target, draft).mean()
    for _ in range(40):
        grad = torch.autograd.grad(total(divergence, target, draft), draft)[0]
        draft = (draft - grad).detach().requires_grad_()
    assert acceptance(target, draft).mean() > start + 0.05


def test_values_follow_their_formulas() -> None:
    target, draft = logits(0), logits(1)
    p, q = target.softmax(-1), draft.softmax(-1)
    kl, reverse = (p * (p / q).log()).sum(-1), (q * (q / p).log()).sum(-1)
    accepted = torch.minimum(p, q).sum(-1)
    m = 0.3 * p + 0.7 * q
    jsd = 0.3 * (p * (p / m).log()).sum(-1) + 0.7 * (q * (q / m).log()).sum(-1)
    blend = (-3 * accepted).exp()
    expected = {
        CrossEntropy(): -q.gather(-1, labels()[:, None])[:, 0].log(),
        ForwardKL(): kl,
        ReverseKL(): reverse,
        JSD(beta=0.3): jsd,
        TotalVariation(): 1 - accepted,
        NegativeLogAcceptance(): -accepted.log(),
        LKHybrid(): blend * kl + (1 - blend) * (1 - accepted),
    }
    for divergence, value in expected.items():
        torch.testing.assert_close(divergence(target, draft, labels()), value)
    torch.testing.assert_close(acceptance(target, draft), accepted)


def test_temperature_divides_the_logits_of_both() -> None:
    hot = ForwardKL(temperature=2.0)(logits(0), logits(1), None)
    torch.testing.assert_close(hot, ForwardKL()(logits(0) / 2, logits(1) / 2, None))


def test_jsd_tends_to_the_two_kls() -> None:
    target, draft, tiny = logits(0), logits(1), 1e-7
    near_forward = JSD(beta=tiny)(target, draft, None) / tiny
    near_reverse = JSD(beta=1 - tiny)(target, draft, None) / tiny
    torch.testing.assert_close(near_forward, ForwardKL()(target, draft, None), rtol=1e-3, atol=0)
    torch.testing.assert_close(near_reverse, ReverseKL()(target, draft, None), rtol=1e-3, atol=0)


def test_negative_log_acceptance_survives_laws_that_hardly_overlap() -> None:
    far = torch.tensor([[400.0, 0.0, -900.0]]), torch.tensor([[-900.0, 0.0, 400.0]])
    assert NegativeLogAcceptance()(*far, None).isfinite().all()


def runs(mask: Tensor) -> list[list[int]]:
    """Return the scored positions, numbered row by row, in runs: the slow reference."""
    found, number = [], 0
    for row in mask.tolist():
        previous = False
        for scored in row:
            if scored:
                found.append([number]) if not previous else found[-1].append(number)
                number += 1
            previous = scored
    return found


def test_end_to_end_tv_is_minus_the_accepted_length_of_every_block() -> None:
    accepted = acceptance(logits(0), logits(1))
    expected = 0.0
    for run in runs(MASK):
        for start in range(len(run)):
            block = run[start : start + 3]
            expected += 1 - accepted[block].cumprod(0).sum() / len(block)
    torch.testing.assert_close(total(EndToEndTV(gamma=3), logits(0), logits(1)), expected)


def test_dpace_weighs_a_position_by_the_prefixes_that_need_it() -> None:
    divergence = DPace(ForwardKL(), gamma=3, smoothing=0.25)
    confidence = 0.75 * acceptance(logits(0), logits(1)) + 0.25
    values = ForwardKL()(logits(0), logits(1), None)
    expected = 0.0
    for run in runs(MASK):
        for start in range(len(run)):
            block = run[start : start + 3]
            prefixes = confidence[block].cumprod(0)
            weighted = [prefixes[i:].sum() * values[n] for i, n in enumerate(block)]
            expected += sum(weighted) / len(block)
    torch.testing.assert_close(total(divergence, logits(0), logits(1)), expected)


def test_dpace_on_cross_entropy_has_the_gradient_of_the_accepted_length() -> None:
    draft = logits(1).requires_grad_()
    divergence = DPace(CrossEntropy(), gamma=3, smoothing=0.0, confidence="likelihood")
    grad = torch.autograd.grad(total(divergence, logits(0), draft), draft)[0]
    stands = (-CrossEntropy()(None, draft, labels())).exp()
    length = sum(
        stands[run[start : start + 3]].cumprod(0).sum() / len(run[start : start + 3])
        for run in runs(MASK)
        for start in range(len(run))
    )
    torch.testing.assert_close(grad, -torch.autograd.grad(length, draft)[0])


def test_blocks_of_one_are_the_divergence_itself() -> None:
    target, draft = logits(0), logits(1)
    plain = total(TotalVariation(), target, draft)
    torch.testing.assert_close(total(EndToEndTV(gamma=1), target, draft), plain)
    weighted = total(DPace(TotalVariation(), gamma=1, smoothing=1.0), target, draft)
    torch.testing.assert_close(weighted, plain)


def test_no_scored_position_gives_a_loss_of_zero() -> None:
    nothing, empty = torch.zeros(2, 4, dtype=torch.bool), logits(0, size=0)
    for divergence in ALL:
        measures = divergence.measure(empty, empty, labels(0))
        assert divergence.total(measures, nothing).item() == 0


@pytest.mark.parametrize("divergence", ALL, ids=repr)
@pytest.mark.parametrize("chunk", [4, 100])
def test_chunks_give_the_value_and_gradient_of_all(divergence: Divergence, chunk: int) -> None:
    torch.manual_seed(0)
    draft_head, target_head = nn.Linear(5, 7).double(), nn.Linear(6, 7).double()
    draft_hidden = torch.randn(NUM_SCORED, 5).double().requires_grad_()
    target_hidden = torch.randn(NUM_SCORED, 6).double()
    leaves = [draft_hidden, *draft_head.parameters()]

    whole = total(divergence, target_head(target_hidden).detach(), draft_head(draft_hidden))
    measures = chunked_divergence(
        divergence, draft_hidden, draft_head, target_hidden, target_head, labels(), chunk
    )
    made = divergence.total(measures, MASK)
    torch.testing.assert_close(made, whole)
    expected = torch.autograd.grad(whole, leaves)
    for mine, theirs in zip(torch.autograd.grad(made, leaves), expected, strict=True):
        torch.testing.assert_close(mine, theirs)


class LargestTensor(TorchFunctionMode):
    """Watches the results of torch functions for the largest number of elements."""

    largest = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.largest = max(self.largest, made.numel())
        return made


def saved_elements(num_positions: int, chunk: int, vocabulary: int = 50) -> tuple[int, int]:
    """Return the largest tensor made and all elements kept for the backward pass."""
    torch.manual_seed(0)
    draft_head, target_head = nn.Linear(4, vocabulary), nn.Linear(4, vocabulary)
    hidden = torch.randn(num_positions, 4, requires_grad=True)
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
        return tensor

    with LargestTensor() as watch, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        measures = chunked_divergence(
            ForwardKL(), hidden, draft_head, hidden.detach(), target_head, None, chunk
        )
    with watch:
        measures.sum().backward()
    return watch.largest, sum(kept.values())


def test_logits_exist_only_for_a_chunk() -> None:
    largest, kept = saved_elements(num_positions=1000, chunk=10)
    assert largest <= 1000 * 4  # the hidden states; all logits would be 50 000
    assert kept < 1000 * 20
    largest, kept = saved_elements(num_positions=1000, chunk=1000)
    assert largest == 1000 * 50 and kept > 1000 * 50  # the probe does see them


def test_without_gradients_nothing_is_kept_and_the_target_never_gets_any() -> None:
    draft_head, target_head = nn.Linear(4, 7), nn.Linear(4, 7)
    hidden = torch.randn(9, 4)
    with torch.no_grad():
        made = chunked_divergence(ForwardKL(), hidden, draft_head, hidden, target_head, None, 2)
    assert not made.requires_grad and made.dtype == torch.float32
    made = chunked_divergence(ForwardKL(), hidden, draft_head, hidden, target_head, None, 2)
    made.sum().backward()
    assert target_head.weight.grad is None and draft_head.weight.grad is not None


def test_cross_entropy_needs_no_target() -> None:
    divergence = DPace(CrossEntropy(), confidence="likelihood")
    head = nn.Linear(4, 7)
    assert not divergence.needs_target and not CrossEntropy().needs_target
    made = chunked_divergence(divergence, torch.randn(9, 4), head, None, None, labels(9), 2)
    assert made.shape == (9, 2)


def test_half_precision_logits_are_measured_in_float32() -> None:
    target, draft = logits(0).bfloat16(), logits(1).bfloat16()
    for divergence in ALL:
        assert divergence(target, draft, labels()).dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ForwardKL(temperature=0.0), "temperature must be positive, got 0.0"),
        (lambda: ForwardKL(temperature=math.inf), "temperature must be positive"),
        (lambda: JSD(beta=1.0), r"beta must be in \(0, 1\), got 1.0"),
        (lambda: LKHybrid(eta=-1.0), "eta must be 0 or positive, got -1.0"),
        (lambda: EndToEndTV(gamma=0), "gamma, the length of a block, must be at least 1, got 0"),
        (lambda: DPace(gamma=0), "gamma"),
        (lambda: DPace(smoothing=1.5), r"smoothing must be in \[0, 1\], got 1.5"),
        (lambda: DPace(confidence="luck"), "confidence must be .* got 'luck'"),
        (lambda: DPace(EndToEndTV()), "single positions"),
    ],
)
def test_a_wrong_option_is_one_clear_line(make, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=words):
        make()
