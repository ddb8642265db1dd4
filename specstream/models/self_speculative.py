"""The causal layer of self-speculative masked diffusion (Campbell et al. 2025, arXiv 2510.03929).

A masked diffusion model says of each masked position what it may hold, as if it were the only one.
One more layer makes a joint law of it: the masked positions are put in an order sigma, and the
layer runs over them in that order under a causal mask, so that element i, which speaks of position
sigma(i), knows the tokens at sigma(0) .. sigma(i - 1) besides what the trunk knew.  The trunk's
states are not made anew: what the tokens change costs one layer, not a pass.

An element is told twice where it is: the layer rotates it by the place of sigma(i), and a learned
embedding adds the place of sigma(i - 1) to its token (the double places of sigma-GPT, Pannatier et
al. 2024).  The layer's output is added to the trunk's state, from zero on: before any training the
joint law is the product of the trunk's own.

Shapes: B rows, C positions of a canvas, K masked positions in order, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from specstream.models.block_layers import RMSNorm
from specstream.models.cache import as_attention_reads
from specstream.models.decoder import find_decoder
from specstream.models.pretrained_masked import PretrainedMaskedLM


class SelfSpeculativeHead(nn.Module):
    """One decoder layer of the trunk's own kind, causal in the order of the masked positions.

    Embeddings, rotations and the output projection are the trunk's, shared and no part of this
    module; its own weights are drawn from `seed` alone.  Raises ValueError for a block model, and
    for a trunk that does not come apart or does not say how many positions it has.
    """

    def __init__(self, trunk: PretrainedMaskedLM, seed: int = 0) -> None:
        super().__init__()
        if not isinstance(trunk, PretrainedMaskedLM):
            raise ValueError(
                "a self-speculative head sits on a masked language model, not on "
                f"{type(trunk).__name__}"
            )
        if trunk.block_length is not None:
            raise ValueError(
                "a self-speculative head needs a bidirectional trunk, not one of blocks of "
                f"{trunk.block_length}"
            )
        if trunk.max_positions is None:
            raise ValueError("a self-speculative head needs a trunk of known max_positions")
        self.decoder = find_decoder(trunk.model)  # by reference: not a part of this module
        self.config = trunk.config
        size, kind = trunk.config.hidden_size, type(self.decoder.layers[0])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.token_norm = RMSNorm(size)  # embeddings are small beside states
            self.before = nn.Linear(2 * size, size, bias=False)  # of the element before
            self.place = nn.Embedding(trunk.max_positions, size)
            self.start = nn.Parameter(torch.empty(size))  # instead, for the first element
            self.now = nn.Linear(size, size, bias=False)
            self.layer = kind(trunk.config, 0)
            self.norm = RMSNorm(size)
            self.out = nn.Linear(size, size, bias=False)
            nn.init.normal_(self.place.weight, std=0.02)
            nn.init.normal_(self.start, std=0.02)
            nn.init.zeros_(self.out.weight)
        self.to(trunk.device)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the weights are in."""
        return self.start.dtype

    def forward(self, hidden: Tensor, order: Tensor, tokens: Tensor, real: Tensor) -> Tensor:
        """Return what the trunk's head reads of each masked position, (B, K, D), in their order.

        hidden (B, C, D): the trunk's states of the canvas; order (B, K): the masked positions, in
        order; tokens (B, K): what they hold, if they hold anything yet; real (B, K) bool: a prefix
        of each row, beyond which the others may be anything.  State i depends on the tokens before
        i alone, and on all of `hidden` that the order names up to i.
        """
        places = order.where(real, 0)
        index = places[:, :, None].expand(-1, -1, hidden.shape[2])
        return self.read(hidden.gather(1, index), places, tokens.where(real, 0))

    def read(self, states: Tensor, places: Tensor, tokens: Tensor) -> Tensor:
        """Return (B, K, D) for the trunk's states (B, K, D) of positions that are in order already.

        places (B, K) are their places in their text, which in a packed row are not those in the
        row; tokens (B, K) as in `forward`.
        """
        known = self.decoder.embed(tokens[:, :-1], places[:, :-1])  # (B, K-1, D)
        known = self.token_norm(known.to(self.dtype))
        entering = states.to(self.dtype)
        before = self.before(torch.cat([entering[:, :-1], known], -1))
        before = before + self.place(places[:, :-1])
        start = self.start.to(before.dtype).expand(len(states), 1, -1)
        hidden = self.now(entering) + torch.cat([start, before], 1)  # (B, K, D)
        told = self.decoder.told(hidden, places)
        hidden = self.decoder.run(self.layer, hidden, self._mask(hidden), told)
        return states + self.out(self.norm(hidden)).to(states.dtype)

    def _mask(self, hidden: Tensor) -> Tensor:
        """Return the causal mask (1, 1, K, K) as the layer's attention reads it."""
        steps = torch.arange(hidden.shape[1], device=hidden.device)
        mask = (steps[:, None] >= steps)[None, None]
        return as_attention_reads(mask, self.config._attn_implementation, hidden.dtype)


def relative_cost(trunk: PretrainedMaskedLM, head: SelfSpeculativeHead) -> float:
    """Return the operations of a pass of the causal layer, those of a full pass being 1.

    By position and with the output projection on both sides, counted as the parameters of the
    matrices: two operations each.  Attention's scores are left out on both sides.
    """
    projection = trunk.model.get_output_embeddings().weight.numel()
    layers = sum(_matrices(layer) for layer in head.decoder.layers)
    own = _matrices(head) - head.place.weight.numel()  # which is looked up, not multiplied
    return (own + projection) / (layers + projection)


def _matrices(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters() if weight.dim() > 1)
