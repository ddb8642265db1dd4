"""A network of `transformers` with fresh weights, from the numbers that size it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def fresh_model(
    vocab_size: int,
    hidden_size: int,
    intermediate_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int | None,
    max_positions: int,
    tie_embeddings: bool,
    architecture: str,
    attn_implementation: str,
    seed: int,
) -> PreTrainedModel:
    """Return a float32 model of the Llama family, its weights drawn from `seed` alone.

    Raises ValueError in one line for a size that is not positive, heads that do not divide the
    hidden size, or an architecture that is no model type.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    for name, value in (
        ("vocab_size", vocab_size),
        ("hidden_size", hidden_size),
        ("intermediate_size", intermediate_size),
        ("num_layers", num_layers),
        ("num_heads", num_heads),
        ("max_positions", max_positions),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    if hidden_size % num_heads:
        raise ValueError(f"hidden_size {hidden_size} is not a multiple of num_heads {num_heads}")
    if num_heads % (num_kv_heads or num_heads):
        raise ValueError(f"num_heads {num_heads} is not a multiple of num_kv_heads {num_kv_heads}")
    try:
        config = AutoConfig.for_model(
            architecture,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=num_kv_heads or num_heads,
            head_dim=hidden_size // num_heads,
            max_position_embeddings=max_positions,
            tie_word_embeddings=tie_embeddings,
            bos_token_id=None,  # the tokenizer's, which is not known here; saving adds its end
            eos_token_id=None,
        )
    except ValueError as error:
        raise ValueError(
            f"architecture {architecture!r} is not a transformers model type"
        ) from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=attn_implementation
        )
