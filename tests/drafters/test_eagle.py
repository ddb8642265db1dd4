"""EAGLE-3 drafts what its training says, in trees of EAGLE-2, and the target's law survives."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config

from specstream.drafters import Eagle3
from specstream.drafters.eagle import EagleState, chosen_layers
from specstream.drafters.loading import load_drafter, save_drafter
from specstream.generation import (
    AutoregressivePipeline,
    CostModelLength,
    DraftLength,
    FixedLength,
    Limits,
    SpeculativePipeline,
    StepCosts,
)
from specstream.generation.batch import Batch
from specstream.generation.lengths import RowLength
from specstream.models import PretrainedLM
from specstream.models.eagle import layer_config
from specstream.models.fingerprint import fingerprint
from specstream.models.walk import read
from specstream.sampling import Noise, Sampling
from specstream.structures import Context, Guarantee, Stats, TokenDraft
from specstream.training.eagle import unroll
from specstream.verification import TokenRejection
from tests.toys import VOCABULARY, chi_square, count_tokens, joint_law, letters, toy_lm

WORDS = 12
PROMPTS = ([3, 1, 4, 1, 5, 9, 2, 6], [7], [0, 1, 0, 1, 2, 2, 3, 5, 8, 9, 9, 9, 0, 3, 4, 1, 1, 8, 5])
GREEDY = Sampling(temperature=0.0)
ROWS = 1024
# Costs that leave the choice to the history, so that rows stop drafting and try again.
COSTS = StepCosts(1.0, (0.0, 1.3, 1.5, 1.7, 1.9), (0.0, 0.1, 0.1, 0.1, 0.1))


@pytest.fixture(scope="module")
def target() -> PretrainedLM:
    return toy_lm(WORDS, num_layers=3, sharpness=5.0)


def eagle(target: PretrainedLM, kind: type[Eagle3] = Eagle3, **options: Any) -> Eagle3:
    """Return a drafter whose every weight matters."""
    drafter = kind(target, **{"width": 2, "num_nodes": 6, "max_tokens": 4} | options)
    noise = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in drafter.parameters():
            weight.add_(torch.randn(weight.shape, generator=noise) * 0.3)
    return drafter.eval().requires_grad_(False)


def pipeline(
    target: PretrainedLM,
    drafter: Eagle3,
    lengths: DraftLength,
    sampling: Sampling = GREEDY,
    new: int = 12,
    batch_size: int = 3,
) -> SpeculativePipeline:
    return SpeculativePipeline(
        target, drafter, letters(), None, lengths, sampling, Limits(new), batch_size, costs=COSTS
    )


@torch.no_grad()
def training_logits(drafter: Eagle3, history: list[int], path: list[int]) -> Tensor:
    """Return what training says (U,) after `history` and the drafted `path` below it."""
    tokens = torch.tensor([[*history, *path]])
    places = torch.arange(tokens.shape[1])[None]
    _, features = read(drafter.borrowed[0], tokens, places, None, drafter.feature_layers)
    outputs = unroll(drafter, tokens, features, places, None, len(path) + 1)
    return drafter.network.logits(outputs[-1][0, len(history) - 2])


@dataclass
class NaiveTree:
    """What EAGLE-2 drafts, node by node, from the laws of training."""

    paths: list[list[int]]
    logits: list[Tensor]  # of each depth, of the nodes expanded there in their order


def naive_tree(drafter: Eagle3, history: list[int], height: int, penalty: float) -> NaiveTree:
    vocabulary = drafter.network.draft_vocabulary.tolist()
    found: list[tuple[list[int], float]] = []
    said: list[Tensor] = []
    kept: list[tuple[list[int], float]] = [([], 0.0)]
    for _ in range(height):
        said.append(torch.stack([training_logits(drafter, history, path) for path, _ in kept]))
        level = []
        for (path, score), logits in zip(kept, said[-1], strict=True):
            seen = torch.tensor([token in [*history, *path] for token in vocabulary])
            lowered = torch.minimum(logits / penalty, logits * penalty)
            best = torch.where(seen, lowered, logits).log_softmax(-1).topk(drafter.width)
            for token, step in zip(best.indices.tolist(), best.values.tolist(), strict=True):
                level.append(([*path, vocabulary[token]], score + step))
        found += level
        kept = sorted(level, key=lambda node: -node[1])[: drafter.width]
    order = sorted(range(len(found)), key=lambda i: (-found[i][1], i))
    return NaiveTree([found[i][0] for i in sorted(order[: drafter.num_nodes])], said)


def paths(draft: TokenDraft, row: int) -> list[list[int]]:
    """Return the path to each drafted node of a row."""
    assert draft.parents is not None
    found: list[list[int]] = []
    for token, parent in zip(draft.tokens[row].tolist(), draft.parents[row].tolist(), strict=True):
        found.append([*(found[parent] if parent >= 0 else []), token])
    return found


class Watched(Eagle3):
    """Compares every tree it drafts with the naive one, and all that its head says on the way."""

    rounds = 0

    def propose(
        self, context: Context, cache: EagleState, num_tokens: int, sampling: Sampling, noise: Noise
    ) -> TokenDraft:
        said: list[Tensor] = []
        hook = self.network.lm_head.register_forward_hook(lambda *call: said.append(call[2]))
        draft = super().propose(context, cache, num_tokens, sampling, noise)
        hook.remove()
        assert context.wanted is not None
        for row, height in enumerate(context.wanted.tolist()):
            history, real = context.history[row], int(draft.lengths[row])
            assert real == (self.drafted(height) if len(history) > 1 else 0)
            if real:
                expected = naive_tree(self, history, height, sampling.repetition_penalty)
                for found, logits in zip(said, expected.logits, strict=False):
                    torch.testing.assert_close(found[row], logits, atol=1e-5, rtol=1e-5)
                assert paths(draft, row)[:real] == expected.paths
        self.rounds += 1
        return draft


@dataclass(frozen=True)
class Seldom(FixedLength):
    """Drafts in every eighth round."""

    def for_row(self, costs: StepCosts | None) -> RowLength:
        class Row(RowLength):
            turns = itertools.cycle([self.max_tokens, 0, 0, 0, 0, 0, 0, 0])

            def choose(self) -> int:
                return next(self.turns)

        return Row()


@pytest.mark.parametrize(
    ("options", "lengths", "new"),
    [
        ({}, FixedLength(4), 14),
        ({"width": 1}, FixedLength(4), 14),
        ({"width": 3, "num_nodes": 5, "draft_vocab_size": 8}, FixedLength(2), 14),
        ({}, CostModelLength(4, retry=1), 14),
        ({}, Seldom(4), 36),
    ],
    ids=["tree", "chain", "reduced vocabulary", "cost model", "seldom"],
)
def test_trees_and_chains_are_drafted_from_the_logits_of_training_whatever_came_before(
    target: PretrainedLM, options: dict[str, Any], lengths: DraftLength, new: int
) -> None:
    """After ragged prompts, rejected and accepted rounds, and rounds in which nothing was drafted.

    The reference reads the committed tokens alone, so keys that a rejected draft had left behind,
    or places that were never read anew, would show.
    """
    drafter = eagle(target, Watched, **options)
    decoding = pipeline(target, drafter, lengths, Sampling(), new)
    decoding.complete(PROMPTS)
    assert drafter.rounds > 3 and 0 < sum(decoding.stats.accepted) < sum(decoding.stats.tested)
    if not isinstance(lengths, FixedLength) or isinstance(lengths, Seldom):
        assert decoding.stats.plain_rounds > 3


@pytest.mark.parametrize("batch_size", [1, 3])
def test_greedy_text_is_the_targets_own_for_every_height(
    target: PretrainedLM, batch_size: int
) -> None:
    plain = AutoregressivePipeline(target, letters(), GREEDY, Limits(12), batch_size)
    expected = [completion.tokens for completion in plain.complete(PROMPTS)]
    drafter = eagle(target, width=3, num_nodes=9)
    for lengths in (*map(FixedLength, (0, 1, 2, 4)), CostModelLength(4, retry=1)):
        decoding = pipeline(target, drafter, lengths, batch_size=batch_size)
        found = [completion.tokens for completion in decoding.complete(PROMPTS)]
        assert found == expected, lengths
        assert (sum(decoding.stats.accepted) > 0) is (lengths.max_tokens > 0)


@pytest.mark.parametrize("architecture", ["qwen3", "gpt2"])
def test_other_kinds_of_targets_are_drafted_for_too(architecture: str) -> None:
    if architecture == "gpt2":
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            vocab_size=WORDS, n_positions=64, n_embd=16, n_layer=3, n_head=2,
            attn_implementation="sdpa",
        )  # fmt: skip
        target = PretrainedLM.of(GPT2LMHeadModel(config).eval())
    else:
        target = toy_lm(WORDS, num_layers=3, architecture=architecture)
    plain = AutoregressivePipeline(target, letters(), GREEDY, Limits(8)).complete(PROMPTS)
    decoding = pipeline(target, eagle(target, Watched), FixedLength(2), new=8)
    assert [c.tokens for c in decoding.complete(PROMPTS)] == [c.tokens for c in plain]


def test_greedy_text_with_a_repetition_penalty_is_the_targets_own(target: PretrainedLM) -> None:
    """The drafter minds the penalty too, of the nodes above each node as well."""
    strong = Sampling(temperature=0.0, repetition_penalty=3.0)
    plain = AutoregressivePipeline(target, letters(), strong, Limits(8), 3).complete(PROMPTS)
    drafter = eagle(target, Watched, draft_vocab_size=9)
    decoding = pipeline(target, drafter, FixedLength(4), strong, new=8)
    assert [c.tokens for c in decoding.complete(PROMPTS)] == [c.tokens for c in plain]


@pytest.mark.parametrize(
    ("options", "sampling"),
    [
        ({"width": 2, "num_nodes": 5}, Sampling()),
        ({"width": 3, "num_nodes": 8, "draft_vocab_size": 3}, Sampling(0.7, top_k=4)),
        ({"width": 1}, Sampling(repetition_penalty=1.4)),
    ],
    ids=["tree", "reduced vocabulary, warped", "chain, penalty"],
)
def test_sampled_text_has_the_targets_law(options: dict[str, Any], sampling: Sampling) -> None:
    target = toy_lm(num_layers=2, sharpness=6.0)
    drafter, prompts = eagle(target, **options), ([0, 1, 2], [3])
    decoding = pipeline(target, drafter, FixedLength(3), sampling, new=4, batch_size=ROWS)
    found = decoding.complete([prompts[row % 2] for row in range(ROWS)], seed=7)
    for first in (0, 1):
        counts = [count_tokens(found[i::2], slice(first, first + 3), VOCABULARY) for i in (0, 1)]
        laws = [joint_law(target, prompt, sampling, 4) / 2 for prompt in prompts]
        laws = [law.sum(3 if first == 0 else 0) for law in laws]
        assert chi_square(torch.stack(counts), torch.stack(laws)) > 0.01
    assert 0 < sum(decoding.stats.accepted) < sum(decoding.stats.tested)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_round_drafts_what_an_eager_one_does(target: PretrainedLM) -> None:
    sampling = Sampling(0.8, repetition_penalty=1.2)
    drafter, texts = eagle(target), []
    for on in (True, False):
        decoding = SpeculativePipeline(
            target, drafter, letters(), None, FixedLength(3), sampling, Limits(8), 3, on
        )
        texts.append([completion.tokens for completion in decoding.complete(PROMPTS, seed=1)])
    assert texts[0] == texts[1] and sum(decoding.stats.accepted) > 0


def context_of(prompts: list[list[int]]) -> Context:
    stats, device = Stats("text", Guarantee.EXACT_LAW), torch.device("cpu")
    numbers = range(len(prompts))
    return Batch(prompts, numbers, 64, Limits(), letters(), stats, device, WORDS).context


def test_a_tree_has_one_shape_for_one_height(target: PretrainedLM) -> None:
    drafter = eagle(target, width=3, num_nodes=14, max_tokens=5)
    sizes = [drafter.drafted(height) for height in range(6)]
    assert sizes == [0, 3, 12, 14, 14, 14]
    assert [drafter.num_slots(height) for height in (0, 5)] == [1, 15]
    draft = drafter.propose(
        context_of([[1, 2, 3], [4]]), drafter.new_cache(2, 64), 2, Sampling(), Noise(0)
    )
    assert draft.tokens.shape == (2, 12) and draft.height == 2
    assert draft.lengths.tolist() == [12, 0], "a row of one token has no feature yet"


def test_features_are_read_where_published_checkpoints_read_them() -> None:
    """They number the outputs of layers from 1, the embeddings being 0: 2, L // 2, L - 3."""
    assert chosen_layers(None, 32) == (1, 15, 28)
    assert chosen_layers(None, 7) == (1, 2, 3)
    assert chosen_layers(None, 3) == (0, 1, 2) and chosen_layers(None, 1) == (0,)


