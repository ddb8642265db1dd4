"""Planning puzzles: what is made, what is never made, and which answers obey the rules."""

from __future__ import annotations

import re
from collections import Counter
from contextlib import suppress
from fractions import Fraction
from itertools import permutations, product
from pathlib import Path

import pytest

from specstream.data import Countdown, Sudoku
from specstream.data.planning import (
    countdown_answer,
    countdown_prompt,
    countdown_solved,
    planning_prompts,
    problem_key,
    solved,
    sudoku_solutions,
    sudoku_solved,
)
from specstream.data.sources import TextSource

PUBLISHED = Path(__file__).parents[2] / "data" / "dllm_planning"
published = pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published puzzles are not there")

PUZZLE, SOLUTION = "3102200002100320", "3142243142131324"


def pairs(source: TextSource) -> list[tuple[str, str]]:
    """Return the prompt and the completion of every document."""
    documents = list(source.documents(None))
    assert all([s.scored for s in document.segments] == [False, True] for document in documents)
    return [(d.segments[0].text, d.segments[1].text) for d in documents]


@pytest.mark.parametrize("kind", [Sudoku, Countdown])
def test_every_puzzle_is_solved_by_its_completion_and_comes_once(kind) -> None:
    source = kind(num_puzzles=1500)
    source.check()
    made = pairs(source)
    assert all(solved(prompt, completion) for prompt, completion in made)
    assert len({problem_key(prompt) for prompt, _ in made}) == len(made) == 1500


@pytest.mark.parametrize("kind", [Sudoku, Countdown])
def test_puzzles_are_a_pure_function_of_the_seed(kind) -> None:
    made = pairs(kind(num_puzzles=50))
    assert made == pairs(kind(num_puzzles=50))
    assert made == pairs(kind(num_puzzles=60))[:50]
    assert made != pairs(kind(num_puzzles=50, seed=1))


def test_the_first_puzzles_stay_what_they_are() -> None:
    # other ones would leak held-out puzzles into what was trained before
    assert pairs(Sudoku(num_puzzles=1)) == [("sudoku 3010000003210104\n", "3412124343212134")]
    assert pairs(Countdown(num_puzzles=1)) == [("countdown 50 98 54 = 6\n", "54+50-98")]


@pytest.mark.parametrize("kind", [Sudoku, Countdown])
def test_excluded_puzzles_are_never_made(kind, write_jsonl) -> None:
    prompts = [prompt for prompt, _ in pairs(kind(num_puzzles=200))]
    path = write_jsonl("published.jsonl.gz", [record_of(prompt) for prompt in prompts[::2]])
    assert planning_prompts(path) == prompts[::2]
    source = kind(num_puzzles=200, exclude=path)
    source.check()
    made = [prompt for prompt, _ in pairs(source)]
    assert made[:100] == prompts[1::2] and not set(made) & set(prompts[::2])
    assert source.fingerprint() != kind(num_puzzles=200).fingerprint()


def record_of(prompt: str) -> dict[str, object]:
    """Return a prompt as the record of a published file."""
    words = prompt.split()
    if words[0] == "sudoku":
        return {"puzzle": words[1]}
    return {"numbers": [int(word) for word in words[1:4]], "target": int(words[5])}


def test_numbers_in_another_order_are_the_same_problem(write_jsonl) -> None:
    prompts = [countdown_prompt(numbers, 47) for numbers in permutations((12, 5, 30))]
    assert {problem_key(prompt) for prompt in prompts} == {"countdown 5 12 30 = 47\n"}
    assert problem_key("countdown 5 12 30 = 48\n") != problem_key(prompts[0])
    made = [prompt for prompt, _ in pairs(Countdown(num_puzzles=20))]
    turned = [record_of(prompt) for prompt in made]
    for record in turned:
        record["numbers"] = record["numbers"][::-1]
    again = Countdown(num_puzzles=20, exclude=write_jsonl("turned.jsonl", turned))
    keys = {document.key for document in again.documents(None)}
    assert not keys & {problem_key(prompt) for prompt in made}


def test_the_empty_cells_are_as_many_as_asked_for() -> None:
    made = pairs(Sudoku(num_puzzles=400, empty=(6, 8)))
    counts = Counter(prompt.count("0") for prompt, _ in made)
    assert set(counts) == {6, 7, 8} and min(counts.values()) > 90
    assert {prompt.count("0") for prompt, _ in pairs(Sudoku(num_puzzles=9, empty=(8, 8)))} == {8}


