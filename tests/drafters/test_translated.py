"""A drafter with a tokenizer of its own: what crosses, where it lands, and what never changes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from specstream import verification as rules
from specstream.data import tokenizer as made
from specstream.drafters import MaskedDraftModel, TranslatedDrafter
from specstream.drafters.loading import load_canvas_drafter, save_drafter
from specstream.drafters.translated import PositionMap
from specstream.generation import DualDiffusionPipeline, Sampler
from specstream.generation.batch import Limits
from specstream.generation.canvases import CanvasPrompt, make_canvas
from specstream.generation.lengths import FixedLength
from specstream.generation.masked_loading import build_masked_pipeline
from specstream.models.pretrained_masked import PretrainedMaskedLM
from specstream.processors import TextProcessor
from specstream.sampling import Noise, Sampling
from specstream.structures import Canvas, CanvasDraft
from specstream.unmasking import Factor, StaticSchedule
from tests.masked_toys import Guesser, masked_lm, texts, texts_alone

GREEDY, DRAWN = Sampling(temperature=0.0), Sampling()
RULES: list[rules.CanvasVerifier] = [
    rules.ExactMatch(), rules.ConfidenceThreshold(0.6), rules.DisagreementWithConfidence(0.8),
    rules.TrustVerifier(), rules.NoVerification(),
]  # fmt: skip
Get = Callable[..., PretrainedMaskedLM]


def tokenizer_of(name: str) -> Any:
    """Return a tokenizer of byte pairs or of characters."""
    if name in ("pairs", "spaced", "unmasked"):
        tokenizer = made.train_tokenizer(["the cat sat on the mat. " * 4], 262)
        tokenizer = tokenizer if name == "unmasked" else made.with_mask_token(tokenizer)
    else:
        more = "\u00e9\u20ac\U0001f600<|>kixu" if name == "more" else ""
        tokenizer = made.train_character_tokenizer(["abcdehmnorst ." + more])
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    if name == "spaced":
        content["pre_tokenizer"]["add_prefix_space"] = True
    elif name == "bare":
        content["post_processor"] = None
    elif name == "reordered":  # the first character comes last
        order = [0, 1, 2, len(vocabulary) - 1, *range(3, len(vocabulary) - 1)]
        content["model"]["vocab"] = {name: order[i] for name, i in vocabulary.items()}
    tokenizer._tokenizer = tokenizer.backend_tokenizer.from_str(json.dumps(content))
    return tokenizer


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Get:
    """Return what gives a tiny model in a folder, with the tokenizer of a name."""
    found: dict[Any, PretrainedMaskedLM] = {}

    def get(name: str, block_length: int | None = None, seed: int = 0) -> PretrainedMaskedLM:
        key = (name, block_length, seed)
        if key not in found:
            tokenizer, folder = tokenizer_of(name), tmp_path_factory.mktemp("model")
            mask = tokenizer.mask_token_id or len(tokenizer)  # one that no tokenizer knows
            size = max(len(tokenizer), mask + 1)
            masked_lm(seed, block_length, size, mask_id=mask).save(folder, tokenizer)
            found[key] = PretrainedMaskedLM(str(folder), "float32")
        return found[key]

    return get


class Script(Guesser):
    """Drafts a token, its step and probability, or None, for each mask; keeps what it saw."""

    def __init__(self, model: PretrainedMaskedLM, says: Sequence[Sequence[Any]]) -> None:
        super().__init__(lambda *_: 0)
        self.model, self.says = model, says
        self.shown: list[list[int]] = []

    def propose(self, canvas: Canvas, *rest: Any) -> CanvasDraft:
        tokens, steps = canvas.tokens.clone(), torch.full_like(canvas.tokens, -1)
        probs = torch.zeros(*tokens.shape, self.model.vocab_size)
        for row, prompt in enumerate(canvas.prompts.tolist()):
            self.shown.append(tokens[row, : canvas.lengths[row]].tolist())
            places = canvas.masked[row].nonzero()[:, 0].tolist()
            for place, said in zip(places, self.says[prompt], strict=False):
                if said is not None:
                    tokens[row, place], steps[row, place] = said[:2]
                    probs[row, place, said[0]] = said[2]
        return CanvasDraft(tokens, steps >= 0, steps, probs)


def processor_of(model: PretrainedMaskedLM) -> TextProcessor:
    return TextProcessor.from_pretrained(model.path)


def ids(model: PretrainedMaskedLM, text: str) -> list[int]:
    """Return the tokens of pieces: `_` is a mask, `$` the end of text, `|` ends a piece."""
    tokenizer = processor_of(model).tokenizer
    found: list[int] = []
    for piece in text.replace("_", "|_|").replace("$", "|$|").split("|"):
        own = {"_": [model.mask_id], "$": [tokenizer.eos_token_id]}
        found += own.get(piece, tokenizer(piece, add_special_tokens=False)["input_ids"])
    return found


def canvas_of(model: PretrainedMaskedLM, *rows: str) -> Canvas:
    """Return the canvas of texts in a model's tokens."""
    prompts = [CanvasPrompt(ids(model, row), None) for row in rows]
    return make_canvas(prompts, range(len(rows)), model.mask_id, torch.device("cpu"))


