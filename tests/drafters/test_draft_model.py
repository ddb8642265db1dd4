"""Draft models: the law they report is the one they draw from, whatever was rejected before."""

from __future__ import annotations

import copy

import pytest
import torch

from specstream.drafters import CutDraftModel, DraftModel
from specstream.drafters.draft_model import prefill_width
from specstream.generation.batch import Batch, Limits
from specstream.models import PretrainedLM
from specstream.sampling import Noise, Sampling, draw, probabilities
from specstream.structures import Context, Guarantee, Stats, TokenDraft
from tests.toys import joint_law, letters, stood, toy_lm

VOCABULARY = 7
PROMPTS = [[1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5, 6, 0], [3], [2, 5]]
SAMPLINGS = {
    "T=1": Sampling(),
    "warped": Sampling(0.7, top_k=5, repetition_penalty=1.3),
    "greedy": Sampling(temperature=0.0),
}


@pytest.fixture(scope="module")
def model() -> PretrainedLM:
    return toy_lm(VOCABULARY, num_layers=2)


def context_of(prompts: list[list[int]]) -> Context:
    device = torch.device("cpu")
    stats = Stats("text", Guarantee.EXACT_LAW)
    numbers = range(len(prompts))
    return Batch(prompts, numbers, 128, Limits(), letters(), stats, device, VOCABULARY).context


def commit(context: Context, tokens: list[list[int]]) -> None:
    """Append ragged tokens to the rows, as a target pass does."""
    for row, new in enumerate(tokens):
        length = len(context.history[row])
        context.tokens[row, length : length + len(new)] = torch.tensor(new, dtype=torch.long)
        context.history[row] += new
        context.seen[row, torch.tensor(new, dtype=torch.long)] = True
    context.lengths = torch.tensor([len(tokens) for tokens in context.history])


