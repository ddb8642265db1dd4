"""Samples of which parts are given: these are kept to the last bit, and the rest keeps its law."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from specstream.drafters import FrozenEstimate, FrozenVelocity, IndependentDenoiser, StateDrafter
from specstream.generation.accept_by_error import AcceptByErrorPipeline
from specstream.generation.denoising import DenoisingPipeline
from specstream.generation.denoising_sampler import DenoisingSampler
from specstream.generation.lengths import FixedLength
from specstream.generation.picard import PicardPipeline
from specstream.generation.refinement import RefinementPipeline
from specstream.generation.solvers import AdamsBashforth2, DPMSolver2M, SolverPipeline
from specstream.metrics import energy_test
from specstream.models import Denoiser, FlowSchedule
from specstream.structures import KnownParts, StateContext
from specstream.transitions import Prediction, StepGrid, mean_square
from specstream.verification import AdaptiveThreshold
from specstream.verification.gaussian import ReflectionCoupling
from tests.denoising_toys import KeepsAll, mixture_model

SIZE, STEPS, ROWS = 8, 12, 400
GIVEN = 3  # of the eight numbers, those in front


def centers(model: Denoiser) -> Tensor:
    return model.network.centers.detach().float()


def known(rows: int, model: Denoiser, center: int = 2, given: int = GIVEN) -> KnownParts:
    data = centers(model)[center].expand(rows, -1).clone()
    data[:, given:] = 99.0  # never looked at
    return KnownParts(data, (torch.arange(SIZE) < given).expand(rows, -1))


def drafters() -> dict[str, StateDrafter]:
    model = mixture_model()
    return {
        "estimate": FrozenEstimate(),
        "velocity": FrozenVelocity(model),
        "independent": IndependentDenoiser(model),
    }


@pytest.mark.parametrize(
    "name, rule, exact",
    [
        ("estimate", ReflectionCoupling(), True),
        ("velocity", ReflectionCoupling(), True),
        ("estimate", KeepsAll(), False),
    ],
)
def test_drafts_keep_the_law_of_the_plain_sampler_that_holds_the_same(
    name: str, rule: ReflectionCoupling, exact: bool
) -> None:
    model = mixture_model()
    held = known(ROWS, model)
    plain = DenoisingPipeline(model, STEPS, batch_size=ROWS).complete(ROWS, seed=1, known=held)
    pipeline = DenoisingPipeline(
        model, STEPS, 1.0, 1.0, drafters()[name], FixedLength(8), rule, ROWS
    )
    drafted = pipeline.complete(ROWS, seed=2, known=held)
    for samples in (plain, drafted):
        assert torch.equal(samples[:, :GIVEN], held.data[:, :GIVEN])
    found = energy_test(drafted[:, GIVEN:], plain[:, GIVEN:], num_permutations=199)
    assert (found.p_value > 0.01) == exact
    assert pipeline.stats.full_rounds < 0.8 * ROWS * STEPS
    assert pipeline.stats.law == "the target's, held to what is given"


class Mistaken(IndependentDenoiser):
    """Says what the target says, but for the numbers in front, where it is far off."""

    def estimate(
        self, states: Tensor, steps: Tensor, context: StateContext, grid: StepGrid
    ) -> Tensor:
        said = super().estimate(states, steps, context, grid).clone()
        said[:, :GIVEN] += 50
        return said


def test_whether_a_draft_stands_is_decided_by_what_is_to_be_made() -> None:
    model = mixture_model()
    pipeline = DenoisingPipeline(model, STEPS, drafter=Mistaken(model), lengths=FixedLength(8))
    pipeline.complete(4, seed=0, known=known(4, model))
    assert pipeline.stats.acceptance == 1
    pipeline.complete(4, seed=0, known=known(4, model, given=GIVEN - 1))
    assert pipeline.stats.acceptance == 0


def test_what_is_made_goes_with_what_is_given() -> None:
    model, rows, given = mixture_model(), 200, 6
    pipeline = DenoisingPipeline(model, 50, batch_size=rows)

    def share(center: int, held: KnownParts | None) -> float:
        rest = pipeline.complete(rows, seed=0, known=held)[:, given:]
        nearest = torch.cdist(rest, centers(model)[:, given:]).argmin(1)
        return float((nearest == center).float().mean())

    for center in (0, 2, 4):
        assert share(center, known(rows, model, center, given)) > 0.3 + share(center, None)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_the_given_parts_are_noised_data_at_every_level(eta: float) -> None:
    model, rows = mixture_model(discrete=True), 2000
    pipeline = DenoisingPipeline(model, 10, eta, batch_size=rows)
    shown: list[Tensor] = []
    model.network.register_forward_pre_hook(lambda _, told: shown.append(told[0].clone()))
    held = known(rows, model)
    pipeline.complete(rows, seed=0, known=held)
    assert len(shown) == 10
    for step, states in enumerate(shown):
        part = states[:, :GIVEN].double()
        noise = (part - pipeline.grid.alphas[step] * held.data[:, :GIVEN]) / pipeline.grid.sigmas[
            step
        ]
        assert noise.mean().abs() < 4 / (rows * GIVEN) ** 0.5
        assert (noise.std() - 1).abs() < 4 / (2 * rows * GIVEN) ** 0.5


def test_no_draft_and_no_coin_changes_the_noise_of_what_is_given() -> None:
    model = mixture_model()
    held = known(1, model)
    plain, drafted = (
        DenoisingPipeline(model, STEPS, drafter=drafter, lengths=lengths)
        for drafter, lengths in ((None, None), (FrozenEstimate(), FixedLength(5)))
    )
    shown: list[dict[float, Tensor]] = []
    for pipeline in (plain, drafted):
        seen: dict[float, Tensor] = {}

        def note(_: nn.Module, told: tuple[Tensor, Tensor], seen: dict = seen) -> None:
            for state, time in zip(*told, strict=True):
                seen[float(time)] = state[:GIVEN].clone()

        hook = model.network.register_forward_pre_hook(note)
        pipeline.complete(1, seed=4, known=held)
        hook.remove()
        shown.append(seen)
    assert drafted.stats.acceptance not in (None, 0.0, 1.0)
    assert shown[0].keys() == shown[1].keys() and len(shown[0]) == STEPS
    for time, state in shown[0].items():
        assert torch.allclose(state, shown[1][time], atol=1e-6)
    exact = PicardPipeline(model, STEPS, eta=1.0, tolerance=0.0)
    picard, stepwise = (way.complete(2, seed=4, known=known(2, model)) for way in (exact, plain))
    assert torch.allclose(picard, stepwise, atol=1e-5)


def sampler(name: str, model: Denoiser) -> DenoisingSampler:
    made: dict[str, Callable[[], DenoisingSampler]] = {
        "adams-bashforth": lambda: SolverPipeline(model, STEPS, AdamsBashforth2()),
        "dpm-solver++": lambda: SolverPipeline(model, STEPS, DPMSolver2M()),
        "by-error": lambda: AcceptByErrorPipeline(model, STEPS),
        "picard": lambda: PicardPipeline(model, STEPS),
        "drafted": lambda: DenoisingPipeline(model, STEPS, drafter=drafters()["independent"]),
    }
    return made[name]()


@pytest.mark.parametrize(
    "name", ["adams-bashforth", "dpm-solver++", "by-error", "picard", "drafted"]
)
def test_every_sampler_holds_what_is_given_whatever_the_batch(name: str) -> None:
    model = mixture_model()
    held = known(4, model)
    pipeline = sampler(name, model)
    together = pipeline.complete(4, seed=5, known=held)
    assert torch.equal(together[:, :GIVEN], held.data[:, :GIVEN])
    assert (together[:, GIVEN:].abs() < 5).all()
    alone = pipeline.complete(1, seed=5, indices=[3], known=held.rows(torch.tensor([3])))
    assert torch.allclose(together[3], alone[0], atol=1e-5)
    assert not torch.allclose(pipeline.complete(4, seed=5)[:, GIVEN:], together[:, GIVEN:])


class Follows(nn.Module):
    """Believes the data to be a little of the state: a draft of it is changed everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.tensor(0.3))

    def forward(self, states: Tensor, times: Tensor) -> Tensor:
        return self.share * states


