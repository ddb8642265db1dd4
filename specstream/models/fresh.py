"""A network of `transformers` with fresh weights, from the numbers that size it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from specstream.files import one_line
from specstream.models.supported import refuse_unsupported
from specstream.models.weights import check_attention, quiet_transformers

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

FLOAT32_BYTES = 4


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

    Raises ValueError in one line for what `fresh_config` refuses, before there is any weight.
    """
    from transformers import AutoModelForCausalLM

    check_attention(attn_implementation)
    config = fresh_config(
        vocab_size,
        hidden_size,
        intermediate_size,
        num_layers,
        num_heads,
        num_kv_heads,
        max_positions,
        tie_embeddings,
        architecture,
    )
    refused = f"architecture {architecture!r} cannot be made of these sizes"
    with one_line(refused), torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=attn_implementation
        )


def fresh_config(
    vocab_size: int,
    hidden_size: int,
    intermediate_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int | None = None,
    max_positions: int = 1024,
    tie_embeddings: bool = True,
    architecture: str = "llama",
) -> PretrainedConfig:
    """Return the config of a model of these sizes, once it is sure that it can be made.

    Raises ValueError in one line for a size that is not positive, heads that do not divide the
    hidden size, an architecture that is no model type or not of the Llama family, and for more
    weights than this machine can hold.
    """
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "max_positions": max_positions,
    }
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    if hidden_size % num_heads:
        raise ValueError(f"hidden_size {hidden_size} is not a multiple of num_heads {num_heads}")
    if num_heads % (num_kv_heads or num_heads):
        raise ValueError(f"num_heads {num_heads} is not a multiple of num_kv_heads {num_kv_heads}")
    check_memory(vocab_size * hidden_size + num_layers * hidden_size * intermediate_size)
    config = _named_config(
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
    _check_building(config)
    return config


def check_memory(num_parameters: int) -> None:
    """Raise ValueError for more float32 weights than this machine has memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if num_parameters * FLOAT32_BYTES > memory:
        raise ValueError(
            f"a model of these sizes has {num_parameters:.3g} parameters or more, which do not fit "
            f"into this machine's memory of {memory / 2**30:.0f} GiB"
        )


def _named_config(architecture: str, **options: object) -> PretrainedConfig:
    """Return the config of a model type with the options that all the Llama family has."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if architecture not in CONFIG_MAPPING_NAMES:
        raise ValueError(f"architecture {architecture!r} is not a transformers model type")
    refused = f"architecture {architecture!r} is not of the Llama family"
    with one_line(refused), quiet_transformers():
        config = AutoConfig.for_model(architecture, **options)
    refuse_unsupported(config)
    return config


def _check_building(config: PretrainedConfig) -> None:
    """Raise ValueError where no model of `config` can be made; its weights take no memory here."""
    from transformers import AutoModelForCausalLM

    refused = f"architecture {config.model_type!r} cannot be made of these sizes"
    with one_line(refused), quiet_transformers(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    check_memory(sum(parameter.numel() for parameter in model.parameters()))