def read(target: PretrainedMaskedLM, model: PretrainedMaskedLM, text: str) -> PositionMap:
    """Return how a drafter sees a text of the target's tokens."""
    row = ids(target, text)
    hidden = [token == target.mask_id for token in row]
    return TranslatedDrafter(target, lambda: model).read(row, hidden, {})


def drafted(
    target: PretrainedMaskedLM, model: PretrainedMaskedLM, rows: Sequence[str], *says: Sequence[Any]
) -> CanvasDraft:
    """Let a script draft for texts of the target, which it sees in its own tokens."""
    script = Script(model, says)
    drafter = TranslatedDrafter(target, drafter=lambda _: script)
    canvas = canvas_of(target, *rows)
    cache, asked = drafter.new_cache(*canvas.tokens.shape), ([9] * len(rows), GREEDY, Noise(0))
    draft = drafter.propose(canvas, cache, *asked)
    assert script.shown == [ids(model, row) for row in rows]
    given = ~canvas.masked
    assert torch.equal(draft.tokens[given], canvas.tokens[given])
    assert torch.equal(draft.drafted, (draft.steps >= 0) & ~given)
    return draft


def say(model: PretrainedMaskedLM, text: str, step: int = 0, sure: float = 1.0) -> list[Any]:
    """Return a script of a text's tokens, all of one step and probability."""
    return [(token, step, sure) for token in ids(model, text)]


def test_a_row_is_read_piece_by_piece_and_each_token_knows_its_characters(lm: Get) -> None:
    target, model = lm("pairs"), lm("characters")
    assert ids(target, "the cat") == ids(target, "the| |cat")  # what the numbers below rest on
    found = read(target, model, "$the cat__ mat$_")
    assert list(found.tokens) == ids(model, "$the cat__ mat$_")
    assert found.targets[:8] == ((0,), (1,), (1,), (1,), (2,), (3,), (3,), (3,))
    assert [(run.place, run.drafted, run.length) for run in found.runs] == [(4, 8, 2), (10, 15, 1)]
    assert [found.drafters(i) for i in range(5)] == [[0], [1, 2, 3], [4], [5, 6, 7], [8]]
    other = read(model, target, "the cat_")  # a token of the drafter covers several of the target
    assert list(other.tokens) == ids(target, "the cat_")
    assert other.targets == ((0, 1, 2), (3,), (4, 5, 6), (7,))


def test_bytes_of_a_character_share_it(lm: Get) -> None:
    pairs, more = lm("pairs"), lm("more")
    text = "a\u00e9t\U0001f600"
    assert read(pairs, more, text).targets == ((0,), (1, 2), (3,), (4, 5, 6, 7))
    found = read(more, pairs, text)
    assert list(found.tokens) == ids(pairs, text)
    assert found.targets == ((0,), (1,), (1,), (2,), (3,), (3,), (3,), (3,))


def test_tokens_that_no_tokenizer_would_write_are_read_as_well(lm: Get) -> None:
    spelled = "t|h|e| |c|a|t|_"
    assert ids(lm("pairs"), spelled) != ids(lm("pairs"), "the cat_")
    found = read(lm("pairs"), lm("characters"), spelled)
    assert list(found.tokens) == ids(lm("characters"), "the cat_")
    assert found.targets == tuple((i,) for i in range(8))


