"""int8 diffusion models: drafts have the law of the target as it became, whoever is converted."""

from __future__ import annotations

import pytest
import torch

from specstream.drafters import FrozenEstimate, IndependentDenoiser, ResidualDenoiser
from specstream.generation.denoising import DenoisingPipeline
from specstream.generation.lengths import FixedLength
from specstream.generation.media_quantization import quantize_denoisers
from specstream.metrics import energy_test
from specstream.models import Denoiser, FlowSchedule, PatchTransformer
from specstream.models.quantization import quantization_report

STEPS, SAMPLES = 8, 256


def network(in_channels: int = 1, num_times: int = 1, seed: int = 0) -> PatchTransformer:
    torch.manual_seed(seed)
    net = PatchTransformer(in_channels, 1, (2, 2), 16, 1, 2, num_times)
    torch.nn.init.normal_(net.write.weight, std=0.2)
    return net.requires_grad_(False)


def model(seed: int = 0) -> Denoiser:
    return Denoiser(network(seed=seed), FlowSchedule(), (1, 4, 4))


@pytest.mark.parametrize("method", ["int8_weight_only", "int8_dynamic"])
def test_drafted_samples_have_the_law_of_the_target_in_int8(method: str) -> None:
    target, drafter = model(), ResidualDenoiser(network(2, 2))
    exact = DenoisingPipeline(target, STEPS, batch_size=SAMPLES).complete(SAMPLES, seed=0)
    quantize_denoisers(target, drafter, "both", method)
    plain = DenoisingPipeline(target, STEPS, batch_size=SAMPLES)
    samples = plain.complete(SAMPLES, seed=0)
    assert not torch.equal(samples, exact) and torch.allclose(samples, exact, atol=0.3)
    drafting = DenoisingPipeline(
        target, STEPS, drafter=drafter, lengths=FixedLength(4), batch_size=SAMPLES
    )
    drafted = drafting.complete(SAMPLES, seed=1)
    assert drafting.stats.law == plain.stats.law == "the target's (target in int8)"
    assert set(drafting.stats.quantized) == {"target", "drafter"}
    assert drafting.stats.acceptance
    assert energy_test(drafted, samples, 99).p_value > 0.01


def test_a_small_model_becomes_int8_and_its_target_stays() -> None:
    target, drafter = model(), IndependentDenoiser(model(1))
    quantize_denoisers(target, drafter, "drafter", "int8_weight_only")
    assert quantization_report(target) is None
    pipeline = DenoisingPipeline(target, STEPS, drafter=drafter)
    assert list(pipeline.stats.quantized) == ["drafter"] and pipeline.stats.law == "the target's"


@pytest.mark.parametrize("drafter", [None, FrozenEstimate()])
def test_nothing_is_converted_where_the_drafter_has_no_weights(
    drafter: FrozenEstimate | None,
) -> None:
    target = model()
    with pytest.raises(ValueError, match="quantize both: there is no drafter with weights of its"):
        quantize_denoisers(target, drafter, "both", "int8_weight_only")
    assert quantization_report(target) is None