def test_there_are_288_boards_of_sudoku() -> None:
    boards = sudoku_solutions()
    assert len(set(boards)) == 288 and SOLUTION in boards
    for cells in ((0, 1, 2, 3), (0, 4, 8, 12), (2, 3, 6, 7), (8, 9, 12, 13)):
        assert all({board[cell] for cell in cells} == set("1234") for board in boards)


def test_any_board_that_keeps_the_given_cells_solves_a_sudoku() -> None:
    assert sudoku_solved(PUZZLE, SOLUTION) and sudoku_solved(PUZZLE, f" {SOLUTION}\n")
    empty = "0" * 16
    assert all(sudoku_solved(empty, board) for board in sudoku_solutions())
    assert sum(sudoku_solved(PUZZLE, board) for board in sudoku_solutions()) == 1
    wrong = {
        "a given cell is changed": next(b for b in sudoku_solutions() if b[0] != "3"),
        "the rows and columns are right, the blocks not": "1234234134124123",
        "a digit is missing": SOLUTION[:-1],
        "a cell is empty": SOLUTION[:-1] + "0",
        "digits of another script": SOLUTION.replace("3", "\u0663"),
        "nothing": "",
        "words": "the solution is " + SOLUTION,
        "blanks": " ".join(SOLUTION),
    }
    for what, answer in wrong.items():
        assert not sudoku_solved(PUZZLE if what.startswith("a given") else empty, answer), what


def test_countdown_is_checked_in_exact_arithmetic() -> None:
    right = {
        "30+12+5": ((12, 5, 30), 47),
        "12 + (5+30)\n": ((12, 5, 30), 47),
        "2-3-4+10": ((2, 3, 4, 10), 5),
        "8/2/2": ((2, 2, 8), 2),
        "1+2*3": ((1, 2, 3), 7),
        "(1+2)*3": ((1, 2, 3), 9),
        "6/(1-3/4)": ((1, 3, 4, 6), 24),  # through a fraction
        "49*(1/49)": ((1, 49, 49), 1),
        "((((3))))+1+1": ((1, 1, 3), 5),
    }
    for answer, (numbers, target) in right.items():
        assert countdown_solved(numbers, target, answer), answer


@pytest.mark.parametrize(
    "answer",
    [
        "30+12+6",
        "30+12",
        "30+12+5+5",
        "30+12-5",
        "30+17",
        "30+12+05",
        "+30+12+5",
        "30+12+5=47",
        "30++12+5",
        "30+12+5+",
        "30 12 5",
        "(30+12+5",
        "30+12+5)",
        "()30+12+5",
        "30(+12)+5",
        "30/(12-12)+5",
        "30+12+5+\u0660",
        "30+12.0+5",
        "30+12+5;",
        "30+12\n+5",
        "3 0+12+5",
        "30**12+5",
        "__import__('os')",
        "",
        "(" * 5000 + "30+12+5" + ")" * 5000,
        "9" * 5000,
    ],
)
def test_a_malformed_or_wrong_expression_is_no_answer(answer: str) -> None:
    assert countdown_solved((12, 5, 30), 47, "12+5+30")
    assert not countdown_solved((12, 5, 30), 47, answer)


def test_a_division_by_zero_is_no_answer() -> None:
    assert not countdown_solved((3, 4, 4), 3, "3/(4-4)")


def test_a_problem_has_one_answer_in_whatever_order_its_numbers_are_given() -> None:
    answers = {countdown_answer(numbers, 47) for numbers in permutations((12, 5, 30))}
    assert answers == {"30+12+5"}
    assert countdown_answer((100, 93, 30), 23) == "93+30-100"
    assert countdown_answer((2, 3, 50), 45) == "50-3-2"
    assert countdown_answer((2, 3, 50), 94) == "(50-3)*2"
    assert countdown_answer((1, 1, 1), 50) is None


def test_whatever_three_numbers_can_make_has_an_answer() -> None:
    shapes = ("{}%s{}%s{}", "({}%s{})%s{}", "{}%s({}%s{})")
    for numbers in ((2, 3, 7), (4, 4, 9), (1, 8, 12)):
        reachable = set()
        for order, shape, signs in product(
            permutations(numbers), shapes, product("+-*/", repeat=2)
        ):
            text = (shape % signs).format(*order)
            with suppress(ZeroDivisionError):
                reachable.add(eval(re.sub(r"(\d+)", r"Fraction(\1)", text), {"Fraction": Fraction}))
        answered = {t for t in range(1, 101) if countdown_answer(numbers, t) is not None}
        assert answered == {value for value in reachable if value in range(1, 101)}
        for target in answered:
            assert countdown_solved(numbers, target, countdown_answer(numbers, target))


