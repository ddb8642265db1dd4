"""LLaDA and Dream, whose files come with code of their own, on the classes of Llama and Qwen2.

LLaDA (Nie et al. 2025) is a Llama under other names (`blocks.0.ff_proj` is the gate of layer 0);
Dream (Ye et al. 2025) is a Qwen2 under its own names, whose output at a position speaks of the next
one.  So no remote code is run.  What those classes cannot express is refused, never approximated:
`llada_network` and `dream_network` read a config.json, `load_network` fills what they describe.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from specstream.files import first_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

LLADA_MASK = 126336  # <|mdm_mask|>
DREAM_MASK = 151666  # <|mask|>
INDEX = "model.safetensors.index.json"
HEAD = "lm_head.weight"

ABSENT = (None, False)
LLADA_IS_A_LLAMA: dict[str, tuple[object, ...]] = {  # None: the key may lack
    "activation_type": ("silu",),
    "alibi": ABSENT,
    "attention_layer_norm": ABSENT,
    "bias_for_layer_norm": ABSENT,
    "block_group_size": (None, 1),
    "block_type": ("llama",),
    "include_bias": ABSENT,
    "include_qkv_bias": ABSENT,
    "input_emb_norm": ABSENT,
    "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (None, True),
    "rope": (True,),
    "scale_logits": ABSENT,
}
LLADA_NAMES = {
    "model.transformer.wte": "model.embed_tokens",
    "model.transformer.ln_f": "model.norm",
    "model.transformer.ff_out": "lm_head",
}
LLADA_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_norm": "post_attention_layernorm",
    "ff_proj": "mlp.gate_proj",  # the one that goes through the activation
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}
DREAM_IS_A_QWEN2: dict[str, tuple[object, ...]] = {
    "hidden_act": (None, "silu"),
    "rope_scaling": ABSENT,
    "use_mrope": ABSENT,
    "use_sliding_window": ABSENT,
}


@dataclass(frozen=True, slots=True)
class HubNetwork:
    """What a config.json of the hub describes.

    Attributes:
        config: the same network for a class of `transformers`.
        names: what a tensor of the class is called in the files, where that is another name.
        form: the fields of the `MaskedForm`.
    """

    config: PretrainedConfig
    names: Mapping[str, str]
    form: dict[str, Any]


def llada_network(found: Mapping[str, Any]) -> HubNetwork:
    """Return the Llama that the config.json of a LLaDA describes.

    Raises ValueError in one line for a mixture of experts, for what no Llama has (biases, ALiBi,
    another norm or activation) and for a size that is missing.
    """
    from transformers import LlamaConfig

    _refuse_other_class(found, "LLaDAModelLM")  # the mixtures of experts have the same model_type
    for name, values in LLADA_IS_A_LLAMA.items():
        if found.get(name) not in values:
            raise _not_expressed("LLaDA", "Llama", name, found.get(name))
    width = _size(found, "d_model")
    num_heads = _size(found, "n_heads", divides=width)
    num_kv_heads = 1 if found.get("multi_query_attention") else num_heads
    if found.get("n_kv_heads") is not None:
        num_kv_heads = _size(found, "n_kv_heads", divides=num_heads)
    inner = "mlp_ratio" if found.get("mlp_hidden_size") is None else "mlp_hidden_size"
    rows = "vocab_size" if found.get("embedding_size") is None else "embedding_size"
    config = LlamaConfig(
        vocab_size=_size(found, rows),
        hidden_size=width,
        intermediate_size=_size(found, inner) * (width if inner == "mlp_ratio" else 1),
        num_hidden_layers=_size(found, "n_layers"),
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=width // num_heads,
        max_position_embeddings=_size(found, "max_sequence_length"),
        rms_norm_eps=_number(found, "rms_norm_eps"),
        rope_parameters={"rope_type": "default", "rope_theta": _number(found, "rope_theta")},
        tie_word_embeddings=bool(found.get("weight_tying")),
        bos_token_id=_token(found, "bos_token_id"),
        eos_token_id=_token(found, "eos_token_id"),  # also its padding; it trains like any token
    )
    names = {f"{ours}.weight": f"{theirs}.weight" for theirs, ours in LLADA_NAMES.items()}
    for layer in range(config.num_hidden_layers):
        for theirs, ours in LLADA_LAYER_NAMES.items():
            name = f"model.transformer.blocks.{layer}.{theirs}.weight"
            names[f"model.layers.{layer}.{ours}.weight"] = name
    mask_id = _mask_id(found, LLADA_MASK, config.vocab_size)
    return HubNetwork(config, names, {"mask_id": mask_id, "block_length": None, "shifted": False})


def dream_network(found: Mapping[str, Any]) -> HubNetwork:
    """Return the Qwen2 that the config.json of a Dream describes.

    Raises ValueError in one line for another class, for what the class of Qwen2 would do otherwise
    (scaled rotary positions, a sliding window) and for a size that is missing.
    """
    from transformers import Qwen2Config

    _refuse_other_class(found, "DreamModel")  # DreamReasoner is a block model that is not shifted
    for name, values in DREAM_IS_A_QWEN2.items():
        if found.get(name) not in values:
            raise _not_expressed("Dream", "Qwen2", name, found.get(name))
    width = _size(found, "hidden_size")
    num_heads = _size(found, "num_attention_heads", divides=width)
    config = Qwen2Config(
        vocab_size=_size(found, "vocab_size"),
        hidden_size=width,
        intermediate_size=_size(found, "intermediate_size"),
        num_hidden_layers=_size(found, "num_hidden_layers"),
        num_attention_heads=num_heads,
        num_key_value_heads=_size(found, "num_key_value_heads", divides=num_heads),
        max_position_embeddings=_size(found, "max_position_embeddings"),
        rms_norm_eps=_number(found, "rms_norm_eps"),
        rope_parameters={"rope_type": "default", "rope_theta": _number(found, "rope_theta")},
        tie_word_embeddings=bool(found.get("tie_word_embeddings")),
        bos_token_id=_token(found, "bos_token_id"),
        eos_token_id=_token(found, "eos_token_id"),
        pad_token_id=_token(found, "pad_token_id"),
    )
    mask_id = _mask_id(found, DREAM_MASK, config.vocab_size)
    return HubNetwork(config, {}, {"mask_id": mask_id, "block_length": None, "shifted": True})


def load_network(
    path: str, network: HubNetwork, dtype: torch.dtype, attn_implementation: str
) -> PreTrainedModel:
    """Return the network with the weights of `path`, read shard by shard in `dtype`.

    Raises ValueError, naming one, for tensors that lack, that have no place or that do not fit.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):  # sizes without memory, which the files' tensors then take
        model = AutoModelForCausalLM.from_config(
            network.config, dtype=dtype, attn_implementation=attn_implementation
        )
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)  # in no file, so computed
    tied = model.config.tie_word_embeddings
    expected = model.state_dict()
    places = {network.names.get(name, name): name for name in expected}
    lacking = {name for name, place in places.items() if not (tied and place == HEAD)}
    for file in _weight_files(path):
        state = {}
        for name, tensor in _tensors(path, file, dtype).items():
            place = places.get(name)
            if place is None:
                raise ValueError(f"{path!r} holds {name}, which its config.json has no place for")
            if tensor.shape != expected[place].shape:
                shapes = f"{tuple(tensor.shape)}, not {tuple(expected[place].shape)}"
                raise ValueError(f"{name} in {path!r} has the shape {shapes} as config.json says")
            lacking.discard(name)
            if not (tied and place == HEAD):
                state[place] = tensor
        model.load_state_dict(state, strict=False, assign=True)
    if lacking:
        name = sorted(lacking)[0]
        raise ValueError(f"{path!r} lacks {len(lacking)} of its model's weights, {name} for one")
    model.tie_weights()
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    return model.eval()


