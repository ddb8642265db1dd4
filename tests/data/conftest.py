"""Small tokenizers and files for the data tests; nothing is read from outside the test."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from specstream.data.tokenizer import train_tokenizer

SENTENCES = [
    f"The {animal} number {number} sat on the {thing}.\nIt was {mood}."
    for number in range(5)
    for animal in ("cat", "dog", "owl", "fox")
    for thing, mood in (("mat", "happy"), ("roof", "cold"), ("river bank", "very wet"))
]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(SENTENCES, vocab_size=300)


@pytest.fixture(scope="session")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = train_tokenizer(SENTENCES, vocab_size=300)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    tokenizer.add_tokens(["<|im_start|>"], special_tokens=True)
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture
def sentences() -> list[str]:
    return list(SENTENCES)


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[[str, Sequence[dict[str, Any]]], str]:
    """Write records to a file of the test's own folder and return its path."""

    def write(name: str, records: Sequence[dict[str, Any]]) -> str:
        path = tmp_path / name
        content = "".join(json.dumps(record) + "\n" for record in records).encode()
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return str(path)

    return write


@pytest.fixture
def questions(write_jsonl: Callable[[str, Sequence[dict[str, Any]]], str]) -> str:
    """60 questions with answers, two answers for each question."""
    records = [
        {"question": f"What is {i} and {i}?", "answer": f"{kind} {2 * i}."}
        for i in range(30)
        for kind in ("It is", "That makes")
    ]
    return write_jsonl("questions.jsonl.gz", records)
