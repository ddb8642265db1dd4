"""Planning puzzles made by rule, 4x4 sudoku and countdown, and the checks of their answers.

Where the order of decoding matters, a puzzle shows it: diffusion language models are measured on
these two (d1, Zhao et al. 2025).  A prompt gives the puzzle and the completion solves it:

    sudoku 3102200002100320      empty cells are 0, row by row     3142243142131324
    countdown 30 100 93 = 23     every number exactly once         93+30-100

Reading order: `Sudoku` and `Countdown` (sources of puzzles to train on), `planning_prompts` (the
published puzzles as prompts), `solved` (whether an answer, any answer, obeys the rules).
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import islice, permutations
from random import Random
from typing import TYPE_CHECKING, ClassVar

from specstream.data.records import Location, Record, require_field
from specstream.data.sources import Document, Segment, TextSource, check_limit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SUDOKU_PROMPT = re.compile(r"sudoku ([0-4]{16})\n")
COUNTDOWN_PROMPT = re.compile(r"countdown ([0-9]+ [0-9]+ [0-9]+) = ([0-9]+)\n")

LARGEST = 100  # of countdown's numbers and targets, as in the published puzzles
MOST_MISSES = 20_000  # so many draws without a new puzzle: there are no more
LONGEST_ANSWER = 64  # tokens of an expression; more are brackets around brackets

DIGITS = "0123456789"  # str.isdigit knows others

_CELLS = range(16)
_GROUPS = [  # the rows, columns and blocks of the board, each four cells
    [cell for cell in _CELLS if place(cell) == number]
    for place in (lambda c: c // 4, lambda c: c % 4, lambda c: c // 8 * 2 + c % 4 // 2)
    for number in range(4)
]

# Every positive value of three numbers has one of these shapes: what is left out is the same by
# commutativity, or as a-(b-c) = a+c-b.  Each gives numerator and denominator.
_SHAPES: dict[str, Callable[[int, int, int], tuple[int, int]]] = {
    "{}+{}+{}": lambda a, b, c: (a + b + c, 1),
    "{}+{}-{}": lambda a, b, c: (a + b - c, 1),
    "{}-{}-{}": lambda a, b, c: (a - b - c, 1),
    "{}*{}+{}": lambda a, b, c: (a * b + c, 1),
    "{}*{}-{}": lambda a, b, c: (a * b - c, 1),
    "{}-{}*{}": lambda a, b, c: (a - b * c, 1),
    "{}/{}+{}": lambda a, b, c: (a + b * c, b),
    "{}/{}-{}": lambda a, b, c: (a - b * c, b),
    "{}-{}/{}": lambda a, b, c: (a * c - b, c),
    "{}*{}*{}": lambda a, b, c: (a * b * c, 1),
    "{}*{}/{}": lambda a, b, c: (a * b, c),
    "{}/{}/{}": lambda a, b, c: (a, b * c),
    "({}+{})*{}": lambda a, b, c: ((a + b) * c, 1),
    "({}-{})*{}": lambda a, b, c: ((a - b) * c, 1),
    "({}+{})/{}": lambda a, b, c: (a + b, c),
    "({}-{})/{}": lambda a, b, c: (a - b, c),
    "{}/({}+{})": lambda a, b, c: (a, b + c),
    "{}/({}-{})": lambda a, b, c: (a, b - c),
}


@dataclass(frozen=True, slots=True)
class Puzzle:
    """A prompt and one of its answers."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class PuzzleSource(TextSource):
    """Puzzles that are drawn until there are enough different ones.

    A document's key is `problem_key` of its prompt.

    Args:
        num_puzzles: how many.
        seed: of the draws; the puzzles are a pure function of it.
        exclude: a file of published puzzles (docstring of `planning_prompts`), none of which is
            ever made, so that they can tell how well a model solves puzzles it has not seen.
    """

    num_puzzles: int = 20_000
    seed: int = 0
    exclude: str | None = None

    masked: ClassVar[bool] = True

    @property
    @abstractmethod
    def prompt_format(self) -> re.Pattern[str]:
        """What prompts of this kind look like."""

    @abstractmethod
    def draw(self, random: Random) -> Puzzle:
        """Make a puzzle, which may have been made before."""

    def check(self) -> None:
        if self.num_puzzles < 1:
            raise ValueError(f"{self.name}: num_puzzles must be at least 1, not {self.num_puzzles}")
        if self.exclude is not None:
            Location(self.exclude).files()

    def documents(self, tokenizer: PreTrainedTokenizerFast | None) -> Iterator[Document]:
        random, taken = Random(self.seed), self._excluded()
        num_excluded, misses = len(taken), 0
        while len(taken) - num_excluded < self.num_puzzles:
            puzzle = self.draw(random)
            key = problem_key(puzzle.prompt)
            if key not in taken:
                taken.add(key)
                misses = 0
                given, scored = Segment(puzzle.prompt, False), Segment(puzzle.answer, True)
                yield Document(key=key, segments=(given, scored))
                continue
            misses += 1
            if misses == MOST_MISSES:
                raise ValueError(
                    f"{self.name}: num_puzzles is {self.num_puzzles}, but no more than "
                    f"{len(taken) - num_excluded} different ones could be made"
                )

    def fingerprint(self) -> str:
        excluded = "" if self.exclude is None else Location(self.exclude).fingerprint()
        return repr(self) + excluded

    def _excluded(self) -> set[str]:
        if self.exclude is None:
            return set()
        prompts = planning_prompts(self.exclude)
        keys = {problem_key(p) for p in prompts if self.prompt_format.fullmatch(p)}
        if not keys:
            raise ValueError(f"{self.name}: '{self.exclude}' holds no puzzles of this kind")
        return keys


