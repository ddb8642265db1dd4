"""Text for training draft models: sources, tokenizer, packing and loaders in one data module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import lightning as L
from lightning.pytorch.strategies import ParallelStrategy

from specstream.data.encoding import encode_documents
from specstream.data.loader import RowLoader
from specstream.data.packing import PackedRows, pack_stream
from specstream.data.sources import Document, TextSource, held_out_position
from specstream.data.tokenizer import load_tokenizer, train_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Split = Literal["train", "validation", "test"]


class TextDataModule(L.LightningDataModule):
    """Rows of tokens from text, with held-out rows and held-out prompts.

    Batches are dictionaries of (B, T) tensors: `input_ids` long; `loss_mask` bool, True where
    `input_ids[b, t]` is to be predicted; `positions` long, restarting with every document;
    `documents` long, equal numbers belong together, -1 is padding.

    Args:
        sources: where the text comes from.
        tokenizer: folder or hub id of a tokenizer; None trains one on the training split.
        vocab_size: of the trained tokenizer.
        sequence_length: T.
        batch_size: B, rows of each process.
        validation_fraction, test_fraction: share of the documents held out.
        prompt_tokens: length of the prompts cut from held-out raw text.
        num_workers: processes that make batches; 0 makes them in this one.
        seed: of the order of batches.
    """

    def __init__(
        self,
        sources: list[TextSource],
        tokenizer: str | None = None,
        vocab_size: int = 2048,
        sequence_length: int = 256,
        batch_size: int = 16,
        validation_fraction: float = 0.05,
        test_fraction: float = 0.05,
        prompt_tokens: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for source in sources:
            source.check()
        self.sources = sources
        self.tokenizer_path = tokenizer
        self.vocab_size = vocab_size
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.validation_fraction = validation_fraction
        self.test_fraction = test_fraction
        self.prompt_tokens = prompt_tokens
        self.num_workers = num_workers
        self.seed = seed
        self._tokenizer: PreTrainedTokenizerFast | None = None
        self._rows: dict[Split, PackedRows] = {}

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer, loaded or trained at the first use."""
        if self._tokenizer is None:
            if self.tokenizer_path is not None:
                self._tokenizer = load_tokenizer(self.tokenizer_path)
            else:
                texts = [document.text for document in self._documents("train")]
                self._tokenizer = train_tokenizer(texts, self.vocab_size)
        return self._tokenizer

    def setup(self, stage: str | None = None) -> None:
        for split in ("train", "validation", "test"):
            self.rows(split)

    def train_dataloader(self) -> RowLoader:
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> RowLoader:
        return self._loader("validation", shuffle=False)

    def test_dataloader(self) -> RowLoader:
        return self._loader("test", shuffle=False)

    def rows(self, split: Split) -> PackedRows:
        """Return the packed rows of a split."""
        if split not in self._rows:
            documents = encode_documents(self.tokenizer, self._documents(split))
            padding = self.tokenizer.pad_token_id or self.tokenizer.eos_token_id
            self._rows[split] = pack_stream(documents, self.sequence_length, padding)
        return self._rows[split]

    def prompts(self, n: int, split: Split = "validation") -> list[list[int]]:
        """Return n held-out prompts: the same ones at every call."""
        rows = self.rows(split)
        whole = (rows.documents[:, : self.prompt_tokens] == 0).all(axis=1)
        windows = rows.tokens[whole, : self.prompt_tokens]
        if len(windows) < n:
            raise ValueError(f"{n} prompts asked for, the {split} split has {len(windows)}")
        chosen = [i * len(windows) // n for i in range(n)]
        return windows[chosen].tolist()

    def _documents(self, split: Split) -> list[Document]:
        documents = (d for source in self.sources for d in source.documents())
        return [d for d in documents if self._split_of(d) == split]

    def _split_of(self, document: Document) -> Split:
        position = held_out_position(document.key)
        if position < self.validation_fraction:
            return "validation"
        held_out = self.validation_fraction + self.test_fraction
        return "test" if position < held_out else "train"

    def _loader(self, split: Split, shuffle: bool) -> RowLoader:
        rank, world_size = 0, 1
        if self.trainer is not None and isinstance(self.trainer.strategy, ParallelStrategy):
            place = self.trainer.strategy.distributed_sampler_kwargs
            rank, world_size = place["rank"], place["num_replicas"]
        return RowLoader(
            self.rows(split),
            batch_size=self.batch_size,
            seed=self.seed,
            shuffle=shuffle,
            drop_last=shuffle,
            rank=rank,
            world_size=world_size,
            num_workers=self.num_workers,
        )
