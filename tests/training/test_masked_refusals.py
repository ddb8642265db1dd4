"""What training of masked diffusion models refuses, each in one line."""

from __future__ import annotations

import math
from typing import Any

import pytest

from specstream.divergences import DPace, ForwardKL
from specstream.models import UntrainedLM
from specstream.training import Certainty, MaskedDiffusionModule
from tests.training.test_masked_diffusion import BLOCK, Tokens, attend, network


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"corruption": 1.0}, r"corruption must be in \[0, 1\), got 1.0"),
        ({"corruption": -0.1}, r"corruption must be in \[0, 1\), got -0.1"),
        ({"corruption": math.nan}, "corruption must be in"),
        ({"divergence": ForwardKL()}, "ForwardKL is to a target, and there is none"),
        ({"divergence": Certainty()}, "Certainty is to a target, and there is none"),
        ({"divergence": DPace(), "target": network}, "DPace weighs consecutive places"),
        ({"model": lambda: UntrainedLM(11, 16, 24, 1, 2)}, "model must be a masked .* UntrainedLM"),
        (
            {"target": lambda: UntrainedLM(11, 16, 24, 1, 2)},
            "target must be a masked diffusion language model, not UntrainedLM",
        ),
        ({"target": lambda: network(BLOCK)}, "the target must be bidirectional"),
        ({"model": lambda: network(mask_id=3)}, "the model's mask token is 3, the data's .* 5"),
        ({"target": lambda: network(mask_id=3)}, "the target's mask token is 3, the data's .* 5"),
        ({"model": lambda: network(vocab_size=10)}, "has 11 tokens, the model a vocabulary of 10"),
        ({"target": lambda: network(vocab_size=9)}, "has 11 tokens, the target a vocabulary of 9"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    attend(monkeypatch)
    with pytest.raises(ValueError, match=message):
        MaskedDiffusionModule(**{"model": network} | options).configure_model()


def test_a_tokenizer_without_a_mask_token_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    attend(monkeypatch, tokenizer=Tokens(None))
    with pytest.raises(ValueError, match=r"no mask token; set data.init_args.mask_token true"):
        MaskedDiffusionModule(network).configure_model()


@pytest.mark.parametrize(
    ("options", "layout", "message"),
    [
        (
            {"model": lambda: network(5)},
            {},
            "sequence_length 12 is not a multiple of block_length 5",
        ),
        ({"pad_canvas": True}, {"pack": True}, "pad_canvas needs one document a row"),
        (
            {},
            {"sequence_length": 65},
            "sequence_length 65 is longer than the 64 positions of the m",
        ),
        (
            {"target": lambda: network(max_positions=8)},
            {},
            "sequence_length 12 is longer than the 8 positions of the target",
        ),
        (
            {"target": lambda: network(vocab_size=12)},
            {},
            "the drafter has a vocabulary of 11, the target one of 12",
        ),
    ],
)
def test_data_and_pairs_that_do_not_fit_are_refused(
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    layout: dict[str, Any],
    message: str,
) -> None:
    attend(monkeypatch, **layout)
    trained = MaskedDiffusionModule(**{"model": network} | options)
    trained.configure_model()
    with pytest.raises(ValueError, match=message):
        trained.on_fit_start()


def test_a_sharded_training_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    attend(monkeypatch)
    monkeypatch.setattr(MaskedDiffusionModule, "device_mesh", "two processes")
    with pytest.raises(ValueError, match="not sharded; use strategy ddp"):
        MaskedDiffusionModule(network).configure_model()
