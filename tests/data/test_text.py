"""The data module as a whole: splits, prompts, masks, the cache, and bad input."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from specstream.data import ChatMessages, PromptCompletion, RawText, StdlibSource, TextDataModule
from specstream.data import preparation as preparation_module
from specstream.data.encoding import encode_texts
from specstream.data.packing import PADDING

PAIR = {"prompt": "{question}\n", "completion": "{answer}"}


@pytest.fixture
def module(tmp_path: Path, tokenizer):
    """Make a data module with a saved tokenizer and a cache of the test's own."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")

    def make(*sources, **options) -> TextDataModule:
        options = {
            "tokenizer": str(tmp_path / "tokenizer"),
            "sequence_length": 48,
            "batch_size": 2,
            "validation_fraction": 0.2,
            "test_fraction": 0.2,
            "prompt_tokens": 8,
            "cache_dir": str(tmp_path / "cache"),
            "show_sample": False,
        } | options
        return TextDataModule(list(sources), **options)

    return make


@pytest.fixture
def story(write_jsonl, sentences) -> str:
    records = [{"text": " ".join(sentences[i : i + 4])} for i in range(len(sentences))]
    return write_jsonl("story.jsonl", records)


def texts_of(data: TextDataModule, split: str) -> set[str]:
    """Return the decoded documents of a split."""
    rows = data.rows(split)
    return {
        data.tokenizer.decode(tokens[owners == i].tolist())
        for tokens, owners in zip(rows.tokens, rows.documents, strict=True)
        for i in range(owners.max() + 1)
    }


def test_the_standard_library_trains_a_tokenizer_and_gives_batches(tmp_path: Path) -> None:
    data = TextDataModule(
        [StdlibSource(limit=12)],
        vocab_size=300,
        sequence_length=64,
        batch_size=4,
        validation_fraction=0.2,
        test_fraction=0.2,
        cache_dir=str(tmp_path),
    )
    data.prepare_data()
    data.setup()
    batch = next(iter(data.train_dataloader()))
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in batch.items()}
    assert shapes == {
        "input_ids": ((4, 64), torch.int64),
        "loss_mask": ((4, 64), torch.bool),
        "positions": ((4, 64), torch.int64),
        "documents": ((4, 64), torch.int64),
    }
    assert len(data.tokenizer) == 300
    assert len(data.val_dataloader()) > 0 and len(data.test_dataloader()) > 0


def test_splits_share_no_prompt_and_lose_no_document(module, questions: str) -> None:
    data = module(PromptCompletion(questions, **PAIR))
    splits = {split: texts_of(data, split) for split in ("train", "validation", "test")}
    asked = {s: {text.split("\n")[0] for text in texts} for s, texts in splits.items()}
    assert sum(len(texts) for texts in splits.values()) == 60
    assert sum(len(names) for names in asked.values()) == 30
    assert not asked["train"] & asked["validation"] and not asked["train"] & asked["test"]


def test_only_completions_are_scored(module, questions: str) -> None:
    data = module(PromptCompletion(questions, **PAIR))
    rows = data.rows("train")
    for tokens, scored, owners in zip(rows.tokens, rows.scored, rows.documents, strict=True):
        for number in range(owners.max() + 1):
            own = owners == number
            answer = data.tokenizer.decode(tokens[own & scored].tolist())
            assert answer.startswith(("It is", "That makes")) and answer.endswith("<|endoftext|>")


def test_ready_made_splits_are_used_whole(module, write_jsonl, questions: str) -> None:
    held = write_jsonl("held.jsonl", [{"question": "Why?", "answer": "Because."}] * 2)
    source = PromptCompletion(questions, **PAIR)
    data = module(source, validation_sources=[PromptCompletion(held, **PAIR)])
    assert len(texts_of(data, "train")) == 60
    assert texts_of(data, "validation") == texts_of(data, "test")
    tested = module(source, test_sources=[PromptCompletion(held, **PAIR)])
    assert texts_of(tested, "test") == texts_of(data, "validation")
    assert len(texts_of(tested, "train")) < 60, "validation is still held out"


