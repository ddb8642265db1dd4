"""Training Medusa heads: what is scored, what is learnt, and the tree that validation measures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric

from specstream.cli import train
from specstream.divergences import Divergence, DPace, EndToEndTV, ForwardKL
from specstream.drafters import DraftModel, Medusa
from specstream.models import UntrainedLM
from specstream.training import MedusaModule

HEADS = 3
WORDS = 30


def small(seed: int = 0) -> UntrainedLM:
    return UntrainedLM(WORDS, 16, 32, 2, 2, max_positions=64, seed=seed)


def module(divergence: Divergence | None = None, **options: Any) -> MedusaModule:
    built = MedusaModule(
        lambda target: Medusa(target, HEADS), small, divergence, chunk_tokens=4, **options
    )
    built.configure_model()
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():  # as if trained: no two heads alike
        for weight in built.drafter.parameters():
            weight.add_(torch.randn(weight.shape, generator=noise) * 0.1)
    return built


def batch(rows: int = 2, length: int = 12) -> dict[str, Tensor]:
    tokens = torch.randint(WORDS, (rows, length))
    mask = torch.ones_like(tokens).bool()
    mask[:, :3] = False
    positions = torch.arange(length).expand(rows, -1)
    return {
        "input_ids": tokens,
        "loss_mask": mask,
        "positions": positions,
        "documents": torch.zeros_like(tokens),
    }


def pairs(data: dict[str, Tensor], ahead: int) -> list[tuple[int, int, int]]:
    """Return (row, place read, place said) of every token that is scored so far ahead."""
    rows, length = data["input_ids"].shape
    return [
        (row, said - ahead, said)
        for row in range(rows)
        for said in range(ahead, length)
        if data["loss_mask"][row, said]
        and data["documents"][row, said] == data["documents"][row, said - ahead]
    ]


def test_head_k_learns_the_token_k_plus_one_places_ahead() -> None:
    trained, data = module(), batch()
    data["loss_mask"][0, 7] = False
    hidden = trained.target.hidden(data["input_ids"])
    total, found = torch.zeros(()), trained.loss(data)
    for k, head in enumerate(trained.drafter.heads, 1):
        value = torch.zeros(())
        for row, read, said in pairs(data, k + 1):
            value = value + cross_entropy(head(hidden[row, read]), data["input_ids"][row, said])
        torch.testing.assert_close(found.metrics[f"head_{k}_loss"], value.detach())
        total = total + 0.8**k * value
    torch.testing.assert_close(found.total, total)
    assert found.count == 17


def test_distilled_heads_learn_the_targets_law_of_the_very_token_that_they_say() -> None:
    trained, data = module(ForwardKL(), head_decay=0.5), batch()
    hidden = trained.target.hidden(data["input_ids"])
    total = torch.zeros(())
    for k, head in enumerate(trained.drafter.heads, 1):
        for row, read, said in pairs(data, k + 1):
            p = trained.target.head(hidden[row, said - 1])[None]
            total = total + 0.5**k * ForwardKL()(p, head(hidden[row, read])[None], None).sum()
    torch.testing.assert_close(trained.loss(data).total, total)


def test_packed_documents_do_not_see_each_other() -> None:
    trained = module().eval()
    one, other = batch(1, 6), batch(1, 9)
    packed = {
        name: torch.cat([one[name], other[name] + (name == "documents")], 1)
        for name in ("input_ids", "loss_mask", "positions", "documents")
    }
    packed["loss_mask"] = packed["loss_mask"].bool()
    whole, parts = trained.loss(packed), [trained.loss(one), trained.loss(other)]
    torch.testing.assert_close(whole.total, parts[0].total + parts[1].total)
    assert whole.count == parts[0].count + parts[1].count
    for name, value in whole.metrics.items():
        torch.testing.assert_close(value, parts[0].metrics[name] + parts[1].metrics[name])


def test_rows_too_short_for_a_head_leave_it_out() -> None:
    trained, data = module(), batch(1, 4)
    loss = trained.loss(data)
    loss.total.backward()
    assert loss.count == 1 and float(loss.metrics["head_3_loss"]) == 0
    assert all(p.grad is not None for p in trained.drafter.parameters())


def test_only_the_heads_are_trained() -> None:
    trained = module()
    trained.loss(batch()).total.backward()
    assert all(p.grad is None for p in trained.target.parameters())
    names = trained.trained_names()
    assert names and all(name.startswith("drafter.heads.") for name in names)
    assert all(p.grad.any() for p in trained.drafter.parameters())


def test_training_lowers_the_loss_of_every_head() -> None:
    trained, data = module(), batch(4, 24)
    optimizer = torch.optim.Adam(trained.drafter.parameters(), lr=0.02)
    before = trained.loss(data).metrics
    for _ in range(40):
        optimizer.zero_grad()
        loss = trained.loss(data)
        (loss.total / loss.count).backward()
        optimizer.step()
    after = trained.loss(data).metrics
    assert all(after[name] < 0.5 * before[name] for name in before)


def test_validation_counts_how_often_each_heads_best_tokens_are_right() -> None:
    trained, data = module().eval(), batch()
    hidden = trained.target.hidden(data["input_ids"])
    metrics = trained.loss(data).metrics
    for k, head in enumerate(trained.drafter.heads, 1):
        for r in (1, 2, 8):
            hits = sum(
                int(data["input_ids"][row, said] in head(hidden[row, read]).topk(r).indices)
                for row, read, said in pairs(data, k + 1)
            )
            assert int(metrics[f"head_{k}_top_{r}"]) == hits


def measured(trained: MedusaModule, tops: list[list[float]]) -> None:
    """Pretend that validation has found these accuracies."""
    for k, head in enumerate(tops, 1):
        for r, top in enumerate(head, 1):
            trained.val_means[f"head_{k}_top_{r}"] = MeanMetric()
            trained.val_means[f"head_{k}_top_{r}"].update(top)


def test_the_measured_tree_has_the_nodes_that_are_likeliest_to_stand() -> None:
    trained = module(tree_nodes=6)
    flat = [0.0] * 5
    measured(trained, [[0.5, 0.8, 0.9, *flat], [0.1, 0.1, 0.1, *flat], [0.1, 0.1, 0.1, *flat]])
    chain = [(0,), (0, 0), (0, 0, 0)]
    assert trained.calibrated_paths(6) == [*chain, (1,), (2,), (1, 0)]


def test_the_measured_tree_survives_a_resumption(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MedusaModule, "trainer", SimpleNamespace(callbacks=[]))
    trained, resumed, fixed = module(tree_nodes=6), module(tree_nodes=6), module()
    trained.drafter.hang([[0], [1], [0, 0]])
    checkpoint: dict[str, Any] = {"state_dict": trained.state_dict()}
    trained.on_save_checkpoint(checkpoint)
    given = fixed.drafter.tree.paths
    for other in (resumed, fixed):
        other.on_load_checkpoint(checkpoint)
    assert resumed.drafter.tree.paths == trained.drafter.tree.paths
    assert fixed.drafter.tree.paths == given, "a tree that is not measured is the config's"


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"head_decay": 0.0}, r"head_decay must be in \(0, 1\], got 0.0"),
        ({"head_decay": 1.1}, r"head_decay must be in \(0, 1\], got 1.1"),
        ({"tree_nodes": 2}, r"tree_nodes must lie in 3..64, got 2"),
        ({"tree_nodes": 65}, r"tree_nodes must lie in 3..64, got 65"),
        ({"divergence": DPace()}, "DPace weighs consecutive places"),
        ({"divergence": EndToEndTV()}, "EndToEndTV weighs consecutive places"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        module(**options)


def test_another_drafter_is_refused() -> None:
    wrong = MedusaModule(lambda target: DraftModel(target, small), small)
    with pytest.raises(ValueError, match="MedusaModule trains Medusa heads, not DraftModel"):
        wrong.configure_model()


def test_heads_are_trained_measured_exported_and_loaded(
    tmp_path: Path, write_config: Callable[..., str], language_model: dict[str, Any]
) -> None:
    from specstream.generation.loading import load_run

    assert train(["--config", write_config("lm", language_model)]) == 0
    arguments = language_model["init_args"]
    model = {
        "class_path": "specstream.training.MedusaModule",
        "init_args": {
            "target": {
                "class_path": "specstream.models.PretrainedLM",
                "init_args": {"path": str(tmp_path / "lm" / "model")},
            },
            "drafter": {
                "class_path": "specstream.drafters.Medusa",
                "init_args": {"num_heads": 2, "num_layers_per_head": 2, "branching": [1, 1]},
            },
            "tree_nodes": 5,
            "optimizer": arguments["optimizer"],
            "schedule": arguments["schedule"],
            "decoding": {"num_prompts": 2, "max_new_tokens": 8, "num_drafted": 2},
            "chunk_tokens": 16,
        },
    }
    assert train(["--config", write_config("medusa", model)]) == 0
    run = tmp_path / "medusa"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (*_, last) = [row for row in rows if "val/tau" in row]
    assert last["val/head_1_top_8"] >= last["val/head_1_top_1"] >= 0
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert losses[-1] < losses[0]
    names = set(torch.load(run / "last.ckpt", weights_only=False)["state_dict"])
    assert names and all(name.startswith("drafter.heads.") for name in names)
    pipeline = load_run(run)
    (completion,) = pipeline.complete(["the draft"], seed=1)
    assert completion.tokens and len(pipeline.drafter.tree) == 5  # type: ignore[attr-defined]
