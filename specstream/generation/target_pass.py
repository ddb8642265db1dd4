"""One pass of the target: it verifies a draft, or, when nothing was drafted, decodes one token.

This is the fixed shape that `torch.compile` takes: everything from the target's embeddings to the
committed tokens is tensors.  Plain decoding is the same pass with an empty draft, so both sides of
every comparison run the same code; a chain and a tree differ in the mask, in the order of what
stood, and in that a tree's path moves up in the cache.

Shapes: B rows, K drafted tokens, W the most that can stand (K, or a tree's height), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from specstream.models.cache import NodeTree, SlotCache
from specstream.models.pretrained_lm import PretrainedLM
from specstream.models.walk import Rider, Walk, walk
from specstream.sampling import Noise, Role, Sampling, probabilities
from specstream.structures import Context, Observation, TokenDraft
from specstream.verification import (
    TokenVerifier,
    accepted_path,
    ancestor_matrix,
    depths,
)


@dataclass(frozen=True, slots=True)
class Committed:
    """What one target pass commits to each row, and what it shows of the target on the way."""

    drafted: Tensor  # (B,) tokens that were really drafted; of a tree, those of its longest path
    tested: Tensor  # (B,) how many verification reached: one more than stood, or all of a path
    counts: Tensor  # (B,) how many of them stood
    tokens: Tensor  # (B, W+1) those, then the target's own token; beyond it, anything
    lengths: Tensor  # (B,) committed tokens after the pass
    seen: Tensor | None  # (B, V)
    start: Tensor  # (B,) place of the last token that was committed before
    features: Tensor | None = None  # (B, W+1, F) of that token and of those that stood
    riders: Tensor | None = None  # (B, R, D) of the last that stood


def target_pass(
    target: PretrainedLM,
    verifier: TokenVerifier,
    sampling: Sampling,
    noise: Noise,
    context: Context,
    cache: SlotCache,
    draft: TokenDraft,
    view: int,
    feature_layers: Sequence[int] = (),
    rider: Rider | None = None,
) -> Committed:
    """Score the last committed token and the draft, verify, and write the outcome.

    Changes `cache` and `context.tokens`; rows that are not active keep their length.
    """
    start = context.lengths - 1
    last = context.tokens.gather(1, start[:, None])
    nodes = torch.cat([last, draft.tokens], 1)  # (B, K+1)
    tree = None if draft.parents is None and rider is None else rooted(draft)
    if feature_layers or rider is not None:
        drafted = draft.lengths + 1  # the root is a node
        shown = walk(target, nodes, start, cache, view, tree, feature_layers, rider, drafted)
    else:
        shown = Walk(target.extend(nodes, start, cache, view, tree=tree), None, None, None)
    slots = start[:, None] + torch.arange(nodes.shape[1], device=nodes.device)
    if shown.kept is not None:
        draft, slots = prune(draft, shown.kept), slots.gather(1, shown.kept)
    num, width = draft.tokens.shape[1], path_width(draft)
    elements = context.elements(max(num, 1))
    verdict = verifier(
        draft,
        probabilities(shown.logits, sampling, _seen_at_nodes(context.seen, draft)),
        noise.uniform(context.prompts, elements[:, :num], Role.ACCEPT),
        # Not at the last node: its number would depend on the longest draft in the batch.
        noise.uniform(context.prompts, elements[:, 0], Role.CORRECT),
    )
    counts = verdict.accepted.sum(1)  # (B,)
    path, drafted = None, draft.tokens
    if draft.parents is not None:
        path = accepted_path(verdict.accepted, width)  # (B, W), K beyond its end
        drafted = F.pad(drafted, (0, 1)).gather(1, path)
        nodes_kept = (path + 1).clamp(max=num)
        steps = start[:, None] + 1 + torch.arange(width, device=path.device)
        beyond = path == num  # the slots beyond the path are copied onto themselves
        cache.keep(torch.where(beyond, steps, slots.gather(1, nodes_kept)), steps)
    steps = torch.arange(width + 1, device=nodes.device)
    drafted = F.pad(drafted, (0, 1))
    tokens = torch.where(steps < counts[:, None], drafted, verdict.correction[:, None])
    places = (context.lengths[:, None] + steps).clamp(max=context.tokens.shape[1] - 1)
    context.tokens.scatter_(1, places, tokens)
    seen = context.seen
    if seen is not None:
        kept = torch.where(steps <= counts[:, None], tokens, tokens[:, :1])
        seen = seen.scatter(1, kept, True)
    lengths = context.lengths + (counts + 1) * context.active
    features, riders = _shown_on(path, shown, counts)
    deepest, tested = _depth(draft), _tested(draft, counts, path)
    return Committed(deepest, tested, counts, tokens, lengths, seen, start, features, riders)


def observation(
    committed: Committed, accepted: Sequence[int], wanted: Tensor | None
) -> Observation:
    """Return what a drafter is told of a pass of which `accepted` drafted tokens stood."""
    return Observation(
        committed.start, committed.counts, accepted, wanted, committed.features, committed.riders
    )


def path_width(draft: TokenDraft) -> int:
    """Return the most drafted tokens that can stand."""
    return draft.tokens.shape[1] if draft.height is None else draft.height


def rooted(draft: TokenDraft) -> NodeTree:
    """Return the tree of the last committed token and the draft below it."""
    num = draft.tokens.shape[1]
    parents = draft.parents
    if parents is None:
        steps = torch.arange(num, device=draft.tokens.device)
        parents = (steps - 1).expand_as(draft.tokens)
    places = F.pad(depths(parents), (1, 0))  # (B, K+1)
    below = torch.ones_like(places, dtype=torch.bool)[:, :, None]  # all are below the root
    ancestors = F.pad(ancestor_matrix(parents).to(torch.uint8), (0, 0, 1, 0)) > 0
    return NodeTree(places, torch.cat([below, ancestors], 2))


def prune(draft: TokenDraft, kept: Tensor) -> TokenDraft:
    """Return the draft of the nodes kept (B, M), counted from the root at 0, which is kept.

    Nodes of a row that are not real may be kept to fill M; they come last.
    """
    assert draft.parents is not None
    rows = kept[:, 1:] - 1  # (B, M-1) drafted nodes
    new = torch.full_like(F.pad(draft.tokens, (1, 0)), 0)  # (B, K+1) old place -> new place
    new = new.scatter(1, kept, torch.arange(kept.shape[1], device=kept.device).expand_as(kept))
    parents = new.gather(1, draft.parents.gather(1, rows) + 1) - 1
    return replace(
        draft,
        tokens=draft.tokens.gather(1, rows),
        probs=None if draft.probs is None else draft.probs.take_along_dim(rows[:, :, None], 1),
        lengths=(rows < draft.lengths[:, None]).sum(1),
        parents=parents,
    )


def _depth(draft: TokenDraft) -> Tensor:
    """Return how deep each row's draft is (B,)."""
    if draft.parents is None or draft.tokens.shape[1] == 0:
        return draft.lengths
    return (depths(draft.parents) * _real(draft)).amax(1)


