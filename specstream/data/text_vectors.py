"""A text as a vector that needs no model: words and letters counted in hashed places.

Feature hashing with signs (Weinberger et al. 2009) of words and of their letter triples, as in
fastText (Bojanowski et al. 2017), so that "smiling" and "smile" are near each other.  The hash is
fixed: the vector of a text is the same in training and generation, on every machine.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator

import torch
from torch import Tensor

LETTERS = 3


def text_vector(text: str, size: int) -> Tensor:
    """Return the vector of a text, float32 (size,), its numbers about 1 large; 0 for no words.

    Case, punctuation and the order of words make no difference.
    """
    vector = torch.zeros(size)
    for feature, weight in features(text):
        digest = hashlib.blake2b(feature.encode(), digest_size=8).digest()
        place, sign = int.from_bytes(digest[:7], "big") % size, 1 - 2 * (digest[7] & 1)
        vector[place] += sign * weight
    length = vector.norm()
    return vector * (size**0.5 / length) if length > 0 else vector


def features(text: str) -> Iterator[tuple[str, float]]:
    """Yield what a text is made of: each word, and its letter triples, which weigh as much as it.

    A word's ends are marked, so that its first and last letters are told from those within.
    """
    for word in re.findall(r"\w+", text.casefold()):
        yield f"word {word}", 1.0
        marked = f"<{word}>"
        triples = [marked[i : i + LETTERS] for i in range(len(marked) - LETTERS + 1)]
        for triple in triples:
            yield f"letters {triple}", len(triples) ** -0.5
