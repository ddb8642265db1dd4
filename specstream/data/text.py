"""Text for training draft models: sources, tokenizer, packing and loaders in one data module."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import lightning as L

from specstream.data.cache import build_once, cache_folder, cache_key
from specstream.data.loader import RowDataset, RowLoader, check_loading, place_of
from specstream.data.packing import PackedRows
from specstream.data.preparation import (
    FORMAT_VERSION,
    HeldOut,
    Layout,
    PreparedSplit,
    Split,
    evenly,
    load_split,
    prepare,
)
from specstream.data.sample import describe_mask, render_sample
from specstream.data.sources import TextSource
from specstream.data.tokenizer import (
    SMALLEST_VOCABULARY,
    load_tokenizer,
    tokenizer_fingerprint,
    train_character_tokenizer,
    train_tokenizer,
    with_mask_token,
)
from specstream.processors import TextProcessor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPLITS: tuple[Split, ...] = ("train", "validation", "test")


class TextDataModule(L.LightningDataModule):
    """Packed rows of tokens from text, with held-out rows and held-out prompts.

    Batches are dictionaries of (B, T) tensors: `input_ids` long; `loss_mask` bool, True where
    `input_ids[b, t]` is to be predicted; `positions` long, restarting with every document;
    `documents` long, equal numbers belong together, -1 is padding.

    The order of training batches is a pure function of (seed, epoch).  Every process takes its own
    rows of a global batch, and the loaders are no `DataLoader`s, so `use_distributed_sampler` of
    the trainer has no effect.  The last validation batch may hold rows without a scored token:
    divide sums by the number of scored tokens, not by the number of rows.

    Args:
        sources: where the text comes from; several are mixed.
        tokenizer: folder or hub id of a tokenizer; None trains a byte-level BPE tokenizer on the
            training split.
        vocab_size: of the trained tokenizer.
        characters: a trained tokenizer is of characters, not BPE: vocab_size is then not used.
        mask_token: add a mask token where the tokenizer has none, for masked diffusion.
        sequence_length: T.
        batch_size: B, rows of each process.
        pack: several documents in a row; False gives each a row of its own.
        validation_sources: a ready-made validation split; `sources` are then for training only.
        test_sources: a ready-made test split; without it, but with `validation_sources`, the
            test split is the validation split.
        validation_fraction, test_fraction: otherwise the shares of the documents held out, chosen
            by a hash of the document, so that they stay the same.
        prompt_tokens: length of the prompts cut from held-out raw text.
        num_workers: processes that make batches; 0 makes them in this one.
        seed: of the order of batches.
        cache_dir: where prepared data is kept; None is `specstream` in the user's cache folder.
        show_sample: print the first sample with its loss mask when training begins.

    Raises ValueError for wrong options and missing files at once, before anything is created.
    """

    def __init__(
        self,
        sources: list[TextSource],
        tokenizer: str | None = None,
        vocab_size: int = 2048,
        sequence_length: int = 256,
        batch_size: int = 16,
        pack: bool = True,
        validation_sources: list[TextSource] | None = None,
        test_sources: list[TextSource] | None = None,
        validation_fraction: float = 0.05,
        test_fraction: float = 0.05,
        prompt_tokens: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        cache_dir: str | None = None,
        show_sample: bool = True,
        characters: bool = False,
        mask_token: bool = False,
    ) -> None:
        super().__init__()
        self.sources = sources
        self.validation_sources = validation_sources
        self.test_sources = test_sources
        self.tokenizer_path = tokenizer
        self.vocab_size = vocab_size
        self.characters = characters
        self.mask_token = mask_token
        self.layout = Layout(sequence_length, pack, prompt_tokens)
        self.batch_size = batch_size
        self.held_out = HeldOut(validation_fraction, test_fraction)
        self.num_workers = num_workers
        self.seed = seed
        self.cache_dir = cache_folder(cache_dir)
        self.show_sample = show_sample
        self._tokenizer: PreTrainedTokenizerFast | None = None
        self._splits: dict[Split, PreparedSplit] = {}
        self._check_options()

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer, loaded or trained at the first use."""
        if self._tokenizer is None:
            path = self.tokenizer_path or str(self._trained_tokenizer())
            tokenizer = load_tokenizer(path)
            self._tokenizer = with_mask_token(tokenizer) if self.mask_token else tokenizer
        return self._tokenizer

    @property
    def processor(self) -> TextProcessor:
        """The boundary between text and tokens."""
        return TextProcessor(self.tokenizer)

    def prepare_data(self) -> None:
        """Tokenise and pack, unless it has been done; Lightning calls it in one process."""
        self._prepared()

    def setup(self, stage: str | None = None) -> None:
        """Map the prepared splits into memory; show the first sample in the first process."""
        first_time = not self._splits
        folder = self._prepared()
        for split in SPLITS:
            found = load_split(folder, split)
            if found is not None:
                self._splits[split] = found
        for split in ("train", "validation") if self._holds_validation else ("train",):
            self._split(split)
        is_first_process = self.trainer is None or self.trainer.is_global_zero
        if self.show_sample and first_time and stage == "fit" and is_first_process:
            from rich.console import Console

            console = Console()
            console.print(self.describe(), highlight=False, markup=False, soft_wrap=True)
            console.print(render_sample(self.tokenizer, self.rows("train")))

    def train_dataloader(self) -> RowLoader:
        trainer = self.trainer
        overfitting = trainer is not None and trainer.overfit_batches > 0  # type: ignore[attr-defined]
        return self._loader("train", shuffle=not overfitting, drop_last=True)

    def val_dataloader(self) -> RowLoader | list[RowLoader]:
        if not self._holds_validation:
            return []
        return self._loader("validation", shuffle=False, drop_last=False)

    def test_dataloader(self) -> RowLoader:
        return self._loader("test", shuffle=False, drop_last=False)

    def rows(self, split: Split) -> PackedRows:
        """Return the packed rows of a split; raises ValueError when it is empty."""
        return self._split(split).rows

    def prompts(self, n: int, split: Split = "validation") -> list[list[int]]:
        """Return n held-out prompts as tokens: the same at every call, evenly over the sources.

        Raises ValueError when the split has fewer.
        """
        pools = [prompts for prompts in self._split(split).prompts if prompts]
        total = sum(len(pool) for pool in pools)
        if n > total:
            raise ValueError(f"{n} prompts are asked for, but the {split} split gives {total}")
        wanted = [0] * len(pools)
        for _ in range(n):  # one more from the source that has given least and has one left
            open_pools = [i for i, pool in enumerate(pools) if wanted[i] < len(pool)]
            wanted[min(open_pools, key=lambda i: wanted[i])] += 1
        return [
            pool[i]
            for pool, share in zip(pools, wanted, strict=True)
            for i in evenly(len(pool), share).tolist()
        ]

    def describe(self) -> str:
        """Return a few lines: the size of every split and what was left out."""
        self._split("train")
        lines = []
        for split, prepared in self._splits.items():
            rows, reports = prepared.rows, prepared.reports
            num_documents = sum(report.documents for report in reports)
            num_tokens = sum(report.tokens for report in reports)
            lines.append(
                f"{split}: {num_documents:,} documents, {num_tokens:,} tokens, {len(rows):,} rows "
                f"of {rows.tokens.shape[1]} ({describe_mask(rows)})"
            )
            lines += [
                f"  {report.name}: {report.dropped:,} documents longer than a row left out"
                for report in reports
                if report.dropped
            ]
        return "\n".join(lines)

    @property
    def _holds_validation(self) -> bool:
        return self.held_out.validation > 0 or bool(self.validation_sources)

    def _check_options(self) -> None:
        layout, held_out = self.layout, self.held_out
        check_loading(self.batch_size, self.seed, self.num_workers)
        if not self.sources:
            raise ValueError("sources is empty: name at least one text source")
        for name, value, least in (
            ("sequence_length", layout.sequence_length, 2),
            ("prompt_tokens", layout.prompt_tokens, 1),
            ("vocab_size", self.vocab_size, SMALLEST_VOCABULARY),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, not {value}")
        if self.characters and self.tokenizer_path is not None:
            raise ValueError(
                "characters is for a tokenizer that is trained and would not change "
                f"'{self.tokenizer_path}'; leave out one of characters and tokenizer"
            )
        fractions = (held_out.validation, held_out.test)
        if min(fractions) < 0 or math.fsum(fractions) >= 1:
            raise ValueError(
                "validation_fraction and test_fraction must be at least 0 and together less than "
                f"1, not {fractions[0]} and {fractions[1]}"
            )
        for source in [*self.sources, *(self.validation_sources or []), *(self.test_sources or [])]:
            source.check()

    def _dealt(self) -> list[tuple[TextSource, HeldOut | Split]]:
        """Return every source with the share that is held out, or the split it belongs to."""
        held_out = HeldOut(
            0.0 if self.validation_sources else self.held_out.validation,
            0.0 if self.validation_sources or self.test_sources else self.held_out.test,
        )
        dealt: list[tuple[TextSource, HeldOut | Split]] = [(s, held_out) for s in self.sources]
        dealt += [(source, "validation") for source in self.validation_sources or []]
        dealt += [(source, "test") for source in self.test_sources or []]
        return dealt

    def _source_fingerprints(self) -> list[object]:
        return [(type(s).__name__, s.fingerprint(), rule) for s, rule in self._dealt()]

    def _trained_tokenizer(self) -> Path:
        """Return the folder of the tokenizer trained on the training split."""
        kind = "characters" if self.characters else self.vocab_size
        key = cache_key([FORMAT_VERSION, kind, *self._source_fingerprints()])
        folder = self.cache_dir / "tokenizers" / key

        def build(temporary: Path) -> None:
            texts = (
                document.text
                for source, rule in self._dealt()
                if isinstance(rule, HeldOut)
                for split, document in rule.deal(source.documents(None))
                if split == "train"
            )
            if self.characters:
                trained = train_character_tokenizer(texts)
            else:
                trained = train_tokenizer(texts, self.vocab_size)
            trained.save_pretrained(temporary)

        build_once(folder, build)
        return folder

    def _prepared(self) -> Path:
        """Return the folder of the prepared splits, made if it is not there."""
        parts = [FORMAT_VERSION, self.layout, tokenizer_fingerprint(self.tokenizer)]
        folder = self.cache_dir / "text" / cache_key([*parts, *self._source_fingerprints()])

        def build(temporary: Path) -> None:
            prepare(temporary, self._dealt(), self.tokenizer, self.layout)

        build_once(folder, build)
        try:
            load_split(folder, "train")
        except (OSError, ValueError, EOFError):  # damaged by something else than this program
            shutil.rmtree(folder)
            build_once(folder, build)
        return folder

    def _split(self, split: Split) -> PreparedSplit:
        if not self._splits:
            self.setup()
        if split == "test" and self.validation_sources and not self.test_sources:
            split = "validation"
        if split not in self._splits:
            raise ValueError(self._empty(split))
        return self._splits[split]

    def _empty(self, split: Split) -> str:
        reports = [report for prepared in self._splits.values() for report in prepared.reports]
        num_documents = sum(report.documents for report in reports)
        if split == "train":
            return f"the train split is empty: all {num_documents} documents are held out"
        fraction = self.held_out.validation if split == "validation" else self.held_out.test
        return (
            f"the {split} split is empty: none of {num_documents} documents fell into "
            f"{split}_fraction {fraction}; raise it or give {split}_sources"
        )

    def _loader(self, split: Split, shuffle: bool, drop_last: bool) -> RowLoader:
        return RowLoader(
            RowDataset(self.rows(split)),
            batch_size=self.batch_size,
            seed=self.seed,
            shuffle=shuffle,
            drop_last=drop_last,
            place=place_of(self.trainer),
            num_workers=self.num_workers,
        )
