"""Block drafters: one pass drafts what training saw, leaves nothing behind, and keeps the law."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from specstream.drafters import BlockDrafter
from specstream.drafters.block import BlockCache
from specstream.drafters.loading import load_drafter, save_drafter
from specstream.drafters.sequential import confident_lengths
from specstream.generation import (
    AutoregressivePipeline,
    CostModelLength,
    DraftLength,
    FixedLength,
    Limits,
    SpeculativePipeline,
    StepCosts,
)
from specstream.models import PretrainedLM
from specstream.models.walk import read
from specstream.sampling import Sampling, probabilities
from specstream.structures import Context, TokenDraft
from specstream.verification import BlockRejection, TokenRejection, TokenVerifier
from tests.toys import VOCABULARY, chi_square, count_tokens, joint_law, letters, toy_lm

SIZE = 4  # tokens of a block
NEW = 12
GREEDY = Sampling(temperature=0.0)
PROMPTS = ([3, 1, 4, 1, 0, 2, 2, 4], [4], [0, 1, 0, 1, 0, 1, 0])
COSTS = StepCosts(1.0, (0.0, 1.1, 1.2, 1.3, 1.4), (0.0, 0.1, 0.2, 0.3, 0.4))
OPTIONS: dict[str, dict[str, Any]] = {
    "parallel": {},
    "markov": {"markov_rank": 3},
    "markov, confident": {
        "markov_rank": 3,
        "confidence": True,
        "confidence_threshold": 0.05,
    },
    "confident": {"confidence": True, "confidence_threshold": 0.05},
}


@pytest.fixture(scope="module")
def target() -> PretrainedLM:
    return toy_lm(num_layers=3)


@pytest.fixture(scope="module")
def mild() -> PretrainedLM:
    return toy_lm(num_layers=3, sharpness=5.0)  # of flatter laws, so that much is accepted


@torch.no_grad()
def lively(drafter: BlockDrafter) -> BlockDrafter:
    """Scale fresh weights up in place, so that all of them speak in what is drafted."""
    noise = torch.Generator().manual_seed(5)
    for name, weight in drafter.named_parameters():
        if weight.dim() > 1 or name == "network.mask_embedding":
            weight.copy_(torch.randn(weight.shape, generator=noise) * 0.4)
    drafter.network.norm.weight.fill_(1.5)
    return drafter.eval().requires_grad_(False)


class Recorder(BlockDrafter):
    """Keeps every draft with the rows it was drafted for, and the last cache."""

    rounds: list[tuple[list[list[int]], TokenDraft]]
    cache: BlockCache

    def new_cache(self, batch_size: int, capacity: int) -> BlockCache:
        self.cache, self.rounds = super().new_cache(batch_size, capacity), []
        return self.cache

    def propose(self, context: Context, *arguments: Any) -> TokenDraft:
        before = copy.deepcopy(self.cache.layers)
        draft = super().propose(context, *arguments)
        self.rounds.append((copy.deepcopy(context.history), draft))
        for old, new in zip(before, self.cache.layers, strict=True):
            assert torch.equal(old[0], new[0]) and torch.equal(old[1], new[1])  # a draft reads only
        return draft


def recorder(target: PretrainedLM, name: str) -> Recorder:
    drafter = lively(Recorder(target, SIZE, **OPTIONS[name]))
    assert isinstance(drafter, Recorder)
    return drafter


def decode(
    target: PretrainedLM,
    drafter: BlockDrafter,
    lengths: DraftLength,
    sampling: Sampling = GREEDY,
    batch_size: int = 3,
    rule: TokenVerifier | None = None,
) -> tuple[SpeculativePipeline, list[list[int]]]:
    pipeline = SpeculativePipeline(
        target, drafter, letters(), rule, lengths, sampling, Limits(NEW), batch_size, costs=COSTS
    )
    return pipeline, [completion.tokens for completion in pipeline.complete(PROMPTS, seed=1)]


@torch.no_grad()
def trained_law(drafter: BlockDrafter, row: list[int], drafted: list[int]) -> torch.Tensor:
    """Return the laws (K, V) that training computes after `row`, packed behind another document."""
    other = [2, 0, 3]
    tokens = torch.tensor([[*other, *row, *drafted]])
    documents = torch.tensor([[0] * len(other) + [1] * (len(row) + len(drafted))])
    positions = torch.tensor([[*range(len(other)), *range(len(row) + len(drafted))]])
    _, features = read(drafter.target, tokens, positions, documents, drafter.feature_layers)
    anchor = torch.tensor([[len(other) + len(row) - 1]])
    seen = (documents == 1) & (torch.arange(tokens.shape[1]) < anchor)
    context = drafter.network.inject(features, positions)
    states = drafter.states(
        tokens.gather(1, anchor), positions.gather(1, anchor), context, seen[:, None]
    )[0, 0]
    if drafter.markov is not None:
        before = torch.tensor([row[-1], *drafted[:-1]])
        states = torch.cat([states[: len(drafted)], drafter.markov.embed(before)], -1)
    return probabilities(drafter.logits(states), Sampling())[: len(drafted)]


@pytest.mark.parametrize("name", ["parallel", "markov"])
def test_decoding_computes_what_training_does(target: PretrainedLM, name: str) -> None:
    drafter = recorder(target, name)
    for lengths in (FixedLength(SIZE), CostModelLength(SIZE, retry=2), FixedLength(2)):
        pipeline, _ = decode(target, drafter, lengths, Sampling())
        assert 0 < sum(pipeline.stats.accepted) < sum(pipeline.stats.tested)
        for history, draft in drafter.rounds:
            for row, tokens in enumerate(history):
                law = trained_law(drafter, tokens, draft.tokens[row].tolist())
                torch.testing.assert_close(draft.probs[row], law, atol=1e-5, rtol=0)
        assert len(drafter.rounds) > 3


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("name", OPTIONS)
def test_greedy_text_is_plain_greedy_text(target: PretrainedLM, name: str, batch_size: int) -> None:
    plain = AutoregressivePipeline(target, letters(), GREEDY, Limits(NEW)).complete(PROMPTS)
    drafter = lively(BlockDrafter(target, SIZE, **OPTIONS[name]))
    for lengths in (*map(FixedLength, (0, 1, 3, SIZE)), CostModelLength(SIZE, retry=1)):
        _, found = decode(target, drafter, lengths, GREEDY, batch_size)
        assert found == [completion.tokens for completion in plain]


def test_rejected_rounds_leave_the_cache_as_if_nothing_had_been_drafted(
    target: PretrainedLM,
) -> None:
    drafter = recorder(target, "parallel")
    pipeline, texts = decode(target, drafter, FixedLength(SIZE))
    assert sum(pipeline.stats.accepted) < sum(pipeline.stats.tested)
    drafted = drafter.cache
    decode(target, drafter, FixedLength(0))
    for row, (prompt, text) in enumerate(zip(PROMPTS, texts, strict=True)):
        known = len(prompt) + len(text) - SIZE - 1  # the last round may commit beyond the limit
        for one, other in zip(drafted.layers, drafter.cache.layers, strict=True):
            for found, expected in zip(one, other, strict=True):
                assert expected[row, :known].abs().sum(-1).min() > 0
                torch.testing.assert_close(found[row, :known], expected[row, :known])


def test_without_the_markov_head_a_law_does_not_depend_on_what_was_drawn(
    target: PretrainedLM,
) -> None:
    for name, independent in (("parallel", True), ("markov", False)):
        drafter, laws = recorder(target, name), []
        for seed in (1, 2):
            pipeline = SpeculativePipeline(
                target, drafter, letters(), None, FixedLength(SIZE), Sampling(), Limits(NEW), 3
            )
            list(pipeline.generate(PROMPTS, seed=seed))
            laws.append(drafter.rounds[0][1])
        assert not torch.equal(laws[0].tokens, laws[1].tokens)
        assert torch.equal(laws[0].probs, laws[1].probs) == independent


ROWS, PROMPT = 2048, [0, 1, 2]
SAMPLINGS = {
    "T=1": Sampling(),
    "warped": Sampling(0.7, top_k=4, repetition_penalty=1.3),
}


def p_value(
    target: PretrainedLM, drafter: BlockDrafter, sampling: Sampling, rule: TokenVerifier
) -> float:
    """Return the p-value of four tokens of 2048 rows under the plain target's exact law."""
    pipeline = SpeculativePipeline(
        target, drafter, letters(), rule, FixedLength(SIZE), sampling, Limits(5), ROWS
    )
    found = pipeline.complete([PROMPT] * ROWS, seed=7)
    law = joint_law(target, PROMPT, sampling, 5).sum(0)
    assert pipeline.stats.acceptance not in (0, 1, None)
    return chi_square(count_tokens(found, slice(1, 5), VOCABULARY), law)


