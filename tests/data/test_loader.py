"""The order of batches: a pure function of seed and epoch, resumable, the same for any world."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from specstream.data.loader import Place, RowDataset, RowLoader, TooFewRows
from specstream.data.packing import PackedRows

T = 4


def rows(number: int) -> PackedRows:
    """Rows whose tokens are their own number."""
    tokens = np.repeat(np.arange(number, dtype=np.uint16)[:, None], T, axis=1)
    scored = np.ones((number, T), np.bool_)
    scored[:, 0] = False
    return PackedRows(tokens, scored, np.zeros((number, T), np.int32))


def numbers(batch) -> list[int]:
    return batch["input_ids"][:, 0].tolist()


def epoch_of(loader: RowLoader, epoch: int = 0) -> list[list[int]]:
    loader.set_epoch(epoch)
    return [numbers(batch) for batch in loader]


def test_an_epoch_visits_every_row_once_in_an_order_of_its_own() -> None:
    loader = RowLoader(RowDataset(rows(12)), batch_size=3, seed=5, shuffle=True, drop_last=True)
    first, second = epoch_of(loader, 0), epoch_of(loader, 1)
    for epoch in (first, second):
        assert sorted(number for batch in epoch for number in batch) == list(range(12))
    assert first != second
    assert epoch_of(loader, 0) == first
    assert epoch_of(RowLoader(RowDataset(rows(12)), 3, seed=6, shuffle=True), 0) != first


def test_two_processes_see_the_global_batches_of_one() -> None:
    options = {"seed": 1, "shuffle": True, "drop_last": True}
    single = epoch_of(RowLoader(RowDataset(rows(23)), batch_size=6, **options), 2)
    ranks = [
        epoch_of(RowLoader(RowDataset(rows(23)), batch_size=3, place=Place(rank, 2), **options), 2)
        for rank in range(2)
    ]
    assert len(single) == len(ranks[0]) == len(ranks[1]) == 3
    for batch, left, right in zip(single, *ranks, strict=True):
        assert (batch[0::2], batch[1::2]) == (left, right)


def test_the_last_validation_batch_is_filled_up_with_unscored_rows() -> None:
    single = list(RowLoader(RowDataset(rows(7)), batch_size=4))
    assert [len(batch["input_ids"]) for batch in single] == [4, 4]
    assert single[1]["loss_mask"].any(dim=1).tolist() == [True, True, True, False]
    ranks = [
        list(RowLoader(RowDataset(rows(7)), batch_size=2, place=Place(rank, 2)))
        for rank in range(2)
    ]
    assert len(ranks[0]) == len(ranks[1]) == 2
    scored = sum(int(batch["loss_mask"].sum()) for rank in ranks for batch in rank)
    assert scored == 7 * (T - 1)


def test_too_few_rows_for_a_batch_is_one_clear_line() -> None:
    with pytest.raises(TooFewRows, match="gives 3 rows of 4 tokens, fewer than one global batch"):
        RowLoader(RowDataset(rows(3)), batch_size=2, drop_last=True, place=Place(0, 2))
    with pytest.raises(ValueError, match="gives 0 rows"):
        RowLoader(RowDataset(rows(0)), batch_size=2)


def test_a_restored_loader_goes_on_with_the_next_batch() -> None:
    whole = epoch_of(RowLoader(RowDataset(rows(20)), 4, shuffle=True, drop_last=True), 3)
    stopped = RowLoader(RowDataset(rows(20)), 4, shuffle=True, drop_last=True)
    stopped.set_epoch(3)
    iterator = iter(stopped)
    seen = [numbers(next(iterator)) for _ in range(2)]
    resumed = RowLoader(RowDataset(rows(20)), 4, shuffle=True, drop_last=True)
    resumed.load_state_dict(stopped.state_dict())
    assert seen + [numbers(batch) for batch in resumed] == whole
    assert epoch_of(resumed, 4) == epoch_of(stopped, 4), "the next epoch is whole again"


def test_worker_processes_change_nothing() -> None:
    plain = RowLoader(RowDataset(rows(8)), 2, shuffle=True)
    workers = RowLoader(RowDataset(rows(8)), 2, shuffle=True, num_workers=1)
    assert epoch_of(plain) == epoch_of(workers)


def test_the_global_noise_is_left_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    list(RowLoader(RowDataset(rows(8)), 2, shuffle=True))
    assert torch.equal(torch.rand(3), expected)


class Recorder(L.LightningModule):
    """Learns nothing; remembers the batches."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[list[int]] = []

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        self.seen.append(numbers(batch))
        return (self.weight * batch["input_ids"]).mean()

    def validation_step(self, batch: dict[str, torch.Tensor], index: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def fit(folder: Path, ckpt_path: str | None = None) -> list[list[int]]:
    module = Recorder()
    trainer = L.Trainer(
        max_epochs=3,
        accelerator="cpu",
        val_check_interval=2,
        default_root_dir=folder,
        callbacks=[
            ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1),
            ModelCheckpoint(folder, "epoch{epoch}", save_top_k=-1, save_on_train_epoch_end=True),
        ],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = RowLoader(RowDataset(rows(20)), 4, seed=1, shuffle=True, drop_last=True)
    trainer.fit(module, loader, RowLoader(RowDataset(rows(4)), 4), ckpt_path=ckpt_path)
    return module.seen


@pytest.mark.filterwarnings("ignore")
def test_lightning_resumes_any_checkpoint_with_the_batches_that_would_have_come(
    tmp_path: Path,
) -> None:
    whole = fit(tmp_path / "whole")
    assert len(whole) == 15
    for step in (1, 2, 5, 6, 9, 10, 14):
        checkpoint = tmp_path / "whole" / f"step={step}.ckpt"
        assert fit(tmp_path / f"from{step}", str(checkpoint)) == whole[step:], f"from step {step}"
    at_epoch_end = tmp_path / "whole" / "epochepoch=0.ckpt"
    assert fit(tmp_path / "from_epoch", str(at_epoch_end)) == whole[5:]
