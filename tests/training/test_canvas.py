"""What is hidden of a row, and when."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from specstream.data.loader import RowDataset, RowLoader
from specstream.data.packing import PackedRows
from specstream.sampling import Noise
from specstream.training.canvas import (
    SMALLEST_TIME,
    corrupt,
    hide,
    hide_in_turn,
    one_block,
    padded,
    position_times,
    spread_times,
)

VOCABULARY, EOS, MASK = 11, 0, 5
Rows = dict[str, Tensor]


def batch(rows: int = 3, length: int = 12, given: int = 4, seed: int = 0) -> Rows:
    """Return rows of one document each without the mask token, the first `given` not scored."""
    noise = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY - 1, (rows, length), generator=noise)
    tokens += tokens >= MASK
    steps = torch.arange(length).expand(rows, -1)
    documents = torch.zeros_like(tokens)
    return {
        "input_ids": tokens,
        "loss_mask": steps >= given,
        "positions": steps,
        "documents": documents,
    }


def part(data: Rows, which: slice | list[int]) -> Rows:
    return {name: value[which] for name, value in data.items()}


def at(time: float, data: Rows) -> Tensor:
    return torch.full(data["input_ids"].shape, time)


@pytest.mark.parametrize("time", [0.1, 0.5, 0.9])
def test_each_scored_token_is_hidden_with_the_probability_of_its_time(time: float) -> None:
    data = batch(2000, 14)
    rows = hide(data, at(time, data), MASK, Noise(1))
    share = rows.masked[data["loss_mask"]].double().mean()
    error = (time * (1 - time) / 20_000) ** 0.5
    assert abs(float(share) - time) < 4 * error
    assert not rows.masked[~data["loss_mask"]].any()
    assert torch.equal(rows.asked, rows.masked)
    assert torch.equal(rows.tokens == MASK, rows.masked)
    assert torch.equal(rows.tokens[~rows.masked], data["input_ids"][~rows.masked])
    torch.testing.assert_close(rows.weights, torch.full_like(rows.weights, 1 / time))


def test_later_times_hide_what_earlier_ones_hid_and_more() -> None:
    data, noise = batch(20), Noise(1)
    hidden = [hide(data, at(time, data), MASK, noise).masked for time in (0.2, 0.5, 1.0)]
    assert (hidden[0] <= hidden[1]).all() and hidden[0].sum() < hidden[1].sum()
    assert torch.equal(hidden[2], data["loss_mask"])


def test_coins_are_keyed_by_what_a_row_holds_and_by_the_noise() -> None:
    data = batch(6)
    data["input_ids"][5] = data["input_ids"][0]
    whole = hide(data, at(0.5, data), MASK, Noise(3))
    other = part(data, [4, 1])
    assert torch.equal(hide(other, at(0.5, other), MASK, Noise(3)).tokens, whole.tokens[[4, 1]])
    assert torch.equal(whole.masked[0], whole.masked[5])
    assert not torch.equal(whole.masked[0], whole.masked[1])
    assert not torch.equal(whole.masked, hide(data, at(0.5, data), MASK, Noise(4)).masked)


def test_times_of_a_batch_are_evenly_spread_from_a_random_start() -> None:
    for start in (0.0, 0.37, 0.999):
        times = spread_times(16, 0, 1, torch.tensor(start)).sort().values
        gaps = torch.cat([times.diff(), 1 + times[:1] - times[-1:]])
        torch.testing.assert_close(gaps, torch.full((16,), 1 / 16))
        assert float(times.min()) >= 0 and float(times.max()) < 1
    positions = torch.arange(12).expand(16, -1)
    for length in (None, 4):
        found = position_times(times, positions, length)
        assert float(found.min()) >= SMALLEST_TIME and float(found.max()) <= 1
        spread = found.sort(0).values.diff(dim=0)  # over rows, at every position
        torch.testing.assert_close(spread, torch.full_like(spread, (1 - SMALLEST_TIME) / 16))


def test_two_processes_have_the_times_of_one_with_twice_the_batch() -> None:
    start = torch.tensor(0.61)
    one = spread_times(8, 0, 1, start)
    for rank in (0, 1):  # rank::world, as the loader deals its rows
        assert torch.equal(spread_times(4, rank, 2, start), one[rank::2])


def test_each_block_has_a_time_of_its_own() -> None:
    times = spread_times(5, 0, 1, torch.tensor(0.3))
    positions = torch.cat([torch.arange(9), torch.arange(7)]).expand(5, -1)  # two documents
    found = position_times(times, positions, 4)
    blocks = positions // 4
    for row in range(5):
        values = {b: found[row][blocks[row] == b].unique() for b in range(3)}
        assert all(len(value) == 1 for value in values.values())
        assert len({float(value) for value in values.values()}) == 3
    assert torch.equal(position_times(times, positions, None)[:, 0], found[:, 0])
    many = position_times(torch.zeros(1), torch.arange(4000)[None], 4)[0, ::4]  # over blocks
    assert abs(float(many.mean()) - 0.5) < 0.01
    assert float(many.sort().values.diff().max()) < 3 / 1000


def test_complementary_masks_hide_each_scored_token_exactly_once() -> None:
    data = batch(7)
    times = at(0.3, data)
    rows = hide_in_turn(data, times, MASK, Noise(2))
    first, second = rows.masked[:7], rows.masked[7:]
    assert torch.equal(first.int() + second.int(), data["loss_mask"].int())
    assert torch.equal(first, hide(data, times, MASK, Noise(2)).masked)
    assert torch.equal(rows.tokens == MASK, rows.masked) and torch.equal(rows.asked, rows.masked)
    assert torch.equal(rows.tokens[7:][~second], data["input_ids"][~second])
    assert (rows.weights == 1).all() and rows.weights.shape == rows.masked.shape


@pytest.mark.parametrize("build", [hide, hide_in_turn])
def test_the_given_share_of_visible_scored_tokens_is_replaced(build: type) -> None:
    data = batch(3000)
    hidden = build(data, at(0.5, data), MASK, Noise(2))
    rows = corrupt(hidden, data, 0.2, VOCABULARY, MASK, Noise(2))
    copies = len(rows.tokens) // 3000
    truth, scored = (data[name].repeat(copies, 1) for name in ("input_ids", "loss_mask"))
    visible = scored & ~rows.masked
    wrong = rows.tokens != truth
    assert torch.equal(rows.masked, hidden.masked) and torch.equal(rows.asked, scored)
    assert not (wrong & ~scored).any()
    assert torch.equal(rows.tokens == MASK, rows.masked)  # a wrong token is never a mask
    share = 0.2 * (VOCABULARY - 2) / (VOCABULARY - 1)  # a random token may be the right one
    assert float(wrong[visible].double().mean()) == pytest.approx(share, abs=0.01)
    drawn = rows.tokens[wrong & visible].bincount(minlength=VOCABULARY).double()
    even = torch.full((VOCABULARY,), 1 / (VOCABULARY - 1), dtype=torch.float64)
    even[MASK] = 0
    torch.testing.assert_close(drawn / drawn.sum(), even, atol=0.015, rtol=0)
    assert (rows.weights[visible] == 1).all()
    assert torch.equal(rows.weights[rows.masked], hidden.weights[rows.masked])


def test_padding_becomes_ends_of_text_that_are_scored() -> None:
    data = batch(3, 8, 3)
    data["documents"][0, 5:] = -1
    data["loss_mask"][0, 5:] = False
    data["positions"] = torch.where(data["documents"] < 0, 0, data["positions"])
    before = {name: value.clone() for name, value in data.items()}
    found = padded(data, EOS)
    assert found["input_ids"][0].tolist() == [*data["input_ids"][0, :5].tolist(), EOS, EOS, EOS]
    assert found["loss_mask"][0].tolist() == [False] * 3 + [True] * 5
    assert (found["documents"] == 0).all()
    assert torch.equal(found["positions"], torch.arange(8).expand(3, -1))
    for name in data:
        assert torch.equal(found[name][1:], data[name][1:])
        assert torch.equal(before[name], data[name])


def test_rows_that_only_fill_up_a_batch_are_not_scored() -> None:
    length = 6
    rows = PackedRows.empty(3, length, EOS, int)
    rows.tokens[:, :4], rows.documents[:, :4], rows.scored[:, 2:4] = 7, 0, True
    last = list(RowLoader(RowDataset(rows), 2))[-1]
    scored = padded(last, EOS)["loss_mask"]
    assert scored[0].sum() == 4 and scored[1].sum() == 0


def test_rows_of_several_documents_have_no_canvas() -> None:
    data = batch(2, 8)
    data["documents"][1, 5:] = 1
    with pytest.raises(ValueError, match=r"one document a row: set data.init_args.pack false"):
        padded(data, EOS)


def test_one_block_is_chosen_among_those_with_scored_tokens() -> None:
    data = batch(4000, 12, given=5)  # block 0 of 4 holds none
    data["loss_mask"][0] = False
    here, counts = one_block(data, 4, Noise(5))
    assert torch.equal(counts[1:], torch.full((3999,), 2)) and counts[0] == 0
    blocks = data["positions"] // 4
    chosen = torch.where(here, blocks, -1).amax(1)
    assert torch.equal(here, blocks == chosen[:, None])
    assert set(chosen[1:].tolist()) == {1, 2}
    assert float((chosen[1:] == 1).double().mean()) == pytest.approx(0.5, abs=0.04)
    again, _ = one_block(part(data, slice(7, 9)), 4, Noise(5))
    assert torch.equal(again, here[7:9])
    assert not torch.equal(one_block(data, 4, Noise(6))[0], here)
