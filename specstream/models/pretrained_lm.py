"""Causal language models of `transformers` as targets and as draft models.

One adapter, no vendored modelling files.  It gives training what it needs (hidden states before
the head, documents of a packed row kept apart) and decoding what it needs (one pass over the
static cache).  It does not know who is target and who is draft, and keeps no state of decoding.

Shapes: B rows, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from specstream.models.cache import NodeTree, SlotCache, as_attention_reads, attention_mask
from specstream.models.decoder import Decoder, find_decoder
from specstream.models.fresh import fresh_model
from specstream.models.saving import save_model
from specstream.models.supported import FORM, layer_windows, refuse_unsupported
from specstream.models.weights import load_model, resolve_dtype

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

HEAD_SCALINGS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


class PretrainedLM(nn.Module):
    """A causal LM with a key-value cache for each position, from a folder or the model hub.

    `path` is a folder or a hub id; `dtype` one of float32, bfloat16, float16, or auto (bfloat16
    where the hardware computes in it, else float32).  `device` is auto or the torch device that
    the model is for; it is loaded on the CPU and `device` only decides what auto is.  Raises
    ValueError in one line for a missing path, damaged weights, or a model that the static cache
    cannot serve.
    """

    def __init__(
        self,
        path: str,
        dtype: str = "auto",
        attn_implementation: str = "sdpa",
        device: str = "auto",
    ) -> None:
        super().__init__()
        self.path = path
        self._adopt(load_model(path, resolve_dtype(dtype, device), attn_implementation))

    @classmethod
    def of(cls, model: PreTrainedModel, path: str = "") -> PretrainedLM:
        """Wrap a `transformers` model that is already in memory."""
        lm = cls.__new__(cls)
        nn.Module.__init__(lm)
        lm.path = path
        lm._adopt(model)
        return lm

    def _adopt(self, model: PreTrainedModel) -> None:
        refuse_unsupported(model.config)
        if getattr(model.config, FORM, None) is not None:
            raise ValueError(
                f"{self.path!r} is a masked diffusion model, not a causal one: load it as "
                "PretrainedMaskedLM"
            )
        self.model = model
        self.config: PretrainedConfig = model.config
        self.vocab_size: int = model.config.get_text_config().vocab_size
        self.num_layers: int = model.config.num_hidden_layers
        self.max_positions: int | None = getattr(model.config, "max_position_embeddings", None)
        self.windows = layer_windows(model.config)

    @property
    def head(self) -> nn.Module:
        """The output projection, D -> V."""
        return self.model.get_output_embeddings()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the weights are in."""
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        """The device the weights are on."""
        return self.model.device

    def hidden(
        self, tokens: Tensor, positions: Tensor | None = None, documents: Tensor | None = None
    ) -> Tensor:
        """Return the last hidden states before the head, (B, T, D), without a cache.

        `tokens`, `positions` and `documents` are (B, T); a token attends to earlier tokens of its
        own document only, and -1 marks padding.  Without `documents` a row is one document.
        Raises ValueError where the model rescales its logits after the head, because a loss on
        these hidden states would then not be a loss on the model's law.
        """
        self._refuse_scaled_logits("training")
        mask = None if documents is None else self.masks(*document_mask(documents))
        base = self.model.base_model
        output = base(
            input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False
        )
        return output.last_hidden_state

    def forward(
        self, tokens: Tensor, positions: Tensor | None = None, documents: Tensor | None = None
    ) -> Tensor:
        """Return logits (B, T, V) without a cache; arguments as in `hidden`."""
        return self.head(self.hidden(tokens, positions, documents))

    def new_cache(self, batch_size: int, capacity: int) -> SlotCache:
        """Return an empty static cache for `batch_size` rows of `capacity` slots."""
        return SlotCache(self.num_layers, batch_size, capacity)

    def extend(
        self,
        tokens: Tensor,
        lengths: Tensor,
        cache: SlotCache,
        view: int,
        num_logits: int = 0,
        tree: NodeTree | None = None,
    ) -> Tensor:
        """Run one pass over `cache`: write `tokens` (B, T) at slots lengths + i, return (B, T, V).

        `lengths` (B,) is what each row holds already; `view` is how many slots the pass reads and
        bounds lengths + T.  With `num_logits` only the last so many positions get logits; with a
        `tree` the tokens are its nodes.  Only the cache is changed.
        """
        steps = torch.arange(tokens.shape[1], device=tokens.device)
        slots = lengths[:, None] + steps  # (B, T)
        cache.open(slots, view)
        output = self.model(
            input_ids=tokens,
            attention_mask=self.masks(slots, view, tree),
            position_ids=self.places(slots if tree is None else lengths[:, None] + tree.depths),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=num_logits,
        )
        cache.close()
        return output.logits

    @functools.cached_property
    def decoder(self) -> Decoder:
        """The model's parts, for passes that read or change what is between its layers.

        Raises ValueError, naming what is missing, for a model that does not come apart, and for one
        that rescales its logits after the head.
        """
        self._refuse_scaled_logits("drafting with the hidden states of")
        return find_decoder(self.model)

    def _refuse_scaled_logits(self, use: str) -> None:
        for name in HEAD_SCALINGS:
            if getattr(self.config, name, None) not in (None, 1):
                raise ValueError(f"{use} a model with {name} in its config is not supported")

    def places(self, places: Tensor) -> Tensor:
        """Keep places in the model's context: only nodes past a row's end can lie beyond."""
        if self.max_positions is None:
            return places
        return places.clamp(max=self.max_positions - 1)

    def masks(self, slots: Tensor, view: int | Tensor, tree: NodeTree | None = None) -> Any:
        """One mask, or one for each kind of layer where a model mixes them."""

        def build(window: int | None) -> Tensor:
            if isinstance(view, int):
                return attention_mask(slots, view, window, tree)
            mask = view  # (B, 1, T, T): documents kept apart
            if window is not None:
                steps = torch.arange(mask.shape[-1], device=mask.device)
                mask = mask & (steps[:, None] - steps < window)
            return mask

        masks = {name: self._as_attention_reads(build(w)) for name, w in self.windows.items()}
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def mask_of_layer(self, masks: Any, index: int) -> Any:
        """Pick the mask of layer `index` from what `masks` returned."""
        return masks[self.config.layer_types[index]] if isinstance(masks, dict) else masks

    def _as_attention_reads(self, mask: Tensor) -> Tensor:
        return as_attention_reads(mask, self.config._attn_implementation, self.dtype)

    def enable_gradient_checkpointing(self) -> None:
        """Trade recomputation for activation memory in training."""
        model = self.model  # the second name is the one before transformers 5.2x
        renamed = getattr(model, "activation_checkpointing_enable", None)
        (renamed or model.gradient_checkpointing_enable)({"use_reentrant": False})

    def save(self, folder: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Write an ordinary `transformers` folder that any runtime loads: bfloat16 safetensors."""
        save_model(self.model, folder, tokenizer)


class UntrainedLM(PretrainedLM):
    """A causal LM with fresh weights, from the numbers that size it.

    `architecture` is a `transformers` model type of the Llama family (llama, qwen2, qwen3,
    mistral, ...).  Weights are drawn from `seed` alone, float32.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        intermediate_size: int,
        num_layers: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        max_positions: int = 1024,
        tie_embeddings: bool = True,
        architecture: str = "llama",
        attn_implementation: str = "sdpa",
        seed: int = 0,
    ) -> None:
        nn.Module.__init__(self)
        self.path = ""
        self._adopt(
            fresh_model(
                vocab_size,
                hidden_size,
                intermediate_size,
                num_layers,
                num_heads,
                num_kv_heads,
                max_positions,
                tie_embeddings,
                architecture,
                attn_implementation,
                seed,
            )
        )


def document_mask(documents: Tensor) -> tuple[Tensor, Tensor]:
    """Return (documents, mask (B, 1, T, T) bool): causal, each document apart, padding too."""
    steps = torch.arange(documents.shape[1], device=documents.device)
    same = documents[:, :, None] == documents[:, None, :]
    return documents, (same & (steps[:, None] >= steps))[:, None]