def test_sources_mix_in_one_module(module, questions: str, story: str) -> None:
    data = module(PromptCompletion(questions, limit=40, **PAIR), RawText(story, limit=30))
    train = texts_of(data, "train")
    assert any("What is" in text for text in train) and any("number" in text for text in train)
    prompts = [data.tokenizer.decode(prompt) for prompt in data.prompts(4)]
    assert ["What is" in prompt for prompt in prompts] == [True, True, False, False]


def test_prompts_are_held_out_and_always_the_same(module, questions: str) -> None:
    data = module(PromptCompletion(questions, **PAIR))
    prompts = data.prompts(3)
    assert prompts == module(PromptCompletion(questions, **PAIR)).prompts(3)
    train = "".join(texts_of(data, "train"))
    for prompt in prompts:
        text = data.tokenizer.decode(prompt)
        assert text.startswith("<|endoftext|>What is") and text.endswith("?\n")
        assert text not in train
    with pytest.raises(ValueError, match="99 prompts are asked for, but the test split gives"):
        data.prompts(99, split="test")


def test_prompts_of_raw_text_lie_within_one_document(module, story: str) -> None:
    data = module(RawText(story))
    for prompt in data.prompts(5):
        assert len(prompt) == 8
        assert data.tokenizer.eos_token_id not in prompt[1:]


def test_the_second_time_everything_comes_from_the_cache(
    module, questions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = module(PromptCompletion(questions, **PAIR))
    first.prepare_data()
    expected = np.array(first.rows("train").tokens)
    monkeypatch.setattr(preparation_module, "encode_documents", None)
    again = module(PromptCompletion(questions, **PAIR))
    again.prepare_data()
    assert (again.rows("train").tokens == expected).all()
    assert isinstance(again.rows("train").tokens, np.memmap)
    with pytest.raises(TypeError):
        module(PromptCompletion(questions, **PAIR), sequence_length=64).prepare_data()


def test_damaged_prepared_data_is_made_again(module, questions: str, tmp_path: Path) -> None:
    module(PromptCompletion(questions, **PAIR)).prepare_data()
    [tokens] = tmp_path.glob("cache/text/*/train/tokens.npy")
    tokens.write_bytes(b"short")
    assert len(texts_of(module(PromptCompletion(questions, **PAIR)), "train")) > 10


def test_documents_longer_than_a_row_are_left_out_and_counted(module, write_jsonl) -> None:
    records = [
        {"question": f"{i}?", "answer": "so " * (100 if i % 5 == 0 else 3)} for i in range(50)
    ]
    data = module(PromptCompletion(write_jsonl("a.jsonl", records), **PAIR))
    data.setup()
    dropped = sum(r.dropped for split in data._splits.values() for r in split.reports)
    assert dropped == 10
    assert "documents longer than a row left out" in data.describe()
    with pytest.raises(ValueError, match="all 1 documents are longer than the sequence_length"):
        long = write_jsonl("long.jsonl", [{"question": "why", "answer": "so " * 100}])
        module(
            PromptCompletion(questions_of(write_jsonl), **PAIR),
            validation_sources=[PromptCompletion(long, **PAIR)],
        ).setup()


def questions_of(write_jsonl) -> str:
    return write_jsonl("few.jsonl", [{"question": f"{i}?", "answer": "yes"} for i in range(9)])


def test_raw_text_longer_than_a_row_is_cut_and_kept(module, write_jsonl) -> None:
    text = " ".join(str(i) for i in range(400))
    data = module(
        RawText(write_jsonl("a.jsonl", [{"text": text}])), validation_fraction=0, test_fraction=0
    )
    rows = data.rows("train")
    kept = rows.tokens[rows.documents != PADDING].tolist()
    assert sorted(kept) == sorted([0, *encode_texts(data.tokenizer, [text])[0], 0])
    assert data.val_dataloader() == []


def test_without_packing_every_document_has_its_own_row(module, questions: str) -> None:
    data = module(PromptCompletion(questions, **PAIR), pack=False)
    assert data.rows("train").documents.max() == 0


def test_a_mask_that_covers_nothing_or_all_shows_a_sample(
    module, write_jsonl, chat_tokenizer, tmp_path: Path
) -> None:
    silent = [{"question": f"Why {i}?", "answer": ""} for i in range(30)]
    with pytest.raises(ValueError, match=r"covers nothing \(coverage 0\).*sample is .*Why \d+\?"):
        module(PromptCompletion(write_jsonl("silent.jsonl", silent), **PAIR)).setup()
    bare = [{"question": "", "answer": f"Because {i}."} for i in range(30)]
    source = PromptCompletion(
        write_jsonl("bare.jsonl", bare), prompt="{question}", completion="{answer}"
    )
    with pytest.raises(ValueError, match=r"covers everything \(coverage 1\).*Because \d+\."):
        module(source, validation_fraction=0, test_fraction=0).setup()
    chat_tokenizer.save_pretrained(tmp_path / "chat")
    monologue = [{"messages": [{"role": "user", "content": f"hello {i}"}]} for i in range(30)]
    source = ChatMessages(write_jsonl("monologue.jsonl", monologue))
    with pytest.raises(ValueError, match=r"coverage 0.*hello"):
        module(source, tokenizer=str(tmp_path / "chat")).setup()


def test_chat_trains_on_the_answers(module, write_jsonl, chat_tokenizer, tmp_path: Path) -> None:
    chat_tokenizer.save_pretrained(tmp_path / "chat")
    talks = [
        {"messages": [{"role": r, "content": f"{r} {i}"} for r in ("user", "assistant")]}
        for i in range(30)
    ]
    data = module(
        ChatMessages(write_jsonl("talks.jsonl", talks)),
        tokenizer=str(tmp_path / "chat"),
        sequence_length=96,
    )
    rows = data.rows("train")
    scored = data.tokenizer.decode(rows.tokens[rows.scored].tolist())
    assert "assistant " in scored and "user" not in scored
    prompt = data.tokenizer.decode(data.prompts(1)[0])
    assert prompt.startswith("<|im_start|>user\n")
    assert prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_empty_data_is_one_clear_line(module, write_jsonl, story: str) -> None:
    empty = write_jsonl("empty.jsonl", [])
    with pytest.raises(ValueError, match=r"RawText '.*empty\.jsonl' holds no documents"):
        module(RawText(empty)).setup()
    few = module(RawText(story, limit=2), validation_fraction=0.0, test_fraction=0.001)
    with pytest.raises(ValueError, match="test split is empty: none of 2 documents fell into"):
        few.test_dataloader()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("sequence_length", 1, "sequence_length must be at least 2, not 1"),
        ("batch_size", 0, "batch_size must be at least 1, not 0"),
        ("vocab_size", 100, "vocab_size must be at least 257, not 100"),
        ("validation_fraction", 0.9, "together less than 1, not 0.9 and 0.2"),
        ("test_fraction", -0.1, "must be at least 0"),
    ],
)
def test_wrong_options_are_refused_at_once(module, story, option, value, message) -> None:
    with pytest.raises(ValueError, match=message):
        module(RawText(story), **{option: value})