def test_a_gap_in_the_middle_takes_as_much_as_it_has_room_for(lm: Get) -> None:
    target, model = lm("characters"), lm("pairs")
    said = [say(model, "the", 1, 0.5), say(model, " ", 0, 0.8), say(model, "c", 3, 0.5)]
    said += [say(model, "at", 2, 0.25)]
    draft = drafted(target, model, ["$a______."], [word for words in said for word in words])
    assert draft.tokens[0].tolist() == ids(target, "$athe ca.")
    assert draft.steps[0].tolist() == [-1, -1, 1, 1, 1, 0, 3, 2, -1]
    sure = torch.tensor([0.5, 0.5, 0.5, 0.8, 0.5, 0.25])
    found = draft.probs[0, 2:8]
    assert torch.allclose(found.gather(1, draft.tokens[0, 2:8, None])[:, 0], sure)
    assert torch.allclose(found.sum(-1), torch.ones(6)) and not found[:, target.mask_id].any()
    assert found[0].unique().numel() == 3  # the token, the others alike, the mask


def test_what_is_shorter_in_the_targets_tokens_leaves_masks(lm: Get) -> None:
    target, model = lm("pairs"), lm("characters")
    said = [(t, step, 0.5) for t, step in zip(ids(model, "thec"), (0, 3, 0, 2), strict=True)]
    draft = drafted(target, model, ["a____."], said)
    assert draft.tokens[0].tolist() == ids(target, "a|the|c|__.")
    assert draft.steps[0].tolist() == [-1, 1, 0, -1, -1, -1]  # steps 3 and 2 of the drafter
    sure = draft.probs[0].gather(1, draft.tokens[0, :, None])[1:3, 0]
    assert torch.allclose(sure, torch.tensor([0.125, 0.5]))


def test_runs_are_filled_from_their_left_and_no_further_than_the_first_gap(lm: Get) -> None:
    target, model = lm("characters"), lm("more")
    c, a, t = say(model, "cat")
    first = [c, a, None, t, None, a, t, *say(model, "on")]
    draft = drafted(target, model, ["____a___b__", "c__", "mat"], first, [a, t], [])
    assert draft.tokens[0].tolist() == ids(target, "ca__a___bon")
    assert draft.tokens[1, :3].tolist() == ids(target, "cat")
    assert draft.drafted.sum(1).tolist() == [4, 2, 0]


def test_masks_of_later_blocks_are_masks_to_the_drafter_and_stay(lm: Get) -> None:
    target, model = lm("characters"), lm("pairs")
    script = Script(model, [say(model, "the|at")])
    drafter = TranslatedDrafter(target, drafter=lambda _: script)
    canvas = canvas_of(target, "a____")
    canvas.masked[:, 3:] = False
    draft = drafter.propose(canvas, drafter.new_cache(1, 5), [4], GREEDY, Noise(0))
    assert script.shown == [ids(model, "a____")]
    assert draft.tokens[0].tolist() == ids(target, "ath__")


def test_an_end_of_text_is_that_of_the_target(lm: Get) -> None:
    target, model = lm("more"), lm("pairs")
    draft = drafted(target, model, ["c_____"], say(model, "at$$at"))
    assert draft.tokens[0].tolist() == ids(target, "cat$$a")
    back = drafted(model, target, ["c___"], say(target, "at$"))
    assert back.tokens[0].tolist() == ids(model, "c|at|$_")


def test_unknown_characters_stay_masked_and_half_ones_end_a_draft(lm: Get) -> None:
    unknown = drafted(lm("characters"), lm("more"), ["____"], say(lm("more"), "axt\u20ac"))
    assert unknown.tokens[0].tolist() == ids(lm("characters"), "a_t_")
    target, model = lm("more"), lm("pairs")
    a, first, second = say(model, "a|\u00e9", 0, 0.5)
    said = [[a, first, *say(model, "$")], [first, second, None], [second, a]]
    draft = drafted(target, model, ["____"] * 3, *said)
    assert draft.tokens[0].tolist() == ids(target, "a___")
    assert draft.tokens[1].tolist() == ids(target, "\u00e9___")
    assert float(draft.probs[1, 0, draft.tokens[1, 0]]) == 0.25
    assert draft.drafted.sum(1).tolist() == [1, 1, 0]


def test_the_name_of_a_special_token_is_text(lm: Get) -> None:
    target, model = lm("pairs"), lm("more")
    vocabulary = processor_of(model).tokenizer.get_vocab()
    spelled = [vocabulary[letter] for letter in made.MASK]
    draft = drafted(target, model, ["_" * len(made.MASK)], [(token, 0, 1.0) for token in spelled])
    found = draft.tokens[0, draft.drafted[0]].tolist()
    assert target.mask_id not in found
    assert processor_of(target).decode(found) == made.MASK
    again = TranslatedDrafter(target, lambda: model).read(found, [False] * len(found), {})
    assert list(again.tokens) == spelled


