"""Chat: only what the assistant says is scored, whatever the template."""

from __future__ import annotations

import pytest

from specstream.data import ChatMessages
from specstream.data.encoding import encode_documents, encode_texts

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "The cat?"},
    {"role": "assistant", "content": "On the mat."},
    {"role": "user", "content": "The dog?"},
    {"role": "assistant", "content": "On the roof."},
]

REWRITING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def scored_text(document) -> list[str]:
    return [segment.text for segment in document.segments if segment.scored]


def test_only_assistant_turns_are_scored(write_jsonl, chat_tokenizer) -> None:
    path = write_jsonl("a.jsonl", [{"messages": TALK}])
    [document] = ChatMessages(path).documents(chat_tokenizer)
    assert scored_text(document) == ["On the mat.<|im_end|>\n", "On the roof.<|im_end|>\n"]
    assert document.text == chat_tokenizer.apply_chat_template(TALK, tokenize=False)


def test_the_part_before_a_turn_is_what_decoding_is_given(write_jsonl, chat_tokenizer) -> None:
    path = write_jsonl("a.jsonl", [{"messages": TALK[:3]}])
    [document] = ChatMessages(path).documents(chat_tokenizer)
    [encoded] = encode_documents(chat_tokenizer, [document])
    prompt = chat_tokenizer.apply_chat_template(
        TALK[:2], tokenize=False, add_generation_prompt=True
    )
    expected = encode_texts(chat_tokenizer, [prompt], special_tokens=True)[0]
    assert encoded.tokens[: encoded.prompt_length].tolist() == expected
    im_end = chat_tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (encoded.tokens == im_end).sum() == 3, "no second end of text is added"


def test_a_template_that_rewrites_earlier_answers_is_masked_by_their_words(
    write_jsonl, chat_tokenizer
) -> None:
    path = write_jsonl("a.jsonl", [{"messages": TALK}])
    [document] = ChatMessages(path, chat_template=REWRITING).documents(chat_tokenizer)
    assert scored_text(document) == [
        "On the mat.<|im_end|>",
        "<think>\n\n</think>\n\nOn the roof.<|im_end|>\n",
    ]


def test_sharegpt_names_are_understood(write_jsonl, chat_tokenizer) -> None:
    talk = [{"from": "human", "value": "The cat?"}, {"from": "gpt", "value": "Here."}]
    path = write_jsonl("a.jsonl", [{"conversations": talk}])
    source = ChatMessages(path, field="conversations", role_field="from", content_field="value")
    [document] = source.documents(chat_tokenizer)
    assert scored_text(document) == ["Here.<|im_end|>\n"]


def test_bad_conversations_are_one_clear_line(write_jsonl, tokenizer, chat_tokenizer) -> None:
    good = write_jsonl("good.jsonl", [{"messages": TALK}])
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        list(ChatMessages(good).documents(tokenizer))
    text = write_jsonl("text.jsonl", [{"messages": "hello"}])
    with pytest.raises(ValueError, match="line 1: field 'messages' is not a list of messages"):
        list(ChatMessages(text).documents(chat_tokenizer))
    empty = write_jsonl("empty.jsonl", [{"messages": []}])
    with pytest.raises(ValueError, match="'messages' is an empty list"):
        list(ChatMessages(empty).documents(chat_tokenizer))
    nameless = write_jsonl("nameless.jsonl", [{"messages": [{"content": "hello"}]}])
    with pytest.raises(ValueError, match="field 'role' is missing; the record has content"):
        list(ChatMessages(nameless).documents(chat_tokenizer))
    refusing = ChatMessages(good, chat_template="{{ raise_exception('no system') }}")
    with pytest.raises(ValueError, match="the chat template refuses this: no system"):
        list(refusing.documents(chat_tokenizer))
