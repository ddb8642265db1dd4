"""Lay documents out in rows of one length, keeping them apart.

Shapes: N tokens of one document, R rows, T sequence length, B batch.

Raw text is one stream cut every T tokens: a row may hold several documents, and a document may go
on in the next row, where it counts as a new one (it cannot see what came before).  Completions are
never cut: whole documents are placed best-fit decreasing, each where the least room is left over
(Ding et al. 2024, "Fewer truncations improve language modeling").  `documents` numbers the
documents of a row from 0; -1 is padding.  A model that lets a token attend only to tokens of its
own document, with positions that restart, computes for a packed row exactly what it computes for
each document alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from specstream.data.encoding import EncodedDocument

PADDING = -1


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Rows to train on: tokens (R, T), scored (R, T) bool, documents (R, T) int32, -1 padding."""

    tokens: NDArray[np.integer]
    scored: NDArray[np.bool_]
    documents: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.tokens)

    @staticmethod
    def empty(num_rows: int, sequence_length: int, padding_token: int, dtype: type) -> PackedRows:
        """Return rows of padding."""
        shape = (num_rows, sequence_length)
        return PackedRows(
            tokens=np.full(shape, padding_token, dtype),
            scored=np.zeros(shape, np.bool_),
            documents=np.full(shape, PADDING, np.int32),
        )

    @staticmethod
    def joined(parts: Sequence[PackedRows]) -> PackedRows:
        """Put several sets of rows, at least one, under each other."""
        return PackedRows(
            tokens=np.concatenate([part.tokens for part in parts]),
            scored=np.concatenate([part.scored for part in parts]),
            documents=np.concatenate([part.documents for part in parts]),
        )

    def shuffled(self) -> PackedRows:
        """Mix the rows, always alike: the first ones then stand for all sources and lengths."""
        order = np.random.default_rng(0).permutation(len(self))
        return PackedRows(self.tokens[order], self.scored[order], self.documents[order])


def pack_stream(
    documents: Sequence[EncodedDocument], sequence_length: int, padding_token: int
) -> PackedRows:
    """Cut the documents, at least one, laid end to end, every `sequence_length` tokens."""
    tokens = np.concatenate([document.tokens for document in documents])
    num_rows = -(-len(tokens) // sequence_length)
    rows = PackedRows.empty(num_rows, sequence_length, padding_token, tokens.dtype.type)
    rows.tokens.reshape(-1)[: len(tokens)] = tokens
    rows.scored.reshape(-1)[: len(tokens)] = np.concatenate([d.scored for d in documents])
    lengths = [len(document.tokens) for document in documents]
    owners = rows.documents.reshape(-1)
    owners[: len(tokens)] = np.repeat(np.arange(len(documents)), lengths)
    local = rows.documents - rows.documents[:, :1]
    rows.documents[:] = np.where(rows.documents == PADDING, PADDING, local)
    return _without_first_tokens(rows)


def pack_best_fit(
    documents: Sequence[EncodedDocument], sequence_length: int, padding_token: int
) -> PackedRows:
    """Place whole documents, none longer than a row, each in the fullest row that has room."""
    lengths = np.array([len(document.tokens) for document in documents])
    assert lengths.max() <= sequence_length
    # Shuffled before the stable sort, or the completions of one prompt would share their rows
    shuffled = np.random.default_rng(0).permutation(len(documents))
    order = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    layout = _best_fit(lengths, order, sequence_length)
    dtype = documents[0].tokens.dtype.type
    rows = PackedRows.empty(len(layout), sequence_length, padding_token, dtype)
    for row, members in enumerate(layout):
        start = 0
        for number, member in enumerate(members):
            place = slice(start, start + lengths[member])
            rows.tokens[row, place] = documents[member].tokens
            rows.scored[row, place] = documents[member].scored
            rows.documents[row, place] = number
            start = place.stop
    return _without_first_tokens(rows)


def _best_fit(lengths: NDArray[np.int64], order: NDArray[np.int64], room: int) -> list[list[int]]:
    """Return the documents of each row.

    Bit r of `available` says that some row has r tokens left, so the tightest fit for a document
    is its lowest bit from the document's length on.
    """
    layout: list[list[int]] = []
    rows_with: list[list[int]] = [[] for _ in range(room + 1)]
    available = 0
    for document in order.tolist():
        length = int(lengths[document])
        fitting = available >> length
        if fitting:
            left = length + (fitting & -fitting).bit_length() - 1
            row = rows_with[left].pop()
            if not rows_with[left]:
                available &= ~(1 << left)
        else:
            left, row = room, len(layout)
            layout.append([])
        layout[row].append(document)
        if left > length:
            rows_with[left - length].append(row)
            available |= 1 << (left - length)
    return layout


def one_per_row(
    documents: Sequence[EncodedDocument], sequence_length: int, padding_token: int
) -> PackedRows:
    """Give every piece of at most `sequence_length` tokens of a document a row of its own."""
    pieces = [
        (document.tokens[start:stop], document.scored[start:stop])
        for document in documents
        for start in range(0, len(document.tokens), sequence_length)
        for stop in [start + sequence_length]
    ]
    dtype = documents[0].tokens.dtype.type
    rows = PackedRows.empty(len(pieces), sequence_length, padding_token, dtype)
    for row, (tokens, scored) in enumerate(pieces):
        rows.tokens[row, : len(tokens)] = tokens
        rows.scored[row, : len(tokens)] = scored
        rows.documents[row, : len(tokens)] = 0
    return _without_first_tokens(rows)


def _without_first_tokens(rows: PackedRows) -> PackedRows:
    """Unset the mask of first tokens, which have nothing to be predicted from, and of padding."""
    rows.scored[_first_tokens(rows.documents) | (rows.documents == PADDING)] = False
    return rows


def _first_tokens(documents: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Mark the first token of every document of a row: (B, T) -> (B, T)."""
    first = np.ones(documents.shape, np.bool_)
    first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return first


def restarting_positions(documents: NDArray[np.int32]) -> NDArray[np.int64]:
    """Count from 0 within each document of a row: (B, T) -> (B, T); 0 on padding."""
    index = np.arange(documents.shape[1])
    starts = np.where(_first_tokens(documents), index, 0)
    positions = index - np.maximum.accumulate(starts, axis=1)
    return np.where(documents == PADDING, 0, positions)
