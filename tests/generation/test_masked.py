"""The plain sampler of masked models: its calls, its order, its law, and what it keeps."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from specstream.generation import FreeDavePipeline, MaskedPipeline, Sampler
from specstream.generation.batch import Limits
from specstream.models.pretrained_masked import PretrainedMaskedLM
from specstream.sampling import Sampling
from specstream.unmasking import EntropyBound, Factor, StaticSchedule, Threshold, Unmasking
from tests.masked_toys import (
    EOS,
    MASK,
    any_order_law,
    characters,
    masked_lm,
    spelled,
    texts,
    texts_alone,
)
from tests.toys import chi_square

GREEDY, DRAWN = Sampling(temperature=0.0), Sampling()
UNMASKINGS: list[Unmasking] = [
    *[StaticSchedule(3, order) for order in ("confidence", "random", "margin", "entropy")],  # type: ignore[arg-type]
    Threshold(0.6),
    Factor(1.0),
    EntropyBound(0.4),
]
CERTAIN = [rule for rule in UNMASKINGS if rule != StaticSchedule(3, "random")]
RAGGED = ["a", "abcde", [MASK, *spelled("abc"), MASK, MASK, *spelled("de")], "cc[MASK:3]a[MASK]"]


def pipeline(
    unmasking: Unmasking | None = None,
    sampling: Sampling = GREEDY,
    new_tokens: int = 8,
    block_tokens: int | None = None,
    guidance: float = 0.0,
    batch_size: int = 4,
    lm: PretrainedMaskedLM | None = None,
) -> MaskedPipeline:
    sampler = Sampler(
        unmasking or StaticSchedule(4), sampling, Limits(new_tokens), block_tokens, guidance
    )
    return MaskedPipeline(lm or masked_lm(), characters(), sampler, batch_size)


@dataclass(frozen=True)
class Recorded(Unmasking):
    """Does as another rule, and keeps the laws it is shown."""

    rule: Unmasking
    laws: list[Tensor] = field(default_factory=list)

    def choose(self, probs: Tensor, *rest: Tensor) -> Tensor:  # type: ignore[override]
        self.laws.append(probs)
        return self.rule.choose(probs, *rest)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 5, 8, 40])
def test_a_schedule_makes_its_number_of_calls_or_one_for_each_mask(num_steps: int) -> None:
    sampled = pipeline(StaticSchedule(num_steps))
    texts(sampled, ["ab"])
    assert sampled.stats.target_calls == min(num_steps, 8)
    assert sampled.stats.target_rows == min(num_steps, 8) * 11 and sampled.stats.elements == 8
    assert sampled.full_passes == min(num_steps, 8)
    blocks = pipeline(StaticSchedule(num_steps), block_tokens=4)
    texts(blocks, ["ab"])
    assert blocks.stats.target_calls == 2 * min(num_steps, 4)
    infilled = pipeline(StaticSchedule(num_steps))
    texts(infilled, ["a[MASK]b[MASK:2]"])
    assert infilled.stats.target_calls == min(num_steps, 3)


def test_rows_are_counted_as_long_as_they_have_masks() -> None:
    sampled = pipeline(StaticSchedule(3))
    texts(sampled, ["[MASK]a", "b[MASK:3]"])  # canvases of 3 and 5 tokens
    assert sampled.stats.target_calls == 3
    assert sampled.stats.target_rows == 3 + 3 * 5 and sampled.full_passes == 1 + 3
    guided = pipeline(StaticSchedule(3), guidance=1.0)
    texts(guided, ["[MASK]a", "b[MASK:3]"])
    assert (guided.stats.target_calls, guided.stats.target_rows) == (3, 36)


def test_temperature_0_does_not_depend_on_the_seed() -> None:
    for unmasking in CERTAIN:
        sampled = pipeline(unmasking)
        assert texts(sampled, RAGGED, seed=1) == texts(sampled, RAGGED, seed=2)
    drawn = pipeline(sampling=DRAWN)
    assert texts(drawn, RAGGED, seed=1) != texts(drawn, RAGGED, seed=2)
    assert texts(drawn, RAGGED, seed=1) == texts(drawn, RAGGED, seed=1)


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN])
@pytest.mark.parametrize("unmasking", UNMASKINGS, ids=str)
def test_a_row_is_filled_alike_in_every_batch(unmasking: Unmasking, sampling: Sampling) -> None:
    for block_tokens in (None, 4):
        sampled = pipeline(unmasking, sampling, block_tokens=block_tokens)
        assert texts(sampled, RAGGED, seed=3) == texts_alone(sampled, RAGGED, seed=3)


def by_hand(lm: PretrainedMaskedLM, tokens: list[int], unmasking: Unmasking) -> list[list[int]]:
    """Fill a canvas greedily; what is chosen depends on the softmax of the logits."""
    found, number = [], tokens.count(MASK)
    while MASK in tokens:
        probs = lm(torch.tensor([tokens])).softmax(-1)
        masked, step = torch.tensor([tokens]) == MASK, torch.tensor([len(found)])
        best = probs.argmax(-1)
        coins = torch.zeros(masked.shape, dtype=torch.float64)
        chosen = unmasking.choose(probs, best, masked, step, torch.tensor([number]), coins)
        tokens = torch.where(chosen, best, torch.tensor([tokens]))[0].tolist()
        found.append(tokens)
    return found


@pytest.mark.parametrize("unmasking", CERTAIN, ids=str)
def test_greedy_filling_goes_by_the_certainty_of_the_model(unmasking: Unmasking) -> None:
    lm = masked_lm(seed=1)
    canvas = [EOS, *spelled("bd"), *[MASK] * 8]
    expected = by_hand(lm, canvas, unmasking)
    found = [step.tokens for step in pipeline(unmasking, lm=lm).generate([canvas[:3]])]
    assert found == expected and len(found) > 1


def test_greedy_filling_does_not_go_from_left_to_right() -> None:
    firsts = set()
    for seed in range(8):
        sampled = pipeline(StaticSchedule(8), lm=masked_lm(seed))
        first, *_ = sampled.generate([[EOS, *spelled("bd")]])
        firsts.add(first.filled[0])
    assert len(firsts) > 2


def test_temperature_and_truncation_do_not_change_how_sure_the_model_is() -> None:
    canvas = [EOS, MASK, *spelled("bd"), MASK]
    law = masked_lm()(torch.tensor([canvas])).softmax(-1)
    for sampling in (GREEDY, DRAWN, Sampling(3.0), Sampling(0.5, top_k=2, top_p=0.9)):
        seen = Recorded(StaticSchedule(1))
        texts(pipeline(seen, sampling), [canvas])
        torch.testing.assert_close(seen.laws[0], law)


def test_infilling_fills_the_masks_and_keeps_everything_else() -> None:
    processor = characters()
    for sampling in (GREEDY, DRAWN):
        sampled = pipeline(sampling=sampling)
        for prompt in ("ab[MASK]d[MASK:3]e", "[MASK]a", "a[MASK]", "[MASK:4]"):
            canvas = sampled.encode(prompt).tokens
            (filled,) = texts(sampled, [prompt])
            assert MASK not in filled and len(filled) == len(canvas)
            kept = [(a, b) for a, b in zip(canvas, filled, strict=True) if a != MASK]
            assert all(a == b for a, b in kept)
            assert sampled.complete([prompt])[0].text == processor.decode(filled)


@pytest.mark.parametrize("guidance", [0.0, 0.5, 3.0])
def test_no_mask_token_is_ever_drawn(guidance: float) -> None:
    for sampling in (Sampling(100.0), Sampling(100.0, top_k=8), Sampling(50.0, top_p=0.99), GREEDY):
        sampled = pipeline(StaticSchedule(4), sampling, 32, guidance=guidance, batch_size=8)
        assert all(MASK not in filled for filled in texts(sampled, ["ab"] * 8))


def test_guidance_is_its_formula_of_two_forwards() -> None:
    lm = masked_lm(sharpness=5.0)
    canvas = [EOS, MASK, *spelled("bd"), MASK, MASK]
    tokens = torch.tensor([canvas])
    blind = torch.full_like(tokens, MASK)
    logits = (2.5 * lm(tokens) - 1.5 * lm(blind)).nan_to_num(0.0)
    logits[..., MASK] = -torch.inf
    seen = Recorded(StaticSchedule(1))
    long = [EOS, *spelled("abcdeabcde"), MASK]  # a neighbour that pads the row
    found = texts(pipeline(seen, guidance=1.5, lm=lm), [canvas, long])[0]
    torch.testing.assert_close(seen.laws[0][:1, :6], logits.softmax(-1), rtol=1e-4, atol=1e-5)
    best = logits.argmax(-1)[0].tolist()
    assert found == [best[i] if token == MASK else token for i, token in enumerate(canvas)]
    assert found != texts(pipeline(StaticSchedule(1), lm=lm), [canvas])[0]


def test_guidance_masks_what_was_given_and_never_what_was_filled() -> None:
    lm = copy.deepcopy(masked_lm())
    shown: list[Tensor] = []
    lm.register_forward_pre_hook(lambda module, arguments: shown.append(arguments[0].clone()))
    sampled = pipeline(StaticSchedule(4), guidance=1.0, lm=lm)
    sampled._pass = lm  # through the hooks
    texts(sampled, [[EOS, *spelled("bd")]])
    for canvases in shown:
        seeing, blind = canvases
        assert (blind[:3] == MASK).all() and torch.equal(seeing[3:], blind[3:])
    assert (shown[-1][1, 3:] != MASK).any()


def test_blocks_are_filled_from_left_to_right() -> None:
    for sampling in (GREEDY, DRAWN):
        sampled = pipeline(StaticSchedule(2, "random"), sampling, 12, block_tokens=4)
        start, filled = {0: 3, 1: 6}, []
        for step in sampled.generate([[EOS, *spelled("ab")], [EOS, *spelled("abcde")]]):
            blocks = {(place - start[step.prompt]) // 4 for place in step.filled}
            first = step.tokens.index(MASK) if MASK in step.tokens else len(step.tokens)
            assert len(step.filled) == 2 and len(blocks) == 1
            assert blocks == {(min([first, *step.filled]) - start[step.prompt]) // 4}
            filled += [(step.prompt, place) for place in step.filled]
        assert len(set(filled)) == len(filled) == 24


def counted(found: Sequence[Sequence[int]], places: Sequence[int], vocab: int) -> Tensor:
    rows = torch.tensor([[tokens[i] for i in places] for tokens in found])
    counts = torch.zeros([vocab] * len(places))
    return counts.index_put_(tuple(rows.T), torch.ones(len(rows)), accumulate=True)


@pytest.mark.parametrize("sampling", [DRAWN, Sampling(1.5, top_k=3)], ids=str)
def test_one_token_a_step_in_random_order_has_the_any_order_law(sampling: Sampling) -> None:
    lm = masked_lm(seed=2, vocab_size=5, sharpness=8.0)
    canvas = [EOS, MASK, 3, MASK, 4, MASK]
    law = any_order_law(lm, canvas, sampling)
    assert law.sum().item() == pytest.approx(1.0)
    values = []
    for num_steps in (3, 2):
        schedule = StaticSchedule(num_steps, "random")
        sampled = pipeline(schedule, sampling, batch_size=3000, lm=lm)
        found = texts(sampled, [canvas] * 3000, seed=5)
        values.append(chi_square(counted(found, (1, 3, 5), 5), law))
    assert values[0] > 0.01
    assert values[1] < 1e-4  # two tokens at once do not know of each other


def test_steps_account_for_every_position() -> None:
    sampled = pipeline(Threshold(0.6), DRAWN)
    filled: dict[int, list[int]] = {i: [] for i in range(len(RAGGED))}
    ended = set()
    for step in sampled.generate(RAGGED):
        assert step.prompt not in ended and not step.drafted and not step.remasked
        assert step.finished == (MASK not in step.tokens)
        filled[step.prompt] += step.filled
        ended |= {step.prompt} if step.finished else set()
    for i, prompt in enumerate(RAGGED):
        tokens = sampled.encode(prompt).tokens
        assert sorted(filled[i]) == [i for i, token in enumerate(tokens) if token == MASK]
    assert sampled.stats.elements == sum(map(len, filled.values())) and ended == set(filled)


def test_what_cannot_be_sampled_is_refused_in_one_line() -> None:
    lm, processor = masked_lm(max_positions=16), characters()
    for options, reason in (
        ({"guidance": -1.0}, "guidance"),
        ({"block_tokens": 0}, "block_tokens must be at least 1"),
        ({"sampling": Sampling(repetition_penalty=1.1)}, "penalty"),
        ({"limits": Limits(stop=("a",))}, "stop"),
    ):
        with pytest.raises(ValueError, match=reason):
            Sampler(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="bidirectional"):
        MaskedPipeline(masked_lm(block_length=4), processor)
    with pytest.raises(ValueError, match="batch_size"):
        MaskedPipeline(lm, processor, batch_size=0)
    sampled = pipeline(lm=lm)
    for prompt, reason in (("abcdeabcde", "context of 16"), ([99], "outside"), ([], "empty")):
        with pytest.raises(ValueError, match=reason):
            sampled.complete([prompt])
    thirds = MaskedPipeline(lm, processor, Sampler(block_tokens=3, limits=Limits(8)))
    with pytest.raises(ValueError, match="3 does not divide max_new_tokens 8"):
        thirds.complete(["ab"])
    assert len(thirds.complete(["ab[MASK:4]"])[0].tokens) == 4  # masks of its own: no matter
    with pytest.raises(ValueError, match="different indices"):
        sampled.complete(["a", "b"], indices=[1, 1])
    assert sampled.complete([]) == []
    assert replace(sampled.sampler, guidance=1.0).guidance == 1.0


def test_logits_that_are_no_numbers_end_in_one_line() -> None:
    lm = copy.deepcopy(masked_lm())
    lm.model.model.norm.weight.data.fill_(torch.nan)
    for unmasking in (StaticSchedule(4), Threshold(0.9)):
        broken = MaskedPipeline(lm, characters(), Sampler(unmasking, limits=Limits(8)))
        with pytest.raises(ValueError, match="logits are no numbers"):
            broken.complete(["ab"])
    nested = FreeDavePipeline(lm, characters(), sampler=Sampler(limits=Limits(8)))
    with pytest.raises(ValueError, match="logits are no numbers"):
        nested.complete(["ab"])
