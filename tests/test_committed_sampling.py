"""The committed self-speculative head samples its sequential law: a permutation test on puzzles.

Two sets of boards are drawn for one puzzle with several solutions, by speculation and one token a
causal pass.  If their laws are one, any split of all boards into two sets is as likely; the
statistic is the energy distance of one-hot boards (Szekely and Rizzo 2013).  Their distance is
the root of the number of cells that differ: that number itself would see single cells only.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from specstream.generation import Limits, Sampler, SelfSpeculativePipeline
from specstream.generation.masked_loading import load_masked_run
from specstream.sampling import Sampling
from specstream.structures import TokenDraft
from specstream.verification import TokenRejection
from specstream.verification.rejection import ChainTests

ROOT = Path(__file__).resolve().parents[1]
PUZZLE = "sudoku 3010000003210104\n"
BOARDS, PERMUTATIONS = 200, 999


class AcceptsAll(TokenRejection):
    """The negative control: every draft stands."""

    def tests(self, draft: TokenDraft, p: Tensor) -> ChainTests:
        found = super().tests(draft, p)
        ones = torch.ones_like(found.denominators)
        return ChainTests(ones, ones, found.weights)


@pytest.fixture(scope="module")
def pipeline() -> SelfSpeculativePipeline:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        sampler = Sampler(sampling=Sampling(1.0), limits=Limits(16, ignore_eos=True))
        found = load_masked_run(
            "checkpoints/masked-planning-self",
            dtype="float32", sampler=sampler, windows=1, batch_size=BOARDS,
        )  # fmt: skip
    assert isinstance(found, SelfSpeculativePipeline)
    return found


def boards(pipeline: SelfSpeculativePipeline, seed: int, **options: object) -> Tensor:
    """Draw boards, (BOARDS, 16)."""
    sampled = SelfSpeculativePipeline(
        pipeline.target, pipeline.head, pipeline.processor, pipeline.num_windows,
        sampler=pipeline.sampler, batch_size=BOARDS, **options,
    )  # type: ignore[arg-type]  # fmt: skip
    return torch.tensor([c.tokens for c in sampled.complete([PUZZLE] * BOARDS, seed=seed)])


def permutation_test(one: Tensor, other: Tensor, seed: int = 0) -> float:
    """Return the p-value of two sets of boards (N, 16) each being drawn from one law."""
    everything = torch.cat([one, other])
    far = (everything[:, None] != everything).sum(-1).double().sqrt()  # (2N, 2N)
    signs = torch.ones(len(everything), dtype=torch.float64)
    signs[len(one) :] = -1
    noise = torch.Generator().manual_seed(seed)
    splits = [torch.randperm(len(signs), generator=noise) for _ in range(PERMUTATIONS)]
    each = torch.stack([signs, *(signs[split] for split in splits)])  # (1 + P, 2N)
    energy = -torch.einsum("pi,ij,pj->p", each, far, each)
    return float((energy >= energy[0] - 1e-9).double().mean())


@pytest.fixture(scope="module")
def one_by_one(pipeline: SelfSpeculativePipeline) -> Tensor:
    return boards(pipeline, 1, speculate=False)


def test_speculation_draws_the_boards_of_its_sequential_law(
    pipeline: SelfSpeculativePipeline, one_by_one: Tensor
) -> None:
    assert len(one_by_one.unique(dim=0)) > 2
    assert permutation_test(boards(pipeline, 2), one_by_one) > 0.01


def test_a_rule_that_accepts_everything_does_not(
    pipeline: SelfSpeculativePipeline, one_by_one: Tensor
) -> None:
    assert permutation_test(boards(pipeline, 2, verifier=AcceptsAll()), one_by_one) < 0.01
