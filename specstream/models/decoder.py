"""A causal LM of `transformers` taken apart: embeddings, layers, final norm.

Drafters that read hidden states between the target's layers, or send states of their own through
some of them, need the parts.  The layers are called as the model calls them; nothing of a
modelling file is copied.  Whether the parts put together are still the model is checked once, on a
few tokens, because a model may scale or add something between them that no attribute shows.

Shapes: B rows, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from specstream.models.cache import as_attention_reads

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBE = 4  # tokens on which the parts are compared with the whole


class Decoder(ABC):
    """The parts of one model, by reference."""

    parts: tuple[str, ...]  # attributes of the base model by which this kind is known

    def __init__(self, base: nn.Module, layers: str, norm: str) -> None:
        self.base = base
        self.layers: nn.ModuleList = getattr(base, layers)
        self.norm: nn.Module = getattr(base, norm)

    @abstractmethod
    def embed(self, tokens: Tensor, places: Tensor) -> Tensor:
        """Return what enters the first layer, (B, T, D), for tokens (B, T) at places (B, T)."""

    @abstractmethod
    def told(self, hidden: Tensor, places: Tensor) -> dict[str, Any]:
        """Return what every layer is told of the places (B, T) of `hidden` (B, T, D)."""

    def run(
        self, layer: nn.Module, hidden: Tensor, mask: Any, told: dict[str, Any], cache: Any = None
    ) -> Tensor:
        """Send `hidden` (B, T, D) through one layer, over `cache` if there is one."""
        return layer(
            hidden,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=cache is not None,
            **told,
        )


class RotaryDecoder(Decoder):
    """Llama, Qwen, Mistral and their kind: places enter each layer as rotations."""

    parts = ("embed_tokens", "layers", "norm", "rotary_emb")

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base, "layers", "norm")

    def embed(self, tokens: Tensor, places: Tensor) -> Tensor:
        return self.base.embed_tokens(tokens)

    def told(self, hidden: Tensor, places: Tensor) -> dict[str, Any]:
        return {
            "position_ids": places,
            "position_embeddings": self.base.rotary_emb(hidden, position_ids=places),
        }


class LearnedPlacesDecoder(Decoder):
    """GPT-2 and its kind: places are embedded beside the tokens."""

    parts = ("wte", "wpe", "h", "ln_f", "drop")

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base, "h", "ln_f")

    def embed(self, tokens: Tensor, places: Tensor) -> Tensor:
        return self.base.drop(self.base.wte(tokens) + self.base.wpe(places))

    def told(self, hidden: Tensor, places: Tensor) -> dict[str, Any]:
        return {}


KINDS = (RotaryDecoder, LearnedPlacesDecoder)


def find_decoder(model: PreTrainedModel) -> Decoder:
    """Return the parts of `model`; ValueError names what a model lacks or does besides."""
    base, name = model.base_model, model.config.model_type
    lacking = {kind: [p for p in kind.parts if not hasattr(base, p)] for kind in KINDS}
    for kind, missing in lacking.items():
        if not missing:
            decoder = kind(base)
            if "past_key_values" not in inspect.signature(decoder.layers[0].forward).parameters:
                raise ValueError(
                    f"model type {name!r} does not come apart: its layers take no past_key_values"
                )
            _check(model, decoder)
            return decoder
    kind, missing = min(lacking.items(), key=lambda item: len(item[1]))
    raise ValueError(
        f"model type {name!r} does not come apart: a drafter that works between the target's "
        f"layers needs {', '.join(kind.parts)}, and {', '.join(missing)} is missing"
    )


@torch.no_grad()
def _check(model: PreTrainedModel, decoder: Decoder) -> None:
    """Compare the parts with the whole on a few tokens."""
    device = model.device
    if device.type == "meta":
        return
    training = model.training
    model.eval()
    tokens = torch.arange(PROBE, device=device)[None] % model.config.get_text_config().vocab_size
    places = torch.arange(PROBE, device=device)[None]
    mask = (places[0][:, None] >= places[0])[None, None]  # (1, 1, T, T)
    mask = as_attention_reads(mask, model.config._attn_implementation, model.dtype)
    try:
        hidden = decoder.embed(tokens, places)
        told = decoder.told(hidden, places)
        for layer in decoder.layers:
            hidden = decoder.run(layer, hidden, mask, told)
    except (TypeError, AttributeError, KeyError) as error:  # the parts want to be told more
        raise ValueError(
            f"model type {model.config.model_type!r} does not come apart: {error}"
        ) from error
    found = decoder.norm(hidden).float()
    whole = model.base_model(
        input_ids=tokens, attention_mask=mask, position_ids=places, use_cache=False
    ).last_hidden_state.float()
    model.train(training)
    if not torch.allclose(found, whole, rtol=0.05, atol=0.05 * float(whole.abs().max())):
        raise ValueError(
            f"model type {model.config.model_type!r} does more than pass hidden states from layer "
            "to layer; drafters that work between its layers are not supported"
        )