@pytest.mark.parametrize(
    ("name", "sampling", "rule"),
    [
        ("parallel", "T=1", BlockRejection()),
        ("parallel", "warped", TokenRejection()),
        ("markov", "warped", TokenRejection()),
        ("markov, confident", "T=1", TokenRejection()),
        ("markov, confident", "warped", BlockRejection()),
        ("confident", "T=1", BlockRejection()),
    ],
)
def test_the_joint_law_is_the_plain_targets(
    mild: PretrainedLM, name: str, sampling: str, rule: TokenVerifier
) -> None:
    drafter = lively(BlockDrafter(mild, SIZE, **OPTIONS[name]))
    assert p_value(mild, drafter, SAMPLINGS[sampling], rule) > 0.01


def test_a_stop_that_looks_at_the_token_itself_fails_the_same_test(mild: PretrainedLM) -> None:
    class Peeking(BlockDrafter):
        def propose(self, *arguments: Any) -> TokenDraft:
            draft = super().propose(*arguments)
            assert draft.probs is not None
            said = draft.probs.gather(2, draft.tokens[:, :, None])[:, :, 0]
            kept = (said >= 0.3).to(torch.uint8).cumprod(1).sum(1)
            return TokenDraft(draft.tokens, draft.probs, kept)

    drafter = lively(Peeking(mild, SIZE))
    assert p_value(mild, drafter, Sampling(), TokenRejection()) < 1e-6


