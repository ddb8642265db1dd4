"""Which causal LMs a static cache with one slot a token can serve, and which it cannot, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FORM = "masked_diffusion"  # the key of config.json that says how a masked network is meant
ATTENTION_LAYERS = {"full_attention", "sliding_attention"}


def refuse_unsupported(config: PretrainedConfig) -> None:
    """Raise ValueError, naming the reason, for a model that a slot a token cannot serve."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"model type {kind!r} is an encoder-decoder, not a causal language model")
    if kind in {"bloom", "mpt"} or getattr(config, "alibi", False):
        raise ValueError(f"model type {kind!r} uses ALiBi positions, which are not supported")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"model type {kind!r} is not a causal language model of transformers")
    if config.get_text_config() is not config:
        raise ValueError(f"model type {kind!r} is multimodal; only its language model would do")
    if "longrope" in _rope_types(config):  # one long row would change all keys of a batch
        raise ValueError(f"model type {kind!r} uses longrope positions, which are not supported")
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    kinds = set(getattr(config, "layer_types", None) or ()) - ATTENTION_LAYERS
    if kinds or architecture._is_stateful:
        found = ", ".join(sorted(kinds)) or "recurrent"
        raise ValueError(f"model type {kind!r} has {found} layers; only attention is supported")
    if not architecture._can_compile_fullgraph:  # transformers' mark of a static cache
        raise ValueError(f"model type {kind!r} does not work with a static key-value cache")


def _rope_types(config: PretrainedConfig) -> set[str]:
    """Return the kinds of rotary positions, of the model or of each kind of its layers."""
    rope = getattr(config, "rope_parameters", None) or {}
    return {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}


def layer_windows(config: PretrainedConfig) -> dict[str, int | None]:
    """Return the look-back of each kind of layer; None sees everything."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return {k: window if k == "sliding_attention" else None for k in dict.fromkeys(kinds)}
    return {"full_attention": window if getattr(config, "use_sliding_window", True) else None}
