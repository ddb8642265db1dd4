"""What block training samples, computes and saves."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from specstream.cli import train
from specstream.divergences import (
    CrossEntropy,
    Divergence,
    DPace,
    EndToEndTV,
    ForwardKL,
    NegativeLogAcceptance,
    acceptance,
)
from specstream.drafters import BlockDrafter, DraftModel
from specstream.drafters.loading import load_drafter
from specstream.models import UntrainedLM
from specstream.models.walk import read
from specstream.sampling import Noise
from specstream.training import AcceptedLengthWeights, BlockModule, ExponentialDecay
from specstream.training.block import block_metrics, sample_blocks
from tests.training.conftest import OPTIMIZER, small_model

SIZE = 4
VOCABULARY = 50


def small(seed: int = 0) -> UntrainedLM:
    return UntrainedLM(VOCABULARY, 16, 32, 3, 2, max_positions=64, seed=seed)


def module(
    divergence: Divergence | None = None, heads: dict[str, Any] | None = None, **options: Any
) -> BlockModule:
    built = BlockModule(
        lambda target: BlockDrafter(target, SIZE, **(heads or {})),
        small,
        divergence,
        **{"chunk_tokens": 7, "num_anchors": 5} | options,
    )
    built.configure_model()
    return built


def batch(rows: int = 2, length: int = 14, seed: int = 1) -> dict[str, torch.Tensor]:
    """Return rows of one document each, all but the first three tokens scored."""
    noise = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (rows, length), generator=noise)
    mask = torch.ones_like(tokens).bool()
    mask[:, :3] = False
    return {
        "input_ids": tokens,
        "loss_mask": mask,
        "positions": torch.arange(length).expand(rows, -1),
        "documents": torch.zeros_like(tokens),
    }


def side_by_side(*parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Pack batches of one document a row behind each other."""
    packed = {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}
    packed["documents"] = torch.cat([parts[i]["documents"] + i for i in range(len(parts))], 1)
    return packed


def test_blocks_start_where_the_next_token_is_scored_and_end_with_the_run() -> None:
    data = side_by_side(batch(3, 9, 1), batch(3, 9, 2))
    data["loss_mask"][:, 7] = False  # a gap
    blocks = sample_blocks(data, 100, SIZE, Noise(0))
    anchors, count = blocks.anchors, blocks.inside.sum(2)
    real = count > 0
    assert [sorted(anchors[i][real[i]].tolist()) for i in range(3)] == [
        [2, 3, 4, 5, 7, 11, 12, 13, 14, 15, 16]
    ] * 3
    expected = {2: 4, 3: 3, 4: 2, 5: 1, 7: 1, 11: 4, 12: 4, 13: 4, 14: 3, 15: 2, 16: 1}
    for place, found in zip(anchors[real].tolist(), count[real].tolist(), strict=True):
        assert found == expected[place]


def test_blocks_of_a_row_depend_on_the_row_the_epoch_and_the_seed_alone() -> None:
    data = batch(6)
    whole = sample_blocks(data, 3, SIZE, Noise(5))
    part = sample_blocks({name: value[4:] for name, value in data.items()}, 3, SIZE, Noise(5))
    assert torch.equal(whole.anchors[4:], part.anchors) and torch.equal(
        whole.inside[4:], part.inside
    )
    assert not torch.equal(whole.anchors, sample_blocks(data, 3, SIZE, Noise(6)).anchors)
    assert len({tuple(sorted(row)) for row in whole.anchors.tolist()}) > 1
    trained = module()
    trained.run_seed = 1
    one = trained.loss(data).total
    assert torch.equal(one, trained.loss(data).total)
    trained.run_seed = 2
    assert not torch.equal(one, trained.loss(data).total)


