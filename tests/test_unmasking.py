"""Which masks a step reveals: against loops over rows, against diffusers, and by hand."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from specstream.unmasking import EntropyBound, Factor, StaticSchedule, Threshold, Unmasking

ORDERS = ["confidence", "margin", "entropy", "random"]
RULES = [
    *[StaticSchedule(4, order) for order in ORDERS],  # type: ignore[arg-type]
    StaticSchedule(1),
    StaticSchedule(99),
    Threshold(),
    Threshold(0.3),
    Threshold(1.0),
    Factor(0.5),
    Factor(1.0),
    Factor(math.inf),
    EntropyBound(0.0),
    EntropyBound(0.7),
    EntropyBound(3.0),
    EntropyBound(math.inf),
]


@dataclass(frozen=True)
class Canvas:
    """The arguments of `choose`, in its order."""

    probs: Tensor
    tokens: Tensor
    masked: Tensor
    step: Tensor
    total: Tensor
    coins: Tensor

    def choose(self, rule: Unmasking) -> Tensor:
        return rule.choose(*self.arguments())

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.probs, self.tokens, self.masked, self.step, self.total, self.coins

    def row(self, index: int) -> Canvas:
        return Canvas(*(argument[index : index + 1] for argument in self.arguments()))


def canvas(rows: int = 60, size: int = 9, seed: int = 0) -> Canvas:
    """Return random laws, half the rows with many ties, one row without masks."""
    noise = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, size, 5, generator=noise, dtype=torch.float64) * 3
    probs = scores.softmax(-1)
    coarse = torch.tensor([[0.5, 0.25, 0.25, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0, 0.0]]).double()
    picks = torch.randint(0, 2, (rows // 2, size), generator=noise)
    probs[: rows // 2] = coarse[picks]
    tokens = probs.argmax(-1)
    other = torch.randint(0, 5, (rows, size), generator=noise)
    tokens = torch.where(torch.rand(rows, size, generator=noise) < 0.3, other, tokens)
    masked = torch.rand(rows, size, generator=noise) < 0.7
    masked[0], masked[1] = False, True
    step = torch.randint(0, 5, (rows,), generator=noise)
    coins = torch.rand(rows, size, generator=noise, dtype=torch.float64)
    # Some rows are behind: with positions masked again there is more left than the schedule knows.
    total = (masked.sum(-1) + step - 4).clamp(min=0)
    return Canvas(probs, tokens, masked, step, total, coins)


def entropy(law: list[float]) -> float:
    return -sum(value * math.log(value) for value in law if value > 0)


def precedence(order: str, law: list[float], token: int, coin: float) -> float:
    best = sorted(law)
    return {
        "confidence": -law[token],
        "margin": best[-2] - best[-1],
        "entropy": entropy(law),
        "random": coin,
    }[order]


def longest(rule: Unmasking, values: list[float], step: int, total: int) -> int:
    """Return how many positions the rule's definition reveals; values are in its order."""
    sizes = range(1, len(values) + 1)
    if isinstance(rule, StaticSchedule):
        shares = [total // rule.num_steps] * rule.num_steps
        shares[: total % rule.num_steps] = [total // rule.num_steps + 1] * (total % rule.num_steps)
        return max(1, shares[step]) if step < rule.num_steps else max(1, shares[-1])
    if isinstance(rule, Threshold):
        return max([1, *[n for n in sizes if -values[n - 1] >= rule.threshold]])
    if isinstance(rule, Factor):
        return max([1, *[n for n in sizes if (n + 1) * (1 + values[n - 1]) < rule.factor]])
    assert isinstance(rule, EntropyBound)
    return max([1, *[n for n in sizes if math.fsum(values[: n - 1]) <= rule.bound]])


def chosen_one_by_one(rule: Unmasking, row: Canvas) -> list[int]:
    """Return what the rule reveals in a canvas of one row, by its definition."""
    order = getattr(rule, "order", "entropy" if isinstance(rule, EntropyBound) else "confidence")
    laws, tokens, coins = row.probs[0].tolist(), row.tokens[0].tolist(), row.coins[0].tolist()
    masked = torch.nonzero(row.masked[0])[:, 0].tolist()
    first = {i: precedence(order, laws[i], tokens[i], coins[i]) for i in masked}
    # Rounded, so that laws which are equal on paper are equal here whatever the summation.
    ranked = sorted(masked, key=lambda i: (round(first[i], 12), i))
    count = longest(rule, [first[i] for i in ranked], int(row.step), int(row.total))
    return sorted(ranked[:count])


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_batch_reveals_what_the_definition_says_row_by_row(rule: Unmasking) -> None:
    batch = canvas()
    chosen = batch.choose(rule)
    for i in range(len(chosen)):
        revealed = torch.nonzero(chosen[i])[:, 0].tolist()
        assert revealed == chosen_one_by_one(rule, batch.row(i)), f"row {i}"


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_every_row_with_masks_makes_progress_and_nothing_else_is_revealed(rule: Unmasking) -> None:
    batch = canvas(rows=300, seed=1)
    chosen = batch.choose(rule)
    assert chosen.dtype == torch.bool and chosen.shape == batch.masked.shape
    assert not (chosen & ~batch.masked).any()
    assert torch.equal(chosen.any(-1), batch.masked.any(-1))
    assert not chosen[0].any()


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_row_does_not_depend_on_its_neighbours_or_on_what_is_not_masked(rule: Unmasking) -> None:
    batch = canvas(rows=20, seed=2)
    chosen = batch.choose(rule)
    alone = torch.cat([batch.row(i).choose(rule) for i in range(20)])
    assert torch.equal(chosen, alone)
    other = canvas(rows=20, seed=3)
    outside = ~batch.masked
    probs = torch.where(outside[..., None], other.probs, batch.probs)
    tokens = torch.where(outside, other.tokens, batch.tokens)
    coins = torch.where(outside, other.coins, batch.coins)
    changed = Canvas(probs, tokens, batch.masked, batch.step, batch.total, coins)
    assert torch.equal(chosen, changed.choose(rule))


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_among_equals_the_lowest_positions_are_revealed(rule: Unmasking) -> None:
    size = 40  # long enough that an unstable sort would show
    masked = torch.arange(size).remainder(3).ne(0)[None]
    even = Canvas(torch.full((1, size, 4), 0.25), torch.zeros(1, size).long(), masked,
                  torch.zeros(1).long(), masked.sum(-1), torch.zeros(1, size).double())  # fmt: skip
    chosen = even.choose(rule)
    assert torch.equal(chosen, masked & (masked.cumsum(-1) <= chosen.sum()))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("num_steps", [1, 3, 4, 7, 20])
def test_a_static_schedule_reveals_equal_shares_and_then_has_no_mask_left(
    num_steps: int, order: str
) -> None:
    batch = canvas(rows=40, seed=4)
    rule = StaticSchedule(num_steps, order)  # type: ignore[arg-type]
    total = batch.masked.sum(-1)
    left, counts = batch.masked, []
    for k in range(num_steps):
        step = torch.full((40,), k)
        chosen = rule.choose(batch.probs, batch.tokens, left, step, total, batch.coins)
        left = left & ~chosen
        counts.append(chosen.sum(-1))
    assert not left.any()
    shares = torch.stack(counts, -1)
    assert torch.equal(shares.sum(-1), total)
    assert (shares.amax(-1) - shares.amin(-1)).max() <= 1
    assert torch.equal(shares, shares.sort(-1, descending=True).values)  # the larger ones first


def test_a_random_order_is_that_of_the_coins_alone() -> None:
    batch, other = canvas(seed=6), canvas(seed=7)
    rule = StaticSchedule(4, "random")
    blind = Canvas(other.probs, other.tokens, batch.masked, batch.step, batch.total, batch.coins)
    assert torch.equal(batch.choose(rule), blind.choose(rule))
    tossed = Canvas(batch.probs, batch.tokens, batch.masked, batch.step, batch.total, other.coins)
    assert not torch.equal(batch.choose(rule), tossed.choose(rule))


def row_of(confidences: list[float]) -> Canvas:
    """Return one row of masks whose first token is the candidate and has these probabilities."""
    best = torch.tensor([confidences], dtype=torch.float64)
    size = best.shape[1]
    return Canvas(torch.stack([best, 1 - best], -1), torch.zeros(1, size).long(),
                  torch.ones(1, size).bool(), torch.zeros(1).long(), torch.tensor([size]),
                  torch.zeros(1, size).double())  # fmt: skip


def test_the_rules_by_hand() -> None:
    def revealed(rule: Unmasking, *confidences: float) -> list[int]:
        return torch.nonzero(row_of([*confidences]).choose(rule)[0])[:, 0].tolist()

    assert revealed(Threshold(0.75), 0.5, 0.75, 1.0, 0.625) == [1, 2]  # the threshold included
    assert revealed(Threshold(0.75), 0.5, 0.625, 0.5) == [1]
    # 2 * 1/8 and 3 * 1/8 are below 1/2, 4 * 1/8 is not.
    assert revealed(Factor(0.5), 0.875, 0.875, 0.875, 0.5) == [0, 1]
    assert revealed(Factor(0.5), 0.5, 0.625) == [1]
    # Entropies 0, log 2, log 2: a sum without its largest of 0, 0, log 2.
    assert revealed(EntropyBound(0.0), 0.5, 1.0, 0.5) == [0, 1]
    assert revealed(EntropyBound(0.7), 0.5, 1.0, 0.5) == [0, 1, 2]
    assert revealed(EntropyBound(0.0), 0.75, 0.875) == [1]
    assert revealed(StaticSchedule(2), 0.5, 0.875, 0.625) == [1, 2]


def test_a_tiny_entropy_is_not_lost_in_the_sum() -> None:
    law = torch.tensor([[1 - 1e-18, 1e-18], [0.5, 0.5]]).double()[None]
    tokens, rows = torch.zeros(1, 2).long(), torch.zeros(1).long()
    chosen = EntropyBound(0.0).choose(law, tokens, torch.ones(1, 2).bool(), rows, rows + 2, law[0])
    assert chosen.tolist() == [[True, False]]  # (h + log 2) - log 2 would round to a certain 0


@pytest.mark.parametrize("bound", [0.0, 0.1, 1.0, 4.0])
def test_the_entropy_bound_is_that_of_diffusers(bound: float) -> None:
    diffusers = pytest.importorskip("diffusers")
    noise = torch.Generator().manual_seed(8)
    logits = torch.randn(50, 16, 30, generator=noise, dtype=torch.float64) * 4
    scheduler = diffusers.EntropyBoundScheduler(entropy_bound=bound, t_max=1.0, t_min=1.0)
    theirs = scheduler.step(logits, 0, torch.zeros(50, 16).long(), generator=noise)
    rows = torch.zeros(50).long()
    chosen = EntropyBound(bound).choose(
        logits.softmax(-1), theirs.sampled_tokens, torch.ones(50, 16).bool(), rows, rows + 16,
        torch.zeros(50, 16).double(),
    )  # fmt: skip
    assert torch.equal(chosen, theirs.accepted_index)


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_threshold_is_that_of_diffusers(temperature: float, threshold: float) -> None:
    """Its quota of a step is a minimum: one where there are as many steps as positions.

    It asks for more than the threshold and not for as much, which random laws do not tell apart.
    """
    diffusers = pytest.importorskip("diffusers")
    noise = torch.Generator().manual_seed(9)
    logits = torch.randn(50, 16, 30, generator=noise) * 4
    masked = torch.rand(50, 16, generator=noise) < 0.6
    masked[0] = False
    scheduler = diffusers.BlockRefinementScheduler(block_length=16, threshold=threshold)
    scheduler.set_timesteps(16)
    theirs = scheduler.step(logits, 0, torch.where(masked, 30, 0), mask_token_id=30,
                            temperature=temperature, generator=noise)  # fmt: skip
    rows = torch.zeros(50).long()
    chosen = Threshold(threshold).choose(
        logits.softmax(-1), theirs.sampled_tokens, masked, rows, masked.sum(-1),
        torch.zeros(50, 16).double(),
    )  # fmt: skip
    assert torch.equal(chosen, theirs.transfer_index)
    assert chosen.sum(-1).max() > 1


@pytest.mark.parametrize("rule", [StaticSchedule(3, "margin"), Threshold(), Factor(1.0),
                                  EntropyBound(1.0)], ids=repr)  # fmt: skip
def test_unmasking_compiles_to_one_graph(rule: Unmasking) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(rule.choose, fullgraph=True, dynamic=False, backend="aot_eager")
    batch = canvas(rows=8, seed=10)
    assert torch.equal(compiled(*batch.arguments()), batch.choose(rule))


@pytest.mark.parametrize("make, message", [
    (lambda: StaticSchedule(0), "num_steps must be at least 1, got 0"),
    (lambda: StaticSchedule(4, "best"),  # type: ignore[arg-type]
     "order must be one of confidence, random, margin, entropy, got 'best'"),
    (lambda: Threshold(0.0), "threshold must be in (0, 1], got 0.0"),
    (lambda: Threshold(1.1), "threshold must be in (0, 1], got 1.1"),
    (lambda: Threshold(math.nan), "threshold must be in (0, 1], got nan"),
    (lambda: Factor(0.0), "factor must be positive, got 0.0"),
    (lambda: Factor(math.nan), "factor must be positive, got nan"),
    (lambda: EntropyBound(-0.1), "bound must not be negative, got -0.1"),
    (lambda: EntropyBound(math.nan), "bound must not be negative, got nan"),
])  # fmt: skip
def test_options_outside_their_range_are_refused(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError) as caught:
        make()
    assert str(caught.value) == message
