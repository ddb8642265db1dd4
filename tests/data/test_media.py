"""Media data modules: batches of one shape, whatever the number of sources and processes."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from specstream.data import CaptionDataModule, Digits, MediaDataModule, MediaSource, Samples
from specstream.data.loader import Batch, Place, RowLoader
from specstream.data.media import SampleDataset, in_buckets
from specstream.media_processor import MediaProcessor


@dataclass(frozen=True)
class Numbered(MediaSource):
    """Samples that hold `start`, `start` + 1, ...; classes are those modulo 5."""

    number: int
    shape: tuple[int, ...]
    start: int = 0
    kind: MediaProcessor = field(default=MediaProcessor("image"))

    def check(self) -> None: ...

    def samples(self) -> Samples:
        values = torch.arange(self.start, self.start + self.number)
        states = values.float().view(-1, *[1] * len(self.shape)).expand(-1, *self.shape)
        return Samples(states, values % 5, text=values.float()[:, None] * torch.ones(2))

    @property
    def processor(self) -> MediaProcessor:
        return self.kind


SMALL, LARGE = (1, 2, 2), (1, 4, 2)
SOURCES = [Numbered(21, SMALL), Numbered(13, LARGE, 21), Numbered(9, SMALL, 34)]


def loader(rank: int = 0, processes: int = 1, batch_size: int = 4, **options) -> RowLoader:
    buckets = in_buckets([source.samples() for source in SOURCES])
    chosen = [np.arange(len(bucket.keys)) for bucket in buckets]
    dataset = SampleDataset(buckets, chosen)
    return RowLoader(dataset, batch_size, seed=3, place=Place(rank, processes), **options)


def numbers(batch: Batch) -> list[int]:
    return torch.where(batch["real"], batch["keys"], -1).tolist()


def test_a_batch_is_of_one_shape_and_an_epoch_mixes_shapes() -> None:
    batches = list(loader(shuffle=True, drop_last=True))
    shapes = [tuple(batch["states"].shape[1:]) for batch in batches]
    assert shapes.count(SMALL) == 30 // 4 and shapes.count(LARGE) == 13 // 4
    assert shapes != sorted(shapes) and shapes != sorted(shapes, reverse=True)
    seen = [number for batch in batches for number in numbers(batch)]
    assert len(seen) == len(set(seen)) == 40
    for batch in batches:  # a sample's key, number and condition belong together
        assert torch.equal(batch["states"].flatten(1)[:, 0].long(), batch["keys"])
        assert torch.equal(batch["classes"], batch["keys"] % 5)
        assert torch.equal(batch["text"][:, 1].long(), batch["keys"])


def test_the_order_is_that_of_seed_and_epoch() -> None:
    first, second = loader(shuffle=True), loader(shuffle=True)
    for epoch in (0, 1):
        first.set_epoch(epoch)
        second.set_epoch(epoch)
        order = [numbers(batch) for batch in first]
        assert order == [numbers(batch) for batch in second]
    first.set_epoch(0)
    assert [numbers(batch) for batch in first] != order


@pytest.mark.parametrize("options", [{"shuffle": True, "drop_last": True}, {}])
def test_two_processes_share_the_global_batches_of_one(options: dict[str, bool]) -> None:
    single = list(loader(batch_size=8, **options))
    ranks = [list(loader(rank, 2, 4, **options)) for rank in range(2)]
    assert len(single) == len(ranks[0]) == len(ranks[1])
    for whole, left, right in zip(single, *ranks, strict=True):
        assert (numbers(whole)[0::2], numbers(whole)[1::2]) == (numbers(left), numbers(right))
        assert left["states"].shape == right["states"].shape == (4, *whole["states"].shape[1:])


def test_validation_sees_every_sample_once_and_fills_up_each_bucket() -> None:
    batches = list(loader(rank=0, processes=2)) + list(loader(rank=1, processes=2))
    seen = [n for batch in batches for n in numbers(batch) if n >= 0]
    assert sorted(seen) == list(range(43))


def test_a_module_of_one_source_keeps_its_numbers_and_held_out_samples() -> None:
    module = MediaDataModule(SOURCES[0], batch_size=2, validation_fraction=0.3)
    held_out, rest = module.numbers(True), module.numbers(False)
    assert sorted([*held_out, *rest]) == list(range(21)) and len(held_out) in range(2, 12)
    assert module.shape == SMALL and len(module.buckets) == 1
    assert sum(int(batch["real"].sum()) for batch in module.val_dataloader()) == len(held_out)


def test_what_is_held_out_in_one_size_is_held_out_in_all() -> None:
    same = (Numbered(200, SMALL), Numbered(200, LARGE))
    module = MediaDataModule(sources=same, batch_size=2, validation_fraction=0.3)
    assert np.array_equal(module.numbers(True, 0), module.numbers(True, 1))
    keys = np.concatenate([bucket.keys for bucket in module.buckets])
    assert len(np.unique(keys)) == 400  # noise is keyed by them, and each sample has its own


def test_a_limit_leaves_out_samples_of_training_only() -> None:
    whole = MediaDataModule(Digits(), validation_fraction=0.2)
    some = MediaDataModule(Digits(), validation_fraction=0.2, limit=100)
    assert np.array_equal(some.numbers(held_out=True), whole.numbers(held_out=True))
    chosen, trained = some.numbers(held_out=False), whole.numbers(held_out=False)
    assert len(chosen) == 100 and np.all(np.diff(chosen) > 0) and set(chosen) <= set(trained)
    assert chosen[-1] > len(trained) // 2  # not the first ones: a source may be sorted
    more = MediaDataModule(Digits(), validation_fraction=0.2, limit=9999)
    assert np.array_equal(more.numbers(held_out=False), trained)
    with pytest.raises(ValueError, match="limit must be at least 1"):
        MediaDataModule(Digits(), limit=0)


def test_several_sources_are_one_kind() -> None:
    module = MediaDataModule(sources=SOURCES, batch_size=2)
    assert [len(bucket.keys) for bucket in module.buckets] == [30, 13] and module.shape == SMALL
    assert module.shapes == [SMALL, LARGE]
    with pytest.raises(ValueError, match="the kind of source 2 is 'video', that of the first"):
        MediaDataModule(
            sources=[SOURCES[0], Numbered(3, (1, 2, 2, 2), kind=MediaProcessor("video"))]
        )
    with pytest.raises(ValueError, match="the classes of source 2 is"):
        other = MediaProcessor("image", classes=("a",))
        MediaDataModule(sources=[SOURCES[0], Numbered(3, LARGE, kind=other)])
    for options in ({}, {"sources": []}, {"source": SOURCES[0], "sources": SOURCES}):
        with pytest.raises(ValueError, match="give a source, or several as sources"):
            MediaDataModule(**options)


def test_a_bucket_that_no_batch_would_hold_is_refused() -> None:
    with pytest.raises(ValueError, match=r"gives 13 samples of \[1, 2, 2\] or \[1, 4, 2\], fewer"):
        loader(batch_size=14, drop_last=True)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"seed": -5}, "seed must be at least 0, not -5"),
        ({"num_workers": -1}, "num_workers must be in 0..256, not -1"),
        ({"num_workers": 1_000_000}, "num_workers must be in 0..256, not 1000000"),
    ],
)
def test_what_no_loader_can_do_is_refused_before_a_run(options: dict[str, int], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        MediaDataModule(Digits(), **options)
    if "seed" in options:
        with pytest.raises(ValueError, match=line):
            CaptionDataModule(["a"], **options)
