"""What a training module builds, what it computes, and what it saves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from specstream.divergences import CrossEntropy, Divergence, ForwardKL, TotalVariation
from specstream.drafters import CutDraftModel, DraftModel, PromptLookup
from specstream.models import UntrainedLM
from specstream.training import DistillationModule, LanguageModelingModule
from specstream.training.base import OPTIMIZED
from specstream.training.language_modeling import check_row_length


def small(layers: int = 2, seed: int = 0, vocabulary: int = 50) -> UntrainedLM:
    return UntrainedLM(vocabulary, 16, 32, layers, 2, max_positions=64, seed=seed)


def module(divergence: Divergence | None = None, **options: Any) -> DistillationModule:
    built = DistillationModule(
        lambda target: DraftModel(target, lambda: small(1, seed=1)),
        small,
        divergence,
        chunk_tokens=5,
        **options,
    )
    built.configure_model()
    return built


def batch(rows: int = 2, length: int = 12) -> dict[str, torch.Tensor]:
    tokens = torch.randint(50, (rows, length))
    mask = torch.ones_like(tokens).bool()
    mask[:, :3] = False
    positions = torch.arange(length).expand(rows, -1)
    return {
        "input_ids": tokens,
        "loss_mask": mask,
        "positions": positions,
        "documents": torch.zeros_like(tokens),
    }


def test_the_loss_is_the_sum_over_scored_positions() -> None:
    trained, data = module(ForwardKL()), batch()
    assert trained.target is not None and isinstance(trained.drafter, DraftModel)
    loss = trained.loss(data)
    mask = data["loss_mask"][:, 1:]
    p = trained.target(data["input_ids"])[:, :-1][mask]
    q = trained.drafter.model(data["input_ids"])[:, :-1][mask]
    torch.testing.assert_close(loss.total, ForwardKL()(p, q, None).sum())
    assert loss.count == mask.sum() == 18


def test_a_drafter_that_is_the_target_has_no_loss() -> None:
    twin = DistillationModule(lambda target: DraftModel(target, small), small, TotalVariation())
    twin.configure_model()
    assert float(twin.loss(batch()).total.detach()) == pytest.approx(0, abs=1e-4)


def test_cross_entropy_runs_no_target(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = module(CrossEntropy())
    assert trained.target is not None
    monkeypatch.setattr(trained.target, "hidden", lambda *a: pytest.fail("the target ran"))
    trained.loss(batch()).total.backward()
    assert all(p.grad is None for p in trained.target.parameters())


def test_validation_also_measures_the_expected_acceptance() -> None:
    trained = module(CrossEntropy()).eval()
    metrics = trained.loss(batch()).metrics
    assert 0 < float(metrics["acceptance_expected"]) / 18 < 1


def test_packed_documents_do_not_see_each_other() -> None:
    trained = module().eval()
    one, other = batch(1, 6), batch(1, 6)
    packed = {
        name: torch.cat([one[name], other[name] + (name == "documents")], 1)
        for name in ("input_ids", "loss_mask", "positions", "documents")
    }
    packed["loss_mask"] = packed["loss_mask"].bool()
    apart = trained.loss(one).total + trained.loss(other).total
    torch.testing.assert_close(trained.loss(packed).total, apart)


def test_only_trained_tensors_are_saved_and_exactly_those_are_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cut = DistillationModule(lambda target: CutDraftModel(target, 1, 0), small)
    cut.configure_model()
    monkeypatch.setattr(DistillationModule, "trainer", SimpleNamespace(callbacks=[]))
    checkpoint: dict[str, Any] = {"state_dict": cut.state_dict()}
    cut.on_save_checkpoint(checkpoint)
    names = set(checkpoint["state_dict"])
    assert names == cut.trained_names()
    assert not any("embed" in name or name.startswith("target.") for name in names)
    cut.on_load_checkpoint(checkpoint)
    del checkpoint["state_dict"][next(iter(names))]
    with pytest.raises(ValueError, match="lacks 1 trained tensors"):
        cut.on_load_checkpoint(checkpoint)
    checkpoint[OPTIMIZED] = {}
    with pytest.raises(ValueError, match="WeightAveraging"):
        cut.on_load_checkpoint(checkpoint)


def test_gradients_are_the_same_with_layers_recomputed() -> None:
    data, gradients = batch(), []
    for recompute in (False, True):
        trained = module(gradient_checkpointing=recompute)
        trained.loss(data).total.backward()
        gradients.append([p.grad for p in trained.parameters() if p.requires_grad])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("drafter", "message"),
    [
        (lambda target: PromptLookup(target), "trains draft language models|no parameters"),
        (lambda target: torch.nn.Linear(1, 1), "must be a Drafter, not Linear"),
        (lambda t: DraftModel(t, lambda: small(vocabulary=60)), "vocabulary of 60"),
    ],
)
def test_what_cannot_be_distilled_is_refused(drafter: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillationModule(drafter, small).configure_model()


def test_a_model_that_is_no_language_model_is_refused() -> None:
    with pytest.raises(ValueError, match="causal language model, not Linear"):
        LanguageModelingModule(lambda: torch.nn.Linear(1, 1)).configure_model()  # type: ignore


def test_data_of_more_tokens_than_the_language_model_has_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trained = LanguageModelingModule(small)
    trained.configure_model()
    data = SimpleNamespace(tokenizer=range(51))
    monkeypatch.setattr(LanguageModelingModule, "trainer", SimpleNamespace(datamodule=data))
    with pytest.raises(ValueError, match="tokenizer has 51 tokens, the model a vocabulary of 50"):
        trained.on_fit_start()


def test_rows_longer_than_a_model_has_positions_are_refused() -> None:
    def rows(length: int) -> SimpleNamespace:
        return SimpleNamespace(layout=SimpleNamespace(sequence_length=length))

    models = {"target": UntrainedLM(50, 16, 32, 1, 2, max_positions=96), "drafter": small(1)}
    check_row_length(rows(64), models)
    with pytest.raises(ValueError, match="sequence_length 65 is longer than the 64 positions of t"):
        check_row_length(rows(65), models)
    with pytest.raises(ValueError, match="the 96 positions of the target"):
        check_row_length(rows(97), models)
