"""The causal layer on a masked trunk: what it sees, where it starts, and how it is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from specstream.drafters.self_speculative import holds_head, load_head, save_head
from specstream.models import SelfSpeculativeHead
from specstream.models.fingerprint import fingerprint
from specstream.models.pretrained_masked import UntrainedMaskedLM
from specstream.models.self_speculative import relative_cost

WORDS, MASK = 11, 10


def small_trunk(seed: int = 0, **options: object) -> UntrainedMaskedLM:
    sizes = {"num_kv_heads": 1, "max_positions": 32, "mask_id": MASK, "seed": seed} | options
    lm = UntrainedMaskedLM(WORDS, 16, 24, 2, 2, **sizes)  # type: ignore[arg-type]
    return lm.eval().requires_grad_(False)


@torch.no_grad()
def stirred(head: SelfSpeculativeHead, amount: float = 0.3, seed: int = 1) -> SelfSpeculativeHead:
    """As if trained: no weight is zero."""
    noise = torch.Generator().manual_seed(seed)
    for weight in head.parameters():
        weight.add_(torch.randn(weight.shape, generator=noise) * amount)
    return head.eval().requires_grad_(False)


def canvas(rows: int = 2, length: int = 9) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return states, an order of five positions, tokens, and which are real."""
    order = torch.stack([torch.randperm(length)[:5] for _ in range(rows)])
    real = torch.ones(rows, 5, dtype=torch.bool)
    return torch.randn(rows, length, 16), order, torch.randint(MASK, (rows, 5)), real


def test_a_state_depends_on_the_tokens_before_it_alone() -> None:
    head = stirred(SelfSpeculativeHead(small_trunk()))
    hidden, order, tokens, real = canvas()
    before = head(hidden, order, tokens, real)
    for i in range(5):
        changed = tokens.clone()
        changed[:, i] = (changed[:, i] + 1) % MASK
        moved = (head(hidden, order, changed, real) - before).abs().amax((0, 2)) > 1e-4
        assert not moved[: i + 1].any() and moved[i + 1 :].all()


def test_a_state_depends_on_the_states_and_places_up_to_its_own() -> None:
    head = stirred(SelfSpeculativeHead(small_trunk()))
    hidden, order, tokens, real = canvas(1)
    before = head(hidden, order, tokens, real)
    for i in range(5):
        changed = hidden.clone()
        changed[0, order[0, i]] += 1.0
        moved = (head(changed, order, tokens, real) - before).abs().amax((0, 2)) > 1e-4
        assert not moved[:i].any() and moved[i:].all()
    other = order.clone()
    other[0, 3] = next(place for place in range(9) if place not in order[0].tolist())
    same = hidden.clone()
    same[0, other[0, 3]] = hidden[0, order[0, 3]]  # only the place differs
    moved = (head(same, other, tokens, real) - before).abs().amax((0, 2)) > 1e-4
    assert not moved[:3].any() and moved[3:].all()


def test_places_are_told_by_their_differences() -> None:
    """A token one place away is met alike wherever it stands: a text may begin anywhere."""
    head = stirred(SelfSpeculativeHead(small_trunk()))
    states, places = torch.randn(1, 3, 16), torch.tensor([[1, 4, 2]])
    tokens = torch.tensor([[3, 5, 7]])
    before = head.read(states, places, tokens)
    torch.testing.assert_close(head.read(states, places + 900, tokens), before, atol=1e-4, rtol=0)
    moved = (head.read(states, places + torch.tensor([2, 0, 0]), tokens) - before).abs()
    assert (moved.amax(2) > 1e-4).tolist() == [[False, True, True]]  # the first token, elsewhere


def test_it_starts_as_the_trunk() -> None:
    head = SelfSpeculativeHead(small_trunk())
    hidden, order, tokens, real = canvas()
    states = head(hidden, order, tokens, real)
    assert torch.equal(states, hidden.gather(1, order[:, :, None].expand(-1, -1, 16)))
    assert torch.equal(head.answer.weight, SelfSpeculativeHead(small_trunk()).answer.weight)
    assert not torch.equal(head.answer.weight, SelfSpeculativeHead(small_trunk(), 1).answer.weight)


