"""Streams draft what their training says, and never change what the target decodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from specstream.drafters import SpeculativeStreaming
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
from specstream.generation.target_pass import empty_draft, rooted
from specstream.models import PretrainedLM
from specstream.models.cache import NodeTree
from specstream.models.fingerprint import fingerprint
from specstream.models.walk import walk
from specstream.sampling import Noise, Sampling
from specstream.structures import Guarantee, Stats
from specstream.training.streaming import stream_states
from specstream.verification import TokenRejection
from tests.toys import chi_square, count_tokens, joint_law, letters, toy_lm

VOCABULARY = 24
NEW = 12
PROMPTS = ([3, 1, 4, 1, 5, 9, 2, 6], [7], [0, 1, 0, 1, 0, 1, 0])
GREEDY = Sampling(temperature=0.0)


def gpt2(vocab_size: int = VOCABULARY) -> PretrainedLM:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocab_size, n_positions=64, n_embd=16, n_layer=3, n_head=2,
        attn_implementation="sdpa",
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval().requires_grad_(False)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.mul_(8.0)
    return PretrainedLM.of(model)


def frozen(architecture: str, vocab_size: int = VOCABULARY) -> PretrainedLM:
    if architecture == "gpt2":
        return gpt2(vocab_size)
    lm = toy_lm(vocab_size, num_layers=3, architecture=architecture, sharpness=6.0)
    return lm.eval().requires_grad_(False)


def streams(target: PretrainedLM, **options: Any) -> SpeculativeStreaming:
    """Return streams whose adapters and early exit have some effect."""
    settings: dict[str, Any] = {"num_streams": 3, "stream_layers": 2, "branching": [3, 2, 1]}
    drafter = SpeculativeStreaming(target, **settings | options)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        for parameter in drafter.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.2)
    return drafter.eval().requires_grad_(False)


def pipeline(
    drafter: SpeculativeStreaming, sampling: Sampling, lengths: DraftLength, batch_size: int
) -> SpeculativePipeline:
    costs = StepCosts(1.0, (0.0, 1.02, 1.04, 1.06), (0.0, 0.01, 0.01, 0.01))
    return SpeculativePipeline(
        drafter.target, drafter, letters(), lengths=lengths, sampling=sampling,
        limits=Limits(NEW, ignore_eos=True), batch_size=batch_size, costs=costs,
    )  # fmt: skip


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("mode", ["lossless", "shared"])
@pytest.mark.parametrize("kept", [None, 3])
def test_greedy_text_is_the_targets_own(architecture: str, mode: str, kept: int | None) -> None:
    target = frozen(architecture)
    plain = AutoregressivePipeline(target, letters(), GREEDY, Limits(NEW, ignore_eos=True))
    expected = [completion.tokens for completion in plain.complete(PROMPTS)]
    drafter = streams(target, mode=mode, kept_nodes=kept)
    drafted = 0
    for lengths in (FixedLength(1), FixedLength(3), CostModelLength(3, prior=0.1, retry=2)):
        for batch_size in (1, 3):
            decoder = pipeline(drafter, GREEDY, lengths, batch_size)
            assert [c.tokens for c in decoder.complete(PROMPTS)] == expected
            drafted += sum(decoder.stats.tested)
            assert decoder.guarantee is Guarantee.EXACT_LAW
    assert drafted > 0


@pytest.mark.parametrize("kept", [None, 3])
def test_at_temperature_one_the_law_is_the_targets(kept: int | None) -> None:
    target = frozen("llama", 5)
    drafter = streams(target, kept_nodes=kept)
    decoder = pipeline(drafter, Sampling(), FixedLength(3), 512)
    prompts = ([0, 1, 2, 1], [3])
    rows = [prompts[row % 2] for row in range(1024)]
    found = decoder.complete(rows, seed=3)
    counts = [count_tokens(found[kind::2], slice(1, 4), 5) for kind in range(2)]
    laws = [joint_law(target, prompt, Sampling(), 4).sum(0) / 2 for prompt in prompts]
    assert chi_square(torch.stack(counts), torch.stack(laws)) > 0.01
    assert sum(decoder.stats.accepted) > 50


def riding(drafter: SpeculativeStreaming, prompt: list[int], nodes: list[int]) -> Any:
    """Run prompt[:-1] and then a pass of prompt[-1] with the chain `nodes`, with streams."""
    target = drafter.target
    cache = target.new_cache(1, 256)
    tokens = torch.tensor([prompt + nodes])
    start = torch.tensor([len(prompt) - 1])
    target.extend(tokens[:, : len(prompt) - 1], torch.tensor([0]), cache, 256)
    width = len(nodes) + 1
    tree = NodeTree(torch.arange(width)[None], torch.ones(1, width, width).tril().bool())
    real = torch.tensor([width])
    rider = drafter.attach()
    seen = walk(target, tokens[:, len(prompt) - 1 :], start, cache, 256, tree, (), rider, real)
    cache = target.new_cache(1, 256)
    return seen, target.extend(tokens, torch.tensor([0]), cache, 256)[:, len(prompt) - 1 :]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_in_lossless_mode_streams_leave_the_targets_logits_as_they_are(architecture: str) -> None:
    drafter = streams(frozen(architecture))
    seen, plain = riding(drafter, PROMPTS[0], [5, 6])
    torch.testing.assert_close(seen.logits, plain, atol=1e-5, rtol=1e-5)
    without = streams(drafter.target, mode="shared")
    bare, _ = riding(without, PROMPTS[0], [5, 6])
    assert (seen.riders - bare.riders).abs().max() > 1e-2, "the adapters act on the streams"


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_folded_adapters_give_the_streams_that_adapters_give(architecture: str) -> None:
    drafter = streams(frozen(architecture))
    folded, _ = riding(drafter, PROMPTS[0], [5, 6])
    assert drafter.folded is not None
    drafter.train()
    assert drafter.copies is not None
    drafter.copies.eval()  # without dropout
    adapted, _ = riding(drafter, PROMPTS[0], [5, 6])
    assert drafter.folded is None, "weights that change are not folded"
    torch.testing.assert_close(folded.riders, adapted.riders, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(folded.logits, adapted.logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("mode", ["lossless", "shared"])
def test_training_computes_the_streams_that_decoding_does(architecture: str, mode: str) -> None:
    from specstream.models.stream_attention import register

    target = frozen(architecture)
    drafter = streams(target, mode=mode)
    documents = [PROMPTS[0] + [5, 6], PROMPTS[2]]
    tokens = torch.tensor([documents[0] + documents[1]])
    lengths = [len(document) for document in documents]
    batch = {
        "input_ids": tokens,
        "loss_mask": torch.ones_like(tokens).bool(),
        "positions": torch.cat([torch.arange(n) for n in lengths])[None],
        "documents": torch.repeat_interleave(torch.arange(2), torch.tensor(lengths))[None],
    }
    target.model.set_attn_implementation(register())
    trained = stream_states(target, drafter, batch)
    seen, _ = riding(drafter, PROMPTS[0], [5, 6])
    first = len(PROMPTS[0]) - 1
    for node in range(2):  # the last node's future lies in the other document: not scored
        place = (trained.places[0] == first + node).nonzero()
        if len(place):
            found = trained.riders[0, place[0, 0]]
            torch.testing.assert_close(found, seen.riders[0, node], atol=1e-4, rtol=1e-4)
    assert first in trained.places[0].tolist()


def test_a_pruned_tree_holds_its_likeliest_nodes_and_their_parents() -> None:
    drafter = streams(frozen("llama"), kept_nodes=4)
    draft = drafter.tree.fill(torch.randint(VOCABULARY, (2, 3, 3)), 3)
    tokens = torch.cat([torch.tensor([[1], [2]]), draft.tokens], 1)
    tree = rooted(draft)
    hidden = torch.randn(2, tokens.shape[1], 16)
    kept = drafter.prune(hidden, tokens, tree, torch.tensor([tokens.shape[1], 8]))
    assert kept is not None and kept.shape == (2, 5)
    for row in range(2):
        nodes = kept[row].tolist()
        assert nodes[0] == 0 and nodes == sorted(nodes)
        for node in nodes:
            assert set(tree.ancestors[row, node].nonzero().flatten().tolist()) <= set(nodes)
    exits = drafter.target.head(drafter.target.decoder.norm(drafter.early_exit(hidden)))
    for row, real in enumerate((tokens.shape[1], 8)):
        chances = [0.0]
        for node in range(1, real):
            parent = int(draft.parents[row, node - 1]) + 1
            step = exits[row, parent].log_softmax(-1)[tokens[row, node]]
            chances.append(chances[parent] + float(step))
        best = sorted(range(real), key=lambda node: -chances[node])[:5]
        assert sorted(best) == kept[row].tolist()


def test_streams_add_twenty_numbers_a_hidden_unit_and_count_adapters_apart() -> None:
    target = frozen("llama")
    size = target.config.hidden_size
    shared = SpeculativeStreaming(target, 4, mode="shared").extra_parameters()
    assert shared["stream embeddings"] + shared["early exit"] == 20 * size
    assert shared["stream adapters"] == 0
    assert SpeculativeStreaming(target, 4, rank=2).extra_parameters()["stream adapters"] > 0


def test_saved_streams_load_for_their_target_only(tmp_path: Path) -> None:
    target = frozen("llama").to(torch.bfloat16)
    drafter = streams(target).to(torch.bfloat16)
    save_drafter(tmp_path / "draft", drafter, letters(), "somewhere", fingerprint(target.model))
    loaded = load_drafter(tmp_path / "draft", target)
    assert isinstance(loaded, SpeculativeStreaming)
    for name, tensor in drafter.stored().items():
        assert torch.equal(tensor, loaded.stored()[name]), name
    other = toy_lm(VOCABULARY, seed=3, num_layers=3)
    with pytest.raises(ValueError, match="was trained for the target 'somewhere'"):
        load_drafter(tmp_path / "draft", other)


def test_a_plain_round_leaves_no_stale_draft() -> None:
    drafter = streams(frozen("llama"))
    decoder = pipeline(drafter, GREEDY, FixedLength(3), 1)
    stats = Stats("text", decoder.guarantee)
    batch = Batch([PROMPTS[0]], [0], 256, decoder.limits, letters(), stats, torch.device("cpu"))
    cache, state, noise = drafter.target.new_cache(1, 256), drafter.new_cache(1, 256), Noise(0)
    nothing = empty_draft(1, torch.device("cpu"))
    for riding_along, expected in ((True, 9), (False, 0)):
        shown = decoder.verify(batch.context, cache, nothing, noise, riding=riding_along)
        if riding_along:
            from specstream.generation.target_pass import observation

            drafter.observe(observation(shown, [0], torch.tensor([1])), state)
        batch.commit(shown)
        draft = drafter.propose(batch.context, state, 2, GREEDY, noise)
        assert int(draft.lengths) == expected


def test_what_does_not_fit_is_refused_in_one_line() -> None:
    from transformers import OPTConfig, OPTForCausalLM

    target = frozen("llama")
    opt = PretrainedLM.of(
        OPTForCausalLM(
            OPTConfig(
                vocab_size=24,
                hidden_size=16,
                num_hidden_layers=1,
                ffn_dim=32,
                num_attention_heads=2,
            )
        )
    )
    for options, words in (
        ({"num_streams": 0}, "num_streams 0"),
        ({"stream_layers": 9}, "1..3"),
        ({"branching": [1] * 5}, "height 5 needs as many streams"),
        ({"branching": [4, 4, 4]}, "84 nodes; a tree has 1..64"),
        ({"paths": [[0, 1]], "branching": None}, r"\[0, 1\] has no parent"),
        ({"mode": "lossy"}, "mode 'lossy'"),
        ({"kept_nodes": 0}, "kept_nodes"),
        ({"rank": 0}, "rank 0 must be at least 1"),
        ({"alpha": float("nan")}, "alpha nan be positive"),
        ({"branching": []}, r"branching \[\] must hold positive numbers"),
        ({"paths": [], "branching": None}, "1..64 nodes, not 0"),
        ({"paths": [[0], [24]], "branching": None}, "25 ranks needs as many tokens, not 24"),
    ):
        with pytest.raises(ValueError, match=words):
            streams(target, **options)
    with pytest.raises(ValueError, match=r"num_streams 1000000000000 must lie in 1\.\.64"):
        SpeculativeStreaming(target, 10**12)
    with pytest.raises(ValueError, match="model type 'opt' does not come apart"):
        SpeculativeStreaming(opt, 2)
    with pytest.raises(ValueError, match="max_tokens 4 is more than the 3"):
        pipeline(streams(target), GREEDY, FixedLength(4), 1)
    with pytest.raises(ValueError, match="TokenRejection judges chains"):
        SpeculativePipeline(target, streams(target), letters(), TokenRejection())