@dataclass(frozen=True)
class Sudoku(PuzzleSource):
    """4x4 sudoku: the 16 cells row by row, 0 where empty, and the solution in the same form.

    A puzzle is one of the 288 solutions with cells taken out, and held out by the puzzle: every
    solution is seen in training, as the answer of other puzzles.  Of the published puzzles (8
    empty cells each) a quarter has more than one solution; so have the puzzles made here, more
    often the more cells are empty.  `solved` accepts each of them.

    Args:
        num_puzzles: how many.
        seed: of the draws; the puzzles are a pure function of it.
        exclude: a file of published puzzles that are never made.
        empty: the least and the most empty cells; every number between is as likely.
    """

    empty: tuple[int, int] = (6, 10)

    @property
    def name(self) -> str:
        return "sudoku puzzles"

    @property
    def prompt_format(self) -> re.Pattern[str]:
        return SUDOKU_PROMPT

    def check(self) -> None:
        super().check()
        least, most = self.empty
        if not 1 <= least <= most <= len(_CELLS):
            raise ValueError(
                f"{self.name}: empty must be the least and the most empty cells, "
                f"1 to {len(_CELLS)}, not {least} and {most}"
            )

    def draw(self, random: Random) -> Puzzle:
        solution = random.choice(sudoku_solutions())
        emptied = set(random.sample(_CELLS, random.randint(*self.empty)))
        cells = "".join("0" if c in emptied else solution[c] for c in _CELLS)
        return Puzzle(sudoku_prompt(cells), solution)


@dataclass(frozen=True)
class Countdown(PuzzleSource):
    """Countdown: an expression of three numbers, each used once, that has the target as its value.

    Numbers (1 to 100, each as likely) and target (1 to 100, from random arithmetic on the numbers
    in which every step is a whole number) are drawn as those of the published puzzles seem to be:
    of these 90 % can be solved with + and - alone, of the drawn ones 88 %.  The answer is always
    `countdown_answer`.  Held out by the problem: numbers in another order are no other problem.

    Args:
        num_puzzles: how many.
        seed: of the draws; the puzzles are a pure function of it.
        exclude: a file of published puzzles that are never made.
    """

    @property
    def name(self) -> str:
        return "countdown puzzles"

    @property
    def prompt_format(self) -> re.Pattern[str]:
        return COUNTDOWN_PROMPT

    def draw(self, random: Random) -> Puzzle:
        numbers = [random.randint(1, LARGEST) for _ in range(3)]
        target = 0
        while not 1 <= target <= LARGEST:
            first, second, third = random.sample(numbers, 3)
            between = random.choice(_whole_results(first, second))
            target = random.choice(_whole_results(between, third))
        answer = countdown_answer(numbers, target)
        assert answer is not None, (numbers, target)
        return Puzzle(countdown_prompt(numbers, target), answer)


