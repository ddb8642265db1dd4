"""A feature cache: as a drafter it keeps the law, as a sampler it says that it does not."""

import pytest
import torch
from torch import Tensor, nn

from specstream.drafters import FirstBlockDenoiser
from specstream.generation.denoising import DenoisingPipeline
from specstream.generation.lengths import CostModelLength, FixedLength
from specstream.generation.step_caching import StepCachePipeline
from specstream.metrics import energy_test
from specstream.models import Denoiser, FlowSchedule, PatchTransformer
from specstream.structures import KnownParts

SHAPE, STEPS, ROWS = (1, 4, 4), 12, 6
NEVER = -1.0  # a tolerance with which nothing is skipped


def model() -> Denoiser:
    """Return a target whose later blocks say something, and not the same of every state."""
    torch.manual_seed(0)
    network = PatchTransformer(1, 1, (2, 2), 16, 3, 2, num_classes=2)
    for weight in network.parameters():
        if weight.abs().max() == 0:
            nn.init.normal_(weight, std=0.15)
    return Denoiser(network.eval().requires_grad_(False), FlowSchedule(), SHAPE)


CLASSES = {"classes": torch.arange(ROWS) % 2}


def cached(tolerance: float, eta: float = 0.0, batch_size: int = ROWS) -> StepCachePipeline:
    return StepCachePipeline(model(), STEPS, eta, tolerance, 4, batch_size=batch_size)


def plain(eta: float, guidance: float = 1.0) -> Tensor:
    return DenoisingPipeline(model(), STEPS, eta, guidance).complete(ROWS, CLASSES, seed=4)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("window", [1, 4])
def test_drafts_of_the_first_block_keep_the_law(window: int, guidance: float) -> None:
    target, rows = model(), 400
    told = {"classes": torch.arange(rows) % 2}
    drafter = FirstBlockDenoiser(target, guidance)
    drafted = DenoisingPipeline(
        target, STEPS, 1.0, guidance, drafter, FixedLength(window), batch_size=100
    )
    found = drafted.complete(rows, told, seed=1)
    right = DenoisingPipeline(target, STEPS, 1.0, guidance, batch_size=400)
    other = right.complete(rows, told, seed=2)
    assert energy_test(found.flatten(1), other.flatten(1), 199).p_value > 0.01
    assert 0.2 < drafted.stats.acceptance < 1
    assert drafted.stats.full_rounds < 0.9 * STEPS * rows
    assert not list(drafter.parameters())  # the target's weights are counted once


def test_a_drafted_sample_does_not_depend_on_its_batch() -> None:
    def drafted(batch_size: int, indices: list[int]) -> Tensor:
        target = model()
        pipeline = DenoisingPipeline(
            target, STEPS, 1.0, 1.0, FirstBlockDenoiser(target), batch_size=batch_size
        )
        told = {"classes": torch.tensor(indices) % 2}
        return pipeline.complete(len(indices), told, seed=3, indices=indices)

    assert torch.allclose(drafted(ROWS, list(range(ROWS)))[[5, 1]], drafted(1, [5, 1]), atol=1e-5)


def test_costs_of_drafts_are_measured_with_what_the_target_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    target = model()
    pipeline = DenoisingPipeline(
        target, STEPS, 1.0, 1.0, FirstBlockDenoiser(target), CostModelLength(4, 2)
    )
    assert pipeline.complete(2, {"classes": torch.tensor([0, 1])}).isfinite().all()
    assert pipeline.stats.predicted_ratio is not None


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_cache_that_skips_nothing_is_the_plain_sampler(eta: float) -> None:
    pipeline = cached(NEVER, eta)
    found = pipeline.complete(ROWS, CLASSES, seed=4)
    assert torch.allclose(found, plain(eta), atol=1e-5)
    assert pipeline.stats.target_rows == STEPS * ROWS and pipeline.stats.acceptance == 0


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_more_tolerance_skips_more_and_errs_more(eta: float) -> None:
    right, rounds, errors = plain(eta), [], []
    for tolerance in (0.02, 0.1, 1e9):
        pipeline = cached(tolerance, eta)
        found = pipeline.complete(ROWS, CLASSES, seed=4)
        errors.append(float((found - right).square().mean().sqrt()))
        rounds.append(pipeline.stats.full_rounds / ROWS)
        assert pipeline.stats.guarantee.value == "heuristic"
    assert STEPS >= rounds[0] > rounds[1] > rounds[2] == 1 + -(-(STEPS - 1) // 5)
    assert errors[0] < errors[1] < errors[2]


def test_a_cached_sample_does_not_depend_on_its_batch() -> None:
    pipeline = cached(0.1, 1.0)
    together = pipeline.complete(ROWS, CLASSES, seed=3)
    assert len(set(pipeline.stats.accepted)) > 1  # rows go on by themselves
    alone = cached(0.1, 1.0, 1).complete(
        2, {"classes": torch.tensor([1, 1])}, seed=3, indices=[5, 1]
    )
    assert torch.allclose(together[[5, 1]], alone, atol=1e-5)


def test_the_counts_are_what_the_target_was_asked_as_a_whole() -> None:
    pipeline = cached(0.1, batch_size=4)
    done: dict[int, int] = {}
    for step in pipeline.generate(ROWS, CLASSES):
        assert step.done == done.get(step.sample, 0) + step.accepted + 1
        done[step.sample] = step.done
    stats = pipeline.stats
    assert done == dict.fromkeys(range(ROWS), STEPS)
    assert stats.target_rows == stats.full_rounds < STEPS * ROWS
    assert stats.elements == ROWS * STEPS == stats.full_rounds + sum(stats.accepted)


def test_given_parts_are_held() -> None:
    given = torch.zeros(ROWS, 1, 4, 4, dtype=torch.bool)
    given[..., :2] = True
    known = KnownParts(torch.full((ROWS, *SHAPE), 0.5), given)
    found = cached(0.1).complete(ROWS, CLASSES, known=known)
    assert torch.equal(found[given], known.data[given]) and found.std() > 0.01


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"window must be in 1..64, got 0"):
        StepCachePipeline(model(), STEPS, window=0)
    shallow = Denoiser(PatchTransformer(1, 1, (2, 2), 16, 1, 2), FlowSchedule(), SHAPE)
    for refused in (StepCachePipeline, FirstBlockDenoiser):
        with pytest.raises(ValueError, match="first-block: the network has one block"):
            refused(shallow)
    with pytest.raises(ValueError, match="tolerance must be a number, got nan"):
        cached(float("nan"))


def test_drafts_of_another_target_or_guidance_are_refused() -> None:
    target = model()
    for drafter, message in (
        (FirstBlockDenoiser(model()), "must be made of the target that it drafts for"),
        (
            FirstBlockDenoiser(target, 3.0),
            "drafts of guidance 3 cannot go on from what a target says with",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            DenoisingPipeline(target, STEPS, 1.0, 1.0, drafter)
