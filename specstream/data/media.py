"""Media for training diffusion models and their drafters: buckets of one shape, held-out samples.

Shapes: B rows, S the shape of a state, n samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import lightning as L
import numpy as np
import torch

from specstream.data.loader import (
    FILLING,
    Batch,
    BatchRows,
    RowLoader,
    check_loading,
    place_of,
)
from specstream.data.media_sources import MediaSource, Samples
from specstream.data.sources import check_limit
from specstream.media_processor import MediaProcessor


@dataclass(frozen=True, slots=True)
class Bucket:
    """Media of one shape, from one or several sources."""

    samples: Samples
    keys: np.ndarray  # (n,) int64, the number of each sample among those of all sources
    places: np.ndarray  # (n,) int64, its number in its own source: of one item in several sizes one


class SampleDataset(BatchRows):
    """Maps a list of B numbers to a batch, which is of one bucket.

    Args:
        buckets: the media.
        chosen: of each bucket, the places of the samples that take part.
    """

    def __init__(self, buckets: Sequence[Bucket], chosen: Sequence[np.ndarray]) -> None:
        self.buckets = buckets
        self.chosen = chosen
        self.ends = np.cumsum([len(places) for places in chosen])
        shapes = [list(bucket.samples.states.shape[1:]) for bucket in buckets]
        self.unit = f"samples of {' or '.join(map(str, shapes))}"

    @property
    def bucket_sizes(self) -> Sequence[int]:
        return [len(places) for places in self.chosen]

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, numbers: list[int]) -> Batch:
        asked = np.asarray(numbers)
        real = asked >= 0
        first = asked.max()  # of a batch that is filled up wholly, FILLING - bucket
        number = int(np.searchsorted(self.ends, first, "right")) if first >= 0 else FILLING - first
        bucket, places = self.buckets[number], self.chosen[number]
        start = self.ends[number] - len(places)
        rows = places[np.where(real, asked - start, 0)]
        index = torch.from_numpy(rows)
        return {
            "states": bucket.samples.states[index],
            "keys": torch.from_numpy(bucket.keys[rows]),
            "real": torch.from_numpy(real),
            **{name: value[index] for name, value in bucket.samples.condition.items()},
        }


class MediaDataModule(L.LightningDataModule):
    """Batches of media in -1..1, with held-out samples.

    Batches are dictionaries: `states` float32 (B, *S); `keys` int64 (B,), the number of each
    sample; `real` bool (B,), False where the last batch is filled up; `classes` int64 (B,) or
    `text` float32 (B, text_size) where the source has them.  A batch is of one shape.  The order of
    training batches is a pure function of (seed, epoch), and every process takes its own rows of a
    global batch.

    Args:
        source: where the media come from.
        sources: instead of one, several of one kind and with the same classes, of whatever sizes
            and durations; the first one's shape is what a trained model makes unless another of
            them is asked for.
        batch_size: B, rows of each process.
        validation_fraction: share held out, chosen by a hash of the samples' numbers.
        num_workers: processes that make batches; 0 makes them in this one.
        seed: of the order of batches.
        limit: train on so many samples of each shape only, chosen by that hash; None: on all.
    """

    def __init__(
        self,
        source: MediaSource | None = None,
        sources: list[MediaSource] | None = None,
        batch_size: int = 64,
        validation_fraction: float = 0.1,
        num_workers: int = 0,
        seed: int = 0,
        limit: int | None = None,
    ) -> None:
        super().__init__()
        check_limit("MediaDataModule", limit)
        check_loading(batch_size, seed, num_workers)
        if not 0 <= validation_fraction < 1:
            raise ValueError(f"validation_fraction must be in [0, 1), not {validation_fraction}")
        if (source is None) == (not sources):
            raise ValueError("give a source, or several as sources; one of the two")
        self.sources = [source] if source is not None else list(sources or [])
        for part in self.sources:
            part.check()
        check_alike(self.sources)
        self.batch_size = batch_size
        self.validation_fraction = validation_fraction
        self.num_workers = num_workers
        self.seed = seed
        self.limit = limit
        self._buckets: list[Bucket] | None = None

    @property
    def buckets(self) -> list[Bucket]:
        """All samples by shape, that of the first source first; read at the first use."""
        if self._buckets is None:
            self._buckets = in_buckets([source.samples() for source in self.sources])
        return self._buckets

    @property
    def samples(self) -> Samples:
        """The samples of the first bucket."""
        return self.buckets[0].samples

    @property
    def processor(self) -> MediaProcessor:
        """What the samples are, and how one is written to a file."""
        return self.sources[0].processor

    @property
    def shape(self) -> tuple[int, ...]:
        """S, of the first source's samples."""
        return tuple(self.samples.states.shape[1:])

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """S of every bucket."""
        return [tuple(bucket.samples.states.shape[1:]) for bucket in self.buckets]

    def numbers(self, held_out: bool, bucket: int = 0) -> np.ndarray:
        """Return where the samples of a bucket lie that are held out, or are trained on."""
        shares = np.array([held_out_place(int(place)) for place in self.buckets[bucket].places])
        found = np.flatnonzero((shares < self.validation_fraction) == held_out)
        if held_out or self.limit is None:
            return found
        return np.sort(found[np.argsort(shares[found])][: self.limit])

    def train_dataloader(self) -> RowLoader:
        return self._loader(held_out=False)

    def val_dataloader(self) -> RowLoader | list[RowLoader]:
        return self._loader(held_out=True) if self.validation_fraction else []

    def _loader(self, held_out: bool) -> RowLoader:
        return RowLoader(
            SampleDataset(
                self.buckets, [self.numbers(held_out, n) for n in range(len(self.buckets))]
            ),
            batch_size=self.batch_size,
            seed=self.seed,
            shuffle=not held_out,
            drop_last=not held_out,
            place=place_of(self.trainer),
            num_workers=self.num_workers,
        )


