"""Weights that are no drafter's are refused before they draft."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from specstream.drafters import Eagle3
from specstream.drafters.stored import read_tensors, write_tensors
from specstream.models import PretrainedLM
from tests.toys import letters, toy_lm

WORDS, DRAFTED = 12, 7


@pytest.fixture(scope="module")
def target() -> PretrainedLM:
    return toy_lm(WORDS, num_layers=3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    write_tensors(tmp_path / "x.safetensors", {"weight": torch.tensor([1.0, value])})
    with pytest.raises(ValueError, match=r"x.safetensors' is damaged: weight holds numbers that"):
        read_tensors(tmp_path / "x.safetensors", {"weight": torch.zeros(2)})


@pytest.mark.parametrize(
    "damage",
    [
        lambda tensors: tensors["d2t"].add_(WORDS),
        lambda tensors: tensors["d2t"].sub_(1),
        lambda tensors: tensors["d2t"][3:].sub_(1),
        lambda tensors: tensors["t2d"].zero_(),
    ],
    ids=["beyond the vocabulary", "before it", "a token twice", "nothing drafted"],
)
def test_a_damaged_map_of_the_drafted_tokens_is_refused(
    target: PretrainedLM, tmp_path: Path, damage: Callable[[dict[str, Tensor]], object]
) -> None:
    Eagle3(target, draft_vocab_size=DRAFTED).save(tmp_path, letters())
    path = tmp_path / "eagle3.safetensors"
    Eagle3(target, draft_vocab_size=DRAFTED, weights=str(tmp_path))
    tensors = load_file(path)
    damage(tensors)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"d2t and t2d must name the same 7 tokens, ascending"):
        Eagle3(target, draft_vocab_size=DRAFTED, weights=str(tmp_path))
