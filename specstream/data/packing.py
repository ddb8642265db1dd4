"""Lay documents out in rows of one length, keeping them apart.

Shapes: N tokens of all documents, M documents, R rows, T sequence length, B batch.

Raw text is one stream cut every T tokens: a row may hold several documents, and a document may go
on in the next row, where it counts as a new one (it cannot see what came before).  Completions are
never cut: whole documents are placed best-fit decreasing, each where the least room is left over.
`documents` numbers the documents of a row from 0; -1 is padding.  A model that lets a token attend
only to tokens of its own document, with positions that restart, computes for a packed row exactly
what it computes for each document alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PADDING = -1


@dataclass(frozen=True, slots=True)
class TokenizedDocuments:
    """Documents one after the other: tokens (N,), scored (N,) bool, lengths (M,)."""

    tokens: NDArray[np.integer]
    scored: NDArray[np.bool_]
    lengths: NDArray[np.int64]

    @property
    def starts(self) -> NDArray[np.int64]:
        """First index of every document, (M,)."""
        return np.cumsum(self.lengths) - self.lengths


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Rows to train on: tokens (R, T), scored (R, T) bool, documents (R, T) int32, -1 padding."""

    tokens: NDArray[np.integer]
    scored: NDArray[np.bool_]
    documents: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.tokens)


def token_dtype(vocab_size: int) -> type[np.integer]:
    """Return the smallest type that holds every id of a vocabulary."""
    return np.uint16 if vocab_size <= 2**16 else np.int32


def pack_stream(
    documents: TokenizedDocuments, sequence_length: int, padding_token: int
) -> PackedRows:
    """Cut the documents, laid end to end, every `sequence_length` tokens."""
    num_tokens = len(documents.tokens)
    num_rows = -(-num_tokens // sequence_length)
    rows = _empty_rows(num_rows, sequence_length, padding_token, documents.tokens.dtype)
    rows.tokens.reshape(-1)[:num_tokens] = documents.tokens
    rows.scored.reshape(-1)[:num_tokens] = documents.scored
    owner = rows.documents.reshape(-1)
    owner[:num_tokens] = np.repeat(np.arange(len(documents.lengths)), documents.lengths)
    first = rows.documents[:, :1].copy()
    rows.documents[rows.documents != PADDING] -= np.broadcast_to(first, rows.documents.shape)[
        rows.documents != PADDING
    ]
    return _without_first_tokens(rows)


def _empty_rows(
    num_rows: int, sequence_length: int, padding_token: int, dtype: np.dtype
) -> PackedRows:
    shape = (num_rows, sequence_length)
    return PackedRows(
        tokens=np.full(shape, padding_token, dtype),
        scored=np.zeros(shape, np.bool_),
        documents=np.full(shape, PADDING, np.int32),
    )


def _without_first_tokens(rows: PackedRows) -> PackedRows:
    """The first token of a document has nothing to be predicted from: it is never scored."""
    first = np.ones(rows.documents.shape, np.bool_)
    first[:, 1:] = rows.documents[:, 1:] != rows.documents[:, :-1]
    rows.scored[first | (rows.documents == PADDING)] = False
    return rows


def restarting_positions(documents: NDArray[np.int32]) -> NDArray[np.int64]:
    """Count from 0 within each document of a row: (B, T) -> (B, T); 0 on padding."""
    index = np.arange(documents.shape[1])
    first = np.ones(documents.shape, np.bool_)
    first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    start = np.maximum.accumulate(np.where(first, index, 0), axis=1)
    return np.where(documents == PADDING, 0, index - start)
