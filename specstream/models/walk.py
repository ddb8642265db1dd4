"""A pass of the target that is watched between its layers, or carries passengers.

`walk` is `PretrainedLM.extend` in parts: it also returns the hidden states of chosen layers
(features for EAGLE-3, Medusa and block drafters), and lets a drafter's own states ride along in
the upper layers (Speculative Streaming).  `read` is its counterpart without a cache, for training.

A layer's number means the output of that layer, from 0; the number of layers means the output of
the final norm, which is what the head reads.  Shapes: B rows, T nodes, M nodes kept, R riders for
each node, D hidden, F = D times the layers read, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from specstream.models.cache import NodeTree, SlotCache
from specstream.models.pretrained_lm import PretrainedLM, document_mask


class Rider(Protocol):
    """States of a drafter that travel with the nodes through the upper layers of the target."""

    first_layer: int  # where they join
    num_streams: int  # R, riders for each node

    @property
    def upper_layers(self) -> Sequence[nn.Module] | None:
        """Return layers to use instead of the target's own from there on; None: the target's."""

    def prune(self, hidden: Tensor, tokens: Tensor, tree: NodeTree, real: Tensor) -> Tensor | None:
        """Return the nodes (B, M) to go on with, ascending, ancestors included; None: all.

        The first real (B,) of a row's nodes count; others may only fill M up.
        """

    def board(self, hidden: Tensor) -> Tensor:
        """Return the riders (B, M, R, D) of nodes with states `hidden` (B, M, D)."""

    def seat(self, num_nodes: int) -> None:
        """Learn how many states before the first rider are the target's own, before each use."""


@dataclass(frozen=True, slots=True)
class Walk:
    """What a watched pass gives."""

    logits: Tensor  # (B, M, V)
    kept: Tensor | None  # (B, M) which of the T nodes they belong to; None: all
    features: Tensor | None  # (B, M, F)
    riders: Tensor | None  # (B, M, R, D) after the final norm


def walk(
    lm: PretrainedLM,
    tokens: Tensor,
    lengths: Tensor,
    cache: SlotCache,
    view: int,
    tree: NodeTree | None = None,
    feature_layers: Sequence[int] = (),
    rider: Rider | None = None,
    real: Tensor | None = None,
    num_logits: int = 0,
) -> Walk:
    """Run one pass over `cache` as `PretrainedLM.extend` does, watched, with an optional rider.

    With a rider, the first `real` (B,) of a row's nodes count.

    Riders' keys and values are written to the slots after the nodes', where the next pass
    overwrites them: they are kept for this pass only.
    """
    decoder, layers = lm.decoder, list(lm.decoder.layers)
    top, num_nodes = len(layers), tokens.shape[1]
    join = top if rider is None else rider.first_layer
    slots = lengths[:, None] + torch.arange(num_nodes, device=tokens.device)  # (B, T)
    places = lm.places(slots if tree is None else lengths[:, None] + tree.depths)
    hidden = decoder.embed(tokens, places)  # (B, T, D)
    features: list[Tensor] = []

    def climb(hidden: Tensor, first: int, last: int) -> Tensor:
        """Take `hidden` through the layers first..last-1 at the slots and places of the moment."""
        told, masks = decoder.told(hidden, places), lm.masks(slots, view, tree)
        cache.open(slots, view)
        for index in range(first, last):
            mask = lm.mask_of_layer(masks, index)
            hidden = decoder.run(layers[index], hidden, mask, told, cache)
            if index in feature_layers:
                features.append(hidden[:, :num_nodes])
        cache.close()
        return hidden

    hidden, kept = climb(hidden, 0, join), None
    if rider is not None:
        assert tree is not None and real is not None, "streams ride with a tree, even of one node"
        kept = rider.prune(hidden, tokens, tree, real)
        if kept is not None:
            hidden, slots, tree = _keep(hidden, kept), _keep(slots, kept), _keep_tree(tree, kept)
            features, num_nodes = [_keep(feature, kept) for feature in features], kept.shape[1]
        hidden = torch.cat([hidden, rider.board(hidden).flatten(1, 2)], 1)  # (B, M + M R, D)
        free = lengths + tokens.shape[1]
        slots, tree = _with_riders(slots, free, tree, rider.num_streams)
        places = lm.places(lengths[:, None] + tree.depths)
        if rider.upper_layers is not None:
            layers[join:] = rider.upper_layers
        rider.seat(num_nodes)
        hidden = climb(hidden, join, top)
    hidden = decoder.norm(hidden)
    nodes, riders = hidden[:, :num_nodes], None
    if rider is not None:
        riders = hidden[:, num_nodes:].unflatten(1, (num_nodes, rider.num_streams))
    if top in feature_layers:
        features.append(nodes)
    logits = lm.head(nodes[:, -num_logits:] if num_logits else nodes)
    return Walk(logits, kept, torch.cat(features, -1) if features else None, riders)


