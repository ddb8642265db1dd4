"""From documents to tokens: bos, the segments, eos, and which of them are scored.

A segment is tokenised as a continuation of the text before it where that leaves the earlier tokens
as they are, and on its own otherwise.  So the tokens of a prompt are those that decoding will see,
and a completion never leaks into the last token of its prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from specstream.data.sources import Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class EncodedDocument:
    """One document of N tokens.

    Attributes:
        tokens: (N,).
        scored: (N,) bool; bos is not scored, eos is.
        prompt_length: how many tokens come before the first scored one.
        coverage: how many of the tokens made from text are scored, and of how many.
    """

    tokens: NDArray[np.integer]
    scored: NDArray[np.bool_]
    prompt_length: int
    coverage: tuple[int, int]


def token_dtype(vocab_size: int) -> type[np.integer]:
    """Return the smallest type that holds every id of a vocabulary."""
    return np.uint16 if vocab_size <= 2**16 else np.int32


def encode_texts(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], special_tokens: bool = False
) -> list[list[int]]:
    """Tokenise texts without adding anything; `special_tokens` reads those written in the text."""
    if not texts:
        return []
    return tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=not special_tokens,
        return_attention_mask=False,
        verbose=False,
    )["input_ids"]


def encode_documents(
    tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document]
) -> list[EncodedDocument]:
    """Tokenise a batch of documents."""
    plain = [document for document in documents if not document.rendered]
    rendered = [document for document in documents if document.rendered]
    parts = {id(d): p for d, p in zip(plain, _segment_tokens(tokenizer, plain, False), strict=True)}
    chats = zip(rendered, _segment_tokens(tokenizer, rendered, True), strict=True)
    parts.update({id(document): part for document, part in chats})
    return [_assemble(tokenizer, document, parts[id(document)]) for document in documents]


def _segment_tokens(
    tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document], special_tokens: bool
) -> Iterator[list[list[int]]]:
    """Yield, for each document, the tokens of each of its segments."""
    texts = [[segment.text for segment in document.segments] for document in documents]
    beginnings = [text for parts in texts for text in accumulate(parts)]
    encoded = iter(encode_texts(tokenizer, beginnings, special_tokens))
    joint = [[next(encoded) for _ in parts] for parts in texts]
    borders = [_first_broken(beginning) for beginning in joint]
    alone = [t for parts, border in zip(texts, borders, strict=True) for t in parts[border:]]
    separate = iter(encode_texts(tokenizer, alone, special_tokens))
    for beginning, border in zip(joint, borders, strict=True):
        lengths = [0, *(len(ids) for ids in beginning)]
        kept = [beginning[i][lengths[i] :] for i in range(border)]
        yield kept + [next(separate) for _ in beginning[border:]]


def _first_broken(beginnings: list[list[int]]) -> int:
    """Return the first segment that changes the tokens before it, or the number of segments."""
    for i in range(1, len(beginnings)):
        before = beginnings[i - 1]
        if beginnings[i][: len(before)] != before:
            return i
    return len(beginnings)


def _assemble(
    tokenizer: PreTrainedTokenizerFast, document: Document, parts: list[list[int]]
) -> EncodedDocument:
    """Join the tokens of the segments; add bos and eos unless a chat template wrote them."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokens: list[int] = [] if bos is None or document.rendered else [bos]
    scored: list[bool] = [False] * len(tokens)
    num_added = len(tokens)
    for segment, part in zip(document.segments, parts, strict=True):
        tokens += part
        scored += [segment.scored] * len(part)
    coverage = (sum(scored), len(tokens) - num_added)
    if not (document.rendered and eos in tokens):
        tokens.append(eos)
        scored.append(True)
    mask = np.array(scored, np.bool_)
    return EncodedDocument(
        tokens=np.array(tokens, token_dtype(len(tokenizer))),
        scored=mask,
        prompt_length=int(mask.argmax()) if mask.any() else len(tokens),
        coverage=coverage,
    )