def test_padding_may_be_anything_and_changes_nothing() -> None:
    head = stirred(SelfSpeculativeHead(small_trunk()))
    hidden, order, tokens, real = canvas()
    real[1, 3:] = False
    order[1, 3:], tokens[1, 3:] = -7, 10_000
    states = head(hidden, order, tokens, real)
    alone = head(hidden[1:], order[1:, :3], tokens[1:, :3], real[1:, :3])
    torch.testing.assert_close(states[1, :3], alone[0])
    assert states.isfinite().all()


def test_it_holds_weights_of_its_own_only() -> None:
    trunk = small_trunk()
    head = SelfSpeculativeHead(trunk)
    shared = {id(p) for p in trunk.parameters()}
    assert not shared & {id(p) for p in head.parameters()}
    assert not any("decoder" in name for name in head.state_dict())
    matrices = 16 * 16 * 3 + 16 * 16 * 2 + 2 * (2 * 16 * 8) + 3 * 16 * 24  # two streams of keys
    projection = WORDS * 16
    full = 2 * (16 * 16 * 2 + 2 * 16 * 8 + 3 * 16 * 24) + projection
    assert relative_cost(trunk, head) == (matrices + projection) / full


@pytest.mark.parametrize(
    ("trunk", "said"),
    [
        (lambda: small_trunk(block_length=4), "bidirectional trunk, not one of blocks of 4"),
        (lambda: torch.nn.Linear(2, 2), "a masked language model, not on Linear"),
    ],
)
def test_other_trunks_are_refused(trunk, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SelfSpeculativeHead(trunk())


def kept(folder: Path, trunk: UntrainedMaskedLM) -> SelfSpeculativeHead:
    head = stirred(SelfSpeculativeHead(trunk).to(torch.bfloat16)).float()
    save_head(folder, head, "the/trunk", fingerprint(trunk.model))
    return head


def test_a_saved_head_is_loaded_again(tmp_path: Path) -> None:
    trunk = small_trunk()
    head, folder = kept(tmp_path / "draft", trunk), tmp_path / "draft"
    loaded = load_head(folder, trunk)
    assert all(torch.equal(w, head.state_dict()[n]) for n, w in loaded.state_dict().items())
    assert not any(p.requires_grad for p in loaded.parameters()) and not loaded.training
    arguments = canvas()
    assert torch.equal(loaded(*arguments), head(*arguments))
    assert holds_head(folder)
    assert sorted(f.name for f in folder.iterdir()) == [
        "self_speculative.safetensors",
        "specstream.json",
    ]


def test_a_head_of_another_trunk_is_refused_in_one_line(tmp_path: Path) -> None:
    kept(tmp_path / "draft", small_trunk())
    with pytest.raises(ValueError, match="was trained on the trunk 'the/trunk'") as error:
        load_head(tmp_path / "draft", small_trunk(seed=1))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"class_path": "specstream.drafters.Medusa"}, "holds specstream.drafters.Medusa, not a"),
        ({"init_args": {"depth": 2}}, "option 'depth' is not accepted"),
    ],
)
def test_another_record_is_refused_in_one_line(tmp_path: Path, change: dict, said: str) -> None:
    trunk, folder = small_trunk(), tmp_path / "draft"
    kept(folder, trunk)
    record = json.loads((folder / "specstream.json").read_text())
    record["drafter"] |= change
    (folder / "specstream.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=said):
        load_head(folder, trunk)


def test_damaged_weights_are_refused_in_one_line(tmp_path: Path) -> None:
    trunk, folder = small_trunk(), tmp_path / "draft"
    kept(folder, trunk)
    (folder / "self_speculative.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot read"):
        load_head(folder, trunk)
