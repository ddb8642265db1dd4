"""The training-time test of EAGLE-3: what each step reads, and what is summed of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from specstream.data.packing import PackedRows
from specstream.divergences import ForwardKL, acceptance
from specstream.drafters import CutDraftModel, Eagle3
from specstream.models import UntrainedLM
from specstream.models.walk import read
from specstream.training import Eagle3Module
from specstream.training.eagle import count_scored, unroll

VOCABULARY = 20
STEPS = 3


def target() -> UntrainedLM:
    return UntrainedLM(VOCABULARY, 16, 32, 3, 2, 1, max_positions=64)


def module(drafter: dict[str, Any] | None = None, **options: Any) -> Eagle3Module:
    settings: dict[str, Any] = {"num_steps": STEPS, "chunk_tokens": 10} | options
    built = Eagle3Module(lambda lm: Eagle3(lm, **(drafter or {})), target, **settings)
    built.configure_model()
    return built


def parts(trained: Eagle3Module) -> tuple[Eagle3, UntrainedLM]:
    assert isinstance(trained.drafter, Eagle3) and isinstance(trained.target, UntrainedLM)
    return trained.drafter, trained.target


def batch(rows: int = 2, length: int = 12, prompt: int = 5) -> dict[str, Tensor]:
    tokens = torch.randint(VOCABULARY, (rows, length))
    mask = torch.ones_like(tokens).bool()
    mask[:, :prompt] = False
    return {
        "input_ids": tokens,
        "loss_mask": mask,
        "positions": torch.arange(length).expand(rows, -1),
        "documents": torch.zeros_like(tokens),
    }


def packed(*documents: dict[str, Tensor]) -> dict[str, Tensor]:
    """Lay batches of one row side by side, with padding at the end."""
    rows = {name: torch.cat([d[name] for d in documents], 1) for name in documents[0]}
    counts = [torch.full_like(d["documents"], i) for i, d in enumerate(documents)]
    rows["documents"] = torch.cat(counts, 1)
    padding = {"loss_mask": False, "documents": -1}
    return {name: F.pad(row, (0, 2), value=padding.get(name, 0)) for name, row in rows.items()}


@torch.no_grad()
def outputs_of(trained: Eagle3Module, data: dict[str, Tensor]) -> list[Tensor]:
    drafter, lm = parts(trained)
    tokens, positions, documents = (data[n] for n in ("input_ids", "positions", "documents"))
    _, features = read(lm, tokens, positions, documents, drafter.feature_layers)
    return unroll(drafter, tokens, features, positions, documents, STEPS)


@torch.no_grad()
def test_every_step_is_one_more_place_of_a_plain_causal_sequence() -> None:
    """The definition, draft by draft: features up to the base, then the drafter's own outputs."""
    trained, data = module(), batch(1)
    drafter, lm = parts(trained)
    tokens, places = data["input_ids"], data["positions"]
    unrolled = outputs_of(trained, data)
    _, features = read(lm, tokens, places, None, drafter.feature_layers)
    fused = drafter.network.fuse(features)

    def causal(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        keys, values = keys.repeat_interleave(2, 1), values.repeat_interleave(2, 1)
        return F.scaled_dot_product_attention(queries, keys, values, is_causal=True)

    for base in range(places.shape[1] - STEPS):
        stream = fused[:, : base + 1]
        for step in range(STEPS):
            size = stream.shape[1]
            embedded = drafter.embed(tokens[:, 1 : size + 1])
            found = drafter.network(embedded, stream, places[:, :size], causal)[:, -1]
            torch.testing.assert_close(unrolled[step][:, base], found, atol=1e-5, rtol=1e-5)
            stream = torch.cat([stream, found[:, None]], 1)


def test_the_loss_is_the_weighted_divergence_of_each_step_from_the_targets_law() -> None:
    trained, data = module(step_weight=0.7).eval(), batch()
    drafter, lm = parts(trained)
    found = trained.loss(data)
    p = lm(data["input_ids"])
    total, scored = torch.zeros(()), data["loss_mask"]
    for step, output in enumerate(outputs_of(trained, data)):
        ahead = 2 + step
        kept = scored[:, ahead:]
        q = drafter.network.logits(output[:, :-ahead])[kept]
        wanted = p[:, ahead - 1 : -1][kept]
        total = total + 0.7**step * ForwardKL()(wanted, q, None).sum()
        torch.testing.assert_close(
            found.metrics[f"acceptance_{step + 1}"], acceptance(wanted, q).sum()
        )
        agreed = (wanted.argmax(-1) == q.argmax(-1)).sum()
        assert found.metrics[f"agreement_{step + 1}"] == agreed
    torch.testing.assert_close(found.total, total)
    assert found.count == scored.sum() == 14


def test_packed_documents_do_not_see_each_other_and_drafts_end_with_their_document() -> None:
    trained = module().eval()
    # Without a prompt the first tokens of a document have no base, and must not find another's.
    documents = [batch(1, 6, 1), batch(1, 3, 1), batch(1, 7, 3)]
    apart = [trained.loss(document) for document in documents]
    together = trained.loss(packed(*documents))
    assert together.count == sum(loss.count for loss in apart) == 4 + 1 + 4
    torch.testing.assert_close(together.total, torch.stack([a.total for a in apart]).sum())
    for name, value in together.metrics.items():
        torch.testing.assert_close(value, torch.stack([a.metrics[name] for a in apart]).sum())


@pytest.mark.parametrize("option", [{"chunk_tokens": 3}, {"gradient_checkpointing": True}])
def test_what_saves_memory_changes_no_gradient(option: dict[str, Any]) -> None:
    data, gradients = packed(batch(1), batch(1)), []
    for options in ({"chunk_tokens": 1000}, option):
        trained = module(**options)
        trained.loss(data).total.backward()
        gradients.append({n: p.grad for n, p in trained.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.abs().sum() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient)


def test_the_target_and_its_embeddings_are_not_trained() -> None:
    trained = module()
    trained.loss(batch()).total.backward()
    assert all(p.grad is None for p in trained.target.parameters())  # type: ignore[union-attr]
    assert {name.split(".")[2] for name in trained.trained_names()} == {
        "fc", "midlayer", "norm", "lm_head",
    }  # fmt: skip


def reduced_module(monkeypatch: pytest.MonkeyPatch, size: int = 6) -> Eagle3Module:
    """Return a module whose data hold even tokens more often than odd ones."""
    tokens = torch.tensor([[0, 2, 4, 6, 8, 10, 1, 3], [0, 2, 4, 6, 8, 10, 5, 7]]).numpy()
    scored = torch.ones(2, 8, dtype=torch.bool).numpy()
    rows = PackedRows(tokens, scored, tokens)
    trainer = SimpleNamespace(datamodule=SimpleNamespace(rows=lambda split: rows))
    monkeypatch.setattr(Eagle3Module, "trainer", trainer)
    return module({"draft_vocab_size": size})


def test_a_reduced_vocabulary_is_that_of_the_training_data(monkeypatch: pytest.MonkeyPatch) -> None:
    drafter, lm = parts(reduced_module(monkeypatch))
    assert drafter.network.draft_vocabulary.tolist() == [0, 2, 4, 6, 8, 10]
    assert torch.equal(drafter.network.lm_head.weight, lm.head.weight[[0, 2, 4, 6, 8, 10]])


def test_a_checkpoint_of_other_drafted_tokens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = reduced_module(monkeypatch)
    trained.trainer.callbacks = []
    checkpoint: dict[str, Any] = {"state_dict": trained.state_dict()}
    trained.on_save_checkpoint(checkpoint)
    trained.on_load_checkpoint(checkpoint)
    trained.drafter.restrict(torch.arange(VOCABULARY))  # type: ignore[union-attr, operator]
    with pytest.raises(ValueError, match="the checkpoint drafts other tokens"):
        trained.on_load_checkpoint(checkpoint)


def test_only_scored_tokens_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specstream.training.eagle.COUNTED_ROWS", 2)
    tokens = torch.tensor([[1, 2, 2], [3, 3, 1], [4, 1, 1]]).numpy()
    rows = PackedRows(tokens, tokens != 2, tokens)
    assert count_scored(rows, 6).tolist() == [0, 4, 0, 2, 1, 0]


def test_a_reduced_vocabulary_learns_from_the_share_that_it_can_draft(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trained, data = reduced_module(monkeypatch).eval(), batch(1)
    trained.num_steps = 1
    drafter, lm = parts(trained)
    found, kept = trained.loss(data), data["loss_mask"][:, 2:]
    p = lm(data["input_ids"])[:, 1:-1][kept].softmax(-1)[:, drafter.network.draft_vocabulary]
    q = drafter.network.logits(outputs_of(trained, data)[0][:, :-2])[kept].softmax(-1)
    share = p.sum(-1, keepdim=True)
    expected = (p * ((p / share).log() - q.log())).sum()
    torch.testing.assert_close(found.total, expected)
    torch.testing.assert_close(found.metrics["acceptance_1"], torch.minimum(p, q).sum())


def test_a_short_training_lowers_the_loss_of_every_step() -> None:
    torch.manual_seed(1)
    trained, data = module(), batch(4, 16)
    optimizer = torch.optim.AdamW(trained.drafter.parameters(), lr=3e-3)  # type: ignore[union-attr]
    before = trained.eval().loss(data)
    for _ in range(40):
        optimizer.zero_grad()
        loss = trained.train().loss(data)
        assert not loss.metrics, "training computes what it needs alone"
        (loss.total / loss.count).backward()
        optimizer.step()
    after = trained.eval().loss(data)
    assert after.total < 0.7 * before.total
    for step in range(1, STEPS + 1):
        name = f"acceptance_{step}"
        assert after.metrics[name] > before.metrics[name]


def test_a_batch_without_scored_tokens_has_a_loss_of_zero() -> None:
    trained, data = module(), batch(1)
    data["loss_mask"] = torch.zeros_like(data["loss_mask"])
    loss = trained.loss(data)
    assert loss.total == 0 and loss.count == 0
    loss.total.backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"step_weight": 0.0}, r"step_weight must be in \(0, 1\], got 0.0"),
        ({"step_weight": 1.5}, r"step_weight must be in \(0, 1\], got 1.5"),
    ],
)
def test_options_that_train_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(**options)


def test_another_drafter_is_refused() -> None:
    with pytest.raises(ValueError, match="trains Eagle3, not CutDraftModel"):
        Eagle3Module(lambda lm: CutDraftModel(lm), target).configure_model()
