"""The causal layer of self-speculative masked diffusion (Campbell et al. 2025, arXiv 2510.03929).

A masked diffusion model says of each masked position what it may hold, as if it were the only one.
One more layer makes a joint law of it: the masked positions are put in an order sigma, and element
i, which speaks of position sigma(i), knows the tokens at sigma(0) .. sigma(i - 1) besides what the
trunk knew.  The trunk's states are not made anew: what the tokens change costs one layer, not a
pass.

An element has two streams (XLNet, Yang et al. 2019): it asks from the trunk's state of its own
position, and it answers those after it with that state and its token.  Both are rotated by the
position that they belong to, so that the letter before is one place away wherever it stands.  In
the published layer, of one stream, an element holds the token before it in the order, and is told
that token's place beside its own (the double places of sigma-GPT, Pannatier et al. 2024).  The
layer's output is added to the trunk's state, from zero on: before any training the joint law is the
product of the trunk's own.

Shapes: B rows, C positions of a canvas, K masked positions in order, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from specstream.models.block_layers import BlockLayer, BlockShape, RMSNorm, rotation
from specstream.models.decoder import find_decoder
from specstream.models.pretrained_masked import PretrainedMaskedLM


class SelfSpeculativeHead(nn.Module):
    """One layer, of the trunk's sizes, causal in the order of the masked positions.

    Embeddings and the output projection are the trunk's, shared and no part of this module; its
    own weights are drawn from `seed` alone.  Raises ValueError for a block model, for a trunk that
    does not come apart, and for one whose heads have an odd number of dimensions.
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
        self.decoder = find_decoder(trunk.model)  # by reference: not a part of this module
        self.shape = _shape(trunk)
        size = self.shape.hidden_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.token_norm = RMSNorm(size)  # embeddings are small beside states
            self.answer = nn.Linear(2 * size, size, bias=False)
            self.answer_norm = RMSNorm(size)
            self.layer = BlockLayer(self.shape)
            self.norm = RMSNorm(size)
            self.out = nn.Linear(size, size, bias=False)
            nn.init.zeros_(self.out.weight)
        self.to(trunk.device)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the weights are in."""
        return self.out.weight.dtype

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
        known = self.token_norm(self.decoder.embed(tokens, places).to(self.dtype))  # (B, K, D)
        entering = states.to(self.dtype)
        answers = self.answer_norm(self.answer(torch.cat([entering, known], -1)))
        turn = rotation(places, self.shape)
        steps = torch.arange(places.shape[1], device=places.device)
        before = (steps[:, None] > steps).expand(len(places), -1, -1)  # (B, K, K): asks, answers
        # each element is a block of its own: it sees itself and the answers of those before it
        answered = self.layer(
            entering[:, :, None],
            turn[:, :, None],
            self.layer.self_attn.inject(answers, turn),
            before,
        )[:, :, 0]
        return states + self.out(self.norm(answered)).to(states.dtype)


def relative_cost(trunk: PretrainedMaskedLM, head: SelfSpeculativeHead) -> float:
    """Return the operations of a pass of the causal layer, those of a full pass being 1.

    By position and with the output projection on both sides, counted as the parameters of the
    matrices: two operations each, and twice as many for keys and values, which both streams have.
    Attention's scores are left out on both sides.
    """
    projection = trunk.model.get_output_embeddings().weight.numel()
    layers = sum(_matrices(layer) for layer in head.decoder.layers)
    attention = head.layer.self_attn
    own = _matrices(head) + _matrices(attention.k_proj) + _matrices(attention.v_proj)
    return (own + projection) / (layers + projection)


def _shape(trunk: PretrainedMaskedLM) -> BlockShape:
    """Return the sizes of one layer of the trunk, with as many keys as queries where it is mute."""
    config = trunk.config
    size, heads = config.hidden_size, config.num_attention_heads
    return BlockShape(
        block_size=1,
        num_features=size,
        hidden_size=size,
        num_layers=1,
        num_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        intermediate_size=getattr(config, "intermediate_size", None) or 4 * size,
    )


def _matrices(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters() if weight.dim() > 1)