def read(
    lm: PretrainedLM,
    tokens: Tensor,
    positions: Tensor,
    documents: Tensor | None,
    feature_layers: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Return what the head reads (B, T, D) and the features (B, T, F), without a cache.

    `feature_layers` is not empty; other arguments as in `PretrainedLM.hidden`.
    """
    decoder = lm.decoder
    rows = torch.zeros_like(tokens) if documents is None else documents
    masks = lm.masks(*document_mask(rows))
    hidden = decoder.embed(tokens, positions)
    told, features = decoder.told(hidden, positions), []
    for index, layer in enumerate(decoder.layers):
        hidden = decoder.run(layer, hidden, lm.mask_of_layer(masks, index), told)
        if index in feature_layers:
            features.append(hidden)
    hidden = decoder.norm(hidden)
    if len(decoder.layers) in feature_layers:
        features.append(hidden)
    return hidden, torch.cat(features, -1)


def _keep(values: Tensor, kept: Tensor) -> Tensor:
    """Return values (B, M, ...) at the nodes kept (B, M) of values (B, T, ...)."""
    index = kept.view(*kept.shape, *[1] * (values.dim() - 2))
    return values.gather(1, index.expand(-1, -1, *values.shape[2:]))


def _keep_tree(tree: NodeTree, kept: Tensor) -> NodeTree:
    rows = _keep(tree.ancestors, kept)  # (B, M, T)
    columns = kept[:, None, :].expand(-1, kept.shape[1], -1)
    return NodeTree(tree.depths.gather(1, kept), rows.gather(2, columns))


def _with_riders(
    slots: Tensor, free: Tensor, tree: NodeTree, num_streams: int
) -> tuple[Tensor, NodeTree]:
    """Add R riders for each node to the slots (B, M) and to the tree.

    A rider sees what its node sees, its node, and the node's riders up to itself (Bhendawade et
    al. 2024, eq. 2); `free` (B,) is the first slot that no node uses.
    """
    num_nodes = slots.shape[1]
    count = num_nodes * num_streams
    steps = torch.arange(count, device=slots.device)
    stream = steps % num_streams + 1  # 1..R
    depths = tree.depths.repeat_interleave(num_streams, 1) + stream
    seen = tree.ancestors.repeat_interleave(num_streams, 1)  # (B, M R, M)
    same = steps[:, None] // num_streams == steps // num_streams
    among = (same & (steps[:, None] >= steps)).expand(slots.shape[0], -1, -1)  # (B, M R, M R)
    unseen = torch.zeros_like(seen.transpose(1, 2))  # no node sees a rider
    upper = torch.cat([tree.ancestors, unseen], 2)
    ancestors = torch.cat([upper, torch.cat([seen, among], 2)], 1)
    return (
        torch.cat([slots, free[:, None] + steps], 1),
        NodeTree(torch.cat([tree.depths, depths], 1), ancestors),
    )
