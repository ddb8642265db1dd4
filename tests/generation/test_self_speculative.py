"""Self-speculative filling: its law is the sequential one, in fewer passes, row by row.

The law is enumerated on a toy: three tokens and a mask token, three masks, every order of them, by
forward passes of trunk and head that share nothing with the sampler but the two networks.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from specstream.generation import SelfSpeculativeSampler
from specstream.generation.self_speculative import FilledRound, random_order, window_ends
from specstream.models import SelfSpeculativeHead, UntrainedMaskedLM
from specstream.sampling import Noise, Role, Sampling, probabilities
from specstream.structures import Guarantee, Law
from specstream.verification import BlockRejection, TokenRejection, TokenVerifier
from tests.toys import LossyRule, chi_square

TOKENS, MASK = 3, 3
CANVAS = [1, MASK, 0, MASK, MASK, 2]
PLACES = [1, 3, 4]
ORDERS = list(itertools.permutations(range(3)))
ROWS = 6144


@torch.no_grad()
def toy(seed: int = 0, max_positions: int = 32) -> UntrainedMaskedLM:
    """A trunk whose laws are peaked and depend on all of the canvas."""
    lm = UntrainedMaskedLM(
        TOKENS + 1, 16, 24, 1, 2, 1, max_positions, False, seed=seed, mask_id=MASK
    )
    for weight in lm.parameters():
        if weight.dim() > 1:
            weight.mul_(15)
    return lm.eval().requires_grad_(False)


@torch.no_grad()
def causal_layer(trunk: UntrainedMaskedLM, amount: float = 0.25) -> SelfSpeculativeHead:
    """A head that moves the trunk's laws by what it was told; none for amount 0."""
    head, noise = SelfSpeculativeHead(trunk), torch.Generator().manual_seed(2)
    head.out.weight.copy_(torch.randn(16, 16, generator=noise) * amount)
    return head.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def trunk() -> UntrainedMaskedLM:
    return toy()


@pytest.fixture(scope="module")
def head(trunk: UntrainedMaskedLM) -> SelfSpeculativeHead:
    return causal_layer(trunk)


@torch.no_grad()
def sequential_law(
    trunk: UntrainedMaskedLM, head: SelfSpeculativeHead, sampling: Sampling, ends: list[int]
) -> Tensor:
    """Return the law of (order, tokens at PLACES), (6, 3, 3, 3), from its definition."""
    cases = list(itertools.product(ORDERS, itertools.product(range(TOKENS), repeat=3)))
    sigma = torch.tensor([[PLACES[i] for i in order] for order, _ in cases])  # (162, 3)
    said = torch.tensor([[values[i] for i in order] for order, values in cases])
    law = torch.full((len(cases),), 1 / len(ORDERS), dtype=torch.float64)
    for first, end in itertools.pairwise([0, *ends]):
        canvas = torch.tensor(CANVAS).repeat(len(cases), 1)
        canvas.scatter_(1, sigma[:, :first], said[:, :first])
        hidden = trunk.hidden(canvas, trunk.mask(canvas * 0, canvas * 0))
        window, tokens = sigma[:, first:end], said[:, first:end]
        states = head(hidden, window, tokens, torch.ones_like(window, dtype=torch.bool))
        p = probabilities(trunk.head(states).double(), sampling)
        law = law * p.gather(2, tokens[:, :, None])[:, :, 0].prod(1)
    return law.view(len(ORDERS), TOKENS, TOKENS, TOKENS)


