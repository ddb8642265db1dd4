"""Media for training diffusion models and their drafters: one shape of state, held-out samples.

Shapes: B rows, S the shape of a state.
"""

from __future__ import annotations

import hashlib

import lightning as L
import numpy as np
import torch
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor

from specstream.data.loader import FILLING, Batch, BatchRows, Place, RowLoader
from specstream.data.media_sources import MediaSource, Samples
from specstream.media_processor import MediaProcessor


class SampleDataset(BatchRows):
    """Maps a list of B numbers to a batch."""

    def __init__(self, samples: Samples, numbers: np.ndarray) -> None:
        self.samples = samples
        self.numbers = numbers
        self.unit = f"samples of {list(samples.states.shape[1:])}"

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, numbers: list[int]) -> Batch:
        asked = np.asarray(numbers)
        chosen = torch.from_numpy(self.numbers[np.where(asked == FILLING, 0, asked)])
        batch: dict[str, Tensor] = {
            "states": self.samples.states[chosen],
            "keys": chosen,
            "real": torch.from_numpy(asked != FILLING),
        }
        if self.samples.classes is not None:
            batch["classes"] = self.samples.classes[chosen]
        return batch


class MediaDataModule(L.LightningDataModule):
    """Batches of media in -1..1, with held-out samples.

    Batches are dictionaries: `states` float32 (B, *S); `keys` int64 (B,), the number of each
    sample; `real` bool (B,), False where the last batch is filled up; `classes` int64 (B,) where
    the source has them.  The order of training batches is a pure function of (seed, epoch), and
    every process takes its own rows of a global batch.

    Args:
        source: where the media come from.
        batch_size: B, rows of each process.
        validation_fraction: share held out, chosen by a hash of the samples' numbers.
        num_workers: processes that make batches; 0 makes them in this one.
        seed: of the order of batches.
    """

    def __init__(
        self,
        source: MediaSource,
        batch_size: int = 64,
        validation_fraction: float = 0.1,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        if not 0 <= validation_fraction < 1:
            raise ValueError(f"validation_fraction must be in [0, 1), not {validation_fraction}")
        source.check()
        self.source = source
        self.batch_size = batch_size
        self.validation_fraction = validation_fraction
        self.num_workers = num_workers
        self.seed = seed
        self._samples: Samples | None = None

    @property
    def samples(self) -> Samples:
        """All samples, read at the first use."""
        if self._samples is None:
            self._samples = self.source.samples()
        return self._samples

    @property
    def processor(self) -> MediaProcessor:
        """What the samples are, and how one is written to a file."""
        return self.source.processor

    @property
    def shape(self) -> tuple[int, ...]:
        """S."""
        return tuple(self.samples.states.shape[1:])

    def numbers(self, held_out: bool) -> np.ndarray:
        """Return the numbers of the samples that are held out, or of the others."""
        places = np.array([_place(number) for number in range(len(self.samples.states))])
        return np.flatnonzero((places < self.validation_fraction) == held_out)

    def train_dataloader(self) -> RowLoader:
        return self._loader(held_out=False)

    def val_dataloader(self) -> RowLoader | list[RowLoader]:
        return self._loader(held_out=True) if self.validation_fraction else []

    def _loader(self, held_out: bool) -> RowLoader:
        place = Place()
        if self.trainer is not None and isinstance(self.trainer.strategy, ParallelStrategy):
            own = self.trainer.strategy.distributed_sampler_kwargs
            place = Place(own["rank"], own["num_replicas"])
        return RowLoader(
            SampleDataset(self.samples, self.numbers(held_out)),
            batch_size=self.batch_size,
            seed=self.seed,
            shuffle=not held_out,
            drop_last=not held_out,
            place=place,
            num_workers=self.num_workers,
        )


def _place(number: int) -> float:
    """Return a stable number in [0, 1) for a sample: below the held-out fraction means held out."""
    return int.from_bytes(hashlib.sha256(str(number).encode()).digest()[:8], "big") / 2**64
