"""Masked drafters: a block model's cache says what a forward without one does, for less."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import specstream.drafters.masked as masked_drafter
from specstream.drafters import MaskedDraftModel
from specstream.drafters.loading import load_canvas_drafter, save_drafter
from specstream.drafters.masked import BlockCache, BlockLook, look_at_block
from specstream.models.pretrained_masked import PretrainedMaskedLM
from specstream.sampling import Noise, Role, Sampling, draw, probabilities
from specstream.structures import Canvas
from specstream.unmasking import EntropyBound, Factor, StaticSchedule, Threshold
from tests.masked_toys import MASK, VOCABULARY, characters, masked_lm

BLOCK = 4
GREEDY = Sampling(temperature=0.0)


def canvases(lengths: list[int], share: float, seed: int = 0) -> Canvas:
    """Return canvases of random tokens of which a share is masked, one at least."""
    noise = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    tokens = torch.randint(3, VOCABULARY, shape, generator=noise)
    real = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    masked = (torch.rand(shape, generator=noise) < share) & real
    masked[:, lengths[0] // 2] |= ~masked.any(1) & real[:, lengths[0] // 2]
    tokens = torch.where(masked, MASK, tokens)
    rows = torch.arange(len(lengths))
    return Canvas(tokens, masked, torch.tensor(lengths), rows, torch.zeros_like(rows))


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Hold every cached look against a forward without a cache; count the looks."""
    looks = []

    def look(
        model: PretrainedMaskedLM,
        tokens: Tensor,
        masked: Tensor,
        lengths: Tensor,
        cache: BlockCache,
    ) -> BlockLook | None:
        found = look_at_block(model, tokens, masked, lengths, cache)
        assert (found is None) == (not masked.any())
        if found is None:
            return None
        rows, columns = found.eligible.nonzero(as_tuple=True)
        about = rows, found.places[rows, columns]
        said, expected = found.logits[rows, columns], model(tokens, lengths)[about]
        torch.testing.assert_close(said, expected, rtol=1e-5, atol=1e-4)
        places = torch.arange(tokens.shape[1])
        lowest = torch.where(masked, places, 10**6).amin(1, keepdim=True) // BLOCK
        asked = masked & (places // BLOCK == lowest)
        assert torch.equal(torch.stack(about), torch.stack(asked.nonzero(as_tuple=True)))
        looks.append(int(asked.any(1).sum()))
        return found

    monkeypatch.setattr(masked_drafter, "look_at_block", look)
    yield looks
    assert looks


def drafter(model: PretrainedMaskedLM, threshold: float = 0.7) -> MaskedDraftModel:
    return MaskedDraftModel(torch.nn.Identity(), lambda: model, Threshold(threshold)).eval()


def reads(model: PretrainedMaskedLM) -> list[int]:
    """Return a list that grows by the number of positions of each pass."""
    widths: list[int] = []
    model.model.base_model.register_forward_pre_hook(
        lambda module, arguments, options: widths.append(options["input_ids"].shape[1]),
        with_kwargs=True,
    )
    return widths


@pytest.mark.parametrize("seed", range(4))
def test_cached_steps_equal_forwards_whatever_happens_to_the_canvas(
    checked: list[int], seed: int
) -> None:
    model = masked_lm(seed, block_length=BLOCK, sharpness=5.0)
    draft_model = drafter(model)
    lengths = [[9, 23, 16, 1], [32, 5, 31, 12], [8, 8, 8, 8], [30, 3, 17, 24]][seed]
    canvas = canvases(lengths, 0.5, seed)
    cache = draft_model.new_cache(*canvas.tokens.shape)
    noise, coins = Noise(seed), torch.Generator().manual_seed(seed)
    real = torch.arange(max(lengths)) < canvas.lengths[:, None]
    for turn in range(12):
        steps = torch.randint(0, 4, (4,), generator=coins).tolist()
        draft = draft_model.propose(canvas, cache, steps, Sampling(), noise)
        stands = draft.drafted & (torch.rand(real.shape, generator=coins) < 0.6)
        canvas.tokens = torch.where(stands, draft.tokens, canvas.tokens)
        canvas.masked = canvas.masked & ~stands
        # The target fills what it likes; at times anything is masked again or overwritten.
        own = canvas.masked & (torch.rand(real.shape, generator=coins) < 0.1)
        if turn % 3 == 2:
            own |= real & (torch.rand(real.shape, generator=coins) < 0.1)
        others = torch.randint(3, VOCABULARY, real.shape, generator=coins)
        canvas.tokens = torch.where(own, others, canvas.tokens)
        canvas.masked = canvas.masked & ~own
        again = real & (torch.rand(real.shape, generator=coins) < (0.15 if turn % 2 else 0.0))
        canvas.tokens = torch.where(again, MASK, canvas.tokens)
        canvas.masked = canvas.masked | again
    assert len(checked) > 12 and min(checked) < 4


def test_a_later_block_is_read_again_after_an_earlier_one_has_changed(checked: list[int]) -> None:
    model = masked_lm(block_length=BLOCK, sharpness=5.0)
    draft_model = drafter(model)
    canvas = canvases([20], 0.0)
    cache = draft_model.new_cache(1, 20)

    def ask(place: int) -> None:
        kept = canvas.tokens.clone()
        canvas.masked[0, place], canvas.tokens[0, place] = True, MASK
        draft_model.propose(canvas, cache, [1], GREEDY, Noise(0))
        canvas.masked[0, place], canvas.tokens = False, kept

    ask(19)  # blocks 0..3 are read
    ask(1)
    canvas.tokens[0, 1] = 3 + (int(canvas.tokens[0, 1]) - 2) % 5  # another token than was read
    ask(18)
    ask(6)
    ask(2)
    ask(13)
    ask(19)
    assert len(checked) == 7


def test_a_step_reads_a_block_or_two_and_not_the_canvas() -> None:
    model = copy.deepcopy(masked_lm(block_length=BLOCK))
    widths = reads(model)
    draft_model = drafter(model, 0.99)
    canvas = canvases([60, 44], 0.0)
    canvas.masked[0, 30:60], canvas.masked[1, 24:44] = True, True
    canvas.tokens = torch.where(canvas.masked, MASK, canvas.tokens)
    cache = draft_model.new_cache(2, 60)
    while bool(canvas.masked.any()):
        draft = draft_model.propose(canvas, cache, [3, 0], GREEDY, Noise(0))
        if not bool(canvas.masked[0].any()):
            draft = draft_model.propose(canvas, cache, [0, 3], GREEDY, Noise(0))
        canvas.tokens, canvas.masked = draft.tokens, canvas.masked & ~draft.drafted
    turn = [i for i, width in enumerate(widths) if width > 2 * BLOCK]
    assert widths[0] == 32  # the prompt, and the block that is asked about
    assert len(turn) == 2  # the second row's prompt, when its turn comes
    assert len(widths) > 12


def test_a_row_that_waits_costs_its_neighbours_no_reading() -> None:
    model = copy.deepcopy(masked_lm(block_length=BLOCK))
    widths = reads(model)
    canvas = canvases([6, 60], 0.0)
    canvas.masked[0, 3:6], canvas.tokens[0, 3:6] = True, MASK
    draft_model = drafter(model)
    cache = draft_model.new_cache(2, 60)
    draft_model.propose(canvas, cache, [2, 2], GREEDY, Noise(0))
    assert max(widths) <= 2 * BLOCK


def test_a_step_draws_and_judges_within_its_block_and_not_over_the_canvas(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = copy.deepcopy(masked_lm(block_length=BLOCK))
    sizes = []

    def watched(probs: Tensor, uniforms: Tensor) -> Tensor:
        sizes.append(probs.shape)
        return draw(probs, uniforms)

    monkeypatch.setattr(masked_drafter, "draw", watched)
    head = model.model.get_output_embeddings()
    head.register_forward_hook(lambda module, arguments, said: sizes.append(said.shape))
    canvas = canvases([60, 44, 9], 0.5)
    draft_model = drafter(model, 1.0)
    draft_model.propose(canvas, draft_model.new_cache(3, 60), [9, 2, 5], GREEDY, Noise(0))
    assert len(sizes) == 18 and set(sizes) == {(3, BLOCK, VOCABULARY)}


@pytest.mark.parametrize("block_length", [None, BLOCK])
def test_a_step_draws_with_the_coins_of_the_canvas_from_the_warped_law(
    block_length: int | None,
) -> None:
    model = masked_lm(block_length=block_length, sharpness=5.0)
    canvas, sampling = canvases([11, 16, 9], 0.8), Sampling(0.7, top_k=3)
    canvas.drawn = torch.tensor([0, 3, 1])
    coins = Noise(1).uniform(canvas.prompts, canvas.elements(), Role.DRAFT)
    logits = model(canvas.tokens, canvas.lengths)
    draft_model = drafter(model, 1e-9)
    cache = draft_model.new_cache(3, 16)
    draft = draft_model.propose(canvas, cache, [1, 1, 1], sampling, Noise(1))
    expected = draw(probabilities(logits, sampling), coins)
    assert draft.drafted.sum() > 6
    assert torch.equal(draft.tokens[draft.drafted], expected[draft.drafted])
    assert not draft.probs[~draft.drafted].any()


@pytest.mark.parametrize("block_length", [None, BLOCK])
def test_a_draft_says_what_it_drew_when_and_from_what(block_length: int | None) -> None:
    model = masked_lm(block_length=block_length, sharpness=5.0)
    canvas = canvases([11, 16, 9], 0.6)
    tokens, masked = canvas.tokens.clone(), canvas.masked.clone()
    draft_model = drafter(model)
    cache = draft_model.new_cache(3, 16)
    draft = draft_model.propose(canvas, cache, [2, 0, 40], Sampling(0.5), Noise(1))
    assert torch.equal(canvas.tokens, tokens) and torch.equal(canvas.masked, masked)
    assert torch.equal(draft.drafted, draft.steps >= 0) and not (draft.drafted & ~masked).any()
    assert torch.equal(draft.tokens[~draft.drafted], tokens[~draft.drafted])
    assert MASK not in draft.tokens[draft.drafted]
    made = draft.steps.amax(1) + 1
    assert made[0] <= 2 and made[1] == 0 and torch.equal(canvas.drawn, made)
    assert torch.equal(draft.drafted[2], masked[2])  # as many steps as it takes
    shown = tokens
    for step in range(int(made.max())):  # the law of its own, on the canvas as it was then
        law = model(shown, canvas.lengths).softmax(-1)
        here = draft.steps == step
        torch.testing.assert_close(draft.probs[here], law[here], rtol=1e-4, atol=1e-4)
        shown = torch.where(here, draft.tokens, shown)


def test_a_greedy_drafter_fills_what_it_is_sure_of_and_not_all() -> None:
    model = masked_lm()
    canvas = canvases([16], 0.9)
    law = model(canvas.tokens, canvas.lengths).softmax(-1).amax(-1)
    threshold = float(law[canvas.masked].median())
    sure = canvas.masked & (law >= threshold)
    draft = drafter(model, threshold).propose(canvas, None, [1], GREEDY, Noise(0))
    assert torch.equal(draft.drafted, sure) and (canvas.masked & ~sure).any() and sure.sum() > 2


def test_a_row_is_drafted_alike_in_every_batch() -> None:
    for block_length in (None, BLOCK):
        draft_model = drafter(masked_lm(block_length=block_length))
        lengths = [11, 16, 9, 3]
        canvas = canvases(lengths, 0.7)
        cache = draft_model.new_cache(4, 16)
        together = draft_model.propose(canvas, cache, [1, 3, 2, 5], Sampling(), Noise(1))
        for row, (length, steps) in enumerate(zip(lengths, [1, 3, 2, 5], strict=True)):
            alone = Canvas(
                canvas.tokens[row : row + 1, :length],
                canvas.masked[row : row + 1, :length],
                canvas.lengths[row : row + 1],
                canvas.prompts[row : row + 1],
                torch.zeros(1, dtype=torch.long),
            )
            cache = draft_model.new_cache(1, length)
            draft = draft_model.propose(alone, cache, [steps], Sampling(), Noise(1))
            assert torch.equal(draft.tokens[0], together.tokens[row, :length])
            assert torch.equal(draft.steps[0], together.steps[row, :length])


def test_a_canvas_beyond_the_drafters_context_gets_no_draft() -> None:
    for block_length in (None, BLOCK):
        draft_model = drafter(masked_lm(block_length=block_length, max_positions=12))
        canvas = canvases([12, 13], 0.7)
        cache = draft_model.new_cache(2, 13)
        draft = draft_model.propose(canvas, cache, [2, 2], GREEDY, Noise(0))
        assert draft.drafted.any(1).tolist() == [True, False] and canvas.drawn.tolist() == [2, 0]


def test_models_that_do_not_fit_together_are_refused_in_one_line() -> None:
    processor = characters()
    for target, reason in (
        (masked_lm(mask_id=2), "mask token is 1, the target's 2"),
        (masked_lm(vocab_size=9), "vocabulary of 8, the target one of 9"),
    ):
        with pytest.raises(ValueError, match=reason) as caught:
            drafter(masked_lm(block_length=BLOCK)).check_target(target, processor)
        assert "\n" not in str(caught.value)
    drafter(masked_lm(block_length=BLOCK)).check_target(masked_lm(1), processor)
    with pytest.raises(ValueError, match="no schedule"):
        MaskedDraftModel(masked_lm(), lambda: masked_lm(), StaticSchedule(4))
    for unmasking in (Factor(1.0), EntropyBound(0.1)):
        assert MaskedDraftModel(masked_lm(), lambda: masked_lm(), unmasking).unmasking == unmasking


def test_a_stored_drafter_keeps_its_rule_and_how_sure_it_is(tmp_path: Path) -> None:
    target = masked_lm(block_length=None)
    drafter = MaskedDraftModel(target, lambda: masked_lm(4, BLOCK), EntropyBound(0.3), 0.25)
    save_drafter(tmp_path, drafter, characters(), "target")
    stored = load_canvas_drafter(tmp_path, target)
    assert isinstance(stored, MaskedDraftModel)
    assert (stored.unmasking, stored.sure) == (EntropyBound(0.3), 0.25)


def test_a_record_without_a_rule_means_the_default_and_a_wrong_one_is_one_line(
    tmp_path: Path,
) -> None:
    target, path = masked_lm(), tmp_path / "specstream.json"
    drafter = MaskedDraftModel(target, lambda: masked_lm(4, BLOCK))
    save_drafter(tmp_path, drafter, characters(), "target")
    record = json.loads(path.read_text())

    def load(unmasking: object) -> MaskedDraftModel:
        arguments = {"model": "."} | ({} if unmasking is None else {"unmasking": unmasking})
        record["drafter"]["init_args"] = arguments
        path.write_text(json.dumps(record))
        loaded = load_canvas_drafter(tmp_path, target)
        assert isinstance(loaded, MaskedDraftModel)
        return loaded

    assert (load(None).unmasking, load(None).sure) == (Threshold(0.9), 0.0)
    wrong: list[object] = ["Threshold", {"class_path": "x"}]
    wrong.append({"class_path": "os.getcwd", "init_args": {}})
    wrong.append({"class_path": "specstream.unmasking.Threshold", "init_args": {"bound": 1}})
    for unmasking in wrong:
        with pytest.raises(ValueError, match=r"specstream\.json' is damaged") as refused:
            load(unmasking)
        assert "\n" not in str(refused.value)
