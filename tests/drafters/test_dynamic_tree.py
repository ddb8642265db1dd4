"""Trees grow by path probability, and are cut to the likeliest nodes with their ancestors."""

import torch

from specstream.drafters.dynamic_tree import Candidates, extended, rerank


def test_a_reranked_tree_keeps_ancestors_the_order_of_depths_and_the_first_of_equals() -> None:
    # Two nodes below the root, 0 and 1; below node 1 the nodes 2 and 3, below node 0 nodes 4 and 5.
    tokens = torch.tensor([[10, 11, 12, 13, 14, 15]])
    parents = torch.tensor([[-1, -1, 1, 1, 0, 0]])
    scores = torch.tensor([[-1.0, -0.1, -0.1, -2.0, -1.0, -1.0]])
    depths = torch.tensor([[1, 1, 2, 2, 2, 2]])
    found = Candidates(tokens, scores, parents, depths)
    draft = rerank(found, 4, torch.tensor([2]), 2)
    assert draft.tokens.tolist() == [[10, 11, 12, 14]]
    assert draft.parents is not None and draft.parents.tolist() == [[-1, -1, 1, 0]]
    assert draft.lengths.tolist() == [4]
    low = rerank(found, 4, torch.tensor([1]), 2)
    assert low.lengths.tolist() == [2] and low.tokens[0, :2].tolist() == [10, 11]


def test_an_extended_tree_shows_each_node_its_ancestors_and_itself() -> None:
    first = extended(None, torch.tensor([[0, 0]]))
    assert first.depths.tolist() == [[0, 0]] and first.ancestors.tolist() == [[[1, 0], [0, 1]]]
    second = extended(first, torch.tensor([[1, 1]]))
    third = extended(second, torch.tensor([[1, 0]]))
    assert third.depths.tolist() == [[0, 0, 1, 1, 2, 2]]
    assert third.ancestors.int().tolist() == [
        [
            [1, 0, 0, 0, 0, 0],
            [0, 1, 0, 0, 0, 0],
            [0, 1, 1, 0, 0, 0],
            [0, 1, 0, 1, 0, 0],
            [0, 1, 0, 1, 1, 0],
            [0, 1, 1, 0, 0, 1],
        ]
    ]
