"""Masked language models see what their mask says, in training, with a cache and without."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from specstream.models import UntrainedLM
from specstream.models.pretrained_masked import (
    MaskedForm,
    MaskedFromCausal,
    PretrainedMaskedLM,
    UntrainedMaskedLM,
    block_mask,
    noised_and_clean_mask,
)

VOCABULARY, MASK, BLOCK = 13, 12, 4
ARCHITECTURES = ["llama", "qwen3"]


def network(
    block_length: int | None = None,
    architecture: str = "llama",
    attention: str = "sdpa",
    shifted: bool = False,
) -> PretrainedMaskedLM:
    """Return a small model whose weights are large enough for every context to count."""
    lm = UntrainedMaskedLM(
        VOCABULARY, 16, 24, 2, 4, 2, 64, architecture=architecture, attn_implementation=attention,
        block_length=block_length, mask_id=MASK,
    )  # fmt: skip
    with torch.no_grad():
        for weight in lm.parameters():
            if weight.ndim > 1:
                weight.mul_(15)
    return PretrainedMaskedLM.of(lm.model, MaskedForm(MASK, block_length, shifted)).eval()


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Return tokens other than the mask."""
    return torch.randint(MASK, shape, generator=torch.Generator().manual_seed(seed))


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def reach(lm: PretrainedMaskedLM, length: int) -> Tensor:
    """Return (T, T) bool: whether the logits at i change with the token at j."""
    tokens = drawn(1, length)
    others = tokens.repeat(length, 1)
    others += torch.eye(length, dtype=torch.long) * torch.where(tokens < MASK - 1, 1, -1)
    differences = (lm(others) - lm(tokens)).abs().amax(-1)  # (changed, T)
    return (differences > 1e-4).T


@torch.no_grad()
def test_every_position_of_a_bidirectional_model_sees_every_other() -> None:
    assert reach(network(), 9).all()


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_position_of_a_block_model_sees_its_block_and_earlier_ones(architecture: str) -> None:
    blocks = torch.arange(10) // BLOCK
    expected = blocks[:, None] >= blocks
    assert torch.equal(reach(network(BLOCK, architecture), 10), expected)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("block_length", [None, BLOCK])
def test_padding_changes_nothing(block_length: int | None, attention: str) -> None:
    lm = network(block_length, attention=attention)
    tokens, lengths = drawn(3, 11), torch.tensor([11, 6, 1])
    padded = tokens.clone()
    padded[torch.arange(11) >= lengths[:, None]] = MASK
    found, expected = lm(padded, lengths), lm(tokens, lengths)
    assert found.isfinite().all()
    for row, length in enumerate(lengths.tolist()):
        same(found[row, :length], expected[row, :length])
        same(found[row, :length], lm(tokens[row : row + 1, :length])[0])


@torch.no_grad()
def test_both_attentions_read_the_same_mask() -> None:
    tokens = drawn(2, 9)
    same(network(BLOCK, attention="eager")(tokens), network(BLOCK)(tokens))


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_blocks_over_the_cache_are_the_pass_without_one(architecture: str, attention: str) -> None:
    lm = network(BLOCK, architecture, attention)
    lengths = torch.tensor([14, 9, 16])  # two rows end within a block
    canvas, final = torch.full((3, 16), MASK), drawn(3, 16)
    cache, view = lm.new_cache(3, 24), 20
    visits = [(0, 0, 0), (0, 0, 0), (4, 0, 4), (4, 4, 8), (8, 4, 8), (12, 8, 12), (12, 8, 12)]
    noise = torch.Generator().manual_seed(1)
    for starts in torch.tensor(visits):  # (B,): rows move on and read again at their own pace
        slots = starts[:, None] + torch.arange(BLOCK)
        filled = torch.rand(slots.shape, generator=noise) < 0.5
        chosen = torch.where(filled, final.gather(1, slots), canvas.gather(1, slots))
        canvas = canvas.scatter(1, slots, chosen)
        found = lm.extend(chosen, starts, lengths, cache, view)
        expected = lm(canvas, lengths).gather(1, slots[..., None].expand(-1, -1, VOCABULARY))
        real = slots < lengths[:, None]
        same(found[real], expected[real])
    assert (canvas != MASK).any() and (canvas == MASK).any()


