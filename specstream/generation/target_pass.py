"""One pass of the target: it verifies a draft, or, when nothing was drafted, decodes one token.

This is the fixed shape that `torch.compile` takes: everything from the target's embeddings to the
committed tokens is tensors.  Plain decoding is the same pass with an empty draft, so both sides of
every comparison run the same code.

Shapes: B rows, K drafted tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from specstream.models.cache import SlotCache
from specstream.models.pretrained_lm import PretrainedLM
from specstream.sampling import Noise, Role, Sampling, probabilities
from specstream.structures import Context, TokenDraft
from specstream.verification import TokenVerifier


@dataclass(frozen=True, slots=True)
class Committed:
    """What one target pass commits to each row."""

    drafted: Tensor  # (B,) tokens that were really drafted
    counts: Tensor  # (B,) how many of them stood
    tokens: Tensor  # (B, K+1) those, then the target's own token; beyond it, anything
    lengths: Tensor  # (B,) committed tokens after the pass
    seen: Tensor | None  # (B, V)


def target_pass(
    target: PretrainedLM,
    verifier: TokenVerifier,
    sampling: Sampling,
    noise: Noise,
    context: Context,
    cache: SlotCache,
    draft: TokenDraft,
    view: int,
) -> Committed:
    """Score the last committed token and the draft, verify, and write the outcome.

    Changes `cache` and `context.tokens`; rows that are not active keep their length.
    """
    num = draft.tokens.shape[1]
    last = context.tokens.gather(1, context.lengths[:, None] - 1)
    nodes = torch.cat([last, draft.tokens], 1)  # (B, K+1)
    logits = target.extend(nodes, context.lengths - 1, cache, view)  # (B, K+1, V)
    p = probabilities(logits, sampling, _seen_at_nodes(context.seen, draft.tokens))
    elements = context.elements(max(num, 1))
    verdict = verifier(
        draft,
        p,
        noise.uniform(context.prompts, elements[:, :num], Role.ACCEPT),
        # Not at the last node: its number would depend on the longest draft in the batch.
        noise.uniform(context.prompts, elements[:, 0], Role.CORRECT),
    )
    counts = verdict.accepted.sum(1)  # (B,)
    steps = torch.arange(num + 1, device=nodes.device)
    drafted = F.pad(draft.tokens, (0, 1))
    tokens = torch.where(steps < counts[:, None], drafted, verdict.correction[:, None])
    places = (context.lengths[:, None] + steps).clamp(max=context.tokens.shape[1] - 1)
    context.tokens.scatter_(1, places, tokens)
    seen = context.seen
    if seen is not None:
        kept = torch.where(steps <= counts[:, None], tokens, tokens[:, :1])
        seen = seen.scatter(1, kept, True)
    lengths = context.lengths + (counts + 1) * context.active
    return Committed(draft.lengths, counts, tokens, lengths, seen)


def _seen_at_nodes(seen: Tensor | None, drafted: Tensor) -> Tensor | None:
    """Add each node's drafted ancestors to what its row has seen: (B, K+1, V) bool."""
    if seen is None:
        return None
    # Counts are padded, not their signs: inductor's vector code for padded bools does not compile.
    counts = F.pad(F.one_hot(drafted, seen.shape[-1]), (0, 0, 1, 0)).cumsum(1)  # (B, K+1, V)
    return seen[:, None] | (counts > 0)


def empty_draft(batch_size: int, device: torch.device) -> TokenDraft:
    """Return the draft of no tokens, with which a target pass is plain decoding."""
    return TokenDraft(
        tokens=torch.empty(batch_size, 0, dtype=torch.long, device=device),
        probs=None,
        lengths=torch.zeros(batch_size, dtype=torch.long, device=device),
    )


def pad_draft(draft: TokenDraft, num_tokens: int) -> TokenDraft:
    """Widen a draft to `num_tokens` columns, none of them real, so that shapes recur."""
    missing = num_tokens - draft.tokens.shape[1]
    if missing <= 0:
        return draft
    probs = None if draft.probs is None else F.pad(draft.probs, (0, 0, 0, missing))
    return TokenDraft(F.pad(draft.tokens, (0, missing)), probs, draft.lengths)