def test_the_embeddings_are_the_targets_own_and_not_counted(target: PretrainedLM) -> None:
    drafter = eagle(target, draft_vocab_size=8)
    size = target.config.hidden_size
    assert sum(drafter.extra_parameters().values()) == sum(p.numel() for p in drafter.parameters())
    assert drafter.extra_parameters()["head"] == 8 * size
    assert drafter.extra_parameters()["fusion"] == 3 * size * size
    embeddings = target.model.get_input_embeddings().weight
    assert not any(p.data_ptr() == embeddings.data_ptr() for p in drafter.parameters())
    assert torch.equal(drafter.embed(torch.tensor([[5]]))[0, 0], embeddings[5])


def test_fresh_weights_depend_on_the_seed_alone(target: PretrainedLM) -> None:
    first = Eagle3(target, seed=3).state_dict()
    torch.rand(1)
    again, other = Eagle3(target, seed=3).state_dict(), Eagle3(target, seed=4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["network.fc.weight"], other["network.fc.weight"])
    assert torch.equal(first["network.lm_head.weight"], target.head.weight)


def test_the_most_frequent_tokens_are_drafted(target: PretrainedLM) -> None:
    drafter = Eagle3(target, draft_vocab_size=4)
    drafter.restrict(torch.tensor([0, 0, 9, 5, 0, 0, 5, 1, 1, 0, 0, 0]))
    assert drafter.network.draft_vocabulary.tolist() == [2, 3, 6, 7]
    assert drafter.network.d2t.tolist() == [2, 2, 4, 4]
    assert drafter.network.t2d.nonzero().flatten().tolist() == [2, 3, 6, 7]
    assert torch.equal(drafter.network.lm_head.weight, target.head.weight[[2, 3, 6, 7]])