@torch.no_grad()
def test_a_block_read_again_leaves_nothing_of_its_first_tokens() -> None:
    lm = network(BLOCK, "qwen3")
    tokens, starts, lengths = drawn(2, 8), torch.tensor([0, 0]), torch.tensor([8, 8])
    cache = lm.new_cache(2, 8)
    masked = lm.extend(torch.full((2, 4), MASK), starts, lengths, cache, 8)
    again = lm.extend(tokens[:, :4], starts, lengths, cache, 8)
    assert not torch.allclose(masked, again)
    found = lm.extend(tokens[:, 4:], starts + 4, lengths, cache, 8)
    same(torch.cat([again, found], 1), lm(tokens))


@torch.no_grad()
def test_several_blocks_in_one_pass_are_one_after_the_other() -> None:
    lm = network(BLOCK)
    tokens, lengths = drawn(2, 20), torch.tensor([20, 16])
    cache = lm.new_cache(2, 20)
    first = lm.extend(tokens[:, :8], torch.tensor([0, 0]), lengths, cache, 20)
    slots = torch.tensor([[8], [4]]) + torch.arange(12)
    found = lm.extend(tokens.gather(1, slots), slots[:, 0], lengths, cache, 20)
    expected = lm(tokens, lengths)
    same(first, expected[:, :8])
    same(found, expected.gather(1, slots[..., None].expand(-1, -1, VOCABULARY)))


@torch.no_grad()
def test_slots_beyond_the_context_may_be_padding() -> None:
    lm = network(BLOCK)
    tokens, cache = drawn(1, 68), lm.new_cache(1, 68)
    lm.extend(tokens[:, :60], torch.tensor([0]), torch.tensor([62]), cache, 68)
    found = lm.extend(tokens[:, 60:], torch.tensor([60]), torch.tensor([62]), cache, 68)
    same(found[:, :2], lm(tokens[:, :62])[:, 60:])


def test_a_bidirectional_model_has_no_cache_that_stays_valid() -> None:
    lm, start = network(), torch.tensor([0])
    with pytest.raises(AssertionError, match="no keys that stay valid"):
        lm.extend(drawn(1, 4), start, start + 4, lm.new_cache(1, 4), 4)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_pass_of_training_is_the_pass_of_decoding(architecture: str) -> None:
    lm = network(BLOCK, architecture)
    lengths = (10, 7)  # two documents in a row, and two slots of padding
    clean, noised = drawn(1, 19), drawn(1, 19)
    noised[torch.rand(1, 19, generator=torch.Generator().manual_seed(2)) < 0.6] = MASK
    documents = torch.tensor([[0] * 10 + [1] * 7 + [-1] * 2])
    positions = torch.cat([torch.arange(n) for n in (*lengths, 2)])[None]
    mask = noised_and_clean_mask(documents, positions, BLOCK)
    assert mask.shape == (1, 1, 38, 38)
    states = lm.hidden(torch.cat([noised, clean], 1), mask, positions.repeat(1, 2))
    assert states.isfinite().all()
    for offset, length in zip((0, 10), lengths, strict=True):
        own = slice(offset, offset + length)
        for start in range(0, length, BLOCK):
            stop = min(start + BLOCK, length)
            seen = torch.cat([clean[:, own][:, :start], noised[:, own][:, start:stop]], 1)
            steps = torch.arange(stop)[None]
            alone = lm.hidden(seen, block_mask(torch.zeros_like(seen), steps, BLOCK), steps)
            same(states[:, offset + start : offset + stop], alone[:, start:])
        same(lm.head(states[:, 19:][:, own]), lm(clean[:, own]))  # the clean half is a plain text


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mask_token_has_probability_zero(dtype: torch.dtype) -> None:
    lm = network(BLOCK)
    lm.to(dtype)
    with torch.no_grad():
        lm.model.get_output_embeddings().weight[MASK] = 100  # it would win everywhere
    tokens = torch.full((1, 4), MASK)
    start = torch.tensor([0])
    for logits in (lm(tokens), lm.extend(tokens, start, start + 4, lm.new_cache(1, 4), 4)):
        probs = logits.float().softmax(-1)
        assert (probs[..., MASK] == 0).all()
        torch.testing.assert_close(probs.sum(-1), torch.ones(1, 4))


