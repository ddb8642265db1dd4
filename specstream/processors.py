"""The boundary between text and tokens: prompts in, printable text out, stop strings honoured.

Only this file knows a tokenizer while decoding.  It does not know models or probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from specstream.files import one_line, read_table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

REPLACEMENT = "\ufffd"  # what an unfinished multi-byte character decodes to
MODEL_FILES = ("generation_config.json", "config.json")  # both may name ends of sequence
WINDOW = 8  # tokens after which a decoding window starts anew


class TextProcessor:
    """Turns prompts into token ids and committed ids into text.

    `eos_ids` end a row; they are the tokenizer's end of sequence unless given.  `from_pretrained`
    adds those that the model's own files name: a chat model often has several.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, eos_ids: Sequence[int] | None = None
    ) -> None:
        self.tokenizer = tokenizer
        own = () if tokenizer.eos_token_id is None else (cast(int, tokenizer.eos_token_id),)
        self.eos_ids = frozenset(own if eos_ids is None else eos_ids)

    @classmethod
    def from_pretrained(cls, path: str) -> TextProcessor:
        """Load the tokenizer of a folder or hub model; ValueError in one line if there is none."""
        from transformers import AutoTokenizer

        with one_line(f"no tokenizer could be loaded from {path!r}"):
            tokenizer = AutoTokenizer.from_pretrained(path)
        return cls(tokenizer, sorted(cls(tokenizer).eos_ids | model_eos_ids(path)))

    def encode(self, prompt: str | Sequence[int], chat: bool = False) -> list[int]:
        """Return a prompt's token ids; ids pass, `chat` applies the tokenizer's template.

        Raises ValueError for a lone surrogate, and for `chat` without a template.
        """
        if not isinstance(prompt, str):
            return list(prompt)
        try:
            prompt.encode()
        except UnicodeEncodeError as error:  # bytes of the command line that are no UTF-8
            raise ValueError(f"a prompt is no text: {error.reason} in {prompt[:40]!r}") from error
        if not chat:
            return cast("list[int]", self.tokenizer(prompt)["input_ids"])
        if self.tokenizer.chat_template is None:
            raise ValueError("chat is on, but the tokenizer has no chat template")
        rendered = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        return cast("list[int]", self.tokenizer(rendered, add_special_tokens=False)["input_ids"])

    def unknown(self, text: str) -> str | None:
        """Return the first part of `text` that the tokenizer has no token for; None: it has all."""
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        if unknown is None:
            return None
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        pairs = zip(found["input_ids"], found["offset_mapping"], strict=True)
        parts = (text[first:end] for token, (first, end) in pairs if token == unknown)
        return next((part for part in parts if part != self.tokenizer.unk_token), None)

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of `tokens` without special tokens."""
        return self.tokenizer.decode(
            list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files beside a model."""
        self.tokenizer.save_pretrained(folder)


def model_eos_ids(path: str) -> frozenset[int]:
    """Return the ends of sequence that the files of a folder or hub model name; none is no error.

    The files are read as they are, because the config classes of `transformers` fill in defaults.
    """
    from transformers.utils import cached_file

    found: set[int] = set()
    for name in MODEL_FILES:
        file = cached_file(
            path,
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if file is None:
            continue
        with one_line(f"{name} of {path!r} is damaged"):
            named = read_table(Path(file)).get("eos_token_id")
            ids = named if isinstance(named, list) else [] if named is None else [named]
            if any(type(token) is not int for token in ids):
                raise ValueError(f"eos_token_id must be a token or a list of them, not {named!r}")
            found.update(ids)
    return frozenset(found)


class TextStream:
    """The growing text of one row: committed tokens in, newly printable text out.

    A token's text may depend on its neighbours (byte pairs, word pieces), so each piece is decoded
    in a window with tokens before it and only the difference is given out.  The window grows for
    a few tokens, which takes one decoding a piece; one that moved on each time would take two.
    With stop strings, text that may still turn out to be the start of one is held back.
    """

    def __init__(self, processor: TextProcessor, stop: Sequence[str] = ()) -> None:
        self.processor = processor
        self.stop = tuple(stop)
        self.tokens: list[int] = []
        self.text = ""  # decoded so far, a stop string and what follows it cut off
        self._shown = 0  # characters of `text` already given out
        self._start = 0  # first token of the decoding window
        self._fixed = 0  # tokens whose text is in `text`
        self._known = ""  # text of the window's tokens up to there

    def push(self, tokens: Sequence[int]) -> int | None:
        """Add tokens; return how many of them stay when a stop string ends the row, else None."""
        if not self.stop:  # nothing to look for: decoded when it is asked for
            self.tokens.extend(tokens)
            return None
        for count, token in enumerate(tokens, start=1):
            self.tokens.append(token)
            before = len(self.text)
            self._advance()
            found = self._find(before)
            if found is not None:
                self.text = self.text[:found]
                self._shown = min(self._shown, found)
                return count
        return None

    def take(self, final: bool = False) -> str:
        """Return the text that became printable; `final` also gives what was held back."""
        self._advance()
        end = len(self.text) if final else len(self.text) - self._held_back()
        piece = self.text[self._shown : end]
        self._shown = max(self._shown, end)
        return piece

    def close(self) -> None:
        """Decode what is left, even an unfinished character."""
        self._advance(final=True)

    def _advance(self, final: bool = False) -> None:
        if self._fixed == len(self.tokens):
            return
        window = self.processor.decode(self.tokens[self._start :])
        if len(window) <= len(self._known) or (window.endswith(REPLACEMENT) and not final):
            return
        self.text += window[len(self._known) :]
        self._known = window
        if len(self.tokens) - self._start > WINDOW:
            self._start = self._fixed
            self._known = self.processor.decode(self.tokens[self._start :])
        self._fixed = len(self.tokens)

    def _find(self, before: int) -> int | None:
        longest = max(len(s) for s in self.stop)
        places = [self.text.find(s, max(0, before - longest)) for s in self.stop]
        return min((p for p in places if p >= 0), default=None)

    def _held_back(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        return max(
            (n for s in self.stop for n in range(1, len(s)) if self.text.endswith(s[:n])), default=0
        )
