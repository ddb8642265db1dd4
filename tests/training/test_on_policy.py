"""Which documents are rewritten, with what, and what is scored then."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import NoReturn

import pytest
import torch

from specstream.structures import Completion
from specstream.training.on_policy import OnPolicy, Slot, find_slots, rewrite


class Writer:
    """Continues every prompt with 90, 91, ... and remembers what it was asked."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.prompts: list[list[int]] = []

    def complete(self, prompts: Sequence[list[int]], seed: int) -> list[Completion]:
        self.prompts = list(prompts)
        tokens = list(range(90, 90 + self.length))
        return [Completion(i, "", tokens, []) for i in range(len(prompts))]


def batch() -> dict[str, torch.Tensor]:
    """One row: a prompted document of 6, a raw one of 4, two tokens of padding."""
    return {
        "input_ids": torch.tensor([[1, 2, 3, 4, 5, 6, 11, 12, 13, 14, 0, 0]]),
        "loss_mask": torch.tensor([[0, 0, 0, 1, 1, 1, 0, 1, 1, 1, 0, 0]]).bool(),
        "positions": torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 0, 0]]),
        "documents": torch.tensor([[0, 0, 0, 0, 0, 0, 1, 1, 1, 1, -1, -1]]),
    }


def test_prompts_end_where_scoring_begins_and_raw_text_gives_half() -> None:
    assert find_slots(batch(), 8) == [Slot(0, 0, 3, 3), Slot(0, 6, 2, 2)]
    assert [slot.room for slot in find_slots(batch(), 1)] == [1, 1]


def test_only_the_written_tokens_are_scored() -> None:
    writer = Writer(2)
    new = rewrite(batch(), writer, find_slots(batch(), 8), seed=0)  # type: ignore[arg-type]
    assert writer.prompts == [[1, 2, 3], [11, 12]]
    assert new["input_ids"][0, :5].tolist() == [1, 2, 3, 90, 91]
    assert new["loss_mask"][0].nonzero().flatten().tolist() == [3, 4, 8, 9]
    assert new["documents"][0].tolist() == [0, 0, 0, 0, 0, -1, 1, 1, 1, 1, -1, -1]
    assert new["positions"][0].tolist() == [0, 1, 2, 3, 4, 0, 0, 1, 2, 3, 0, 0]


def test_a_completion_never_leaves_its_room() -> None:
    new = rewrite(batch(), Writer(9), find_slots(batch(), 8), seed=0)  # type: ignore[arg-type]
    assert new["input_ids"][0].tolist() == [1, 2, 3, 90, 91, 92, 11, 12, 90, 91, 0, 0]
    assert torch.equal(new["documents"], batch()["documents"])


def test_the_choice_of_batches_is_fixed_and_near_the_fraction() -> None:
    policy = OnPolicy(fraction=0.3)
    chosen = [policy.chooses(0, 1, i) for i in range(2000)]
    assert chosen == [policy.chooses(0, 1, i) for i in range(2000)]
    assert chosen != [policy.chooses(0, 2, i) for i in range(2000)]
    assert chosen != [policy.chooses(1, 1, i) for i in range(2000)]
    assert sum(chosen) / 2000 == pytest.approx(0.3, abs=0.03)
    assert not any(OnPolicy(fraction=0).chooses(0, 0, i) for i in range(100))
    assert all(OnPolicy(fraction=1).chooses(0, 0, i) for i in range(100))


@pytest.mark.parametrize(
    "options", [{"fraction": 1.5}, {"source": "teacher"}, {"max_new_tokens": 0}]
)
def test_wrong_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError):
        OnPolicy(**options)  # type: ignore[arg-type]


def test_drafter_and_target_can_both_write(monkeypatch: pytest.MonkeyPatch) -> None:
    from specstream.drafters import DraftModel
    from specstream.models import UntrainedLM
    from specstream.training import DistillationModule

    def refused(graph: object, inputs: object) -> NoReturn:
        raise RuntimeError("a text is written uncompiled")

    def small(layers: int) -> UntrainedLM:
        return UntrainedLM(100, 16, 32, layers, 2, max_positions=64)

    for source in ("drafter", "target"):
        module = DistillationModule(
            lambda target: DraftModel(target, lambda: small(1)),
            lambda: small(2),
            on_policy_fraction=1.0,
            on_policy_source=source,  # type: ignore[arg-type]
        )
        module.configure_model()
        tokenizer = SimpleNamespace(
            eos_token_id=99, decode=lambda tokens, **options: " ".join(map(str, tokens))
        )
        trainer = SimpleNamespace(
            datamodule=SimpleNamespace(tokenizer=tokenizer), current_epoch=0, global_rank=0
        )
        monkeypatch.setattr(type(module), "trainer", trainer)
        for layer in [*module.target.decoder.layers, *module.drafter.model.decoder.layers]:
            layer.compile(backend=refused)  # as for training steps
        old = batch()
        new = module.on_policy_batch(old, 3)
        again = module.on_policy_batch(old, 3)
        assert torch.equal(new["input_ids"], again["input_ids"])
        module.run_seed = 1
        assert not torch.equal(new["input_ids"], module.on_policy_batch(old, 3)["input_ids"])
        assert torch.equal(new["input_ids"][0, :3], old["input_ids"][0, :3])
        assert not torch.equal(new["input_ids"], old["input_ids"])
        assert module.drafter is not None and module.drafter.training
        with pytest.raises(Exception, match="a text is written uncompiled"):
            module.loss(new)
        with torch.compiler.set_stance("force_eager"):
            assert module.loss(new).total.requires_grad
