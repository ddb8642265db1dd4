"""The order of batches: a pure function of (seed, epoch), whatever the number of processes.

Shapes: B rows of one process, W processes, T sequence length.

`RowLoader` is a plain iterable, not a `DataLoader`, so Lightning leaves its order alone whatever
`use_distributed_sampler` says.  Of each global batch of W * B rows, process r takes the rows r,
r + W, ...: two processes with batch B see what one process with batch 2 B sees.  `state_dict` tells
how far the epoch has come; Lightning keeps it in checkpoints and restores it, so a run that is
resumed in the middle of an epoch goes on with the very next batch.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from specstream.data.packing import PackedRows, restarting_positions

Batch = dict[str, Tensor]


class RowDataset(Dataset):
    """Maps a list of row numbers to a batch; the number -1 is a row without a scored token."""

    def __init__(self, rows: PackedRows) -> None:
        self.rows = rows

    def __getitem__(self, numbers: list[int]) -> Batch:
        real = np.asarray(numbers) >= 0
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
    """Holds the epoch; Lightning finds it as `loader.sampler` and calls `set_epoch`."""

    def __init__(self, num_rows: int, seed: int, shuffle: bool) -> None:
        self.num_rows = num_rows
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __call__(self) -> np.ndarray:
        """Return the row numbers of this epoch in order, (R,)."""
        if not self.shuffle:
            return np.arange(self.num_rows)
        return np.random.default_rng([self.seed, self.epoch]).permutation(self.num_rows)


class RowLoader:
    """Iterates over the batches of one process.

    Args:
        rows: the packed rows of a split.
        batch_size: B, rows of each process.
        seed, shuffle: the order is `EpochOrder`; without `shuffle` it is that of the rows.
        drop_last: leave out an incomplete global batch; otherwise it is filled up with rows
            without scored tokens, so that every process has the same number of equal batches.
        rank, world_size: which process of how many.
        num_workers, pin_memory: as in `DataLoader`.

    Raises ValueError when there is not one batch.
    """

    def __init__(
        self,
        rows: PackedRows,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = False,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.global_batch_size = batch_size * world_size
        if len(rows) == 0 or (drop_last and len(rows) < self.global_batch_size):
            raise ValueError(
                f"the data gives {len(rows)} rows of {rows.tokens.shape[1]} tokens, fewer than "
                f"one global batch of {self.global_batch_size}: use more data, a smaller "
                "batch_size or a smaller sequence_length"
            )
        self.dataset = RowDataset(rows)
        self.sampler = EpochOrder(len(rows), seed, shuffle)
        self.drop_last = drop_last
        self.rank = rank
        self.world_size = world_size
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self._batches_done = 0
        self._resume_at = 0

    def __len__(self) -> int:
        if self.drop_last:
            return len(self.dataset.rows) // self.global_batch_size
        return -(-len(self.dataset.rows) // self.global_batch_size)

    def __iter__(self) -> Iterator[Batch]:
        # A generator: epoch and resume point are read at the first `next`, after Lightning set them
        first, self._resume_at = self._resume_at, 0
        self._batches_done = first
        for batch in self._batches(first):
            self._batches_done += 1
            yield batch

    def _batches(self, first: int) -> Iterator[Batch]:
        loader = DataLoader(
            self.dataset,
            batch_size=None,
            sampler=self._row_numbers()[first:],
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            generator=torch.Generator(),  # or the loader would draw from the global noise
        )
        return iter(loader)

    def _row_numbers(self) -> list[list[int]]:
        """Return the row numbers of every batch of this process, len(self) lists of B."""
        order = self.sampler()
        size = len(self) * self.global_batch_size
        filled = np.full(size, -1)
        filled[: min(size, len(order))] = order[:size]
        mine = filled.reshape(len(self), -1)[:, self.rank :: self.world_size]
        return mine.tolist()

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.sampler.epoch, "batches_done": self._batches_done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.sampler.set_epoch(state["epoch"])
        finished = state["batches_done"] >= len(self)
        self._resume_at = 0 if finished else state["batches_done"]
        self._batches_done = self._resume_at
