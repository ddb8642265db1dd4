"""Attention for training streams: every scored place at once, in memory linear in the streams.

A layer is called once, with the main stream and all streams side by side along the sequence; this
function takes the place of its attention.  Stream j of place t sees the main stream up to t and
the streams 1..j of the same place (Bhendawade et al. 2024, eq. 2).  So its scores are a block over
the main stream, whose mask is that of place t, and a strip over the place's own R streams: for R
streams of M places of T, R M (T + R) scores a head, and no mask over pairs of streams exists.

Shapes: B rows, H heads, T main tokens, M places with streams, R streams a place, D of one head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

NAME = "specstream_streams"


def register() -> str:
    """Make the function known to `transformers`; return the name of its attention."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, stream_attention)
    return NAME


def stream_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    stream_mask: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend as `sdpa` where there is no `stream_mask`, else to the main stream and one's own.

    query (B, H, T + M R, D), streams place by place; attention_mask (B, 1, T, T) of the main
    stream; stream_mask (B, M, T) bool, what each place with streams sees of it.  Returns
    (B, T + M R, H, D).
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if stream_mask is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    size, places = stream_mask.shape[2], stream_mask.shape[1]
    main = [states[:, :, :size] for states in (query, key, value)]
    out, _ = sdpa_attention_forward(module, *main, attention_mask, **options)
    own = [states[:, :, size:].unflatten(2, (places, -1)) for states in (query, key, value)]
    streams = _streams(own, main[1], main[2], stream_mask, float(options["scaling"]))
    return torch.cat([out, streams], 1), None


def _streams(own: list[Tensor], key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """Return what the streams gather, (B, M R, H, D), from `own` query, key, value (B, H, M, R, D).

    key and value (B, Hk, T, D) of the main stream; with grouped heads Hk divides H.
    """
    groups = own[0].shape[1] // key.shape[1]
    query = own[0].unflatten(1, (-1, groups))  # (B, Hk, G, M, R, D)
    to_main = torch.einsum("bkgmrd,bktd->bkgmrt", query, key) * scaling
    to_main = to_main.float().masked_fill(~mask[:, None, None, :, None, :], -torch.inf)
    to_own = torch.einsum("bkgmrd,bkmsd->bkgmrs", query, own[1]) * scaling
    size = to_own.shape[-1]
    later = torch.ones(size, size, dtype=torch.bool, device=mask.device).triu(1)
    to_own = to_own.float().masked_fill(later, -torch.inf)
    weights = torch.cat([to_main, to_own], -1).softmax(-1).to(value.dtype)
    main, beside = weights.split([mask.shape[2], size], -1)
    found = torch.einsum("bkgmrt,bktd->bkgmrd", main, value)
    found = found + torch.einsum("bkgmrs,bkmsd->bkgmrd", beside, own[2])
    return found.flatten(3, 4).flatten(1, 2).transpose(1, 2)  # (B, M R, H, D)
