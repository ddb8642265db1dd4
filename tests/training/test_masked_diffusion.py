"""What training of masked diffusion models minimises, next to sums written out by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from specstream.divergences import CrossEntropy, Divergence, ForwardKL, ReverseKL
from specstream.models import UntrainedMaskedLM
from specstream.models.pretrained_masked import MaskedForm, PretrainedMaskedLM
from specstream.training import Certainty, MaskedDiffusionModule
from specstream.training.canvas import one_block
from tests.training.test_canvas import EOS, MASK, VOCABULARY, batch

BLOCK, LENGTH = 4, 12
Rows = dict[str, Tensor]


class Tokens:
    """A tokenizer of which only the mask token and the size are known."""

    eos_token_id = EOS

    def __init__(self, mask: int | None = MASK, size: int = VOCABULARY) -> None:
        self.mask_token_id, self.size = mask, size

    def __len__(self) -> int:
        return self.size


@torch.no_grad()
def network(block_length: int | None = None, seed: int = 0, **options: Any) -> UntrainedMaskedLM:
    """Return a small model whose weights are large enough for every context to count."""
    sizes = {"vocab_size": VOCABULARY, "max_positions": 64} | options
    lm = UntrainedMaskedLM(
        hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2,
        block_length=block_length, seed=seed, **sizes,
    )  # fmt: skip
    for weight in lm.parameters():
        if weight.dim() > 1:
            weight.mul_(8)
    return lm


def attend(
    monkeypatch: pytest.MonkeyPatch,
    rank: int = 0,
    world_size: int = 1,
    tokenizer: Tokens | None = None,
    **layout: Any,
) -> None:
    """Stand in for the trainer: which process of how many, and the data."""
    layout = {"sequence_length": LENGTH, "pack": False} | layout
    data = SimpleNamespace(tokenizer=tokenizer or Tokens(), layout=SimpleNamespace(**layout))
    trainer = SimpleNamespace(
        world_size=world_size, global_rank=rank, datamodule=data, default_root_dir="run"
    )
    monkeypatch.setattr(MaskedDiffusionModule, "trainer", trainer)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Callable[..., MaskedDiffusionModule]:
    """Build a module without a trainer's help."""

    def build(block_length: int | None = None, **options: Any) -> MaskedDiffusionModule:
        built = MaskedDiffusionModule(
            lambda: network(block_length), **{"chunk_tokens": 7} | options
        )
        built.configure_model()
        return built

    attend(monkeypatch)
    return build


def packed(rows: int = 3) -> Rows:
    """Return rows of two documents each, of 7 and 5 tokens."""
    parts = batch(rows, 7, 2, seed=1), batch(rows, 5, 1, seed=2)
    joined = {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}
    joined["documents"][:, 7:] = 1
    return joined


def said(model: PretrainedMaskedLM, tokens: Tensor, clean: Tensor, document: Tensor) -> Tensor:
    """Return log laws (T, V) of one row, from passes over one document, and for a block model one
    block, at a time.
    """
    found = torch.zeros(len(tokens), VOCABULARY)
    for number in document.unique().tolist():
        places = (document == number).nonzero()[:, 0].tolist()
        size = model.block_length or len(places)
        for start in range(0, len(places), size):
            before, here = places[:start], places[start : start + size]
            shown = torch.cat([clean[before], tokens[here]])[None]
            found[here] = model(shown)[0, start:].log_softmax(-1)
    return found


def by_hand(
    trained: MaskedDiffusionModule, data: Rows, value: Callable[[int, Tensor, int], Tensor]
) -> Tensor:
    """Sum weight * value(row, log law, place) over what is asked of each row as it is shown."""
    rows, total = trained.hidden_rows(data), torch.zeros(())
    for row in range(len(rows.tokens)):
        source = row % len(data["input_ids"])
        laws = said(
            trained.model, rows.tokens[row], data["input_ids"][source], data["documents"][source]
        )
        for place in rows.asked[row].nonzero()[:, 0].tolist():
            total = total + rows.weights[row, place] * value(source, laws[place], place)
    return total


@pytest.mark.parametrize("block_length", [None, BLOCK])
@pytest.mark.parametrize(
    ("options", "data"),
    [
        ({}, batch(3)),
        ({}, packed()),
        ({"complementary": True}, packed()),
        ({"corruption": 0.3}, packed()),
        ({"complementary": True, "corruption": 0.3}, batch(3)),
        ({"pad_canvas": True}, batch(3)),
    ],
)
def test_the_loss_is_the_weighted_sum_over_what_is_hidden(
    module: Callable[..., MaskedDiffusionModule],
    block_length: int | None,
    options: dict[str, Any],
    data: Rows,
) -> None:
    trained = module(block_length, **options)
    found = trained.loss(data)
    expected = by_hand(trained, data, lambda row, law, place: -law[data["input_ids"][row, place]])
    torch.testing.assert_close(found.total, expected, rtol=1e-4, atol=1e-4)
    assert found.count == data["loss_mask"].sum()
    gradients = [
        torch.autograd.grad(loss, list(trained.model.parameters()), allow_unused=True)
        for loss in (found.total, expected)
    ]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_a_hidden_token_weighs_the_inverse_of_its_time(
    module: Callable[..., MaskedDiffusionModule],
) -> None:
    data = batch(2000, 9)
    for block_length in (None, 3):
        rows = module(block_length).hidden_rows(data)
        times = 1 / rows.weights
        assert float(times.min()) > 0 and float(times.max()) <= 1
        hidden = rows.masked[data["loss_mask"]].double().mean()
        assert float(hidden) == pytest.approx(0.5, abs=0.02)
        # of what is hidden at time t, 1 / t counts it as often as it is there
        assert float((rows.weights * rows.masked)[data["loss_mask"]].mean()) == pytest.approx(
            1, abs=0.1
        )


