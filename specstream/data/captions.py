"""Captions alone, for training drafters of a target that makes its own samples of them."""

from __future__ import annotations

import lightning as L
import numpy as np
import torch

from specstream.data.loader import Batch, BatchRows, RowLoader, check_loading, place_of
from specstream.data.media import held_out_place
from specstream.data.prompts import PromptFile


class CaptionRows(BatchRows):
    """Maps a list of B numbers to a batch: the caption of each, and what keys its noise."""

    unit = "samples of captions"

    def __init__(self, keys: np.ndarray, num_prompts: int) -> None:
        self.keys = keys
        self.num_prompts = num_prompts

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, numbers: list[int]) -> Batch:
        asked = np.asarray(numbers)
        keys = torch.from_numpy(self.keys[np.maximum(asked, 0)])
        return {
            "keys": keys,
            "prompts": keys % self.num_prompts,
            "real": torch.from_numpy(asked >= 0),
        }


class CaptionDataModule(L.LightningDataModule):
    """Batches of captions, by number, each to be made a sample of by the target.

    Batches are dictionaries: `prompts` int64 (B,), which of the captions; `keys` int64 (B,), the
    number of the sample; `real` bool (B,), False where the last batch is filled up.  Their order is
    a pure function of (seed, epoch), as that of media is.

    Args:
        prompts: the captions; of a model of classes their numbers, and "" of one without prompts.
        file: instead, a file of them.
        num_samples: of an epoch, the held-out ones included; the captions take turns.
        batch_size: B, rows of each process.
        validation_fraction: share of samples held out, chosen by a hash of their numbers; their
            captions occur in training too, with other noise.
        seed: of the order of batches.
    """

    processor = None  # what is made of captions, and how it is written, is the target's

    def __init__(
        self,
        prompts: list[str] | None = None,
        file: PromptFile | None = None,
        num_samples: int = 1024,
        batch_size: int = 4,
        validation_fraction: float = 0.05,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_loading(batch_size, seed)
        if not 0 <= validation_fraction < 1:
            raise ValueError(f"validation_fraction must be in [0, 1), not {validation_fraction}")
        if (not prompts) == (file is None):
            raise ValueError("give prompts, or a file of them; one of the two")
        self.prompts = list(prompts or []) if file is None else file.read()
        if num_samples < len(self.prompts):
            raise ValueError(
                f"num_samples must be at least {len(self.prompts)}, one for each caption, got "
                f"{num_samples}"
            )
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.validation_fraction = validation_fraction
        self.seed = seed

    def numbers(self, held_out: bool) -> np.ndarray:
        """Return the numbers of the samples that are held out, or of the others."""
        shares = np.array([held_out_place(number) for number in range(self.num_samples)])
        return np.flatnonzero((shares < self.validation_fraction) == held_out)

    def train_dataloader(self) -> RowLoader:
        return self._loader(held_out=False)

    def val_dataloader(self) -> RowLoader | list[RowLoader]:
        return self._loader(held_out=True) if self.validation_fraction else []

    def _loader(self, held_out: bool) -> RowLoader:
        return RowLoader(
            CaptionRows(self.numbers(held_out), len(self.prompts)),
            batch_size=self.batch_size,
            seed=self.seed,
            shuffle=not held_out,
            drop_last=not held_out,
            place=place_of(self.trainer),
        )
