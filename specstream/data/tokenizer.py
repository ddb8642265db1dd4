"""Load a tokenizer, or train one: byte-level BPE (Sennrich et al. 2016; GPT-2's bytes), characters.

A tokenizer of characters has a mask token; `with_mask_token` gives one to any other.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from specstream.files import is_hub_id, one_line

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
MASK = "<|mask|>"
UNKNOWN = "<|unk|>"
SMALLEST_VOCABULARY = 257  # every byte, and the end of text


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; `<|endoftext|>` (id 0) is its bos, eos and padding token.

    Raises ValueError when `vocab_size` cannot hold the bytes.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(f"vocab_size must be at least {SMALLEST_VOCABULARY}, not {vocab_size}")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _finished(tokenizer)


def train_character_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Make every character of the texts a token; text of these characters decodes to itself.

    `<|endoftext|>` (id 0) is bos, eos and padding token, `<|mask|>` (id 1) the mask token of masked
    diffusion, `<|unk|>` (id 2) stands for characters that the texts do not have.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    vocabulary = [END_OF_TEXT, MASK, UNKNOWN, *sorted(characters)]
    ids = {token: number for number, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return _finished(tokenizer, mask_token=MASK, unk_token=UNKNOWN)


def with_mask_token(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Return a tokenizer that has a mask token.

    One without gets `<|mask|>` as a new special token, its id the old `len(tokenizer)`, in a copy;
    one with a mask token is returned as it is.
    """
    if tokenizer.mask_token_id is not None:
        return tokenizer
    masking = copy.deepcopy(tokenizer)
    masking.add_special_tokens({"mask_token": MASK})
    return masking


def _finished(tokenizer: Tokenizer, **special_tokens: str) -> PreTrainedTokenizerFast:
    """Let prompts start as documents do, with the end of text, which is id 0."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        **special_tokens,
    )


def load_tokenizer(path: str) -> PreTrainedTokenizerFast:
    """Load the fast tokenizer of a folder or a hub model.

    Raises ValueError when there is none, or when it has no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    with one_line(f"no tokenizer could be loaded from {path!r}"):
        if not Path(path).is_dir() and "/" in path and not is_hub_id(path):
            raise ValueError("there is no such folder")
        tokenizer = AutoTokenizer.from_pretrained(path)
    if not tokenizer.is_fast:
        raise ValueError(f"the tokenizer of '{path}' has no fast version (tokenizer.json)")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of '{path}' has no end-of-sequence token")
    return tokenizer


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """Identify vocabulary, merges, special tokens and chat template; part of the cache key."""
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.chat_template)
    content = tokenizer.backend_tokenizer.to_str() + repr(special)
    return hashlib.sha256(content.encode()).hexdigest()