def test_the_surprise_is_the_mean_over_hidden_tokens_whatever_else_is_asked(
    module: Callable[..., MaskedDiffusionModule],
) -> None:
    trained, data = module(corruption=0.3), batch(3)
    rows, found = trained.hidden_rows(data), trained.loss(data)
    laws = trained.model(rows.tokens).log_softmax(-1)
    values = -laws.gather(2, data["input_ids"][:, :, None])[:, :, 0][rows.masked]
    torch.testing.assert_close(found.metrics["surprise"] / found.count, values.mean())


def test_the_mask_token_is_never_predicted(module: Callable[..., MaskedDiffusionModule]) -> None:
    trained = module()
    laws = trained.model(torch.full((1, 5), MASK)).softmax(-1)
    assert (laws[..., MASK] == 0).all()


@torch.no_grad()
@pytest.mark.parametrize("block_length", [None, 3])
def test_the_expected_loss_is_the_cross_entropy_of_a_model_that_ignores_context(
    module: Callable[..., MaskedDiffusionModule], block_length: int | None
) -> None:
    data = batch(256, 9, 2)
    trained = module(block_length)
    for layer in trained.model.model.model.layers:  # what is left reads the mask token alone
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    law = trained.model(torch.tensor([[MASK]]))[0, 0].log_softmax(-1)
    exact = -law[data["input_ids"][data["loss_mask"]]].mean()
    losses = []
    for seed in range(80):
        trained.run_seed = seed
        found = trained.loss(data)
        losses.append(found.total / found.count)
    error = torch.stack(losses).std() / 80**0.5
    assert float((torch.stack(losses).mean() - exact).abs() / error) < 4
    assert float(error / exact) < 0.015
    trained.complementary = True  # no coin is left in it
    assert float(trained.loss(data).total / found.count) == pytest.approx(float(exact), rel=1e-4)


@torch.no_grad()
def test_the_expected_loss_is_the_mean_over_orders_and_so_bounds_the_surprise(
    module: Callable[..., MaskedDiffusionModule],
) -> None:
    """-log of the mean over orders of p(text) <= mean over orders of -log p = the loss."""
    one = batch(1, 5, 2)
    text, places = one["input_ids"][0], [2, 3, 4]
    trained = module()
    for weight in trained.model.parameters():  # so sure that the order matters
        weight.mul_(3)
    surprises = []
    for order in itertools.permutations(places):
        canvas, surprise = text.clone(), torch.zeros(())
        canvas[places] = MASK
        for place in order:
            surprise = surprise - trained.model(canvas[None])[0, place].log_softmax(-1)[text[place]]
            canvas[place] = text[place]
        surprises.append(surprise)
    bound = torch.stack(surprises).mean()
    truth = -torch.stack(surprises).neg().logsumexp(0) + math.log(len(surprises))
    assert float(truth) < float(bound) - 0.1
    losses = []
    for seed in range(1000):
        trained.run_seed = seed
        losses.append(trained.loss(one).total)
    found = torch.stack(losses)
    error = float(found.std()) / len(losses) ** 0.5
    assert abs(float(found.mean() - bound)) < 4 * error
    assert float(found.mean()) > float(truth)


@pytest.mark.parametrize("block_length", [None, BLOCK])
@pytest.mark.parametrize("divergence", [None, ForwardKL()])
def test_two_processes_sum_to_one_with_twice_the_batch(
    module: Callable[..., MaskedDiffusionModule],
    monkeypatch: pytest.MonkeyPatch,
    block_length: int | None,
    divergence: Divergence | None,
) -> None:
    options: dict[str, Any] = {"corruption": 0.2, "divergence": divergence}
    options |= {} if divergence is None else {"target": lambda: network(seed=1)}
    trained, data = module(block_length, **options), batch(6)
    whole, halves = trained.loss(data), []
    for rank in (0, 1):
        attend(monkeypatch, rank, 2)
        halves.append(trained.loss({name: value[rank::2] for name, value in data.items()}))
    torch.testing.assert_close(whole.total, halves[0].total + halves[1].total)
    assert whole.count == halves[0].count + halves[1].count


