"""The order of batches: a pure function of (seed, epoch), whatever the number of processes.

Shapes: B rows of one process, W processes, T sequence length.

`RowLoader` is a plain iterable, not a `DataLoader`, so Lightning leaves its order alone whatever
`use_distributed_sampler` says.  Of each global batch of W * B rows, process r takes the rows r,
r + W, ...: two processes with batch B see what one process with batch 2 B sees.  `state_dict` tells
how far the epoch has come; Lightning keeps it in checkpoints and restores it, so a run that is
resumed in the middle of an epoch goes on with the very next batch.

Rows may lie in buckets, one behind the other, which no batch mixes: media of several shapes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from specstream.data.packing import PackedRows, restarting_positions

if TYPE_CHECKING:
    from lightning import Trainer

Batch = dict[str, Tensor]

MOST_WORKERS = 256  # processes that make batches: more is a slip of the pen
FILLING = -1  # stands for a row without a scored token; bucket b has FILLING - b


class BatchRows(Dataset, ABC):
    """Maps a list of B row numbers of one bucket to a batch.

    A number below 0, FILLING - bucket, gives a row that counts for nothing.
    """

    unit: str  # what its rows are, for people

    @property
    def bucket_sizes(self) -> Sequence[int]:
        """How many rows each bucket has."""
        return [len(self)]

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, numbers: list[int]) -> Batch: ...


class RowDataset(BatchRows):
    """Maps a list of B row numbers to a batch of (B, T) tensors."""

    def __init__(self, rows: PackedRows) -> None:
        self.rows = rows
        self.unit = f"rows of {rows.tokens.shape[1]} tokens"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, numbers: list[int]) -> Batch:
        real = np.asarray(numbers) != FILLING
        index = np.where(real, numbers, 0)
        documents = np.asarray(self.rows.documents[index])
        scored = np.asarray(self.rows.scored[index]) & real[:, None]
        return {
            "input_ids": torch.from_numpy(self.rows.tokens[index].astype(np.int64)),
            "loss_mask": torch.from_numpy(scored),
            "positions": torch.from_numpy(restarting_positions(documents)),
            "documents": torch.from_numpy(documents.astype(np.int64)),
        }


class EpochOrder:
    """The order of the rows in an epoch; Lightning calls `set_epoch`."""

    def __init__(self, num_rows: int, seed: int, shuffle: bool) -> None:
        self.num_rows = num_rows
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch."""
        self.epoch = epoch

    def row_numbers(self) -> np.ndarray:
        """Return the rows of this epoch in order, (R,)."""
        if not self.shuffle:
            return np.arange(self.num_rows)
        return np.random.default_rng([self.seed, self.epoch]).permutation(self.num_rows)

    def batch_numbers(self, num_batches: int) -> np.ndarray:
        """Return the batches of this epoch in order, where they come from several buckets."""
        if not self.shuffle:
            return np.arange(num_batches)
        return np.random.default_rng([self.seed, self.epoch, 1]).permutation(num_batches)