@torch.no_grad()
def check(draft: TokenDraft, context: Context, model: PretrainedLM, sampling: Sampling) -> None:
    """Assert that q is the model's own law after committed and drafted tokens, without a cache."""
    for row, history in enumerate(context.history):
        for i in range(draft.tokens.shape[1]):
            tokens = torch.tensor([*history, *draft.tokens[row, :i].tolist()])
            seen = torch.zeros(VOCABULARY, dtype=torch.bool)
            seen[tokens] = True
            law = probabilities(model(tokens[None])[0, -1], sampling, seen)
            torch.testing.assert_close(draft.probs[row, i], law, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", SAMPLINGS)
def test_the_reported_law_is_the_models_after_any_verdict(model: PretrainedLM, name: str) -> None:
    """All of a draft stood, a part, or nothing; and rounds in which nothing was drafted."""
    sampling, noise = SAMPLINGS[name], Noise(1)
    drafter = DraftModel(model, lambda: model)
    context = context_of(copy.deepcopy(PROMPTS))
    cache = drafter.new_cache(3, 128)
    for accepted in ([4, 0, 2], [0, 4, 4], [1, 1, 0], [4, 4, 4]):
        draft = drafter.propose(context, cache, 4, sampling, noise)
        check(draft, context, model, sampling)
        rows = [draft.tokens[row, :n].tolist() for row, n in enumerate(accepted)]
        commit(context, [[*tokens, 6] for tokens in rows])
        drafter.observe(stood(accepted), cache)
        if accepted == [0, 4, 4]:  # plain rounds: the drafter is not run, and falls behind
            commit(context, [[1, 2, 3] * 4, [4], [5, 0]])


def test_drafts_are_drawn_from_the_reported_law(model: PretrainedLM) -> None:
    drafter, context, noise = DraftModel(model, lambda: model), context_of(PROMPTS), Noise(3)
    draft = drafter.propose(context, drafter.new_cache(3, 128), 3, Sampling(), noise)
    coins = noise.uniform(context.prompts, context.elements(3), 0)
    assert torch.equal(draft.tokens, draw(draft.probs, coins))
    assert draft.lengths.tolist() == [3, 3, 3]


def test_the_first_draft_has_the_joint_law_of_the_model(model: PretrainedLM) -> None:
    drafter = DraftModel(model, lambda: model)
    rows = 3000
    draft = drafter.propose(
        context_of([[1, 2]] * rows), drafter.new_cache(rows, 128), 2, Sampling(), Noise(0)
    )
    law = joint_law(model, [1, 2], Sampling(), 2)
    counts = torch.zeros(VOCABULARY, VOCABULARY)
    counts.index_put_(tuple(draft.tokens.T), torch.ones(rows), accumulate=True)
    assert (counts / rows - law).abs().max() < 0.03


def test_a_drafter_guesses_up_to_the_end_of_its_own_context() -> None:
    model = toy_lm(VOCABULARY, max_positions=10)
    drafter = DraftModel(model, lambda: model)
    context = context_of([[1] * 7, [1] * 10, [2] * 11])
    cache = drafter.new_cache(3, 128)
    draft = drafter.propose(context, cache, 5, Sampling(), Noise(0))
    assert draft.lengths.tolist() == [4, 1, 0]
    drafter.observe(stood([4, 1, 0]), cache)
    commit(context, [[0] * 5, [0, 0], [0]])
    nothing = drafter.propose(context, cache, 5, Sampling(), Noise(0))
    assert nothing.tokens.shape == (3, 0) and nothing.lengths.tolist() == [0, 0, 0]


def test_a_drafter_keeps_no_state_of_its_own(model: PretrainedLM) -> None:
    drafter, noise = DraftModel(model, lambda: model), Noise(0)
    drafts = []
    for _ in range(2):
        cache = drafter.new_cache(3, 128)
        drafts.append(drafter.propose(context_of(PROMPTS), cache, 3, Sampling(), noise))
    assert torch.equal(drafts[0].tokens, drafts[1].tokens)


def test_prompts_are_read_in_few_widths() -> None:
    assert [prefill_width(n) for n in (1, 8, 9, 100, 512, 9999)] == [8, 8, 16, 128, 512, 512]


@torch.no_grad()
def test_a_cut_of_all_layers_is_the_target_itself(model: PretrainedLM) -> None:
    cut = CutDraftModel(model, 1, 1).model
    tokens = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(cut(tokens), model(tokens))
    assert model.num_layers == 2 and len(model.model.base_model.layers) == 2


def test_a_cut_takes_the_first_and_last_layers_and_decodes() -> None:
    target = toy_lm(VOCABULARY, num_layers=4)
    for share in (True, False):
        cut = CutDraftModel(target, 1, 1, share_embeddings=share)
        model, layers = cut.model, target.model.base_model.layers
        for mine, theirs in zip(model.model.base_model.layers, (layers[0], layers[3]), strict=True):
            assert torch.equal(mine.mlp.up_proj.weight, theirs.mlp.up_proj.weight)
        trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
        assert ("lm_head.weight" in {n.removeprefix("model.") for n in trained}) is not share
        assert any("mlp" in name for name in trained) and not layers[0].mlp.up_proj.weight.grad
        context = context_of(PROMPTS)
        with torch.no_grad():
            draft = cut.propose(context, cut.new_cache(3, 128), 3, Sampling(), Noise(0))
        check(draft, context, model, Sampling())
        with torch.no_grad():
            model.model.base_model.layers[0].mlp.up_proj.weight.zero_()
        assert layers[0].mlp.up_proj.weight.abs().sum() > 0, "the target keeps its own weights"


@torch.no_grad()
def test_a_cut_keeps_each_layers_kind_of_attention() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    config = AutoConfig.for_model(
        "gemma3_text", vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24,
        num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        sliding_window=3, layer_types=kinds, max_position_embeddings=64,
    )  # fmt: skip
    target = PretrainedLM.of(AutoModelForCausalLM.from_config(config, dtype=torch.float32)).eval()
    cut = CutDraftModel(target, 1, 1)
    assert cut.model.config.layer_types == ["sliding_attention", "full_attention"]
    context = context_of(PROMPTS)
    draft = cut.propose(context, cut.new_cache(3, 128), 3, Sampling(), Noise(0))
    check(draft, context, cut.model, Sampling())


@pytest.mark.parametrize(("first", "last"), [(0, 0), (2, 1), (-1, 1), (1, 3)])
def test_a_cut_that_does_not_fit_is_refused(model: PretrainedLM, first: int, last: int) -> None:
    with pytest.raises(ValueError, match="do not fit a target of 2 layers"):
        CutDraftModel(model, first, last)


def test_only_a_language_model_can_be_cut() -> None:
    with pytest.raises(ValueError, match="a drafter can be cut from a causal language model only"):
        CutDraftModel(torch.nn.Linear(2, 2))