def test_an_error_is_that_of_what_is_to_be_made() -> None:
    given = torch.tensor([[[True, False, False, False]], [[True, True, True, False]]])
    held = KnownParts(torch.zeros(2, 2, 4), given)
    changes = torch.ones(2, 3, 2, 4)
    changes[:, :, :, 0] = 0
    changes[1, 1, 1, 3] = 3
    assert mean_square(changes, held).tolist() == [[1, 1, 1], [1, 5, 1]]
    assert mean_square(changes, None)[0].tolist() == [0.75] * 3


def test_of_a_draft_only_what_is_to_be_made_is_refined() -> None:
    shape = (1, 6, 2, 2)
    model = Denoiser(Follows(), FlowSchedule(), shape, Prediction.DATA)
    given = torch.zeros(3, 1, 6, 2, 2, dtype=torch.bool)
    given[:, :, 0] = True
    held = KnownParts(torch.full((3, *shape), 0.5), given)
    everything = AdaptiveThreshold(-1e9)
    pipeline = RefinementPipeline(model, None, 3, 8, threshold=everything)
    refined = pipeline.complete(3, seed=0, known=held)
    draft = DenoisingPipeline(model, 3, 0.0).complete(3, seed=0, known=held)
    for samples in (refined, draft):
        assert (samples[:, :, 0] == 0.5).all()
    assert (refined != draft)[:, :, 1:].all()


def test_of_the_parts_of_a_draft_those_that_are_given_are_not_counted() -> None:
    shape = (1, 6, 2, 2)
    model = Denoiser(Follows(), FlowSchedule(), shape, Prediction.DATA)
    given = torch.zeros(2, 1, 6, 2, 2, dtype=torch.bool)
    given[:, :, :2] = True  # two frames, and a corner of a third
    given[:, :, 2, 0, 0] = True
    held = KnownParts(torch.full((2, *shape), 0.5), given)
    for threshold, stand in ((-1e9, 0), (1e9, 3)):  # of four frames all fall, or the last alone
        pipeline = RefinementPipeline(
            model, None, 3, 8, threshold=AdaptiveThreshold(threshold), batch_size=1
        )
        pipeline.complete(2, seed=0, known=held)
        assert (pipeline.stats.tested, pipeline.stats.accepted) == ([2 * 4], [2 * stand])


@pytest.mark.parametrize(
    ("data", "given", "message"),
    [
        (torch.zeros(2, SIZE), torch.ones(3, SIZE, dtype=torch.bool), r"a mask of \[3, "),
        (torch.zeros(2, SIZE + 1), torch.ones(2, SIZE, dtype=torch.bool), "no parts of 2 states"),
        (torch.zeros(2, SIZE), torch.ones(2, SIZE), "the mask must be bool, not torch.float32"),
    ],
)
def test_parts_of_other_samples_are_one_line(data: Tensor, given: Tensor, message: str) -> None:
    pipeline = DenoisingPipeline(mixture_model(), 4, 1.0)
    with pytest.raises(ValueError, match=message):
        pipeline.complete(2, known=KnownParts(data, given))