def test_training_hides_anew_and_validation_never(
    module: Callable[..., MaskedDiffusionModule],
) -> None:
    trained, data = module(), batch()

    def hidden(number: int, training: bool = True, seed: int = 0) -> list[Any]:
        trained.train(training)
        trained.run_seed = seed
        begin = trained.on_train_batch_start if training else trained.on_validation_batch_start
        begin(data, number)
        rows = trained.hidden_rows(data)
        return [rows.masked.tolist(), rows.weights.tolist()]

    assert hidden(3) == hidden(3) and hidden(3)[1] != hidden(4)[1]
    assert hidden(3)[0] != hidden(3, seed=1)[0] and hidden(3)[0] != hidden(3, False)[0]
    assert hidden(3, False) == hidden(3, False) and hidden(3, False)[1] != hidden(4, False)[1]


@pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL(), ForwardKL(temperature=0.5)])
def test_a_model_that_is_its_target_has_no_loss_and_no_gradient(
    module: Callable[..., MaskedDiffusionModule], divergence: Divergence
) -> None:
    trained = module(target=network, divergence=divergence, corruption=0.2)
    found = trained.loss(batch())
    found.total.backward()
    assert float(found.total.detach()) == pytest.approx(0, abs=1e-3)
    for parameter in trained.model.parameters():
        assert float(parameter.grad.abs().max()) == pytest.approx(0, abs=1e-2)
    assert all(p.grad is None for p in trained.target.parameters())
    assert trained.trained_names() == {
        f"model.{name}" for name, _ in trained.model.named_parameters()
    }


@pytest.mark.parametrize("complementary", [False, True])
@pytest.mark.parametrize("corruption", [0.0, 0.3])
def test_a_block_drafter_learns_what_the_target_says_of_one_block_before_masks(
    module: Callable[..., MaskedDiffusionModule], complementary: bool, corruption: float
) -> None:
    data = batch(4, 12, 3)
    options = {"complementary": complementary, "corruption": corruption}
    trained = module(BLOCK, target=lambda: network(seed=3), **options)
    assert trained.target is not None and trained.target.block_length is None
    found = trained.loss(data)
    rows, total = trained.hidden_rows(data), torch.zeros(())
    which, _ = one_block(data, BLOCK, trained.epoch_noise())
    for row in range(len(rows.tokens)):
        source = row % 4
        clean, start = data["input_ids"][source], int(which[source].nonzero()[0])
        places = range(start, start + BLOCK)
        num_blocks = 3  # the first holds one scored token
        canvas = [*clean[:start], *rows.tokens[row, start : start + BLOCK], *[MASK] * LENGTH]
        p = trained.target(torch.tensor(canvas[:LENGTH])[None])[0].log_softmax(-1)
        q = said(trained.model, rows.tokens[row], clean, data["documents"][source])
        for place in places:
            if rows.asked[row, place]:
                gap = (p[place].exp() * (p[place] - q[place])).nan_to_num().sum()
                total = total + num_blocks * rows.weights[row, place] * gap
    torch.testing.assert_close(found.total, total, rtol=1e-4, atol=1e-3)
    assert found.count == data["loss_mask"].sum()


def test_cross_entropy_runs_no_target(
    module: Callable[..., MaskedDiffusionModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = module(BLOCK, target=network, divergence=CrossEntropy())
    monkeypatch.setattr(trained.target, "hidden", lambda *a: pytest.fail("the target ran"))
    torch.testing.assert_close(trained.loss(batch()).total, module(BLOCK).loss(batch()).total)


@pytest.mark.parametrize("block_length", [None, BLOCK])
def test_a_batch_without_a_scored_token_has_no_loss(
    module: Callable[..., MaskedDiffusionModule], block_length: int | None
) -> None:
    data = batch()
    data["loss_mask"] = torch.zeros_like(data["loss_mask"])
    options = {"target": network, "corruption": 0.5, "pad_canvas": True}
    found = module(block_length, **options).loss(data)
    found.total.backward()
    assert found.count == 0 and float(found.total.detach()) == 0
    assert float(found.metrics["surprise"]) == 0


@pytest.mark.parametrize("divergence", [None, Certainty(CrossEntropy())])
def test_a_short_training_lowers_the_loss(
    module: Callable[..., MaskedDiffusionModule], divergence: Divergence | None
) -> None:
    trained, data = module(divergence=divergence), batch(8)
    data["input_ids"] = (data["positions"] * 2 + torch.arange(8)[:, None]) % MASK
    optimizer = torch.optim.Adam(trained.model.parameters(), 0.01)
    losses = []
    for step in range(60):
        trained.on_train_batch_start(data, step)
        found = trained.loss(data)
        optimizer.zero_grad()
        (found.total / found.count).backward()
        optimizer.step()
        losses.append(float(found.total.detach() / found.count))
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_a_fresh_model_takes_the_mask_token_of_the_data(
    module: Callable[..., MaskedDiffusionModule],
) -> None:
    trained = module(target=lambda: network(mask_id=MASK))
    assert trained.model.form == MaskedForm(MASK) == trained.target.form
    assert trained.drafter().model is trained.model