def test_frequencies_of_places_stay_exact_when_weights_are_cast(target: PretrainedLM) -> None:
    network = eagle(target).network
    exact = network.rotary.inv_freq.clone()
    network.to(torch.bfloat16)
    assert network.dtype == torch.bfloat16 and torch.equal(network.rotary.inv_freq, exact)


@pytest.mark.parametrize("reduced", [None, 7])
def test_a_drafter_is_saved_and_loaded_for_its_target(
    target: PretrainedLM, tmp_path: Path, reduced: int | None
) -> None:
    drafter = eagle(target, draft_vocab_size=reduced, feature_layers=[0, 3], intermediate_size=20)
    if reduced:
        drafter.restrict(torch.arange(WORDS))
    folder = tmp_path / "draft"
    save_drafter(folder, drafter, letters(), "", fingerprint(target.model))
    loaded = load_drafter(folder, target)
    assert isinstance(loaded, Eagle3) and str(loaded) == str(drafter)
    state, expected = loaded.state_dict(), drafter.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        kept = tensor.to(torch.bfloat16).float() if tensor.is_floating_point() else tensor
        assert torch.equal(state[name], kept), name
    texts = [
        [c.tokens for c in pipeline(target, each, FixedLength(3)).complete(PROMPTS)]
        for each in (drafter, loaded)
    ]
    assert texts[0] == texts[1]
    assert loaded.network.draft_vocabulary.tolist() == drafter.network.draft_vocabulary.tolist()