def test_a_prompt_says_which_puzzle_it_is() -> None:
    assert solved(f"sudoku {PUZZLE}\n", SOLUTION)
    assert solved("countdown 30 100 93 = 23\n", "30+93-100")
    assert not solved("countdown 30 100 93 = 23\n", SOLUTION)
    for prompt in ("", f"sudoku {PUZZLE}", "sudoku 123\n", "countdown 1 2 = 3\n", "What is 1+1?"):
        with pytest.raises(ValueError, match="neither a sudoku prompt nor a countdown prompt"):
            solved(prompt, SOLUTION)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"puzzle": "12"}, r"line 1: 'sudoku 12\\n' is neither 4x4 sudoku nor countdown"),
        ({"numbers": [1, 2], "target": 3}, "neither 4x4 sudoku nor countdown of 3 numbers"),
        ({"numbers": 5, "target": 3}, "neither 4x4 sudoku nor countdown of 3 numbers"),
        ({"numbers": [1, 2, 3]}, "field 'target' is missing; the record has numbers"),
        ({"question": "why"}, "field 'numbers' is missing; the record has question"),
    ],
)
def test_a_file_of_other_records_is_refused(write_jsonl, record, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        planning_prompts(write_jsonl("other.jsonl", [record]))


def test_planning_prompts_stop_at_the_limit(write_jsonl) -> None:
    path = write_jsonl("a.jsonl", [{"puzzle": PUZZLE}, {"numbers": [1, 2, 3], "target": 6}])
    assert planning_prompts(path) == [f"sudoku {PUZZLE}\n", "countdown 1 2 3 = 6\n"]
    assert planning_prompts(path, limit=1) == [f"sudoku {PUZZLE}\n"]
    with pytest.raises(ValueError, match="limit must be at least 1"):
        planning_prompts(path, limit=0)
    with pytest.raises(ValueError, match="holds no puzzles"):
        planning_prompts(write_jsonl("empty.jsonl", []))


def test_wrong_options_are_refused(tmp_path: Path, write_jsonl) -> None:
    wrong: list[tuple[TextSource, str]] = [
        (Sudoku(num_puzzles=0), "num_puzzles must be at least 1, not 0"),
        (Sudoku(empty=(0, 8)), "1 to 16, not 0 and 8"),
        (Sudoku(empty=(9, 8)), "1 to 16, not 9 and 8"),
        (Sudoku(empty=(8, 17)), "1 to 16, not 8 and 17"),
        (Countdown(exclude=str(tmp_path / "nowhere.jsonl")), r"nowhere\.jsonl' does not exist"),
    ]
    for source, message in wrong:
        with pytest.raises(ValueError, match=message):
            source.check()
    sudokus = write_jsonl("sudokus.jsonl", [{"puzzle": PUZZLE}])
    with pytest.raises(ValueError, match="holds no puzzles of this kind"):
        next(Countdown(exclude=sudokus).documents(None))
    with pytest.raises(ValueError, match="num_puzzles is 2, but no more than 1 different"):
        list(Sudoku(num_puzzles=2, empty=(16, 16)).documents(None))


@published
def test_the_published_puzzles_are_of_the_kind_that_is_made() -> None:
    sudokus = planning_prompts(str(PUBLISHED / "sudoku4x4_test.jsonl.gz"))
    countdowns = planning_prompts(str(PUBLISHED / "countdown3_test.jsonl.gz"))
    assert (len(sudokus), len(countdowns)) == (500, 256)
    assert {prompt.count("0") for prompt in sudokus} == {8}
    for prompt in countdowns:
        record = record_of(prompt)
        assert all(1 <= number <= 100 for number in [*record["numbers"], record["target"]])
        assert solved(prompt, countdown_answer(record["numbers"], record["target"]))
    ambiguous = [
        prompt for prompt in sudokus if sum(solved(prompt, b) for b in sudoku_solutions()) > 1
    ]
    assert len(ambiguous) == 124


@published
@pytest.mark.parametrize(
    ("kind", "name"), [(Sudoku, "sudoku4x4_test"), (Countdown, "countdown3_test")]
)
def test_the_published_puzzles_are_kept_out(kind, name: str) -> None:
    path = str(PUBLISHED / f"{name}.jsonl.gz")
    source = kind(num_puzzles=3000, exclude=path)
    keys = {document.key for document in source.documents(None)}
    assert not keys & {problem_key(prompt) for prompt in planning_prompts(path)}