def filled(sampler: SelfSpeculativeSampler, seed: int, rows: int = ROWS) -> Tensor:
    """Fill CANVAS `rows` times; return the counts of (order, tokens at PLACES)."""
    tokens = torch.tensor([CANVAS]).expand(rows, -1)
    masked, noise = tokens == MASK, Noise(seed)
    prompts = torch.arange(rows)
    *_, last = sampler.fill(tokens, masked, torch.full((rows,), len(CANVAS)), prompts, noise)
    order = random_order(masked, prompts, noise)[:, :3]
    code = torch.tensor([PLACES.index(i) if i in PLACES else 0 for i in range(len(CANVAS))])
    numbers = {order: number for number, order in enumerate(ORDERS)}
    which = torch.tensor([numbers[tuple(row)] for row in code[order].tolist()])
    values = last.tokens[:, PLACES]
    counts = torch.zeros(len(ORDERS), TOKENS + 1, TOKENS + 1, TOKENS + 1)
    counts.index_put_((which, *values.T), torch.ones(rows), accumulate=True)
    assert counts[:, :TOKENS, :TOKENS, :TOKENS].sum() == rows  # a mask is never predicted
    return counts[:, :TOKENS, :TOKENS, :TOKENS]


ENDS = {1: [3], 2: [1, 3], 3: [1, 2, 3]}  # of three masks