def test_weights_that_do_not_fit_are_refused(target: PretrainedLM, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read .*eagle3.safetensors"):
        Eagle3(target, weights=str(tmp_path))
    eagle(target).save(tmp_path, letters())
    Eagle3(target, weights=str(tmp_path))
    with pytest.raises(ValueError, match=r"weights of another drafter: fc.weight is"):
        Eagle3(target, feature_layers=[1], weights=str(tmp_path))
    with pytest.raises(ValueError, match="weights of another drafter: d2t"):
        Eagle3(target, draft_vocab_size=WORDS, weights=str(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature_layers": []}, r"ascending numbers in 0..3, not \[\]"),
        ({"feature_layers": [1, 0]}, r"ascending numbers in 0..3, not \[1, 0\]"),
        ({"feature_layers": [0, 4]}, r"ascending numbers in 0..3, not \[0, 4\]"),
        ({"feature_layers": [-1, 2]}, r"ascending numbers in 0..3, not \[-1, 2\]"),
        ({"width": 0}, r"width must be in 1..12, not 0"),
        ({"width": 9, "draft_vocab_size": 8}, r"width must be in 1..8, not 9"),
        ({"num_nodes": 64}, r"num_nodes must be in 1..63, not 64"),
        ({"max_tokens": 0}, r"max_tokens must be in 1..63, not 0"),
        ({"draft_vocab_size": 13}, r"draft_vocab_size must be in 1..12, not 13"),
        ({"intermediate_size": 0}, r"intermediate_size must be positive, not 0"),
    ],
)
def test_options_that_make_no_drafter_are_refused(
    target: PretrainedLM, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Eagle3(target, **options)


def test_targets_that_do_not_fit_are_refused(target: PretrainedLM) -> None:
    with pytest.raises(ValueError, match="for a causal language model only"):
        Eagle3(torch.nn.Linear(2, 2))
    drafter = eagle(target)
    for other, message in (
        (toy_lm(WORDS + 1, num_layers=3), "a vocabulary of 12, not one of 13"),
        (toy_lm(WORDS, num_layers=3, hidden_size=24), "a hidden size of 16, not one of 24"),
        (toy_lm(WORDS, num_layers=2), "a number of layers of 3, not one of 2"),
    ):
        with pytest.raises(ValueError, match=message):
            pipeline(other, drafter, FixedLength(2))
    with pytest.raises(ValueError, match="more than the 4 that this Eagle3 drafts"):
        pipeline(target, drafter, FixedLength(5))
    with pytest.raises(ValueError, match="TokenRejection judges chains"):
        SpeculativePipeline(target, drafter, letters(), TokenRejection(), FixedLength(2))
    with pytest.raises(ValueError, match="heads of an even number of dimensions, not 3"):
        layer_config(GPT2Config(n_embd=6, n_head=2), None)
