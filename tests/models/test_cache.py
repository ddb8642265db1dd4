"""The static cache: rollback, stale slots, views, trees and `keep`, against forwards without it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from specstream.models import PretrainedLM, SlotCache
from specstream.models.cache import NodeTree, attention_mask, bucket
from tests.toys import toy_lm

VOCABULARY = 11
CAPACITY = 128
TOKENS = torch.randint(0, VOCABULARY, (2, 14), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def lm(request: pytest.FixtureRequest) -> PretrainedLM:
    return toy_lm(VOCABULARY, num_layers=2, attn_implementation=request.param)


@torch.no_grad()
def extend(lm: PretrainedLM, cache: SlotCache, tokens: Tensor, lengths: list[int]) -> Tensor:
    return lm.extend(tokens, torch.tensor(lengths), cache, CAPACITY)


def filled(lm: PretrainedLM, lengths: list[int]) -> SlotCache:
    """Return a cache whose rows hold the first `lengths` of TOKENS, and garbage after them."""
    cache = lm.new_cache(2, CAPACITY)
    extend(lm, cache, TOKENS[:, : max(lengths)], [0, 0])
    return cache


def rows(tokens: Tensor, starts: list[int], width: int) -> Tensor:
    return torch.stack([tokens[b, s : s + width] for b, s in enumerate(starts)])


@torch.no_grad()
def test_ragged_passes_give_the_logits_of_a_forward_without_a_cache(lm: PretrainedLM) -> None:
    cache = filled(lm, [7, 3])
    found = extend(lm, cache, rows(TOKENS, [7, 3], 5), [7, 3])
    whole = lm(TOKENS)
    torch.testing.assert_close(found, torch.stack([whole[0, 7:12], whole[1, 3:8]]))


def test_a_rollback_is_as_if_nothing_had_been_drafted(lm: PretrainedLM) -> None:
    drafted, fresh = filled(lm, [7, 3]), filled(lm, [7, 3])
    extend(lm, drafted, (rows(TOKENS, [7, 3], 6) + 1) % VOCABULARY, [7, 3])  # all rejected
    following = rows(TOKENS, [7, 3], 4)
    found = extend(lm, drafted, following, [7, 3])
    assert torch.equal(found, extend(lm, fresh, following, [7, 3]))


def test_slots_beyond_a_rows_length_are_never_read(lm: PretrainedLM) -> None:
    cache, poisoned = filled(lm, [7, 3]), filled(lm, [7, 3])
    for layer in poisoned.layers:
        for storage in (layer.keys, layer.values):
            for row, length in enumerate([7, 3]):
                storage.view(2, CAPACITY, -1)[row, length:] = 1e30
    following = rows(TOKENS, [7, 3], 4)
    found = extend(lm, poisoned, following, [7, 3])
    assert torch.equal(found, extend(lm, cache, following, [7, 3]))


def test_a_pass_reads_its_view_only(lm: PretrainedLM) -> None:
    cache = lm.new_cache(2, 2 * CAPACITY)
    extend(lm, cache, TOKENS[:, :7], [0, 0])
    for layer in cache.layers:
        layer.keys.view(2, 2 * CAPACITY, -1)[:, CAPACITY:] = torch.nan
        layer.values.view(2, 2 * CAPACITY, -1)[:, CAPACITY:] = torch.nan
    assert extend(lm, cache, TOKENS[:, 7:9], [7, 7]).isfinite().all()


@torch.no_grad()
def test_a_row_may_cross_from_one_view_into_the_next(lm: PretrainedLM) -> None:
    tokens = torch.arange(140).remainder(VOCABULARY).expand(1, -1)
    cache = lm.new_cache(1, 2 * CAPACITY)
    lm.extend(tokens[:, :126], torch.tensor([0]), cache, CAPACITY)
    found = lm.extend(tokens[:, 126:], torch.tensor([126]), cache, 2 * CAPACITY)
    torch.testing.assert_close(found, lm(tokens)[:, 126:], atol=1e-4, rtol=1e-4)


def test_only_the_last_logits_are_made_when_only_they_are_asked_for(lm: PretrainedLM) -> None:
    cache, lengths = lm.new_cache(2, CAPACITY), torch.tensor([0, 0])
    with torch.no_grad():
        whole = lm.extend(TOKENS, lengths, cache, CAPACITY)
        last = lm.extend(TOKENS, lengths, cache, CAPACITY, num_logits=1)
    torch.testing.assert_close(last, whole[:, -1:])


# A tree of five drafted nodes: two children of the last committed token, and so on.
PARENTS = [-1, -1, 0, 0, 2]
PATHS = [[0], [1], [0, 2], [0, 3], [0, 2, 4]]
DEPTHS = [len(path) for path in PATHS]


def tree_pass(lm: PretrainedLM, cache: SlotCache, nodes: Tensor, lengths: list[int]) -> Tensor:
    """Run the five nodes (2, 5) of a tree in one pass, logits (2, 5, V)."""
    ancestors = torch.zeros(5, 5, dtype=torch.bool)
    for node, path in enumerate(PATHS):
        ancestors[node, path] = True
    tree = NodeTree(torch.tensor(DEPTHS).expand(2, 5) - 1, ancestors.expand(2, 5, 5))
    with torch.no_grad():
        return lm.extend(nodes, torch.tensor(lengths), cache, CAPACITY, tree=tree)


@torch.no_grad()
def test_a_tree_in_one_pass_equals_a_forward_for_each_path(lm: PretrainedLM) -> None:
    lengths = [7, 3]
    nodes = torch.tensor([[1, 2, 3, 4, 5], [9, 8, 7, 6, 5]])
    found = tree_pass(lm, filled(lm, lengths), nodes, lengths)
    for row, length in enumerate(lengths):
        for node, path in enumerate(PATHS):
            chain = torch.cat([TOKENS[row, :length], nodes[row, path]])[None]
            torch.testing.assert_close(found[row, node], lm(chain)[0, -1], atol=1e-4, rtol=1e-4)


def test_the_kept_path_of_a_tree_is_a_chain_again(lm: PretrainedLM) -> None:
    lengths = [7, 3]
    nodes = torch.tensor([[1, 2, 3, 4, 5], [9, 8, 7, 6, 5]])
    kept = [[0, 2, 4], [0, 3]]  # 0, 3 padded below with a copy onto itself
    tree, chain = filled(lm, lengths), filled(lm, lengths)
    tree_pass(lm, tree, nodes, lengths)
    start = torch.tensor(lengths)[:, None]
    places = start + torch.arange(3)
    tree.keep(start + torch.tensor([[0, 2, 4], [0, 3, 2]]), places)
    extend(lm, chain, torch.stack([nodes[0, kept[0]], nodes[1, [0, 3, 2]]]), lengths)
    following = torch.tensor([[6], [2]])
    ends = [7 + 3, 3 + 2]
    found, expected = (extend(lm, cache, following, ends) for cache in (tree, chain))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_window_over_a_tree_is_refused() -> None:
    with pytest.raises(AssertionError, match="depths"):
        tree = NodeTree(torch.tensor([[0, 1]]), torch.ones(1, 2, 2).tril().bool())
        attention_mask(torch.tensor([[3, 4]]), 8, window=2, tree=tree)


def test_views_are_whole_steps_up_to_the_capacity() -> None:
    wanted = [256, 256, 512, 512, 600]
    assert [bucket(n, 600) for n in (1, 256, 257, 512, 513)] == wanted
