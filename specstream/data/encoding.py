"""From documents to tokens: bos, the segments, eos, and which of them are scored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from specstream.data.packing import TokenizedDocuments, token_dtype
from specstream.data.sources import Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BATCH = 256  # documents tokenised at once


def encode_texts(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """Tokenise plain text: nothing is added, and no special token is read out of the text."""
    if not texts:
        return []
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
    )
    return encoded["input_ids"]


def encode_documents(
    tokenizer: PreTrainedTokenizerFast, documents: Iterable[Document]
) -> TokenizedDocuments:
    """Tokenise documents as bos (if the tokenizer has one), segments, eos (scored)."""
    dtype = token_dtype(len(tokenizer))
    tokens: list[np.ndarray] = []
    scored: list[np.ndarray] = []
    for batch in _batched(documents, BATCH):
        segments = [segment for document in batch for segment in document.segments]
        encoded = iter(encode_texts(tokenizer, [segment.text for segment in segments]))
        for document in batch:
            ids = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
            mask = [False] * len(ids)
            for segment in document.segments:
                part = next(encoded)
                ids += part
                mask += [segment.scored] * len(part)
            tokens.append(np.array([*ids, tokenizer.eos_token_id], dtype))
            scored.append(np.array([*mask, True], np.bool_))
    lengths = np.array([len(part) for part in tokens], np.int64)
    if not tokens:
        return TokenizedDocuments(np.empty(0, dtype), np.empty(0, np.bool_), lengths)
    return TokenizedDocuments(np.concatenate(tokens), np.concatenate(scored), lengths)


def _batched(documents: Iterable[Document], size: int) -> Iterator[list[Document]]:
    iterator = iter(documents)
    while batch := list(islice(iterator, size)):
        yield batch