class GlobalBatches:
    """Cuts the order of each bucket into global batches and takes the share of one process.

    Named and shaped as a `DataLoader`'s batch sampler: Lightning looks for
    `loader.batch_sampler.sampler` to set the epoch.
    """

    def __init__(
        self,
        sampler: EpochOrder,
        bucket_sizes: Sequence[int],
        batch_size: int,
        drop_last: bool,
        rank: int,
        world_size: int,
    ) -> None:
        self.sampler = sampler
        self.bucket_sizes = bucket_sizes
        self.global_batch_size = batch_size * world_size
        self.drop_last = drop_last
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return sum(self.counts)

    @property
    def counts(self) -> list[int]:
        """How many batches each bucket gives."""
        rest = 0 if self.drop_last else self.global_batch_size - 1
        return [(size + rest) // self.global_batch_size for size in self.bucket_sizes]

    def row_numbers(self) -> list[list[int]]:
        """Return the row numbers of every batch of this process, len(self) lists of B."""
        order, parts, start = self.sampler.row_numbers(), [], 0
        for bucket, (rows, count) in enumerate(zip(self.bucket_sizes, self.counts, strict=True)):
            own = order[(order >= start) & (order < start + rows)]
            size = count * self.global_batch_size
            filled = np.full(size, FILLING - bucket)
            filled[: min(size, rows)] = own[:size]
            parts.append(filled.reshape(count, self.global_batch_size))
            start += rows
        batches = np.concatenate(parts)
        if len(parts) > 1:
            batches = batches[self.sampler.batch_numbers(len(batches))]
        return batches[:, self.rank :: self.world_size].tolist()


@dataclass(frozen=True, slots=True)
class Place:
    """Which process of how many."""

    rank: int = 0
    world_size: int = 1


class TooFewRows(ValueError):
    """Rows that do not make one global batch, which every process of a run finds alike."""


def place_of(trainer: Trainer | None) -> Place:
    """Return which process a trainer runs in; under tensor parallelism, of the data's mesh."""
    from lightning.pytorch.strategies import ParallelStrategy

    if trainer is None or not isinstance(trainer.strategy, ParallelStrategy):
        return Place()
    own = trainer.strategy.distributed_sampler_kwargs
    return Place(own["rank"], own["num_replicas"])


def check_loading(batch_size: int, seed: int, num_workers: int = 0) -> None:
    """Raise ValueError for numbers that no loader can work with."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, not {seed}")
    if not 0 <= num_workers <= MOST_WORKERS:
        raise ValueError(f"num_workers must be in 0..{MOST_WORKERS}, not {num_workers}")


class RowLoader:
    """Iterates over the batches of one process.

    Args:
        rows: maps a list of row numbers to a batch; `unit` says what its rows are, and
            `bucket_sizes` which of them may share a batch.
        batch_size: B, rows of each process.
        seed, shuffle: of the order; without `shuffle` it is that of the rows.
        drop_last: leave out an incomplete global batch; otherwise it is filled up with rows
            without scored tokens, so that every process has the same number of equal batches.
        place: which process of how many.
        num_workers: processes that make the batches; 0 makes them in this one, which is quick.

    Raises TooFewRows when there is not one batch, or a bucket whose rows would never be seen.
    """

    def __init__(
        self,
        rows: BatchRows,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = False,
        drop_last: bool = False,
        place: Place = Place(),
        num_workers: int = 0,
    ) -> None:
        order = EpochOrder(len(rows), seed, shuffle)
        self.batch_sampler = GlobalBatches(
            order, rows.bucket_sizes, batch_size, drop_last, place.rank, place.world_size
        )
        counts = zip(rows.bucket_sizes, self.batch_sampler.counts, strict=True)
        unseen = [size for size, count in counts if drop_last and not count]
        if len(self.batch_sampler) == 0 or unseen:
            found = min(unseen, default=len(rows))
            raise TooFewRows(
                f"the data gives {found} {rows.unit}, fewer than one global batch of "
                f"{self.batch_sampler.global_batch_size}: use more data or a smaller batch_size"
            )
        self.rows = rows
        self.num_workers = num_workers
        self._epoch = 0  # of the batches counted
        self._batches_done = 0
        self._resuming = False

    @property
    def epoch(self) -> int:
        """The epoch whose order is used next."""
        return self.batch_sampler.sampler.epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch where no trainer does."""
        self.batch_sampler.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Batch]:
        # A generator, so epoch and place are read at the first `next`: Lightning makes the
        # iterator before it sets the epoch
        resumed = self._resuming and self.epoch == self._epoch
        first = self._batches_done if resumed else 0
        self._resuming = False
        self._epoch, self._batches_done = self.epoch, first
        for batch in self._batches(first):
            self._batches_done += 1
            yield batch

    def _batches(self, first: int) -> Iterator[Batch]:
        loader = DataLoader(
            self.rows,
            batch_size=None,
            sampler=self.batch_sampler.row_numbers()[first:],
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # or the loader would draw from the global noise
        )
        return iter(loader)

    def state_dict(self) -> dict[str, int]:
        """Return how far the epoch has come, in rows of all processes."""
        rows_done = self._batches_done * self.batch_sampler.global_batch_size
        return {"epoch": self._epoch, "rows_done": rows_done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on behind the last batch of a checkpoint, if the epoch is still the same."""
        self._epoch = state["epoch"]
        self._batches_done = state["rows_done"] // self.batch_sampler.global_batch_size
        self._resuming = True
        self.set_epoch(self._epoch)
