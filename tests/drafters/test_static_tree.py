"""Static trees: which nodes there are, in which order, and which guesses fill them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from specstream.drafters.static_tree import StaticTree, likeliest_paths, product_paths
from specstream.verification import depths

PATHS = [(1,), (0,), (0, 2), (0, 0), (1, 0), (0, 2, 1)]


def test_nodes_are_in_order_of_depth_and_hang_on_their_prefix() -> None:
    tree = StaticTree(PATHS)
    assert tree.paths == ((0,), (1,), (0, 0), (0, 2), (1, 0), (0, 2, 1))
    assert tree.parents.tolist() == [-1, -1, 0, 0, 1, 3]
    assert (tree.height, tree.num_ranks, len(tree)) == (3, 3, 6)
    assert depths(tree.parents[None]).tolist() == [[1, 1, 2, 2, 2, 3]]


def test_each_node_holds_the_guess_of_its_own_depth_and_rank() -> None:
    guesses = torch.tensor([[[10, 11, 12], [20, 21, 22], [30, 31, 32]]])
    draft = StaticTree(PATHS).fill(torch.cat([guesses, guesses + 100]), 3)
    assert draft.tokens.tolist() == [[10, 11, 20, 22, 20, 31], [110, 111, 120, 122, 120, 131]]
    assert draft.lengths.tolist() == [6, 6] and draft.height == 3 and draft.probs is None
    assert draft.parents is not None
    assert draft.parents.tolist() == [[-1, -1, 0, 0, 1, 3]] * 2


@pytest.mark.parametrize(("height", "nodes"), [(1, 2), (2, 5), (3, 6), (9, 6)])
def test_a_lower_tree_is_the_beginning_of_the_whole_one(height: int, nodes: int) -> None:
    tree, guesses = StaticTree(PATHS), torch.arange(9).view(1, 3, 3)
    whole, low = tree.fill(guesses, 3), tree.fill(guesses[:, :height], height)
    assert tree.cut(height) == nodes == low.tokens.shape[1]
    assert torch.equal(low.tokens, whole.tokens[:, :nodes])
    assert low.parents is not None and whole.parents is not None
    assert torch.equal(low.parents, whole.parents[:, :nodes])
    assert low.height == min(height, 3) and low.lengths.tolist() == [nodes]


def test_a_tree_moves_and_is_saved_with_no_weights_of_its_own() -> None:
    tree = StaticTree(PATHS)
    assert not tree.state_dict() and not list(tree.parameters())
    assert {buffer.device.type for buffer in tree.to("meta").buffers()} == {"meta"}


def test_trees_of_different_shape_are_printed_differently() -> None:
    assert repr(StaticTree(PATHS)) != repr(StaticTree(PATHS[:2]))


@pytest.mark.parametrize(
    ("paths", "line"),
    [
        ([(0,), (1, 0)], r"tree node \[1, 0\] has no parent in the tree"),
        ([(0,), (-1,)], r"tree node \[-1\] has no parent"),
        ([(0,), ()], r"tree node \[\] has no parent"),
        ([], "a tree has 1..64 nodes, not 0"),
        ([(i,) for i in range(65)], "a tree has 1..64 nodes, not 65"),
    ],
)
def test_what_is_no_tree_is_refused(paths: list[tuple[int, ...]], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        StaticTree(paths)


def test_branching_says_how_many_children_each_depth_has() -> None:
    tree = StaticTree(product_paths([3, 2, 1]))
    assert [tree.cut(height) for height in (1, 2, 3)] == [3, 9, 15]
    children = [tree.parents.tolist().count(node) for node in range(-1, 9)]
    assert children == [3, 2, 2, 2, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("branching", "line"),
    [
        ([], r"branching \[\] must hold positive numbers"),
        ([2, 0], r"branching \[2, 0\] must hold positive"),
        ([10_000] * 5, "makes 100010001000100010000 nodes; a tree has 1..64"),
    ],
)
def test_branching_that_makes_no_tree_is_refused(branching: list[int], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        product_paths(branching)


def chance(path: tuple[int, ...], accuracies: list[list[float]]) -> float:
    return math.prod(accuracies[depth][rank] for depth, rank in enumerate(path))


def test_the_likeliest_paths_are_those_that_a_search_of_all_paths_finds() -> None:
    accuracies = torch.rand(3, 4, generator=torch.Generator().manual_seed(0)).tolist()
    lengths = range(1, 4)
    every = [p for n in lengths for p in itertools.product(range(4), repeat=n)]
    best = sorted(every, key=lambda path: -chance(path, accuracies))
    for num_nodes in (1, 7, 30, 84):
        found = likeliest_paths(accuracies, num_nodes)
        assert found == best[:num_nodes]
        assert all(path[:-1] in {(), *found[:i]} for i, path in enumerate(found))
    assert likeliest_paths(accuracies, 85) == best, "there are no more"


def test_no_tree_of_as_many_nodes_is_expected_to_accept_more() -> None:
    """Of nodes that err independently, a tree accepts the sum of its paths' chances."""
    accuracies = [[0.6, 0.3], [0.5, 0.2]]
    every = product_paths([2, 2])
    best = sum(chance(path, accuracies) for path in likeliest_paths(accuracies, 3))
    for paths in itertools.combinations(every, 3):
        if all(path[:-1] in {(), *paths} for path in paths):
            assert sum(chance(path, accuracies) for path in paths) <= best + 1e-12


def test_the_likeliest_paths_of_many_heads_are_found_without_listing_all() -> None:
    accuracies = [[0.5 / (rank + 1) for rank in range(10)] for _ in range(12)]  # 10^12 leaves
    assert len(likeliest_paths(accuracies, 64)) == 64