def test_missing_files_are_found_before_anything_is_created(module, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.jsonl' does not exist"):
        module(RawText(str(tmp_path / "nowhere.jsonl")))
    with pytest.raises(ValueError, match="sources is empty"):
        module()
    assert not (tmp_path / "cache").exists()


def test_the_first_sample_is_printed_once_with_its_mask(
    module, questions: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = module(PromptCompletion(questions, **PAIR), show_sample=True)
    data.setup("fit")
    printed = capsys.readouterr().out
    assert "train: " in printed and "scored" in printed and "What is" in printed
    data.setup("fit")
    assert capsys.readouterr().out == ""


def test_a_config_of_class_paths_builds_the_module(questions: str, tmp_path: Path) -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_subclass_arguments(TextDataModule, "data")
    source = {"class_path": "specstream.data.PromptCompletion", "init_args": {"path": questions}}
    options = {"sources": [source, {"class_path": "specstream.data.StdlibSource"}]}
    config = parser.parse_object(
        {"data": {"class_path": "specstream.data.TextDataModule", "init_args": options}}
    )
    data = parser.instantiate(config).data
    assert data.sources == [PromptCompletion(questions), StdlibSource()]


def test_sources_and_prompt_files_need_neither_lightning_nor_transformers() -> None:
    code = (
        "import sys; from specstream.data import PromptFile, StdlibSource; "
        "sys.exit(bool({'lightning', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