def _tested(draft: TokenDraft, counts: Tensor, path: Tensor | None) -> Tensor:
    """Return how many drafted tokens were judged: those that stood, and a rejected one (B,)."""
    if draft.parents is None or path is None or draft.tokens.shape[1] == 0:
        return torch.minimum(counts + 1, draft.lengths)
    ends = F.pad(path, (1, 0), value=-1).gather(1, counts[:, None])  # (B, 1) -1: the root
    refused = ((draft.parents == ends) & _real(draft)).any(1)  # the end has drafted children
    return counts + refused


def _real(draft: TokenDraft) -> Tensor:
    """Return which of the drafted tokens are real (B, K)."""
    return torch.arange(draft.tokens.shape[1], device=draft.tokens.device) < draft.lengths[:, None]


def _shown_on(
    path: Tensor | None, shown: Walk, counts: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Return the features along what stood, and the riders at its end."""
    features, ends = shown.features, counts  # a chain's nodes are its path already
    if path is not None:
        num = shown.logits.shape[1] - 1
        nodes = F.pad((path + 1).clamp(max=num), (1, 0))  # (B, W+1)
        ends = nodes.gather(1, counts[:, None])[:, 0]
        if features is not None:
            features = features.take_along_dim(nodes[:, :, None], 1)
    riders = shown.riders
    if riders is not None:
        riders = riders[torch.arange(len(ends), device=ends.device), ends]
    return features, riders


def _seen_at_nodes(seen: Tensor | None, draft: TokenDraft) -> Tensor | None:
    """Add each node's drafted ancestors to what its row has seen: (B, K+1, V) bool."""
    if seen is None:
        return None
    own = F.one_hot(draft.tokens, seen.shape[-1])  # (B, K, V)
    # Counts are padded, not their signs: inductor's vector code for padded bools does not compile.
    if draft.parents is None:
        counts = F.pad(own, (0, 0, 1, 0)).cumsum(1)  # (B, K+1, V)
    else:
        counts = F.pad(ancestor_matrix(draft.parents).float() @ own.float(), (0, 0, 1, 0))
    return seen[:, None] | (counts > 0)


def empty_draft(batch_size: int, device: torch.device) -> TokenDraft:
    """Return the draft of no tokens, with which a target pass is plain decoding."""
    return TokenDraft(
        tokens=torch.empty(batch_size, 0, dtype=torch.long, device=device),
        probs=None,
        lengths=torch.zeros(batch_size, dtype=torch.long, device=device),
    )


def pad_draft(draft: TokenDraft, num_tokens: int) -> TokenDraft:
    """Widen a chain to `num_tokens` columns, none of them real, so that shapes recur.

    A tree is left as it is: a drafter gives all trees of one height one shape.
    """
    missing = num_tokens - draft.tokens.shape[1]
    if missing <= 0 or draft.parents is not None:
        return draft
    probs = None if draft.probs is None else F.pad(draft.probs, (0, 0, 0, missing))
    return replace(draft, tokens=F.pad(draft.tokens, (0, missing)), probs=probs)
