"""Drafting across vocabularies: a drafter with its own tokenizer for a target with another one.

DualDiffusion (Goyal et al. 2026) pairs such models, but its code uses positions of one vocabulary
as positions of the other.  Here nothing crosses without a `PositionMap`.  A row is cut at masks and
special tokens; each piece of text between them is decoded and encoded by itself, and a run of n
masks is n masks of the drafter: how much text a mask stands for is open on either side.

Reading order: `Vocabulary` (a tokenizer on pieces), `translated` (a piece), `PositionMap` (a row),
`TranslatedDrafter` (a round, whose tokens are copied to the host and back).  Shapes: B rows, C
positions of the target's canvas, W of the drafter's, V the target's vocabulary.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from specstream.drafters.base import CanvasDrafter
from specstream.drafters.masked import MaskedDraftModel
from specstream.models.pretrained_masked import PretrainedMaskedLM
from specstream.processors import REPLACEMENT, TextProcessor
from specstream.sampling import Noise, Sampling
from specstream.structures import Canvas, CanvasDraft

MOST_GROWTH = 32  # drafter tokens for each position of the target's canvas, at most

Span = tuple[int, int]  # the characters first..last-1 of a piece of text


class Vocabulary:
    """One side of a translation: a model's tokenizer, used on pieces of texts, and its mask.

    Special tokens are no text: `text` and `encode` neither meet nor make them.  Raises ValueError
    in one line for a model without a tokenizer or without a mask token, and for a tokenizer that
    takes each piece for the beginning of a text (Llama 2's, which puts a space before it).
    """

    def __init__(self, model: PretrainedMaskedLM, role: str) -> None:
        if not model.path:
            raise ValueError(f"the {role}'s model is of no folder that has a tokenizer")
        self.processor = TextProcessor.from_pretrained(model.path)
        self.tokenizer = self.processor.tokenizer
        name = f"the {role}'s tokenizer of {model.path!r}"
        if not self.tokenizer.is_fast:
            raise ValueError(f"{name} has no fast version")
        added = self.tokenizer.added_tokens_decoder.items()
        special = {i for i, token in added if token.special} | {*self.tokenizer.all_special_ids}
        if model.form.mask_id not in special:
            raise ValueError(f"{name} has no mask token of id {model.form.mask_id}, its model's")
        self.mask, self.size = model.mask_id, model.vocab_size
        self.ends = self.processor.eos_ids
        self.special = frozenset(special | self.ends)
        own = self.tokenizer.eos_token_id
        self.end: int | None = own if own is not None else min(self.ends, default=None)
        self.beginning: int | None = self.tokenizer.bos_token_id
        self.opening: list[int] = list(self.tokenizer("")["input_ids"])
        self.begins = self.opening == [self.beginning]
        self.names: dict[str, int] = self.tokenizer.get_vocab()
        pieces = self.processor.decode(self.encode("a")[0] + self.encode("b")[0])
        if pieces not in ("ab", "a", "b", ""):  # a letter may be unknown, and has no text then
            raise ValueError(f"{name} puts spaces before pieces of text: they cannot be translated")

    def encode(self, text: str) -> tuple[list[int], list[Span]]:
        """Return a piece's tokens and the characters of each, without gaps.

        A name of a special token in the text is text.  Bytes of one character share it.
        """
        encoded = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
        )
        spans: list[Span] = []
        for first, last in encoded["offset_mapping"]:  # some tokenizers leave out spaces
            spans.append((min(first, spans[-1][1] if spans else 0), last))
        return list(encoded["input_ids"]), spans

    def text(self, tokens: Sequence[int]) -> tuple[str, list[Span]]:
        """Return the text of tokens and the characters of each; parts of one share them."""
        text, spans, group = "", [], []
        for i, token in enumerate(tokens):
            group.append(token)
            piece = self.processor.decode(group)
            if piece.endswith(REPLACEMENT) and i < len(tokens) - 1:
                continue  # the next token may complete the character
            spans += [(len(text), len(text) + len(piece))] * len(group)
            text, group = text + piece, []
        return text, spans


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of text in another vocabulary."""

    tokens: tuple[int, ...]
    covers: tuple[tuple[int, ...], ...]  # of each: the old tokens that it shares characters with
    broken: bool  # whether the old ones hold bytes that are no character


def translated(tokens: Sequence[int], source: Vocabulary, goal: Vocabulary, cut: bool) -> Piece:
    """Return `tokens` of `source`, none of them special, in those of `goal`.

    `cut` leaves out what comes after bytes that are no character (yet).
    """
    text, old = source.text(tokens)
    broken = REPLACEMENT in text
    found, new = goal.encode(text.split(REPLACEMENT)[0] if cut else text)
    firsts, lasts = [span[0] for span in old], [span[1] for span in old]
    covers = tuple(
        tuple(range(bisect_right(lasts, first), bisect_left(firsts, last))) for first, last in new
    )
    return Piece(tuple(found), covers, broken)


@dataclass(frozen=True, slots=True)
class Run:
    """Masks of a row that stand side by side: as many in both vocabularies."""

    place: int  # of the first in the target's canvas
    drafted: int  # of the first in the drafter's
    length: int


@dataclass(frozen=True, slots=True)
class PositionMap:
    """One row in the drafter's tokens, and which positions of the two share characters or masks."""

    tokens: tuple[int, ...]  # the row in the drafter's tokens
    targets: tuple[tuple[int, ...], ...]  # of each drafter position: the target's that it covers
    runs: tuple[Run, ...]

    def drafters(self, place: int) -> list[int]:
        """Return the way back: the drafter positions that cover the target's `place`."""
        return [i for i, places in enumerate(self.targets) if place in places]


@dataclass(frozen=True, slots=True)
class Word:
    """A drafted token in the target's vocabulary."""

    place: int  # in the target's canvas
    token: int
    step: int  # the latest step of the drafter's tokens whose characters it covers
    certain: float  # the product of their probabilities


@dataclass(slots=True)
class TranslatedCanvas(Canvas):
    """A canvas in the drafter's tokens, whose length changes as its text does."""

    strides: Tensor  # (B,) more than a row is ever long

    def elements(self) -> Tensor:
        """Number a step's draws (B, W); numbers by the present length would come twice."""
        steps = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return self.drawn[:, None] * self.strides[:, None] + steps


@dataclass(slots=True)
class TranslatedCache:
    """The wrapped drafter's state, the width that it has room for, and what was translated."""

    drafter: Any
    capacity: int
    pieces: dict[tuple[int, ...], Piece] = field(default_factory=dict)


class TranslatedDrafter(CanvasDrafter):
    """Lets a drafter with its own tokenizer draft for `target`.

    Give the `model` of a `MaskedDraftModel`, or any other `drafter` that holds a masked LM; the
    tokenizers are those of the models' folders.  Where both have the same tokens, in whatever
    order, the draft is the wrapped drafter's, laws included.  Else a run of masks takes what was
    drafted without a gap from its left, in the target's tokens, as far as it has room; the rest of
    it stays masked, and so do drafts further right, whose place in the target's tokens is unknown.

    `probs` are then a stand-in for a law over other tokens: the product of the probabilities of
    the drafter's tokens under a token, the rest evenly over all others but the mask; no rule may
    take it for a law.  `steps` are the latest of the tokens under each; a step of which a row keeps
    nothing is not counted.  Ends and beginnings of texts become the drafter's own; of other
    special tokens it sees those that it knows by name, and only ends of text are taken over.
    """

    to_drafter: Tensor | None  # (V,) the drafter's id of each token, where all are the same tokens

    def __init__(
        self,
        target: nn.Module,
        model: Callable[[], PretrainedMaskedLM] | None = None,
        drafter: Callable[[nn.Module], CanvasDrafter] | None = None,
    ) -> None:
        super().__init__()
        assert isinstance(target, PretrainedMaskedLM)
        if model is not None and drafter is None:
            self.drafter: CanvasDrafter = MaskedDraftModel(target, model)
        elif drafter is not None and model is None:
            self.drafter = drafter(target)
        else:
            raise ValueError("what is to be translated is either a model or a drafter: give one")
        inside = [part for part in self.drafter.modules() if isinstance(part, PretrainedMaskedLM)]
        if not inside:
            raise ValueError(f"{type(self.drafter).__name__} holds no model with a tokenizer")
        self.mine, self.theirs = Vocabulary(inside[0], "drafter"), Vocabulary(target, "target")
        self.register_buffer("to_drafter", renumbering(self.theirs, self.mine), persistent=False)

    @property
    def reports_law(self) -> bool:
        return self.to_drafter is not None

    def new_cache(self, batch_size: int, capacity: int) -> TranslatedCache:
        """Return fresh state, made anew and larger when a text needs more drafter tokens.

        Text moves as it is filled: a drafter's cache must compare what it has read with what it
        sees, as `MaskedDraftModel`'s does.
        """
        return TranslatedCache(self.drafter.new_cache(batch_size, capacity), capacity)

    def propose(
        self,
        canvas: Canvas,
        cache: TranslatedCache,
        num_steps: Sequence[int],
        sampling: Sampling,
        noise: Noise,
    ) -> CanvasDraft:
        if self.to_drafter is not None:
            own = replace(canvas, tokens=self.to_drafter[canvas.tokens])
            draft = self.drafter.propose(own, cache.drafter, num_steps, sampling, noise)
            canvas.drawn = own.drawn
            drawn = self.to_drafter.argsort()[draft.tokens]
            return replace(draft, tokens=drawn, probs=draft.probs[:, :, self.to_drafter])
        if not max(num_steps):
            return self._draft(canvas, [])
        given, hidden = torch.stack([canvas.tokens, canvas.masked]).tolist()
        rows = zip(given, hidden, canvas.lengths.tolist(), strict=True)
        maps = [self.read(row[:size], masked[:size], cache.pieces) for row, masked, size in rows]
        own = self._canvas(canvas, maps, num_steps)
        if own.tokens.shape[1] > cache.capacity:  # the drafter reads all of it once more
            cache.capacity = 2 * own.tokens.shape[1]
            cache.drafter = self.drafter.new_cache(len(maps), cache.capacity)
        draft = self.drafter.propose(own, cache.drafter, num_steps, sampling, noise)
        canvas.drawn = own.drawn
        certain = draft.probs.gather(-1, draft.tokens[:, :, None])[:, :, 0].tolist()  # (B, W)
        tokens, steps = torch.stack([draft.tokens, draft.steps]).tolist()
        words = [
            list(self.write(found, tokens[row], steps[row], certain[row])) if num_steps[row] else []
            for row, found in enumerate(maps)
        ]
        return self._draft(canvas, words)

    def read(
        self, tokens: list[int], masked: list[bool], known: dict[tuple[int, ...], Piece]
    ) -> PositionMap:
        """Return a row of the target's canvas in the drafter's tokens; adds pieces to `known`."""
        row: list[int] = []
        covers: list[tuple[int, ...]] = []
        runs: list[Run] = []
        if self.mine.begins and not self.theirs.begins:  # as the drafter knows texts
            row, covers = list(self.mine.opening), [()]
        special = [token in self.theirs.special for token in tokens]
        for _, group in groupby(range(len(tokens)), lambda i: (masked[i], special[i])):
            places = list(group)
            if masked[places[0]]:
                runs.append(Run(places[0], len(row), len(places)))
                row += [self.mine.mask] * len(places)
                covers += [(place,) for place in places]
            elif special[places[0]]:
                named = [(self._special(tokens[place], place == 0), place) for place in places]
                row += [token for token, _ in named if token is not None]
                covers += [(place,) for token, place in named if token is not None]
            else:
                text = tuple(tokens[place] for place in places)
                if text not in known:
                    known[text] = translated(text, self.theirs, self.mine, cut=False)
                row += known[text].tokens
                covers += [tuple(places[i] for i in under) for under in known[text].covers]
        return PositionMap(tuple(row), tuple(covers), tuple(runs))

    def _special(self, token: int, first: bool) -> int | None:
        """Return the drafter's token for a special one of the target, None where it has none."""
        if token == self.theirs.mask:  # of a block that is not filled yet
            return self.mine.mask
        if token == self.theirs.beginning and (first or token not in self.theirs.ends):
            return self.mine.beginning
        if token in self.theirs.ends:
            return self.mine.end
        same = self.mine.names.get(self.theirs.tokenizer.convert_ids_to_tokens(token), -1)
        return same if same in self.mine.special and same != self.mine.mask else None

    def write(
        self, found: PositionMap, tokens: list[int], steps: list[int], certain: list[float]
    ) -> Iterator[Word]:
        """Yield what was drafted in a row, in the target's tokens, run by run.

        `steps` are -1 where nothing was drafted; `certain` is the probability of each token.
        """
        for run in found.runs:
            here = range(run.drafted, run.drafted + run.length)
            here = here[: next((i for i, place in enumerate(here) if steps[place] < 0), run.length)]
            said = self._said([tokens[i] for i in here])
            for place, (token, covers) in zip(range(run.length), said, strict=False):
                under = [here[i] for i in covers]
                if under and (token not in self.theirs.special or token in self.theirs.ends):
                    step = max(steps[i] for i in under)
                    yield Word(run.place + place, token, step, prod(certain[i] for i in under))

    def _said(self, tokens: Sequence[int]) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Yield drafted tokens in the target's, each with the indices of those under it.

        They end where there is no telling: at bytes that are no character, at special tokens.
        """
        for special, group in groupby(range(len(tokens)), lambda i: tokens[i] in self.mine.special):
            places = list(group)
            if special:
                for place in places:
                    if tokens[place] not in self.mine.ends or self.theirs.end is None:
                        return
                    yield self.theirs.end, (place,)
            else:
                piece = translated([tokens[i] for i in places], self.mine, self.theirs, cut=True)
                covers = (tuple(places[i] for i in under) for under in piece.covers)
                yield from zip(piece.tokens, covers, strict=True)
                if piece.broken:
                    return

    def _canvas(
        self, canvas: Canvas, maps: Sequence[PositionMap], num_steps: Sequence[int]
    ) -> TranslatedCanvas:
        """Return the canvas that the drafter sees; ValueError for a row that has grown too long."""
        strides = MOST_GROWTH * canvas.lengths
        for found, room, wanted in zip(maps, strides.tolist(), num_steps, strict=True):
            if wanted and len(found.tokens) > room:
                raise ValueError(
                    f"a canvas of {room // MOST_GROWTH} tokens is {len(found.tokens)} of the "
                    f"drafter's, more than {MOST_GROWTH} for one"
                )
        lengths = torch.tensor([max(1, len(found.tokens)) for found in maps])
        tokens = torch.zeros(len(maps), int(lengths.max()), dtype=torch.long)  # (B, W)
        masked = torch.zeros_like(tokens, dtype=torch.bool)
        for row, found in enumerate(maps):
            tokens[row, : len(found.tokens)] = torch.tensor(found.tokens, dtype=torch.long)
            for run in found.runs:
                masked[row, run.drafted : run.drafted + run.length] = True
        tokens, masked, lengths = (x.to(strides.device) for x in (tokens, masked, lengths))
        return TranslatedCanvas(tokens, masked, lengths, canvas.prompts, canvas.drawn, strides)

    def _draft(self, canvas: Canvas, words: Sequence[Sequence[Word]]) -> CanvasDraft:
        """Return the draft that puts the words of each row into the canvas."""
        tokens = canvas.tokens.tolist()
        steps, certain = ([[x] * len(row) for row in tokens] for x in (-1, 0.0))
        for row, placed in enumerate(words):
            left = sorted({word.step for word in placed})
            for word in placed:
                tokens[row][word.place] = word.token
                steps[row][word.place] = left.index(word.step)
                certain[row][word.place] = word.certain
        device, size = canvas.tokens.device, self.theirs.size
        drawn, order = torch.tensor(tokens, device=device), torch.tensor(steps, device=device)
        sure, drafted = torch.tensor(certain, device=device), order >= 0
        rest = ((1 - sure) / (size - 2))[:, :, None].expand(-1, -1, size)  # (B, C, V)
        probs = rest.scatter(-1, drawn[:, :, None], sure[:, :, None])
        probs[:, :, self.theirs.mask] = 0.0
        return CanvasDraft(drawn, drafted, order, probs * drafted[:, :, None])

    def check_target(self, target: nn.Module, processor: TextProcessor) -> None:
        """Refuse another target than the one whose tokenizer is translated; ids may be any."""
        assert isinstance(target, PretrainedMaskedLM)
        same = processor.tokenizer.get_vocab() == self.theirs.names
        if not same or (target.mask_id, target.vocab_size) != (self.theirs.mask, self.theirs.size):
            raise ValueError("the drafter was made to translate for a target with other tokens")

    def save(self, folder: Path, processor: TextProcessor) -> dict[str, Any]:
        """Write the wrapped drafter with its own tokenizer."""
        arguments = {"drafter": self.drafter.save(folder, self.mine.processor)}
        return {"class_path": "specstream.drafters.TranslatedDrafter", "init_args": arguments}


def renumbering(source: Vocabulary, goal: Vocabulary) -> Tensor | None:
    """Return the id in `goal` of each token of `source`, (V,); None where their tokens differ."""
    if source.size != goal.size or source.names.keys() != goal.names.keys():
        return None
    numbers = {index: goal.names[name] for name, index in source.names.items()}
    # Ids without a token, by which models round their vocabularies up, are the same on both sides.
    ids = [numbers.get(index, index) for index in range(source.size)]
    same = ids[source.mask] == goal.mask and sorted(ids) == list(range(goal.size))
    return torch.tensor(ids) if same else None
