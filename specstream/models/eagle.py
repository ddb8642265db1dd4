"""The network of EAGLE-3: one decoder layer that goes on from where the target's layers stopped.

Li et al. 2025 (EAGLE-3, arXiv 2503.01840), figure 5: features of several target layers are fused
into one vector; it and the embedding of the token after it, each normed, enter the layer's
attention side by side; the layer's output says what comes next, and stands in for the fused feature
one place on, where the target has not been yet.

The keys and values are the caller's business (`Attend`): decoding keeps them in a cache, training
for every unrolled step.  So both run the very same layer.  Tensors are named as EAGLE-3 checkpoints
name them.

Shapes: B rows, T places, H heads, E size of a head, D hidden, F = D times the features fused,
U tokens that can be drafted, V vocabulary of the target.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import LlamaConfig, PretrainedConfig

# (queries (B, H, T, E), keys and values of the same places) -> what they attend to (B, H, T, E)
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def layer_config(target: PretrainedConfig, intermediate_size: int | None) -> LlamaConfig:
    """Return the sizes and the rotary places of a Llama layer beside a target of this config.

    Raises ValueError for heads that cannot be turned, halves against each other.
    """
    from transformers import LlamaConfig

    size, heads = target.hidden_size, target.num_attention_heads
    head_dim = getattr(target, "head_dim", None) or size // heads
    if head_dim % 2:
        raise ValueError(f"EAGLE-3 needs heads of an even number of dimensions, not {head_dim}")
    inner = intermediate_size or getattr(target, "intermediate_size", None) or 4 * size
    rotary = getattr(target, "rope_parameters", None) or {}
    rotary = dict(rotary.get("full_attention") or rotary)  # some have one for each kind of layer
    rotary.pop("partial_rotary_factor", None)  # heads here turn as a whole
    return LlamaConfig(
        hidden_size=size,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=getattr(target, "num_key_value_heads", None) or heads,
        head_dim=head_dim,
        max_position_embeddings=target.max_position_embeddings,
        rms_norm_eps=getattr(target, "rms_norm_eps", 1e-6),
        rope_parameters=rotary or None,
    )


class EagleAttention(nn.Module):
    """Attention that is fed two vectors of size D and leaves its keys and values to the caller."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        self.rotate = apply_rotary_pos_emb
        self.head_dim: int = config.head_dim
        entering, own = 2 * config.hidden_size, config.num_attention_heads * config.head_dim
        shared = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(entering, own, bias=False)
        self.k_proj = nn.Linear(entering, shared, bias=False)
        self.v_proj = nn.Linear(entering, shared, bias=False)
        self.o_proj = nn.Linear(own, config.hidden_size, bias=False)

    def forward(self, entering: Tensor, rotation: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """Return (B, T, D) for entering (B, T, 2 D) at places turned by `rotation`."""
        queries, keys, values = (
            project(entering).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        turned = self.rotate(queries, keys, *rotation)
        queries, keys = (states.to(values.dtype) for states in turned)
        return self.o_proj(attend(queries, keys, values).transpose(1, 2).flatten(2))


class EagleLayer(nn.Module):
    """The one decoder layer; the feature is its residual stream."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

        def norm() -> nn.Module:
            return LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)

        self.input_layernorm, self.hidden_norm = norm(), norm()
        self.self_attn = EagleAttention(config)
        self.post_attention_layernorm = norm()
        self.mlp = LlamaMLP(config)

    def forward(
        self, embedded: Tensor, feature: Tensor, rotation: tuple[Tensor, Tensor], attend: Attend
    ) -> Tensor:
        """Return (B, T, D) from embedded tokens and features, both (B, T, D)."""
        entering = torch.cat([self.input_layernorm(embedded), self.hidden_norm(feature)], -1)
        hidden = feature + self.self_attn(entering, rotation, attend)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class EagleNetwork(nn.Module):
    """Fusion, layer, norm and head; the embeddings are the target's and not a part of it.

    `num_features` target layers are fused.  With `draft_vocab_size` U the head speaks of U of the
    target's `vocab_size` tokens only, at first of the lowest ids: `d2t` (U,) is what to add to a
    drafted token's number to get its id, `t2d` (V,) says which ids can be drafted.
    """

    d2t: Tensor
    t2d: Tensor

    def __init__(
        self,
        config: LlamaConfig,
        num_features: int,
        vocab_size: int,
        draft_vocab_size: int | None = None,
    ) -> None:
        super().__init__()
        from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

        size, num_drafted = config.hidden_size, draft_vocab_size or vocab_size
        self.fc = nn.Linear(num_features * size, size, bias=False)
        self.midlayer = EagleLayer(config)
        self.norm = LlamaRMSNorm(size, config.rms_norm_eps)
        self.lm_head = nn.Linear(size, num_drafted, bias=False)
        self.rotary = LlamaRotaryEmbedding(config)
        self.reduced = draft_vocab_size is not None
        if self.reduced:
            self.register_buffer("d2t", torch.zeros(num_drafted, dtype=torch.long))
            self.register_buffer("t2d", torch.arange(vocab_size) < num_drafted)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EagleNetwork:
        """Move or cast the weights; the frequencies of far places would not survive bfloat16."""
        exact = dict(self.rotary.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            setattr(self.rotary, name, buffer.to(getattr(self.rotary, name).device))
        return self

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights; quantised ones do not count."""
        return self.norm.weight.dtype

    def fuse(self, features: Tensor) -> Tensor:
        """Return one vector (B, T, D) for the target's features (B, T, F) of each place."""
        return self.fc(features.to(self.dtype))

    def forward(self, embedded: Tensor, feature: Tensor, places: Tensor, attend: Attend) -> Tensor:
        """Return what stands for the feature one place on, (B, T, D).

        embedded (B, T, D) is the token after each of the places (B, T), feature (B, T, D) the fused
        one of the place, or what an earlier pass has put in its stead.
        """
        rotation = self.rotary(feature, places)
        return self.midlayer(embedded.to(self.dtype), feature, rotation, attend)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (..., U) of the token after next, from the output (..., D)."""
        return self.lm_head(self.norm(hidden))

    @property
    def draft_vocabulary(self) -> Tensor:
        """The target's ids (U,) of the tokens that can be drafted."""
        numbers = torch.arange(self.lm_head.out_features, device=self.norm.weight.device)
        return numbers + self.d2t if self.reduced else numbers

    @torch.no_grad()
    def speak_of(self, tokens: Tensor, rows: Tensor) -> None:
        """Let the head speak of `tokens` (U,), ascending ids, starting from its `rows` (U, D)."""
        assert self.reduced or len(tokens) == self.lm_head.out_features
        self.lm_head.weight.copy_(rows)
        if self.reduced:
            self.d2t.copy_(tokens - torch.arange(len(tokens), device=tokens.device))
            self.t2d.zero_()[tokens] = True
