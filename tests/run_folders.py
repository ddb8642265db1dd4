"""A tiny target and a tiny drafter on disk, as training leaves them, for tests that load runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from specstream.data.tokenizer import train_tokenizer
from specstream.drafters import DraftModel
from specstream.drafters.loading import save_drafter
from specstream.models import UntrainedLM
from specstream.processors import TextProcessor
from tests.toys import nearby, sharpened

TEXTS = (
    "def read_config(path):\n    return open(path).read()\n",
    "for line in lines: print(line)\n",
)
VOCABULARY = 300
CONTEXT = 256


def processor(texts: Sequence[str] = TEXTS) -> TextProcessor:
    """Return a tokenizer of 300 tokens, trained on `texts`."""
    return TextProcessor(train_tokenizer(list(texts) * 10, VOCABULARY))


def tiny_lm(hidden_size: int = 16, seed: int = 0, vocab_size: int = VOCABULARY) -> UntrainedLM:
    """Return a causal LM of one layer with peaked laws."""
    lm = UntrainedLM(vocab_size, hidden_size, 32, 1, 2, max_positions=CONTEXT, seed=seed)
    sharpened(lm)
    return lm


def save_target(folder: Path, words: TextProcessor | None = None) -> Path:
    """Write a run of language modelling, `folder`/model; returns the model's folder."""
    tiny_lm().save(folder / "model", (words or processor()).tokenizer)
    return folder / "model"


def save_run(folder: Path, target: Path, words: TextProcessor | None = None) -> Path:
    """Write a run of distillation, `folder`/draft, for the model in `target`; returns `folder`."""
    folder.mkdir()
    drafter = DraftModel(tiny_lm(), lambda: nearby(tiny_lm()))
    save_drafter(folder / "draft", drafter, words or processor(), str(target))
    return folder
