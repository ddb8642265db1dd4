"""The network of a block drafter (Chen et al. 2026, DFlash, arXiv 2602.06036).

A block is the embedding of one known token, its anchor, and K - 1 times a learned mask embedding.
In every layer its positions attend to each other in both directions, and to keys and values that
the layer's own projections make of the target's fused features at all places before the anchor
("KV injection").  The state at position k speaks of the token k + 1 places after the anchor.

Training runs many blocks of a row side by side, decoding one block a row over projections that a
cache holds: both call the same code.  The names of the parts are those of published checkpoints.

Shapes: B rows, T places of context, A blocks a row, K positions of a block, D hidden, H key-value
heads, G queries for each of them, d numbers a head, F features of a place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

EPSILON = 1e-6  # of all norms
Injected = tuple[Tensor, Tensor]  # keys and values of one layer's context, (B, T, H, d) each


@dataclass(frozen=True, slots=True)
class BlockShape:
    """The numbers that size the network.  Raises ValueError where they do not fit together."""

    block_size: int  # K
    num_features: int  # F
    hidden_size: int  # D
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    rope_theta: float = 10_000.0

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_heads", "num_kv_heads", "intermediate_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"a hidden size of {self.hidden_size} does not give each of num_heads "
                f"{self.num_heads} an even number of dimensions"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if not 0 < self.rope_theta < math.inf:
            raise ValueError(f"rope_theta must be positive, not {self.rope_theta}")

    @property
    def head_size(self) -> int:
        """Numbers of one head."""
        return self.hidden_size // self.num_heads


class BlockNetwork(nn.Module):
    """From anchors and the target's features to the states that the target's head reads."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.shape = shape
        size = shape.hidden_size
        self.fc = nn.Linear(shape.num_features, size, bias=False)
        self.hidden_norm = RMSNorm(size)
        self.mask_embedding = nn.Parameter(torch.empty(size))
        self.layers = nn.ModuleList(BlockLayer(shape) for _ in range(shape.num_layers))
        self.norm = RMSNorm(size)
        for weight in self.parameters():
            if weight.dim() > 1 or weight is self.mask_embedding:
                nn.init.normal_(weight, std=0.02)

    def inject(self, features: Tensor, places: Tensor) -> list[Injected]:
        """Fuse features (B, T, F) of `places` (B, T); return each layer's keys and values."""
        fused = self.hidden_norm(self.fc(features.to(self.mask_embedding.dtype)))  # (B, T, D)
        turn = rotation(places, self.shape)
        return [layer.self_attn.inject(fused, turn) for layer in self.layers]

    def forward(
        self, anchors: Tensor, places: Tensor, context: Sequence[Injected], seen: Tensor
    ) -> Tensor:
        """Return the states (B, A, K, D) of blocks, after the final norm.

        anchors (B, A, D) are embedded tokens that stand at `places` (B, A) of their documents;
        `context` is what `inject` returned and seen (B, A, T) bool says what of it a block sees.
        """
        num_masks = self.shape.block_size - 1
        masks = self.mask_embedding.expand(*anchors.shape[:2], num_masks, -1)
        hidden = torch.cat([anchors.to(masks.dtype)[:, :, None], masks], 2)  # (B, A, K, D)
        steps = torch.arange(self.shape.block_size, device=places.device)
        turn = rotation(places[:, :, None] + steps, self.shape)
        for layer, injected in zip(self.layers, context, strict=True):
            hidden = layer(hidden, turn, injected, seen)
        return self.norm(hidden)