def test_the_loss_is_that_of_each_block_alone() -> None:
    """One block after the other, each with its own text only: no packing, no other blocks."""
    heads = {"markov_rank": 3, "confidence": True}
    trained = module(ForwardKL(), heads, num_anchors=100, confidence_weight=0.5)
    drafter, target = trained.drafter, trained.target
    assert isinstance(drafter, BlockDrafter) and target is not None
    torch.nn.init.normal_(drafter.markov.bias.weight)
    torch.nn.init.normal_(drafter.confidence.proj.weight)
    parts = batch(1, 8, 1), batch(1, 7, 2)
    found = trained.loss(side_by_side(*parts))
    total, count = torch.zeros(()), 0
    for part in parts:
        tokens, length = part["input_ids"], part["input_ids"].shape[1]
        hidden, _ = read(target, tokens, part["positions"], None, [0])
        p = target.head(hidden)[0]
        for anchor in range(2, length - 1):
            before = tokens[:, :anchor]  # the features of the anchor itself are not known
            places = part["positions"][:, :anchor]
            _, features = read(target, before, places, None, drafter.feature_layers)
            context = drafter.network.inject(features, places)
            states = drafter.states(
                tokens[:, [anchor]],
                torch.tensor([[anchor]]),
                context,
                torch.ones(1, 1, anchor, dtype=torch.bool),
            )[0, 0]
            num = min(SIZE, length - 1 - anchor)
            previous = drafter.markov.embed(tokens[0, anchor : anchor + num])
            states = torch.cat([states[:num], previous], 1)
            q, laws = drafter.logits(states), p[anchor : anchor + num]
            weights = (-torch.arange(num) / 4.0).exp()
            total = total + (weights * ForwardKL()(laws, q, None)).sum()
            surprise = torch.nn.functional.binary_cross_entropy_with_logits(
                drafter.confidence(states), acceptance(laws, q).detach(), reduction="sum"
            )
            total, count = total + 0.5 * surprise, count + num
    assert found.count == count
    torch.testing.assert_close(found.total, total)
    for loss in (found.total, total):
        loss.backward(inputs=list(drafter.parameters()))


def test_gradients_reach_the_drafter_and_not_the_target() -> None:
    trained = module(heads={"markov_rank": 3, "confidence": True})
    trained.loss(batch()).total.backward()
    assert all(p.grad is None for p in trained.target.parameters())
    missing = [name for name, p in trained.drafter.named_parameters() if p.grad is None]
    assert not missing
    assert trained.trained_names() == {
        f"drafter.{n}" for n, _ in trained.drafter.named_parameters()
    }


def test_near_positions_weigh_more_and_what_is_not_scored_nothing() -> None:
    accepted = torch.tensor([[0.5, 0.8, 0.2], [0.4, 0.0, 0.0]])
    inside = torch.tensor([[True, True, True], [True, False, False]])
    decayed = ExponentialDecay(2.0)(accepted, inside)
    expected = torch.tensor([[1.0, 0.6065, 0.3679], [1.0, 0, 0]])
    torch.testing.assert_close(decayed, expected, atol=1e-4, rtol=0)
    lengths = AcceptedLengthWeights(0.0)(accepted, inside)
    torch.testing.assert_close(
        lengths, torch.tensor([[0.5 + 0.4 + 0.08, 0.4 + 0.08, 0.08], [0.4, 0, 0]])
    )
    assert AcceptedLengthWeights(1.0)(accepted, inside).tolist() == [[3, 2, 1], [1, 0, 0]]


def test_weights_by_accepted_length_have_the_gradient_of_the_accepted_length() -> None:
    p = torch.randn(1, 1, SIZE, 7)
    q = torch.randn(1, 1, SIZE, 7, requires_grad=True)
    inside = torch.ones(1, 1, SIZE, dtype=torch.bool)
    length = acceptance(p, q).cumprod(-1).sum()
    weights = AcceptedLengthWeights(0.0)(acceptance(p, q).detach(), inside)
    loss = (weights * NegativeLogAcceptance()(p, q, None)).sum()
    (expected,) = torch.autograd.grad(-length, q)
    (found,) = torch.autograd.grad(loss, q)
    torch.testing.assert_close(found, expected)


