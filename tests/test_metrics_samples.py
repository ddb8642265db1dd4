"""Quality without references: by hand, and added up over processes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from specstream.data.planning import solved
from specstream.metrics import DistinctN, JudgeNLL, Solved, TokenEntropy


def test_solved_asks_the_rules_and_no_list_of_answers() -> None:
    metric = Solved(solved)
    prompts = ["countdown 30 100 93 = 23\n"] * 3 + ["sudoku 3102200002100320\n"]
    metric.update(prompts, ["93+30-100", "30-100+93", "30+93", "3142243142131324"])
    assert metric.compute()["solved"].item() == 0.75


def test_entropy_is_that_of_each_text_by_itself() -> None:
    metric = TokenEntropy()
    metric.update([[7, 7, 7, 7], [1, 2, 1, 2]])
    assert metric.compute().item() == pytest.approx(math.log(2) / 2)
    metric.update([[1, 2, 3, 3], []])
    uneven = 0.5 * math.log(4) + 0.5 * math.log(2)
    assert metric.compute().item() == pytest.approx((math.log(2) + uneven) / 4)


def test_distinct_n_pools_the_texts() -> None:
    metric = DistinctN(2)
    metric.update([[1, 2, 1, 2], [1, 2], [9]])  # 12 21 12, 12: two of four
    assert metric.compute().item() == 0.5
    one = DistinctN(1)
    one.update([[1, 2], [1, 2]])
    assert one.compute().item() == 0.5
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        DistinctN(0)


def judge(prompt: str, text: str) -> Tensor:
    """A token is two characters; the first one after a prompt is less likely."""
    found = torch.full((len(text) // 2,), math.log(0.5))
    if prompt:
        found[:1] = math.log(0.125)
    return found


def test_a_judge_counts_by_its_own_tokens() -> None:
    metric = JudgeNLL(judge)
    metric.update(["", "a"], ["abcd", "abcdef"])  # five tokens, ten characters: 1 1, 3 1 1 bits
    found = metric.compute()
    assert found["judge_nll"].item() == pytest.approx(7 * math.log(2) / 5)
    assert found["judge_bits_per_character"].item() == pytest.approx(0.7)
    metric.update(["a"], [""])
    assert metric.compute()["judge_nll"].item() == pytest.approx(7 * math.log(2) / 5)


def test_samples_of_several_processes_add_up() -> None:
    rows = [[1, 2, 1], [1, 2, 3], [4, 4]]
    texts, prompts = ["ab", "abcd", "ef"], ["", "x", ""]
    cases = [
        (TokenEntropy, (rows,)),
        (DistinctN, (rows,)),
        (lambda: JudgeNLL(judge), (prompts, texts)),
        (lambda: Solved(lambda prompt, text: "c" in text), (prompts, texts)),
    ]
    for build, arguments in cases:
        whole, one, two = build(), build(), build()
        whole.update(*arguments)
        one.update(*(argument[:1] for argument in arguments))
        two.update(*(argument[1:] for argument in arguments))
        one.merge_state(two)
        assert one.compute() == whole.compute()