def _weight_files(path: str) -> list[str]:
    """Return the safetensors files of a folder or a hub id, downloaded where they must be."""
    from transformers.utils import cached_file

    try:
        index = cached_file(path, INDEX)
    except OSError:  # none there: one file holds everything
        index = None
    try:
        if index is None:
            return [cached_file(path, "model.safetensors")]
        with open(index, encoding="utf-8") as text:
            shards = sorted(set(json.load(text)["weight_map"].values()))
        return [cached_file(path, shard) for shard in shards]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"cannot load a model from {path!r}: {first_line(error)}") from error


def _tensors(path: str, file: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors of one file as copies: what is mapped changes with the file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as shard:
            return {name: shard.get_tensor(name).to(dtype, copy=True) for name in shard.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot load a model from {path!r}: {first_line(error)}") from error


def _refuse_other_class(found: Mapping[str, Any], wanted: str) -> None:
    classes = found.get("architectures") or [wanted]
    if classes != [wanted]:
        raise ValueError(
            f"of model type {found['model_type']!r} only {wanted} is supported, not {classes}"
        )


def _not_expressed(kind: str, target: str, name: str, value: object) -> ValueError:
    return ValueError(f"a {kind} with {name} {value!r} is not what the class of {target} computes")


def _size(found: Mapping[str, Any], name: str, divides: int = 0) -> int:
    value = found.get(name)
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} in config.json must be a whole number above 0, not {value!r}")
    if divides % value:
        raise ValueError(f"{name} {value} in config.json does not divide {divides}")
    return value


def _number(found: Mapping[str, Any], name: str) -> float:
    value = found.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise ValueError(f"{name} in config.json must be a number above 0, not {value!r}")
    return float(value)


def _token(found: Mapping[str, Any], name: str) -> int | None:
    value = found.get(name)
    if value is not None and (type(value) is not int or value < 0):
        raise ValueError(f"{name} in config.json must be a token or null, not {value!r}")
    return value


def _mask_id(found: Mapping[str, Any], default: int, vocab_size: int) -> int:
    value = found.get("mask_token_id", default)
    if type(value) is not int or not 0 <= value < vocab_size:
        raise ValueError(
            f"mask_token_id in config.json must be one of {vocab_size} tokens, not {value!r}"
        )
    return value
