"""Load a tokenizer, or train a byte-level BPE tokenizer (Sennrich et al. 2016; GPT-2's bytes)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = 257  # every byte, and the end of text


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; `<|endoftext|>` (id 0) is its bos, eos and padding token.

    Raises ValueError when `vocab_size` cannot hold the bytes.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(f"vocab_size must be at least {SMALLEST_VOCABULARY}, not {vocab_size}")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

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
    tokenizer.post_processor = processors.TemplateProcessing(  # a prompt starts as documents do
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 0)]
    )
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(path: str) -> PreTrainedTokenizerFast:
    """Load the fast tokenizer of a folder or a hub model.

    Raises ValueError when there is none, or when it has no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # a damaged tokenizer.json raises a bare Exception
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ValueError(f"no tokenizer could be loaded from '{path}': {reason}") from error
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