def test_metrics_are_means_over_the_blocks_that_have_the_position() -> None:
    accepted = torch.tensor([[[0.5, 0.8], [0.3, 0.0], [0.0, 0.0]]])
    inside = torch.tensor([[[True, True], [True, False], [False, False]]])
    metrics = block_metrics(accepted, inside)
    values = {name: float(value / inside.sum()) for name, value in metrics.items()}
    assert values["acceptance_1"] == pytest.approx(0.4)
    assert values["acceptance_2"] == pytest.approx(0.8)
    assert values["tau_expected"] == pytest.approx(1 + (0.5 + 0.4 + 0.3) / 2)


@pytest.mark.parametrize("divergence", [ForwardKL(), CrossEntropy()])
def test_a_short_training_lowers_the_loss_and_raises_tau(divergence: Divergence) -> None:
    trained = module(divergence, {"markov_rank": 4, "confidence": True}, num_anchors=8)
    data = batch(4, 16)
    data["input_ids"] = (torch.arange(16) * 3 + torch.arange(4)[:, None]) % VOCABULARY
    if isinstance(divergence, ForwardKL):  # a target that has something to say
        trained.target.model.lm_head.weight.data.mul_(30)
    optimizer = torch.optim.Adam(trained.drafter.parameters(), 0.01)
    losses, taus = [], []
    for _ in range(40):
        found = trained.loss(data)
        optimizer.zero_grad()
        (found.total / found.count).backward()
        optimizer.step()
        losses.append(float(found.total.detach() / found.count))
        taus.append(float(found.metrics["tau_expected"] / found.count))
    assert losses[-1] < 0.7 * losses[0]
    if isinstance(divergence, ForwardKL):
        assert taus[-1] > taus[0] + 0.3


def test_a_batch_without_a_scored_token_has_no_loss() -> None:
    data = batch()
    data["loss_mask"][:] = False
    found = module(heads={"confidence": True}).loss(data)
    found.total.backward()
    assert found.count == 0 and float(found.total.detach()) == 0


def test_what_cannot_be_trained_is_refused() -> None:
    for divergence in (DPace(), EndToEndTV()):
        with pytest.raises(ValueError, match="weighs consecutive places"):
            module(divergence)
    with pytest.raises(ValueError, match="num_anchors must be at least 1, got 0"):
        module(num_anchors=0)
    for weight in (-1.0, math.nan):
        with pytest.raises(ValueError, match=f"confidence_weight must not be .*, got {weight}"):
            module(confidence_weight=weight)
    with pytest.raises(ValueError, match="gamma must be positive"):
        ExponentialDecay(0.0)
    with pytest.raises(ValueError, match=r"smoothing must be in \[0, 1\]"):
        AcceptedLengthWeights(1.1)
    with pytest.raises(ValueError, match="trains a BlockDrafter, not DraftModel"):
        BlockModule(lambda target: DraftModel(target, small), small).configure_model()


def test_a_run_trains_decodes_saves_and_repeats(
    write_config: Callable[..., str], tmp_path: Path
) -> None:
    drafter = {
        "class_path": "specstream.drafters.BlockDrafter",
        "init_args": {"block_size": 4, "markov_rank": 2, "confidence": True},
    }
    model = {
        "class_path": "specstream.training.BlockModule",
        "init_args": {
            "target": small_model(3),
            "drafter": drafter,
            "weights": {"class_path": "specstream.training.AcceptedLengthWeights"},
            "optimizer": OPTIMIZER,
            "decoding": {"num_prompts": 1, "max_new_tokens": 4, "num_drafted": 4},
            "chunk_tokens": 16,
        },
    }
    for name in ("one", "two"):
        assert train(["--config", write_config(name, model)]) == 0
    weights = [tmp_path / name / "draft" / "block.safetensors" for name in ("one", "two")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "one" / "metrics.jsonl").open()]
    names = set().union(*rows)
    assert {"val/tau", "val/tau_expected", "val/acceptance_4", "train/confidence_error"} <= names
    options = small_model(3)["init_args"]
    loaded = load_drafter(tmp_path / "one" / "draft", UntrainedLM(**options))
    assert isinstance(loaded, BlockDrafter) and loaded.markov_rank == 2
