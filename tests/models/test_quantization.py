"""int8 weights: what was converted is told, and decoding is exact for the quantised target."""

from __future__ import annotations

import copy

import pytest
import torch

from specstream.drafters import DraftModel, PromptLookup
from specstream.generation import (
    AutoregressivePipeline,
    FixedLength,
    Limits,
    SpeculativePipeline,
)
from specstream.models import PretrainedLM, UntrainedLM
from specstream.models.quantization import quantization_report, quantize
from specstream.sampling import Sampling
from tests.toys import chi_square, count_tokens, joint_law, letters, nearby, toy_lm

TOKENS = torch.tensor([[1, 2, 3, 4]])


@pytest.fixture(scope="module")
def plain() -> PretrainedLM:
    return toy_lm(16, num_layers=2, hidden_size=32)


@pytest.fixture(scope="module")
def quantized(plain: PretrainedLM) -> PretrainedLM:
    lm = copy.deepcopy(plain)
    quantize(lm, "int8_weight_only")
    return lm


@torch.no_grad()
def test_weights_become_int8_and_the_model_stays_close(
    plain: PretrainedLM, quantized: PretrainedLM
) -> None:
    expected, found = plain(TOKENS), quantized(TOKENS)
    assert not torch.equal(expected, found)
    assert (expected - found).abs().max() < 0.2 * expected.std()


def test_the_report_counts_what_was_converted(plain: PretrainedLM, quantized: PretrainedLM) -> None:
    linear = [m for m in plain.modules() if isinstance(m, torch.nn.Linear)]
    share = sum(m.weight.numel() for m in linear) / sum(p.numel() for p in plain.parameters())
    assert quantization_report(plain) is None
    assert quantization_report(quantized) == {
        "method": "int8_weight_only",
        "linear_layers": len(linear),
        "share_of_parameters": round(share, 4),
    }


def test_a_head_tied_to_the_embeddings_stays_as_it_is() -> None:
    lm = UntrainedLM(16, 32, 48, 1, 2)
    quantize(lm, "int8_weight_only")
    report = quantization_report(lm)
    assert report is not None and report["linear_layers"] == 7  # q, k, v, o, gate, up, down
    assert lm.head.weight is lm.model.get_input_embeddings().weight
    assert lm.head.weight.dtype is torch.float32


def test_greedy_text_is_that_of_the_quantised_target(
    plain: PretrainedLM, quantized: PretrainedLM
) -> None:
    greedy, prompts = Sampling(temperature=0.0), [[1, 2, 3], [7], [9, 9]]
    expected = AutoregressivePipeline(quantized, letters(), greedy, Limits(16), 3)
    draft = copy.deepcopy(plain)
    quantize(draft, "int8_weight_only")
    drafter = DraftModel(quantized, lambda: draft)
    pipeline = SpeculativePipeline(
        quantized, drafter, letters(), None, FixedLength(3), greedy, Limits(16), 3
    )
    found = pipeline.complete(prompts)
    assert [c.tokens for c in found] == [c.tokens for c in expected.complete(prompts)]
    assert set(pipeline.stats.quantized) == {"target", "drafter"}
    assert set(expected.stats.quantized) == {"target"}


def test_the_law_is_that_of_the_quantised_target(quantized: PretrainedLM) -> None:
    coarse = toy_lm(5, hidden_size=32)
    exact = copy.deepcopy(coarse)
    quantize(coarse, "int8_weight_only")
    drafter = DraftModel(coarse, lambda: nearby(exact, 0.3))
    pipeline = SpeculativePipeline(
        coarse, drafter, letters(), lengths=FixedLength(3), limits=Limits(3), batch_size=1024
    )
    found = pipeline.complete([[0, 1]] * 1024, seed=2)
    law = joint_law(coarse, [0, 1], Sampling(), 3)
    assert chi_square(count_tokens(found, slice(0, 3), 5), law) > 0.01


def test_an_unknown_method_is_refused(plain: PretrainedLM) -> None:
    with pytest.raises(ValueError, match="quantize 'int4' is not one of none, int8_weight_only"):
        quantize(plain, "int4")
    quantize(plain, "none")
    assert quantization_report(plain) is None


def test_a_model_without_a_linear_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="PromptLookup has no linear layer to convert"):
        quantize(PromptLookup(), "int8_weight_only")