class RMSNorm(nn.Module):
    """Divide by the root mean square, in float32; states keep the dtype that they come in.

    That of torch warns on every screen where autocast gives it bfloat16 states.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, hidden: Tensor) -> Tensor:
        """Return normed states (..., D)."""
        weight = self.weight.float()
        return functional.rms_norm(hidden.float(), weight.shape, weight, EPSILON).to(hidden.dtype)


class BlockLayer(nn.Module):
    """Attention and a gated MLP, each after a norm and beside the residual stream."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size)
        self.self_attn = BlockAttention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size)
        self.mlp = GatedMLP(shape)

    def forward(self, hidden: Tensor, turn: Tensor, injected: Injected, seen: Tensor) -> Tensor:
        """Return the states (B, A, K, D) after this layer."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), turn, injected, seen)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        size, width = shape.hidden_size, shape.intermediate_size
        self.gate_proj = nn.Linear(size, width, bias=False)
        self.up_proj = nn.Linear(size, width, bias=False)
        self.down_proj = nn.Linear(width, size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return (..., D) of hidden (..., D)."""
        return self.down_proj(functional.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class BlockAttention(nn.Module):
    """Attention of blocks to their contexts and to themselves, with normed queries and keys."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.kv_heads, self.head_size = shape.num_kv_heads, shape.head_size
        size, width = shape.hidden_size, shape.num_kv_heads * shape.head_size
        self.q_proj = nn.Linear(size, size, bias=False)
        self.k_proj = nn.Linear(size, width, bias=False)
        self.v_proj = nn.Linear(size, width, bias=False)
        self.o_proj = nn.Linear(size, size, bias=False)
        self.q_norm = RMSNorm(self.head_size)
        self.k_norm = RMSNorm(self.head_size)

    def inject(self, fused: Tensor, turn: Tensor) -> Injected:
        """Return keys and values (..., H, d) of states (..., D) turned by `turn` (..., d)."""
        keys = self.k_norm(self.k_proj(fused).unflatten(-1, (self.kv_heads, self.head_size)))
        values = self.v_proj(fused).unflatten(-1, (self.kv_heads, self.head_size))
        return rotate(keys, turn), values

    def forward(self, hidden: Tensor, turn: Tensor, injected: Injected, seen: Tensor) -> Tensor:
        """Return the attended states (B, A, K, D).

        Scores exist for (A K) x (T + K) pairs: those of different blocks are never made.
        """
        keys, values = injected
        queries = self.q_norm(self.q_proj(hidden).unflatten(-1, (-1, self.head_size)))
        queries = rotate(queries, turn).unflatten(3, (self.kv_heads, -1))  # (B, A, K, H, G, d)
        own_keys, own_values = self.inject(hidden, turn)  # (B, A, K, H, d)
        queries = queries * self.head_size**-0.5
        scores = torch.einsum("bakhgd,bthd->bahgkt", queries, keys)
        scores = scores.masked_fill(~seen[:, :, None, None, None], -math.inf)
        own = torch.einsum("bakhgd,bajhd->bahgkj", queries, own_keys)
        weights = torch.cat([scores, own], -1).softmax(-1, torch.float32).to(values.dtype)
        before, within = weights.split([keys.shape[1], own.shape[-1]], -1)
        mixed = torch.einsum("bahgkt,bthd->bakhgd", before, values)
        mixed = mixed + torch.einsum("bahgkj,bajhd->bakhgd", within, own_values)
        return self.o_proj(mixed.flatten(3))


def rotation(places: Tensor, shape: BlockShape) -> Tensor:
    """Return the angles (..., d) by which rotary embeddings turn a head at `places` (...)."""
    half = torch.arange(0, shape.head_size, 2, device=places.device, dtype=torch.float32)
    speeds = shape.rope_theta ** (-half / shape.head_size)
    angles = places[..., None].float() * speeds
    return torch.cat([angles, angles], -1)


def rotate(heads: Tensor, turn: Tensor) -> Tensor:
    """Turn heads (..., h, d), halves against each other, by angles (..., d); in float32."""
    first, second = heads.float().chunk(2, -1)
    crossed = torch.cat([-second, first], -1)
    angles = turn[..., None, :]
    return (heads.float() * angles.cos() + crossed * angles.sin()).to(heads.dtype)
