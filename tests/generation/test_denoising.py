"""Sampling with verified drafts: the law of the plain sampler, whatever drafts."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from specstream.drafters import (
    FrozenEstimate,
    FrozenVelocity,
    IndependentDenoiser,
    ResidualDenoiser,
    StateDrafter,
    WindowDenoiser,
)
from specstream.generation.denoising import DenoisingPipeline
from specstream.generation.lengths import CostModelLength, FixedLength
from specstream.metrics import energy_test
from specstream.models import ConsistencyModel, Denoiser, FlowSchedule, PatchTransformer
from specstream.models.denoiser import Reads
from specstream.structures import KnownParts
from specstream.transitions import Prediction
from specstream.verification.gaussian import ReflectionCoupling
from tests.denoising_toys import KeepsAll, counts_of, gaussian_model

SHAPE = (3,)
STEPS = 12


def drafters() -> dict[str, StateDrafter]:
    return {
        "estimate": FrozenEstimate(),
        "velocity": FrozenVelocity(gaussian_model()),
        "independent": IndependentDenoiser(gaussian_model(0.4, 0.7)),
    }


def sampler(
    drafter: StateDrafter | None, batch_size: int = 8, eta: float = 1.0
) -> DenoisingPipeline:
    lengths = None if drafter is None else FixedLength(5)
    return DenoisingPipeline(
        gaussian_model(), STEPS, eta, drafter=drafter, lengths=lengths, batch_size=batch_size
    )


def moments(samples: Tensor) -> tuple[Tensor, Tensor]:
    return samples.double().mean(0), samples.double().T.cov()


@pytest.mark.parametrize("eta", [1.0, 0.5])
@pytest.mark.parametrize("name", drafters())
def test_drafted_samples_have_the_law_of_the_plain_sampler(name: str, eta: float) -> None:
    rows = 12_000
    plain = sampler(None, rows, eta).complete(rows, seed=1)
    pipeline = sampler(drafters()[name], rows, eta)
    mean, covariance = moments(pipeline.complete(rows, seed=2))
    right_mean, right_covariance = moments(plain)
    width = right_covariance.diagonal().sqrt().max()
    assert (mean - right_mean).abs().max() < 4.5 * width * (2 / rows) ** 0.5
    assert (covariance - right_covariance).abs().max() < 4.5 * width**2 * (4 / rows) ** 0.5
    assert pipeline.stats.target_calls < STEPS
    assert pipeline.stats.guarantee.value == "exact law"


def awake(
    in_channels: int, out_channels: int, num_times: int, seed: int, read: int = 0
) -> PatchTransformer:
    """Return a network whose last layer, 0 when fresh, says something."""
    torch.manual_seed(seed)
    network = PatchTransformer(
        in_channels, out_channels, (2,), 16, 1, 2, num_times, 2, feature_size=read
    )
    for weight in (network.write.weight, network.last_scale.weight):
        torch.nn.init.normal_(weight, std=0.2)
    return network


def known(rows: int, given: int) -> KnownParts:
    """Return the first `given` of six numbers, each 0.5; the others are never looked at."""
    data = torch.full((rows, 1, 6), 99.0)
    data[..., :given] = 0.5
    return KnownParts(data, (torch.arange(6) < given).expand(rows, 1, 6))


@pytest.mark.parametrize(
    "drafter, given, rule, exact",
    [
        ("residual", 0, ReflectionCoupling(), True),
        ("window", 0, ReflectionCoupling(), True),
        ("window", 2, ReflectionCoupling(), True),
        ("features", 0, ReflectionCoupling(), True),
        ("features", 2, ReflectionCoupling(), True),
        ("student", 0, ReflectionCoupling(), True),
        ("student", 2, ReflectionCoupling(), True),
        ("residual", 0, KeepsAll(), False),
        ("features", 2, KeepsAll(), False),
    ],
)
def test_networks_with_guidance_keep_the_law_and_a_biased_rule_does_not(
    drafter: str, given: int, rule: ReflectionCoupling, exact: bool
) -> None:
    """Also where the first `given` of the six numbers of each sample are known."""
    target = Denoiser(awake(1, 1, 1, 0), FlowSchedule(), (1, 6))
    read = 16 if drafter == "features" else 0
    network = awake(2, 4 if drafter == "window" else 1, 2, 1, read)
    guess = WindowDenoiser(network, 4) if drafter == "window" else ResidualDenoiser(network)
    if drafter == "student":
        student = ConsistencyModel(awake(1, 1, 1, 2), FlowSchedule(), (1, 6), guidance=3.0)
        guess = IndependentDenoiser(student, 3.0)
    told = {"classes": torch.arange(600) % 2}
    sizes = {"guidance": 3.0, "batch_size": 600}
    held = known(600, given) if given else None
    plain = DenoisingPipeline(target, 10, **sizes).complete(600, told, seed=1, known=held)
    pipeline = DenoisingPipeline(target, 10, 1.0, 3.0, guess, FixedLength(4), rule, 600)
    drafted = pipeline.complete(600, told, seed=2, known=held)
    assert (drafted[..., :given] == 0.5).all()
    found = energy_test(drafted[..., given:], plain[..., given:], num_permutations=199)
    assert (found.p_value > 0.01) == exact
    assert pipeline.stats.full_rounds < 600 * 10


@pytest.mark.parametrize("guidance, held", [(1.0, None), (3.0, None), (3.0, known(6, 2))])
def test_a_drafter_reads_what_the_target_thought_of_the_state_it_estimated_from(
    guidance: float, held: KnownParts | None
) -> None:
    """Also after a rejection, where estimate and features are those of the state before."""
    target = Denoiser(awake(1, 1, 1, 0), FlowSchedule(), (1, 6))
    drafter = ResidualDenoiser(awake(2, 1, 2, 1, 16))
    told = {"classes": torch.arange(6) % 2}
    pipeline = DenoisingPipeline(target, 10, 1.0, guidance, drafter, FixedLength(3))
    steps_ahead, propose = set(), drafter.propose

    def watch(context, lengths, grid, eta, noise):
        seen = context.seen_steps
        given = (context.seen, seen, grid, context.condition, guidance)
        said = target.evaluate(*given, reads=Reads.HIDDEN)
        times = grid.times[seen][:, None].float()
        hidden = target.network.spoken(context.seen, times, context.condition["classes"])
        estimates = said.estimates if held is None else context.known.hold(said.estimates)
        assert torch.allclose(context.estimates, estimates, atol=1e-5)
        assert torch.allclose(context.features, hidden.hidden, atol=1e-5)
        assert torch.equal(context.steps, seen + 1)
        steps_ahead.update(seen.tolist())
        return propose(context, lengths, grid, eta, noise)

    drafter.propose = watch  # type: ignore[method-assign]
    pipeline.complete(6, told, seed=2, known=held)
    assert len(steps_ahead) > 3 and 0 < pipeline.stats.acceptance < 1


def test_costs_of_a_drafter_that_reads_hidden_states_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    target = Denoiser(awake(1, 1, 1, 0), FlowSchedule(), (1, 6))
    reader, lengths = ResidualDenoiser(awake(2, 1, 2, 1, 16)), CostModelLength(max_tokens=2)
    pipeline = DenoisingPipeline(target, 6, drafter=reader, lengths=lengths)
    assert pipeline.complete(2, seed=0).isfinite().all()
    assert pipeline.costs is not None and pipeline.stats.predicted_ratio is not None


def test_hidden_states_that_a_target_does_not_have_are_refused() -> None:
    reader = ResidualDenoiser(awake(2, 1, 2, 1, 16))
    with pytest.raises(ValueError, match="the hidden states of a ExactEstimate cannot be read"):
        DenoisingPipeline(gaussian_model(), 10, drafter=reader)
    other = Denoiser(PatchTransformer(1, 1, (2,), 24, 1, 2), FlowSchedule(), (1, 6))
    with pytest.raises(ValueError, match=r"feature_size is 16, but the target's .* are 24 wide"):
        DenoisingPipeline(other, 10, drafter=reader)
    split = Denoiser(awake(1, 1, 1, 0), FlowSchedule(), (1, 6))
    split.spread([torch.device("cpu"), torch.device("cpu")])
    with pytest.raises(ValueError, match="has its target on one device"):
        DenoisingPipeline(split, 10, drafter=reader)
    other = Denoiser(PatchTransformer(1, 1, (3,), 16, 1, 2), FlowSchedule(), (1, 6))
    with pytest.raises(ValueError, match=r"patch is \[2\], but .* has the target's, \[3\]"):
        DenoisingPipeline(other, 10, drafter=reader)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    for drafter in (None, FrozenEstimate()):
        together = sampler(drafter, 8).complete(8, seed=3)
        alone = sampler(drafter, 1).complete(1, seed=3, indices=[5])
        assert torch.allclose(together[5], alone[0], atol=1e-6)


def test_the_counts_are_what_the_target_saw() -> None:
    pipeline = sampler(FrozenEstimate(), 4)
    pipeline.complete(6, seed=0)
    stats = pipeline.stats
    assert (stats.target_calls, stats.target_rows) == counts_of(pipeline.target)
    assert stats.elements == 6 * STEPS == stats.full_committed
    assert stats.target_rows == stats.full_rounds + stats.draft_lengths


def test_every_round_reports_each_sample_that_still_had_steps_to_do() -> None:
    pipeline = sampler(FrozenEstimate(), 4)
    done: dict[int, int] = {}
    for step in pipeline.generate(6, seed=0):
        assert step.done == done.get(step.sample, 0) + step.accepted + 1
        done[step.sample] = step.done
        assert step.finished == (step.done == STEPS)
    assert done == dict.fromkeys(range(6), STEPS)


def test_a_deterministic_sampler_with_an_exact_rule_is_refused_and_says_why() -> None:
    with pytest.raises(ValueError, match="eta 0 is a deterministic sampler"):
        sampler(FrozenEstimate(), eta=0.0)


def test_guidance_pushes_from_the_unconditional_answer() -> None:
    class Told(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unit = nn.Parameter(torch.ones(1))

        def forward(self, states: Tensor, times: Tensor, classes: Tensor) -> Tensor:
            return (classes + 1.0)[:, None].expand_as(states) * self.unit

    target = Denoiser(Told(), FlowSchedule(), SHAPE, Prediction.DATA)
    pipeline = DenoisingPipeline(target, 4, guidance=3.0)
    samples = pipeline.complete(2, {"classes": torch.tensor([0, 4])})
    assert torch.allclose(samples, torch.tensor([3.0, 15.0])[:, None].expand(2, 3))
    assert pipeline.stats.target_rows == 2 * 2 * 4


def test_guidance_without_a_condition_costs_no_rows() -> None:
    pipeline = DenoisingPipeline(gaussian_model(), 4, guidance=3.0)
    pipeline.complete(2)
    assert pipeline.stats.target_rows == 2 * 4 == counts_of(pipeline.target)[1]
