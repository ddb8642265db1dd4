"""Packing: nothing lost, nothing doubled, and documents kept apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from specstream.data.encoding import EncodedDocument
from specstream.data.loader import RowDataset
from specstream.data.packing import (
    PADDING,
    one_per_row,
    pack_best_fit,
    pack_stream,
    restarting_positions,
)

T = 16


def documents(lengths: list[int], prompt: int = 2) -> list[EncodedDocument]:
    generator = np.random.default_rng(0)
    made = []
    for length in lengths:
        tokens = generator.integers(1, 50, length).astype(np.uint16)
        scored = np.arange(length) >= prompt
        made.append(EncodedDocument(tokens, scored, prompt, (length - prompt, length)))
    return made


def pieces(rows) -> list[tuple[int, ...]]:
    """Return the tokens of every document of every row."""
    found = []
    for tokens, owners in zip(rows.tokens, rows.documents, strict=True):
        found += [tuple(tokens[owners == i].tolist()) for i in range(owners.max() + 1)]
    return found


def test_a_stream_keeps_every_token_in_order() -> None:
    given = documents([5, 40, 3, 16, 1, 9])
    rows = pack_stream(given, T, padding_token=0)
    flat = rows.tokens[rows.documents != PADDING]
    assert flat.tolist() == np.concatenate([d.tokens for d in given]).tolist()
    assert (rows.documents[:, 0] == 0).all(), "documents of a row are numbered from 0"
    assert len(rows) == -(-74 // T)


def test_best_fit_keeps_every_document_whole_and_wastes_little() -> None:
    lengths = np.random.default_rng(1).integers(2, T + 1, 300).tolist()
    given = documents(lengths)
    rows = pack_best_fit(given, T, padding_token=0)
    assert sorted(pieces(rows)) == sorted(tuple(d.tokens.tolist()) for d in given)
    fewest = -(-sum(lengths) // T)
    assert len(rows) <= 1.05 * fewest


def test_best_fit_is_the_same_every_time() -> None:
    given = documents([4, 9, 16, 7, 3, 3, 12])
    first, second = (pack_best_fit(given, T, padding_token=0) for _ in range(2))
    assert (first.tokens == second.tokens).all()


def test_shuffled_rows_are_the_same_rows_mixed_alike_every_time() -> None:
    rows = pack_best_fit(documents([4, 9, 16, 7, 3, 3, 12, 15, 14]), T, padding_token=0)
    mixed = rows.shuffled()
    assert sorted(pieces(mixed)) == sorted(pieces(rows))
    assert mixed.tokens.tolist() != rows.tokens.tolist()
    assert mixed.tokens.tolist() == rows.shuffled().tokens.tolist()


def test_one_per_row_cuts_long_documents() -> None:
    rows = one_per_row(documents([5, 40]), T, padding_token=0)
    assert (rows.documents != PADDING).sum(axis=1).tolist() == [5, 16, 16, 8]


@pytest.mark.parametrize("pack", [pack_stream, pack_best_fit, one_per_row])
def test_first_tokens_padding_and_prompts_are_never_scored(pack) -> None:
    rows = pack(documents([5, 16, 3, 9], prompt=0), T, padding_token=0)
    positions = restarting_positions(rows.documents)
    assert not rows.scored[(positions == 0) | (rows.documents == PADDING)].any()
    assert rows.scored[(positions > 0) & (rows.documents != PADDING)].all()


def test_positions_restart_with_every_document() -> None:
    owners = np.array([[0, 0, 0, 1, 1, 2, PADDING, PADDING]], np.int32)
    assert restarting_positions(owners).tolist() == [[0, 1, 2, 0, 1, 0, 0, 0]]


def attend(tokens: Tensor, positions: Tensor, allowed: Tensor) -> Tensor:
    """A one-layer attention model with absolute positions: tokens (B, T) -> (B, T, D)."""
    noise = torch.Generator().manual_seed(0)
    embedding = torch.randn(50, 8, generator=noise, dtype=torch.float64)
    places = torch.randn(64, 8, generator=noise, dtype=torch.float64)
    hidden = embedding[tokens] + places[positions]
    return functional.scaled_dot_product_attention(hidden, hidden, hidden, attn_mask=allowed)


@pytest.mark.parametrize("pack", [pack_stream, pack_best_fit])
def test_a_packed_row_computes_what_each_document_computes_alone(pack) -> None:
    given = documents([5, 7, 4, 11, 3])
    dataset = RowDataset(pack(given, T, padding_token=0))
    batch = dataset[list(range(len(dataset.rows)))]
    owners = batch["documents"]
    allowed = (owners[:, :, None] == owners[:, None, :]) & torch.ones(T, T).tril().bool()
    packed = attend(batch["input_ids"], batch["positions"], allowed)
    for row, owner in enumerate(owners):
        for number in range(int(owner.max()) + 1):
            own = owner == number
            tokens = batch["input_ids"][row, own]
            causal = torch.ones(len(tokens), len(tokens)).tril().bool()
            alone = attend(tokens[None], torch.arange(len(tokens))[None], causal[None])
            torch.testing.assert_close(packed[row, own], alone[0], rtol=1e-12, atol=1e-12)