def test_texts_begin_as_each_tokenizer_begins_them(lm: Get) -> None:
    bare, model = lm("bare"), lm("pairs")
    found = read(bare, model, "at_")
    assert list(found.tokens) == ids(model, "$at_") and found.targets[0] == ()
    assert [(run.place, run.drafted) for run in found.runs] == [(2, 2)]
    assert list(read(model, bare, "$at_").tokens) == ids(bare, "$at_")


@pytest.mark.parametrize("block_length", [None, 4])
@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("name", ["pairs", "characters"])
def test_the_same_tokens_give_what_the_drafter_gives_in_any_order(
    lm: Get, name: str, sampling: Sampling, block_length: int | None
) -> None:
    model = lm(name, block_length, seed=1)
    target = lm("pairs" if name == "pairs" else "reordered")
    last = model.vocab_size - 1
    numbers = list(range(last + 1)) if name == "pairs" else [0, 1, 2, *range(4, last + 1), 3]
    drafters = [kind(target, lambda: model) for kind in (MaskedDraftModel, TranslatedDrafter)]
    canvases = [canvas_of(lm, "the ____ sat___", "_on__") for lm in (model, target)]
    caches = [drafter.new_cache(2, 15) for drafter in drafters]
    for _ in range(2):
        one, two = (
            drafter.propose(canvas, cache, [2, 3], sampling, Noise(3))
            for drafter, canvas, cache in zip(drafters, canvases, caches, strict=True)
        )
        assert torch.equal(one.tokens, torch.tensor(numbers)[two.tokens])
        assert torch.equal(one.steps, two.steps)
        assert torch.equal(one.probs[:, :, numbers], two.probs)
        assert torch.equal(canvases[0].drawn, canvases[1].drawn)


PAIRS = [("pairs", "characters", None), ("more", "pairs", None), ("pairs", "more", 4),
         ("characters", "pairs", 4), ("reordered", "characters", 4)]  # fmt: skip
PROMPTS = ["the cat", "a[MASK:3]t on the [MASK:4]", "[MASK:5]at.", "[MASK]"]


@pytest.mark.parametrize("pair", [0, 2])
@pytest.mark.parametrize("number", range(len(RULES)), ids=lambda i: type(RULES[i]).__name__)
def test_every_rule_ends_fills_all_and_keeps_what_is_given(lm: Get, number: int, pair: int) -> None:
    name, other, block = PAIRS[(number + pair) % len(PAIRS)]
    target, model = lm(name), lm(other, block, seed=2)
    inner = lambda _: MaskedDraftModel(target, lambda: model, Factor(1.0))  # noqa: E731
    sampling, block_tokens = (GREEDY, 4) if block is None else (DRAWN, None)
    sampler = Sampler(StaticSchedule(3), sampling, Limits(4), block_tokens)
    pipeline = DualDiffusionPipeline(
        target, TranslatedDrafter(target, drafter=inner), processor_of(target), RULES[number],
        FixedLength(3), sampler=sampler, batch_size=3,
    )  # fmt: skip
    found = texts(pipeline, PROMPTS, seed=5)
    for prompt, tokens in zip(PROMPTS, found, strict=True):
        assert target.mask_id not in tokens
        for given, token in zip(pipeline.encode(prompt).tokens, tokens, strict=True):
            assert given in (token, target.mask_id)
    assert sum(pipeline.stats.tested) > 0
    assert found == texts_alone(pipeline, PROMPTS, seed=5)


@pytest.mark.parametrize("pair", PAIRS[:2])
def test_a_cache_of_texts_that_move_gives_what_a_fresh_one_gives(lm: Get, pair: Any) -> None:
    target, model = lm(pair[0]), lm(pair[1], 4, seed=3)
    drafter = TranslatedDrafter(target, lambda: model)
    source = torch.Generator().manual_seed(0)
    canvas = canvas_of(target, "_" * 14 + "the cat on", "_" * 9 + "the cat")
    cache = drafter.new_cache(*canvas.tokens.shape)
    letters = torch.tensor(ids(target, "the cat on mats$"))
    for _ in range(12):  # filled, masked again and filled otherwise, left of what was read
        places = torch.rand(canvas.masked.shape, generator=source)
        choice = letters[torch.randint(len(letters), places.shape, generator=source)]
        open_ = torch.arange(places.shape[1]) < torch.tensor([[14], [9]])
        canvas.masked = open_ & (places < 0.3)
        canvas.tokens = torch.where(open_ & (places > 0.6), choice, canvas.tokens)
        canvas.tokens = canvas.tokens.masked_fill(canvas.masked, target.mask_id)
        fresh = drafter.new_cache(*canvas.tokens.shape)
        asked = ([2, 1], GREEDY, Noise(0))
        one, two = (drafter.propose(replace(canvas), each, *asked) for each in (cache, fresh))
        assert torch.equal(one.tokens, two.tokens) and torch.equal(one.steps, two.steps)
        assert torch.allclose(one.probs, two.probs, atol=1e-5)