@pytest.mark.parametrize("rule", [TokenRejection(), BlockRejection()], ids=["token", "block"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("num_windows", [1, 2])
def test_the_joint_law_is_the_sequential_one(
    trunk: UntrainedMaskedLM,
    head: SelfSpeculativeHead,
    num_windows: int,
    temperature: float,
    rule: TokenVerifier,
) -> None:
    sampling = Sampling(temperature)
    law = sequential_law(trunk, head, sampling, ENDS[num_windows])
    assert math.isclose(float(law.sum()), 1.0, abs_tol=1e-9)
    sampler = SelfSpeculativeSampler(trunk, head, sampling, num_windows, rule)
    assert sampler.guarantee == Guarantee.EXACT_LAW
    assert chi_square(filled(sampler, 7), law) > 0.01
    assert 0.3 < sampler.counts.acceptance < 0.95


@pytest.mark.parametrize("num_windows", [1, 2])
def test_the_plain_sampler_has_the_same_law(
    trunk: UntrainedMaskedLM, head: SelfSpeculativeHead, num_windows: int
) -> None:
    law = sequential_law(trunk, head, Sampling(), ENDS[num_windows])
    sampler = SelfSpeculativeSampler(trunk, head, num_windows=num_windows, speculate=False)
    assert chi_square(filled(sampler, 3), law) > 0.01
    assert sampler.counts.causal_calls == 3 and sampler.counts.drafted == 0


def test_a_lossy_rule_fails_the_same_test(
    trunk: UntrainedMaskedLM, head: SelfSpeculativeHead
) -> None:
    law = sequential_law(trunk, head, Sampling(), [3])
    assert chi_square(filled(SelfSpeculativeSampler(trunk, head, verifier=LossyRule()), 7), law) < (
        1e-6
    )


def test_another_number_of_windows_is_another_law(
    trunk: UntrainedMaskedLM, head: SelfSpeculativeHead
) -> None:
    """Else the tests above could not tell a trunk that is asked again within a window."""
    law = sequential_law(trunk, head, Sampling(), [3])
    assert chi_square(filled(SelfSpeculativeSampler(trunk, head, num_windows=2), 7), law) < 1e-6


def test_with_a_window_for_each_mask_the_law_is_that_of_one_token_a_pass(
    trunk: UntrainedMaskedLM,
) -> None:
    fresh = causal_layer(trunk, 0.0)
    law = sequential_law(trunk, fresh, Sampling(), [1, 2, 3])
    sampler = SelfSpeculativeSampler(trunk, fresh, num_windows=8)
    assert chi_square(filled(sampler, 5), law) > 0.01
    assert sampler.counts.trunk_calls == sampler.counts.causal_calls == 3


def test_a_fresh_head_accepts_everything(trunk: UntrainedMaskedLM) -> None:
    sampler = SelfSpeculativeSampler(trunk, causal_layer(trunk, 0.0), num_windows=2)
    filled(sampler, 1, rows=256)
    assert sampler.counts.accepted == sampler.counts.drafted == 256 * 3
    assert sampler.counts.trunk_calls == sampler.counts.causal_calls == 2


# Batches

RAGGED = [
    [MASK] * 9,
    [0, MASK, 2],
    [1, 1, 2, 0, MASK, MASK, MASK, 2, MASK, 1, MASK, MASK],
    [2, 2, 1],
    [MASK, 1, MASK, MASK, 0, 2, MASK],
]


def ragged(rows: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return canvases, masks, lengths and prompts of some of RAGGED."""
    lengths = torch.tensor([len(RAGGED[row]) for row in rows])
    tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
    for line, row in enumerate(rows):
        tokens[line, : len(RAGGED[row])] = torch.tensor(RAGGED[row])
    return tokens, tokens == MASK, lengths, torch.tensor(rows)


def rounds(
    sampler: SelfSpeculativeSampler, rows: list[int], noise: Noise | None = None
) -> list[FilledRound]:
    return list(sampler.fill(*ragged(rows), noise if noise is not None else Noise(11)))


@pytest.mark.parametrize("speculate", [True, False])
@pytest.mark.parametrize("num_windows", [1, 3])
def test_a_row_is_filled_alike_in_every_batch(
    trunk: UntrainedMaskedLM, head: SelfSpeculativeHead, num_windows: int, speculate: bool
) -> None:
    def build() -> SelfSpeculativeSampler:
        return SelfSpeculativeSampler(trunk, head, num_windows=num_windows, speculate=speculate)

    together, alone = build(), build()
    last = rounds(together, list(range(5)))[-1]
    for row, canvas in enumerate(RAGGED):
        found = rounds(alone, [row])
        if not found:
            assert MASK not in canvas
            assert last.tokens[row, : len(canvas)].tolist() == canvas
            continue
        assert torch.equal(last.tokens[row, : len(canvas)], found[-1].tokens[0])
    counts = together.counts
    assert counts.trunk_calls == num_windows < alone.counts.trunk_calls  # rows share passes
    assert together.full_row_passes == alone.full_row_passes
    for name in ("trunk_rows", "causal_rows", "filled", "drafted", "tested", "accepted"):
        assert getattr(counts, name) == getattr(alone.counts, name)


def test_every_mask_is_filled_once_and_nothing_else_changes(
    trunk: UntrainedMaskedLM, head: SelfSpeculativeHead
) -> None:
    sampler = SelfSpeculativeSampler(trunk, head, num_windows=2)
    tokens, masked, lengths, prompts = ragged(list(range(5)))
    given, seen = tokens.clone(), torch.zeros_like(tokens)
    accepted = tested = 0
    for found in sampler.fill(tokens, masked, lengths, prompts, Noise(4)):
        assert not (found.accepted & ~found.filled).any()
        assert found.accepted.sum(1).tolist() == found.stood
        assert ((found.filled & ~found.accepted).sum(1) <= 1).all()
        seen += found.filled
        accepted, tested = accepted + sum(found.stood), tested + sum(found.tested)
    assert torch.equal(tokens, given)
    assert torch.equal(seen.bool(), masked) and int(seen.max()) == 1
    assert torch.equal(found.tokens[~masked], given[~masked])
    assert (found.tokens[masked] != MASK).all()
    counts = sampler.counts
    assert (counts.accepted, counts.tested) == (accepted, tested)
    assert counts.filled == int(masked.sum()) and counts.drafted >= counts.tested


def test_at_temperature_zero_speculation_changes_no_token(
    trunk: UntrainedMaskedLM, head: SelfSpeculativeHead
) -> None:
    found = [
        rounds(
            SelfSpeculativeSampler(trunk, head, Sampling(0.0), 2, speculate=speculate),
            list(range(5)),
        )[-1].tokens
        for speculate in (True, False)
    ]
    assert torch.equal(*found)


class Recorded(Noise):
    """Noise that fails where a coin is asked for again."""

    def __init__(self, seed: int, rows: int) -> None:
        super().__init__(seed)
        self.rows, self.spent = rows, set()

    def uniform(self, prompts: Tensor, elements: Tensor, role: Role) -> Tensor:
        asked = elements.reshape(len(prompts), -1).tolist()
        coins = [(role, row, e) for row in range(self.rows) for e in set(asked[row])]
        assert not self.spent & set(coins)
        self.spent |= set(coins)
        return super().uniform(prompts, elements, role)


@pytest.mark.parametrize("speculate", [True, False])
def test_no_coin_is_used_twice_not_even_by_another_fill_of_the_canvas(
    trunk: UntrainedMaskedLM, head: SelfSpeculativeHead, speculate: bool
) -> None:
    sampler = SelfSpeculativeSampler(trunk, head, num_windows=2, speculate=speculate)
    tokens, masked, lengths, prompts = ragged([0, 2])
    now = masked & (torch.arange(tokens.shape[1]) < 6)

    class Drawn(Recorded):
        def uniform(self, prompts: Tensor, elements: Tensor, role: Role) -> Tensor:
            if role == Role.ORDER:  # keyed by position, and a position is filled once
                return Noise.uniform(self, prompts, elements, role)
            return super().uniform(prompts, elements, role)

    noise = Drawn(3, 1)  # of the first row, which is active until the end of each fill
    *_, half = sampler.fill(tokens, now, lengths, prompts, noise)
    assert torch.equal(half.tokens == MASK, masked & ~now)
    rest = list(sampler.fill(half.tokens, masked & ~now, lengths, prompts, noise))
    assert rest and not (rest[-1].tokens == MASK).any() and noise.spent


# Passes


def test_passes_are_counted_by_their_operations(
    trunk: UntrainedMaskedLM, head: SelfSpeculativeHead
) -> None:
    sampler = SelfSpeculativeSampler(trunk, head, num_windows=3)
    found = rounds(sampler, [0])
    counts = sampler.counts
    assert counts.trunk_calls == 3 and counts.causal_calls == len(found)
    assert sampler.full_passes == 3 + len(found) * sampler.relative_cost
    speculative = len(found)
    plain = SelfSpeculativeSampler(trunk, head, num_windows=3, speculate=False)
    assert len(rounds(plain, [0])) == 9 > speculative


def test_windows_follow_a_cosine_and_hold_one_mask_at_least() -> None:
    totals = torch.tensor([0, 1, 2, 5, 40])
    assert window_ends(totals, 1).tolist() == [[0], [1], [2], [5], [40]]
    four = window_ends(totals, 4).tolist()
    assert four[0] == [0, 0, 0, 0] and four[1] == [1, 1, 1, 1] and four[2] == [1, 2, 2, 2]
    assert four[4] == [3, 12, 25, 40]  # 40 (1 - cos(pi s / 8))
    for windows in range(1, 9):
        for ends in window_ends(torch.arange(60), windows).tolist():
            steps = [b - a for a, b in itertools.pairwise([0, *ends])]
            assert all(b > 0 for b, end in zip(steps, [0, *ends], strict=False) if end < ends[-1])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_windows": 0}, "num_windows must be at least 1, got 0"),
        ({"sampling": Sampling(repetition_penalty=1.2)}, "repetition_penalty must be 1"),
    ],
)
def test_options_without_a_meaning_are_refused(
    trunk: UntrainedMaskedLM, head: SelfSpeculativeHead, options: dict, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        SelfSpeculativeSampler(trunk, head, **options)


def test_a_rule_that_takes_no_drawn_drafts_is_refused(
    trunk: UntrainedMaskedLM, head: SelfSpeculativeHead
) -> None:
    class OneHot(TokenRejection):
        needs = frozenset({Law.DETERMINISTIC})

    with pytest.raises(ValueError, match="OneHot does not take drafts that are drawn"):
        SelfSpeculativeSampler(trunk, head, verifier=OneHot())
