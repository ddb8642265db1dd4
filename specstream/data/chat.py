"""Chat messages, rendered with the tokenizer's own template; only the assistant's turns are scored.

Which characters belong to a turn is found by rendering again: the conversation up to the turn with
the prompt for an answer, and the conversation up to and with the answer.  Both are beginnings of
the whole, so their lengths are the turn's borders, whatever the template looks like, and the part
before a turn is exactly what decoding will be given.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar

from specstream.data.records import Location, Record, require_field
from specstream.data.sources import Document, Segment, TextSource, check_limit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Message = dict[str, str]

ROLE_NAMES = {"human": "user", "gpt": "assistant", "bot": "assistant"}  # ShareGPT's words


@dataclass(frozen=True)
class ChatMessages(TextSource):
    """Conversations: a list of messages with a role and a content; held out by the first message.

    Args:
        path: local .jsonl(.gz) or .parquet file or pattern, or a hub data set id.
        field: the field of a record that holds the list of messages.
        role_field, content_field: of a message (ShareGPT: `from` and `value`; its roles `human`
            and `gpt` are understood).
        chat_template: a Jinja template used instead of the tokenizer's.
        split, subset: of a hub data set.
        limit: only the first `limit` conversations.
    """

    path: str
    field: str = "messages"
    role_field: str = "role"
    content_field: str = "content"
    chat_template: str | None = None
    split: str | None = None
    subset: str | None = None
    limit: int | None = None

    masked: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return self.path

    @property
    def location(self) -> Location:
        return Location(self.path, self.split, self.subset)

    def check(self) -> None:
        check_limit(f"ChatMessages '{self.path}'", self.limit)
        self.location.check()

    def documents(self, tokenizer: PreTrainedTokenizerFast | None) -> Iterator[Document]:
        if tokenizer is not None and not (self.chat_template or tokenizer.chat_template):
            raise ValueError(
                f"ChatMessages '{self.path}': the tokenizer has no chat template; give one as "
                "chat_template, or use a tokenizer that has one"
            )
        for place, record in islice(self.location.records(), self.limit):
            messages = self._messages(place, record)
            if tokenizer is None:
                segments = tuple(Segment(message["content"], True) for message in messages)
            else:
                segments = tuple(self._segments(place, messages, tokenizer))
            yield Document(key=messages[0]["content"], segments=segments, rendered=True)

    def fingerprint(self) -> str:
        return repr(self) + self.location.fingerprint()

    def _messages(self, place: str, record: Record) -> list[Message]:
        found = require_field(place, record, self.field)
        if not isinstance(found, list) or not all(isinstance(message, dict) for message in found):
            raise ValueError(f"{place}: field '{self.field}' is not a list of messages")
        if not found:
            raise ValueError(f"{place}: field '{self.field}' is an empty list")
        messages = []
        for message in found:
            role = str(require_field(place, message, self.role_field))
            content = str(require_field(place, message, self.content_field))
            messages.append({"role": ROLE_NAMES.get(role, role), "content": content})
        return messages

    def _segments(
        self, place: str, messages: list[Message], tokenizer: PreTrainedTokenizerFast
    ) -> Iterator[Segment]:
        """Cut the rendered conversation at the borders of the assistant's turns."""
        whole = self._render(place, tokenizer, messages, answer=False)
        end = 0
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(place, tokenizer, messages[:number], answer=True)
            after = self._render(place, tokenizer, messages[: number + 1], answer=False)
            if number == len(messages) - 1:
                after = whole
            if not whole.startswith(before) or len(before) < end:
                raise ValueError(
                    f"{place}: the chat template does not render turn by turn (turn {number + 1} "
                    "begins differently in the whole conversation), so it cannot be masked"
                )
            stop = len(after)
            if not whole.startswith(after):  # a template that rewrites earlier answers
                stop = _end_of_turn(place, whole, len(before), message["content"], tokenizer)
            yield Segment(whole[end : len(before)], scored=False)
            yield Segment(whole[len(before) : stop], scored=True)
            end = stop
        if end < len(whole):
            yield Segment(whole[end:], scored=False)

    def _render(
        self,
        place: str,
        tokenizer: PreTrainedTokenizerFast,
        messages: list[Message],
        answer: bool,
    ) -> str:
        from jinja2 import TemplateError

        try:
            rendered: Any = tokenizer.apply_chat_template(
                messages,
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=answer,
            )
        except TemplateError as error:
            raise ValueError(f"{place}: the chat template refuses this: {error}") from error
        return rendered


def _end_of_turn(
    place: str, whole: str, start: int, content: str, tokenizer: PreTrainedTokenizerFast
) -> int:
    """Find where an answer ends in the whole text: after its words and the end token, if any.

    Some templates (Qwen3) drop the thinking of earlier answers, so that the conversation up to an
    answer is no beginning of the whole; the answer's own words are then looked for.
    """
    words = content.split("</think>")[-1].strip()
    found = whole.find(words, start)
    if found < 0:
        raise ValueError(f"{place}: the chat template rewrites an answer: it cannot be masked")
    stop = found + len(words)
    if whole.startswith(tokenizer.eos_token, stop):
        stop += len(tokenizer.eos_token)
    return stop