@torch.no_grad()
@pytest.mark.parametrize(("block_length", "shifted"), [(None, False), (None, True), (BLOCK, False)])
def test_documents_in_one_row_do_not_see_each_other(
    block_length: int | None, shifted: bool
) -> None:
    lm = network(block_length, shifted=shifted)
    first, second, padding = drawn(1, 6), drawn(1, 9, seed=1), torch.full((1, 2), MASK)
    packed = torch.cat([first, second, padding], 1)
    documents = torch.tensor([[0] * 6 + [1] * 9 + [-1] * 2])
    positions = torch.cat([torch.arange(6), torch.arange(9), torch.arange(2)])[None]
    found = lm.head(lm.hidden(packed, lm.mask(documents, positions), positions))
    same(found[:, :6], lm(first))
    same(found[:, 6:15], lm(second))


@torch.no_grad()
def test_the_output_of_a_shifted_model_is_the_one_before() -> None:
    plain, shifted = network(), network(shifted=True)
    tokens = drawn(2, 7)
    same(shifted(tokens)[:, 1:], plain(tokens)[:, :-1])
    same(shifted(tokens)[:, 0], plain(tokens)[:, 0])  # nothing before it: its own, as Dream does


@pytest.mark.parametrize("block_length", [None, BLOCK])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_saved_folder_says_how_it_is_meant(
    tmp_path: Path, block_length: int | None, architecture: str
) -> None:
    lm = network(block_length, architecture)
    lm.form = replace(lm.form, corruption=0.25)
    for weight in lm.parameters():  # the folder is in bfloat16
        weight.data = weight.data.to(torch.bfloat16).float()
    lm.save(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    form = {"mask_id": MASK, "block_length": block_length, "shifted": False, "corruption": 0.25}
    assert config["masked_diffusion"] == form
    loaded = PretrainedMaskedLM(str(tmp_path / "a"), dtype="float32")
    assert loaded.form == lm.form
    torch.testing.assert_close(loaded(drawn(2, 9)), lm(drawn(2, 9)), rtol=0, atol=0)
    loaded.save(tmp_path / "b")
    assert PretrainedMaskedLM(str(tmp_path / "b"), dtype="float32").form == lm.form


def test_a_folder_from_before_corruption_was_written_has_none(tmp_path: Path) -> None:
    network().save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["masked_diffusion"]["corruption"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert PretrainedMaskedLM(str(tmp_path)).form == MaskedForm(MASK)


def test_a_causal_model_is_the_beginning_of_a_masked_one(tmp_path: Path) -> None:
    causal = UntrainedLM(VOCABULARY, 16, 24, 1, 2)
    causal.save(tmp_path)
    lm = MaskedFromCausal(str(tmp_path), shifted=True)
    assert lm.form == MaskedForm(None, None, True) and lm.dtype == torch.float32
    for name, weight in causal.named_parameters():
        expected = weight.data.to(torch.bfloat16).float()
        torch.testing.assert_close(lm.get_parameter(name).data, expected, rtol=0, atol=0)


def test_forms_and_layers_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="block_length must be at least 1, not 0"):
        MaskedForm(1, 0)
    with pytest.raises(ValueError, match="a block model cannot be shifted"):
        MaskedForm(1, BLOCK, shifted=True)
    with pytest.raises(ValueError, match="mask_id must not be negative, got -1"):
        MaskedForm(-1)
    with pytest.raises(ValueError, match=r"corruption must be in \[0, 1\), got 1.5"):
        MaskedForm(1, corruption=1.5)
    with pytest.raises(ValueError, match="has full attention only, not sliding_attention"):
        UntrainedMaskedLM(
            VOCABULARY, 16, 24, 1, 2, architecture="gemma2", attn_implementation="eager"
        )


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"architecture": "bert"}, "'bert' does not work with a static key-value cache"),
        ({"num_kv_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
    ],
)
def test_a_network_that_cannot_be_masked_is_refused_in_one_line(
    options: dict[str, object], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        UntrainedMaskedLM(16, 32, 48, 1, 4, max_positions=32, mask_id=1, **options)  # type: ignore[arg-type]
