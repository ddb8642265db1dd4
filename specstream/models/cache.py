"""One static key-value cache with a length per row.

Append is a scatter at `lengths + i`, rollback is a smaller length, and the attention mask follows
from the positions alone, so ragged prompts and ragged acceptance are the same code as batch 1 and
every shape is fixed.  The cache does not hold the lengths: they belong to whoever decodes.  It
holds one slot a token, also in sliding-window layers, where the mask does the windowing.

A slot beyond a row's length may hold anything.  It is never read: a query at position t sees the
slots 0..t, and the pass that brings a query to t has just written t.

Shapes: B rows, T new tokens, C capacity, H key-value heads, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

VIEW_STEP = 256  # slots; views are rounded up to it, so that shapes recur and few are compiled


class SlotLayer(CacheLayerMixin):
    """Keys and values of one decoder layer, stored (B * C, H * D): a write is one kernel."""

    is_compileable = True
    is_sliding = False

    def __init__(self, batch_size: int, capacity: int) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.capacity = capacity
        self.slots: Tensor | None = (
            None  # (B * T,) rows of the storage that the running pass writes
        )
        self.view = capacity  # how many slots of each row the running pass reads

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate zeroed storage for `key_states` (B, H, T, D); zeros keep masked slots finite."""
        rows = self.batch_size * self.capacity
        self.keys = key_states.new_zeros(rows, key_states.shape[1] * key_states.shape[3])
        self.values = value_states.new_zeros(rows, value_states.shape[1] * value_states.shape[3])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write (B, H, T, D) at the pass's slots; return what it reads, (B, H, view, D)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.slots is not None, "a pass must be opened with SlotCache.open"
        heads = key_states.shape[1]
        self.keys.index_copy_(0, self.slots, key_states.transpose(1, 2).flatten(2).flatten(0, 1))
        self.values.index_copy_(
            0, self.slots, value_states.transpose(1, 2).flatten(2).flatten(0, 1)
        )
        return self._read(self.keys, heads), self._read(self.values, heads)

    def _read(self, storage: Tensor, heads: int) -> Tensor:
        rows = storage.view(self.batch_size, self.capacity, heads, -1)[:, : self.view]
        return rows.transpose(1, 2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that a pass reads, and their offset."""
        return self.view, 0

    def get_seq_length(self) -> int:
        """Rows have lengths of their own; positions are always given, so nothing reads this."""
        return 0

    def get_max_length(self) -> int:
        """Slots in each row."""
        return self.capacity

    get_max_cache_shape = get_max_length  # the name in transformers before 5.2x


class SlotCache(Cache):
    """A static cache for `num_layers` decoder layers, B rows and C slots a row."""

    def __init__(self, num_layers: int, batch_size: int, capacity: int) -> None:
        super().__init__(layers=[SlotLayer(batch_size, capacity) for _ in range(num_layers)])
        self.rows = batch_size
        self.capacity = capacity

    def open(self, positions: Tensor, view: int) -> None:
        """Point the next pass at slots `positions` (B, T); it will read the first `view` slots."""
        offsets = torch.arange(self.rows, device=positions.device)[:, None] * self.capacity
        slots = (offsets + positions).flatten()
        for layer in self.layers:
            layer.slots, layer.view = slots, view

    def close(self) -> None:
        """Forget the pass, so that no tensor of it outlives it."""
        for layer in self.layers:
            layer.slots = None

    def keep(self, source: Tensor, destination: Tensor) -> None:
        """Copy slots `source` (B, N) onto slots `destination` (B, N): the kept path of a tree."""
        offsets = torch.arange(self.rows, device=source.device)[:, None] * self.capacity
        read, write = (offsets + source).flatten(), (offsets + destination).flatten()
        for layer in self.layers:
            layer.keys.index_copy_(0, write, layer.keys.index_select(0, read))
            layer.values.index_copy_(0, write, layer.values.index_select(0, read))


@dataclass(frozen=True, slots=True)
class NodeTree:
    """How the T queries of a pass hang together when they are nodes of a tree, not a chain."""

    depths: Tensor  # (B, T) steps from the first node, which is the root: places in the sequence
    ancestors: Tensor  # (B, T, T) bool: node i sees node j, itself included


def attention_mask(
    slots: Tensor, view: int, window: int | None = None, tree: NodeTree | None = None
) -> Tensor:
    """Return which slots each query sees, (B, 1, T, view) bool.

    `slots` (B, T) are those of the queries, and also their places in the sequence for a chain.
    `window` limits the look back (sliding attention).  With a `tree` a query sees everything
    before the first query's slot and, of the queries, its own ancestors; their slots may have
    gaps.  A tree's slots are not its places in the sequence, so it takes no `window`.
    """
    places = torch.arange(view, device=slots.device)
    if tree is not None:
        assert window is None, "a window would have to be measured in depths"
        before = (places < slots[:, :1, None]).expand(-1, slots.shape[1], -1)  # (B, T, view)
        own = slots[:, None, :].expand_as(tree.ancestors)
        return before.scatter(2, own, tree.ancestors)[:, None]
    reach = slots[:, :, None]
    mask = places <= reach
    if window is not None:
        mask = mask & (places > reach - window)
    return mask[:, None]


def as_attention_reads(mask: Tensor, attn_implementation: str, dtype: torch.dtype) -> Tensor:
    """Return a bool mask as `transformers` wants it: eager adds it to the scores, sdpa takes it."""
    if attn_implementation != "eager":
        return mask
    lowest = torch.finfo(dtype).min
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, lowest)


def bucket(length: int, capacity: int) -> int:
    """Round a filled length up to the slots that a pass reads, at most `capacity`."""
    return min(-(-length // VIEW_STEP) * VIEW_STEP, capacity)
