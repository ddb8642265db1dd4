"""The task metrics of text, against published examples, hand-made ones and torchmetrics."""

from __future__ import annotations

import random

import pytest
from torchmetrics.functional.text import rouge_score

from specstream.metrics import ExactMatch, Rouge
from specstream.metrics.text import rouge_lsum


def rouge(text: str, *references: str) -> dict[str, float]:
    metric = Rouge()
    metric.update([text], [references])
    return {name: value.item() for name, value in metric.compute().items()}


def test_lins_example_of_the_union_of_common_subsequences() -> None:
    """Lin 2004, section 3.2: w1 w2 and w1 w3 w5 together find four of the five words."""
    f = rouge_lsum("w1 w2 w6 w7 w8\nw1 w3 w8 w9 w5", "w1 w2 w3 w4 w5")
    recall, precision = 4 / 5, 4 / 10
    assert f == pytest.approx(2 * recall * precision / (recall + precision))


def test_lins_example_of_word_order() -> None:
    """Lin 2004, section 3.1: both candidates share three words, only the first in their order."""
    reference = "police killed the gunman"
    assert rouge("Police kill the gunman.", reference)["rougeLsum"] == 0.75
    assert rouge("the gunman kill police", reference) == {"rouge1": 0.75, "rougeLsum": 0.5}


def test_rouge_1_counts_a_word_as_often_as_both_texts_hold_it() -> None:
    found = rouge("a a a b", "a a c")  # two of four, two of three
    assert found["rouge1"] == pytest.approx(2 * 2 / (4 + 3))
    assert found["rougeLsum"] == pytest.approx(2 * 2 / (4 + 3))


def test_the_best_reference_counts_for_each_score_on_its_own() -> None:
    found = rouge("a b c d", "d c b a", "a b x y")
    assert found == {"rouge1": 1.0, "rougeLsum": 0.5}


def test_sentences_end_at_lines_and_marks_but_not_after_titles() -> None:
    swapped = "It is big. Mr. Lee is here!"
    assert rouge(swapped, "Mr. Lee is here!\nIt is big.")["rougeLsum"] == 1.0
    assert rouge("Lee Mr.", "Mr. Lee")["rougeLsum"] == 0.5  # one sentence: the order counts
    assert rouge("Lee now.", "now. Lee")["rougeLsum"] == 1.0


def test_texts_without_a_common_word_score_nothing() -> None:
    for text in ("", "?!", "x y"):
        assert rouge(text, "a b") == {"rouge1": 0.0, "rougeLsum": 0.0}


def test_of_single_sentences_lsum_is_the_rouge_l_of_torchmetrics() -> None:
    rng = random.Random(0)
    for _ in range(20):
        text, reference = (" ".join(rng.choices("abcdef", k=rng.randint(1, 9))) for _ in "12")
        expected = rouge_score(text, reference, rouge_keys="rougeL")["rougeL_fmeasure"]
        assert rouge_lsum(text, reference) == pytest.approx(expected.item())


def test_exact_match_forgives_white_space_and_nothing_else() -> None:
    metric = ExactMatch()
    metric.update([" SELECT  a\nFROM t "], [["SELECT a FROM t"]])
    assert metric.compute()["exact_match"] == 1.0
    metric.update(["select a FROM t"], [["SELECT a FROM t"]])
    metric.update(["x"], [["y", "x"]])
    metric.update(["SELECT a FROM"], [["SELECT a FROM t"]])
    assert metric.compute()["exact_match"] == 0.5


def test_qualities_of_several_processes_add_up() -> None:
    texts, references = ["a b", "c", "d e f"], [["a b"], ["x"], ["d e"]]
    whole, one, two = Rouge(), Rouge(), Rouge()
    whole.update(texts, references)
    one.update(texts[:1], references[:1])
    two.update(texts[1:], references[1:])
    one.merge_state(two)
    assert one.compute() == whole.compute()
    assert whole.compute()["rouge1"].item() == pytest.approx((1 + 0 + 0.8) / 3)