def test_no_coin_is_tossed_twice_while_a_text_changes_its_length(lm: Get) -> None:
    tossed: set[int] = set()

    class Tossing(Script):
        def propose(self, canvas: Canvas, *rest: Any) -> CanvasDraft:
            new = set(canvas.elements()[0, : int(canvas.lengths[0])].tolist())
            assert not tossed & new
            tossed.update(new)
            canvas.drawn = canvas.drawn + 1
            return super().propose(canvas, *rest)

    target, model = lm("pairs"), lm("characters")
    drafter = TranslatedDrafter(target, drafter=lambda _: Tossing(model, [[]]))
    cache, canvas = drafter.new_cache(1, 4), canvas_of(target, "____")
    for token in ids(target, "the|c|at"):
        canvas.tokens[0, 0], canvas.masked[0, 0] = token, False
        drafter.propose(canvas, cache, [1], DRAWN, Noise(0))
    assert int(canvas.drawn) == 3


def test_a_saved_drafter_is_built_again_with_its_own_tokenizer(lm: Get, tmp_path: Path) -> None:
    target, model = lm("pairs"), lm("characters", 4)
    inner = MaskedDraftModel(target, lambda: model, Factor(0.7), 0.4)
    drafter = TranslatedDrafter(target, drafter=lambda _: inner)
    folder = tmp_path / "draft"
    save_drafter(folder, drafter, processor_of(target), target.path)
    found: Any = build_masked_pipeline(target, lambda t: load_canvas_drafter(folder, t)).drafter
    assert found.mine.names == drafter.mine.names != drafter.theirs.names
    assert (found.drafter.unmasking, found.drafter.sure) == (Factor(0.7), 0.4)


def refusal(do: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as refused:
        do()
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_what_cannot_be_translated_is_refused_in_one_line(lm: Get, tmp_path: Path) -> None:
    target, model = lm("pairs"), lm("characters")
    processor = processor_of(target)
    assert "give one" in refusal(lambda: TranslatedDrafter(target))
    assert "give one" in refusal(lambda: TranslatedDrafter(target, lambda: model, lambda _: model))
    assert "no folder" in refusal(lambda: TranslatedDrafter(target, masked_lm))
    assert "mask token" in refusal(lambda: TranslatedDrafter(target, lambda: lm("unmasked")))
    masked_lm().save(tmp_path)
    alone = PretrainedMaskedLM(str(tmp_path), "float32")
    assert "no tokenizer" in refusal(lambda: TranslatedDrafter(target, lambda: alone))
    drafter = TranslatedDrafter(target, lambda: model)
    assert "other tokens" in refusal(lambda: drafter.check_target(model, processor))
    drafter.check_target(target, processor)
    scripted = TranslatedDrafter(target, drafter=lambda _: Script(model, [[]]))
    assert "spaces" in refusal(lambda: TranslatedDrafter(target, lambda: lm("spaced")))
    long = PositionMap((0,) * 200, ((),) * 200, ())
    scripted.read = lambda *_: long  # type: ignore[method-assign]
    asked = (canvas_of(target, "a|a|a|_"), scripted.new_cache(1, 4), [1], GREEDY, Noise(0))
    assert "more than 32" in refusal(lambda: scripted.propose(*asked))


def test_an_untranslated_drafter_of_other_tokens_is_refused(lm: Get) -> None:
    target, model, same = lm("pairs"), lm("more"), lm("pairs", 4, seed=1)
    plain = MaskedDraftModel(target, lambda: model)
    assert "TranslatedDrafter" in refusal(lambda: build_masked_pipeline(target, lambda _: plain))
    build_masked_pipeline(target, lambda t: MaskedDraftModel(t, lambda: same))
    build_masked_pipeline(target, lambda t: TranslatedDrafter(t, lambda: model))