def _whole_results(a: int, b: int) -> list[int]:
    """Return what + - * / make of two numbers in whole numbers that are not negative."""
    low, high = sorted((a, b))
    quotient = [high // low] if low and high % low == 0 else []
    return [a + b, high - low, a * b, *quotient]


def sudoku_prompt(cells: str) -> str:
    """Return the prompt of a puzzle of 16 digits."""
    return f"sudoku {cells}\n"


def countdown_prompt(numbers: Sequence[int], target: int) -> str:
    """Return the prompt of a problem."""
    return f"countdown {' '.join(map(str, numbers))} = {target}\n"


def problem_key(prompt: str) -> str:
    """Return what a prompt has in common with every prompt that asks for the same."""
    countdown = COUNTDOWN_PROMPT.fullmatch(prompt)
    if countdown is None:
        return prompt
    return countdown_prompt(sorted(map(int, countdown[1].split())), int(countdown[2]))


def planning_prompts(path: str, limit: int | None = None) -> list[str]:
    """Return the puzzles of a published file as the prompts that `Sudoku` and `Countdown` make.

    A record has the field `puzzle` (16 digits) or the fields `numbers` (three) and `target`.
    Raises ValueError, with the line number, for any other record, and for a file that is missing
    or empty.
    """
    check_limit(f"puzzles '{path}'", limit)
    location = Location(path)
    location.files()  # a file is meant, even if the name would do for the hub
    prompts = [_published(place, record) for place, record in islice(location.records(), limit)]
    if not prompts:
        raise ValueError(f"'{path}' holds no puzzles")
    return prompts


def _published(place: str, record: Record) -> str:
    if "puzzle" in record:
        prompt = sudoku_prompt(record["puzzle"])
    else:
        numbers = require_field(place, record, "numbers")
        target = require_field(place, record, "target")
        prompt = countdown_prompt(numbers if isinstance(numbers, list) else [numbers], target)
    if not (SUDOKU_PROMPT.fullmatch(prompt) or COUNTDOWN_PROMPT.fullmatch(prompt)):
        raise ValueError(f"{place}: {prompt!r} is neither 4x4 sudoku nor countdown of 3 numbers")
    return prompt


def solved(prompt: str, answer: str) -> bool:
    """Return whether an answer obeys the rules of the puzzle that a prompt asks for.

    Raises ValueError for a prompt that is none of `Sudoku` or `Countdown`.
    """
    sudoku = SUDOKU_PROMPT.fullmatch(prompt)
    if sudoku is not None:
        return sudoku_solved(sudoku[1], answer)
    countdown = COUNTDOWN_PROMPT.fullmatch(prompt)
    if countdown is not None:
        return countdown_solved(list(map(int, countdown[1].split())), int(countdown[2]), answer)
    raise ValueError(f"{prompt!r} is neither a sudoku prompt nor a countdown prompt")


@cache
def sudoku_solutions() -> tuple[str, ...]:
    """Return the 288 full boards of 4x4 sudoku, sorted."""
    boards = [""]
    for _ in range(4):
        rows = ("".join(row) for row in permutations("1234"))
        boards = [board for row in rows for start in boards if _is_legal(board := start + row)]
    return tuple(sorted(boards))


def sudoku_solved(puzzle: str, answer: str) -> bool:
    """Return whether an answer is a full board, any legal one, that keeps the given cells."""
    board = answer.strip(" \n")
    if not re.fullmatch("[1-4]{16}", board):
        return False
    keeps = all(given in ("0", digit) for given, digit in zip(puzzle, board, strict=True))
    return keeps and _is_legal(board)


def _is_legal(board: str) -> bool:
    """Return whether no digit comes twice in a group, in as much of a board as is there."""
    groups = ([board[cell] for cell in group if cell < len(board)] for group in _GROUPS)
    return all(len(set(digits)) == len(digits) for digits in groups)


def countdown_answer(numbers: Sequence[int], target: int) -> str | None:
    """Return the first expression, in a fixed order, of three numbers that makes the target.

    + and - come before * and /, brackets last, larger numbers first; the order in which the
    numbers are given does not matter.  None when there is no expression.
    """
    orders = list(permutations(sorted(numbers, reverse=True)))
    for shape, fraction in _SHAPES.items():
        for a, b, c in orders:
            numerator, denominator = fraction(a, b, c)
            if denominator and numerator == target * denominator:
                return shape.format(a, b, c)
    return None


def countdown_solved(numbers: Sequence[int], target: int, answer: str) -> bool:
    """Return whether an answer is an expression of exactly these numbers that makes the target.

    + - * / and brackets, in exact arithmetic; a leading sign, an equals sign or a word is wrong.
    """
    tokens = re.findall(r"[0-9]+|[^ ]", answer.strip(" \n"))
    used = [token for token in tokens if token[0] in DIGITS]
    if len(tokens) > LONGEST_ANSWER or sorted(used) != sorted(map(str, numbers)):
        return False
    rest = tokens[::-1]
    try:
        return _sum(rest) == target and not rest
    except (ValueError, IndexError, ZeroDivisionError):
        return False


def _sum(rest: list[str]) -> Fraction:
    """Take a sum off the end of reversed tokens and return its value."""
    value = _product(rest)
    while rest and rest[-1] in "+-":
        value = value + _product(rest) if rest.pop() == "+" else value - _product(rest)
    return value


def _product(rest: list[str]) -> Fraction:
    value = _factor(rest)
    while rest and rest[-1] in "*/":
        value = value * _factor(rest) if rest.pop() == "*" else value / _factor(rest)
    return value


def _factor(rest: list[str]) -> Fraction:
    token = rest.pop()
    if token[0] in DIGITS:
        return Fraction(int(token))
    if token != "(":
        raise ValueError("neither a number nor a bracket")
    value = _sum(rest)
    if rest.pop() != ")":
        raise ValueError("a bracket is not closed")
    return value