def test_a_draft_ends_before_the_product_of_confidences_falls_below_the_threshold() -> None:
    chances = torch.tensor([[0.9, 0.5, 0.9], [0.2, 0.99, 0.99], [0.9, 0.9, 0.9]])
    logits = chances.logit()
    assert confident_lengths(logits, 0.44).tolist() == [2, 0, 3]
    assert confident_lengths(logits, 0.0).tolist() == [3, 3, 3]


def test_where_a_draft_ends_depends_on_the_tokens_before_its_end_only(mild: PretrainedLM) -> None:
    drafter = recorder(mild, "markov, confident")
    pipeline = SpeculativePipeline(
        mild, drafter, letters(), None, FixedLength(SIZE), Sampling(), Limits(NEW), 256
    )
    list(pipeline.generate([PROMPT] * 256, seed=1))
    draft = drafter.rounds[0][1]
    rows = list(zip(draft.tokens.tolist(), draft.lengths.tolist(), strict=True))
    assert len({length for _, length in rows}) > 1
    for place in range(SIZE):
        decisions: dict[tuple[int, ...], set[bool]] = {}
        for tokens, length in rows:
            if length >= place:  # the question was asked
                decisions.setdefault(tuple(tokens[:place]), set()).add(length > place)
        assert all(len(found) == 1 for found in decisions.values())


def test_a_row_may_want_no_draft_and_keeps_its_shape(target: PretrainedLM) -> None:
    drafter = recorder(target, "confident")
    drafter.confidence_threshold = 1.0
    pipeline, texts = decode(target, drafter, FixedLength(SIZE))
    assert {len(text) for text in texts} == {NEW} and pipeline.stats.tested == []
    draft = drafter.rounds[0][1]
    assert draft.tokens.shape == (3, SIZE) and draft.lengths.tolist() == [0, 0, 0]