def in_buckets(parts: Sequence[Samples]) -> list[Bucket]:
    """Return the samples of several sources by their shape, in the order of the first of each."""
    shapes: dict[tuple[int, ...], list[int]] = {}
    for number, samples in enumerate(parts):
        shapes.setdefault(tuple(samples.states.shape[1:]), []).append(number)
    places = [np.arange(len(samples.states)) for samples in parts]
    starts = np.cumsum([0, *map(len, places)])
    return [
        Bucket(
            joined([parts[n] for n in numbers]),
            np.concatenate([starts[n] + places[n] for n in numbers]),
            np.concatenate([places[n] for n in numbers]),
        )
        for numbers in shapes.values()
    ]


def joined(parts: Sequence[Samples]) -> Samples:
    """Return samples of one shape, one source's behind the other's."""
    if len(parts) == 1:
        return parts[0]
    told = [samples.condition for samples in parts]
    return Samples(
        torch.cat([samples.states for samples in parts]),
        **{name: torch.cat([one[name] for one in told]) for name in told[0]},
    )


def check_alike(sources: Sequence[MediaSource]) -> None:
    """Raise ValueError where one model could not be trained on all sources."""
    if len(sources) == 1:
        return
    first, *others = [source.processor for source in sources]
    for number, other in enumerate(others, start=2):
        for name in ("kind", "classes", "text_size"):
            if getattr(other, name) != getattr(first, name):
                raise ValueError(
                    f"the {name} of source {number} is {getattr(other, name)!r}, that of the first "
                    f"{getattr(first, name)!r}: sources must agree in it"
                )


def held_out_place(number: int) -> float:
    """Return a stable number in [0, 1) for a sample: below the held-out fraction means held out."""
    return int.from_bytes(hashlib.sha256(str(number).encode()).digest()[:8], "big") / 2**64
