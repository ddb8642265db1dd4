"""int8 weights: what was converted is told, and decoding is exact for the quantised target."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from specstream.drafters import DraftModel, PromptLookup
from specstream.generation import (
    AutoregressivePipeline,
    FixedLength,
    Limits,
    SpeculativePipeline,
)
from specstream.models import PretrainedLM, UntrainedLM
from specstream.models.quantization import bytes_ratio, quantization_report, quantize
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
    linear = [m for m in plain.modules() if isinstance(m, nn.Linear)]
    numbers = sum(m.weight.numel() for m in linear)
    total = sum(p.numel() for p in plain.parameters())
    rows = sum(m.out_features for m in linear)  # each with a scale in float32 and a zero point
    held = numbers + 5 * rows
    assert quantization_report(plain) is None
    assert quantization_report(quantized) == {
        "method": "int8_weight_only",
        "linear_layers": len(linear),
        "share_of_parameters": round(numbers / total, 4),
        "bytes_in_bfloat16": 2 * numbers,
        "bytes": held,
        "bytes_ratio": round(held / (2 * numbers), 4),
        "not_converted": {
            "embeddings": round(16 * 32 / total, 4),
            "norms": round(5 * 32 / total, 4),  # two of each layer, and the last
        },
    }


def test_what_was_not_converted_is_named_by_kind() -> None:
    model = nn.ModuleDict(
        {
            "table": nn.Embedding(7, 16),
            "head": nn.Linear(16, 7),
            "other_table": nn.Embedding(3, 16),
            "layer": nn.Linear(16, 16),
            "norm": nn.LayerNorm(16),
            "convolution": nn.Conv1d(16, 2, 3),
            "attention": nn.MultiheadAttention(16, 2, bias=False),
        }
    )
    model["head"].weight = model["table"].weight
    numbers = {"tied_head": 7 * 16, "embeddings": 3 * 16, "norms": 2 * 16, "biases": 7 + 16}
    numbers |= {"convolutions": 16 * 2 * 3 + 2, "others": 3 * 16 * 16}
    converted = 2 * 16 * 16  # the layer, and what attention writes
    total = converted + sum(numbers.values())
    quantize(model, "int8_weight_only")
    report = quantization_report(model)
    assert report is not None and report["linear_layers"] == 2
    assert report["not_converted"] == {k: round(n / total, 4) for k, n in numbers.items()}
    assert report["share_of_parameters"] == round(converted / total, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["int8_weight_only", "int8_dynamic"])
def test_int8_takes_about_half_the_bytes_of_bfloat16_whatever_it_was(
    dtype: torch.dtype, method: str
) -> None:
    wide, narrow = nn.Linear(128, 64, dtype=dtype), nn.Linear(8, 64, dtype=dtype)
    model = nn.Sequential(wide)
    quantize(model, method)
    quantize(narrow, method)
    report = quantization_report(model)
    assert report is not None and report["bytes_in_bfloat16"] == 2 * 128 * 64
    assert 0.5 < report["bytes_ratio"] <= 0.55
    both = {"target": report, "drafter": quantization_report(narrow), "codec": {"method": "none"}}
    assert bytes_ratio(both) == pytest.approx((64 * 133 + 64 * 13) / (2 * 64 * 136))
    assert bytes_ratio({}) is None


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
    assert pipeline.stats.law == expected.stats.law == "the target's (target in int8)"


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