def test_a_saved_drafter_is_loaded_as_it_was(target: PretrainedLM, tmp_path: Path) -> None:
    drafter = lively(
        BlockDrafter(
            target, 6, 1, [0, 3], intermediate_size=20, markov_rank=2, confidence=True,
            confidence_threshold=0.1,
        )
    )  # fmt: skip
    save_drafter(tmp_path / "draft", drafter, letters(), "somewhere")
    loaded = load_drafter(tmp_path / "draft", target)
    assert isinstance(loaded, BlockDrafter)
    assert loaded.network.shape == drafter.network.shape
    assert loaded.feature_layers == (0, 3) and loaded.confidence_threshold == 0.1
    expected = drafter.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name].to(torch.bfloat16).float())
    with pytest.raises(ValueError, match="weights of another drafter"):
        BlockDrafter(target, 6, 2, [0, 3], weights=str(tmp_path / "draft"))
    with pytest.raises(ValueError, match="cannot read"):
        BlockDrafter(target, weights=str(tmp_path))


def test_fresh_weights_depend_on_the_seed_alone(target: PretrainedLM) -> None:
    one, other, third = (
        BlockDrafter(target, markov_rank=2, seed=s).state_dict() for s in (3, 3, 4)
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(one["network.fc.weight"], third["network.fc.weight"])


def test_only_the_drafters_own_weights_are_counted(target: PretrainedLM) -> None:
    drafter = BlockDrafter(target, markov_rank=2, confidence=True)
    counts = drafter.extra_parameters()
    assert sum(counts.values()) == sum(weight.numel() for weight in drafter.parameters())
    assert counts["markov head"] == 2 * 2 * VOCABULARY and counts["mask embedding"] == 16


def test_layers_are_read_where_the_paper_reads_them() -> None:
    deep = toy_lm(num_layers=36)
    assert BlockDrafter(deep).feature_layers == (1, 9, 17, 25, 33)  # Qwen3-4B's in both papers
    assert BlockDrafter(toy_lm(num_layers=12)).feature_layers == (1, 3, 5, 7, 9)
    assert BlockDrafter(toy_lm(num_layers=5)).feature_layers == (0, 2, 4)
    assert BlockDrafter(toy_lm(num_layers=1)).feature_layers == (0,)


def test_a_target_with_embedded_places_is_drafted_for() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **sizes)).eval()
    target = PretrainedLM.of(model)
    drafter = lively(BlockDrafter(target, SIZE))
    plain = AutoregressivePipeline(target, letters(), GREEDY, Limits(NEW)).complete(PROMPTS)
    _, found = decode(target, drafter, FixedLength(SIZE))
    assert found == [completion.tokens for completion in plain]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 1}, "block_size must lie in 2..64, not 1"),
        ({"num_layers": 0}, "num_layers must be at least 1, not 0"),
        ({"num_heads": 3}, "does not give each of num_heads 3"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"rope_theta": 0.0}, "rope_theta must be positive, not 0.0"),
        ({"feature_layers": []}, r"ascending numbers in 0..3, not \[\]"),
        ({"feature_layers": [2, 1]}, "must be ascending"),
        ({"feature_layers": [0, 4]}, r"in 0..3, not \[0, 4\]"),
        ({"markov_rank": -1}, "markov_rank must be 0"),
        ({"confidence_threshold": 0.2}, "needs confidence: true"),
        ({"confidence": True, "confidence_threshold": 1.5}, r"must lie in \[0, 1\]"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    target: PretrainedLM, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        BlockDrafter(target, **options)


def test_another_target_than_its_own_is_refused(target: PretrainedLM) -> None:
    with pytest.raises(ValueError, match="the target that it was built for"):
        BlockDrafter(target).check_target(toy_lm(num_layers=3), letters())
    with pytest.raises(ValueError, match="causal language model"):
        BlockDrafter(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="more than the 4"):
        decode(target, BlockDrafter(target, SIZE), FixedLength(SIZE + 1))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_pipeline_drafts_what_an_eager_one_does(target: PretrainedLM) -> None:
    torch._dynamo.reset()
    drafter, texts = lively(BlockDrafter(target, SIZE, **OPTIONS["markov, confident"])), []
    for compiled in (False, True):
        pipeline = SpeculativePipeline(
            target, drafter, letters(), None, FixedLength(SIZE), Sampling(0.8), Limits(NEW), 3,
            compiled,
        )  # fmt: skip
        texts.append([c.tokens for c in pipeline.complete(PROMPTS, seed=3)])
    assert texts[0] == texts[1]
