"""A small causal LM as drafter (Leviathan, Chen et al. 2023), and one cut from its target.

Shapes: B rows, K drafted tokens, V vocabulary, W window of tokens the drafter has to catch up on.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from specstream.drafters.base import Drafter
from specstream.models.cache import SlotCache, bucket
from specstream.models.compilation import compile_shapes
from specstream.models.pretrained_lm import PretrainedLM
from specstream.processors import TextProcessor
from specstream.sampling import Noise, Role, Sampling, draw, probabilities
from specstream.structures import Context, Law, Observation, TokenDraft


@dataclass(slots=True)
class DraftCache:
    """The drafter's keys and values, and up to where they match each row's committed tokens."""

    slots: SlotCache
    valid: list[int]  # tokens of each row whose keys and values are right
    drafted: int = 0  # tokens drafted in the running round


class DraftModel(Drafter):
    """Any supported causal LM of `transformers` with the target's vocabulary.

    `model` is a factory, so that training, loading and cutting all build it the same way.  Every
    token is drawn from the model's own law under the run's warpers, and that law is reported as q.
    """

    law = Law.DRAWN

    def __init__(self, target: nn.Module, model: Callable[[], PretrainedLM]) -> None:
        super().__init__()
        self.model = model()
        if isinstance(target, PretrainedLM) and target.vocab_size != self.model.vocab_size:
            raise ValueError(
                f"drafter has a vocabulary of {self.model.vocab_size}, target one of "
                f"{target.vocab_size}: they must share a tokenizer"
            )

    def new_cache(self, batch_size: int, capacity: int) -> DraftCache:
        return DraftCache(self.model.new_cache(batch_size, capacity), [0] * batch_size)

    @torch.inference_mode()
    def propose(
        self,
        context: Context,
        cache: DraftCache,
        num_tokens: int,
        sampling: Sampling,
        noise: Noise,
    ) -> TokenDraft:
        rows = [len(tokens) for tokens in context.history]
        room = self.model.max_positions
        if room is not None and min(rows) > room:
            cache.drafted = 0
            return TokenDraft(
                context.tokens[:, :0], None, torch.zeros_like(context.lengths)
            )  # every row has outgrown the drafter's context
        self._catch_up(context, cache)
        view = bucket(max(rows) + num_tokens, cache.slots.capacity)
        run = self._compiled_chain if context.compiled else draw_chain
        tokens, probs = run(self.model, context, cache.slots, num_tokens, sampling, noise, view)
        cache.valid = rows
        cache.drafted = num_tokens
        lengths = torch.full_like(context.lengths, num_tokens)
        if room is not None:  # the token drafted last is not read by the drafter
            lengths = (room + 1 - context.lengths).clamp(min=0, max=num_tokens)
        return TokenDraft(tokens, probs, lengths)

    @functools.cached_property
    def _compiled_chain(self) -> Callable[..., tuple[Tensor, Tensor]]:
        return compile_shapes(draw_chain)

    def _catch_up(self, context: Context, cache: DraftCache) -> None:
        """Read the committed tokens that the drafter has not seen, all but the last two."""
        rows = [len(tokens) for tokens in context.history]
        behind = max(n - 2 - v for n, v in zip(rows, cache.valid, strict=True))
        while behind > 0:
            width = min(prefill_width(behind), cache.slots.capacity)
            first = [max(min(v, n - 2), 0) for v, n in zip(cache.valid, rows, strict=True)]
            start = torch.tensor(first, device=context.lengths.device)
            start = start.clamp(max=cache.slots.capacity - width)
            window = context.tokens.gather(
                1, start[:, None] + torch.arange(width, device=start.device)
            )
            view = bucket(int(max(first)) + width, cache.slots.capacity)
            self.model.extend(window, start, cache.slots, view, num_logits=1)
            cache.valid = [min(f + width, n) for f, n in zip(first, rows, strict=True)]
            behind = max(n - 2 - v for n, v in zip(rows, cache.valid, strict=True))

    def observe(self, observation: Observation, cache: DraftCache) -> None:
        # The last drafted token was drawn but never read, so its keys and values are missing.
        read = max(cache.drafted - 1, 0)
        cache.valid = [
            v + min(a, read) for v, a in zip(cache.valid, observation.accepted, strict=True)
        ]

    def check_target(self, target: nn.Module, processor: TextProcessor) -> None:
        if not isinstance(target, PretrainedLM) or target.vocab_size != self.model.vocab_size:
            size = getattr(target, "vocab_size", "none")
            raise ValueError(
                f"drafter has a vocabulary of {self.model.vocab_size}, target one of {size}: "
                "they must share a tokenizer"
            )

    def save(self, folder: Path, processor: TextProcessor) -> dict[str, Any]:
        self.model.save(folder, processor.tokenizer)
        return {
            "class_path": "specstream.drafters.DraftModel",
            "init_args": {
                "model": {
                    "class_path": "specstream.models.PretrainedLM",
                    "init_args": {"path": "."},
                }
            },
        }


def draw_chain(
    model: PretrainedLM,
    context: Context,
    slots: SlotCache,
    num_tokens: int,
    sampling: Sampling,
    noise: Noise,
    view: int,
) -> tuple[Tensor, Tensor]:
    """Draw K tokens one after the other: tokens (B, K) and their laws (B, K, V).

    This is the part of `propose` with fixed shapes, which is compiled whole.  The
    first pass reads the last two committed tokens, because after a wholly accepted draft the
    drafter has seen neither: so the shapes are the same after every round.
    """
    start = (context.lengths - 2).clamp(min=0)
    last = context.lengths - 1 - start
    window = context.tokens.gather(1, torch.stack([start, start + 1], 1))  # (B, 2)
    logits = model.extend(window, start, slots, view)  # (B, 2, V)
    logits = logits.take_along_dim(last[:, None, None], 1)[:, 0]  # (B, V)
    coins = noise.uniform(context.prompts, context.elements(num_tokens), Role.DRAFT)  # (B, K)
    seen, tokens, probs = context.seen, [], []
    for i in range(num_tokens):
        q = probabilities(logits, sampling, seen)
        token = draw(q, coins[:, i])
        tokens.append(token)
        probs.append(q)
        if i + 1 < num_tokens:
            if seen is not None:
                seen = seen.scatter(1, token[:, None], True)
            logits = model.extend(token[:, None], context.lengths + i, slots, view)[:, 0]
    return torch.stack(tokens, 1), torch.stack(probs, 1)


class CutDraftModel(DraftModel):
    """A drafter made of the target's own first and last layers, to be trained further.

    Takes `first_layers` from the bottom and `last_layers` from the top of a `PretrainedLM` target,
    with its embeddings, norm and head, all of them copied in float32.  With `share_embeddings` the
    copies of the embeddings and the head are frozen, so they keep the target's values and only the
    layers and the norm are trained.  Everything is saved, so that `draft/` stands alone.
    """

    def __init__(
        self,
        target: nn.Module,
        first_layers: int = 1,
        last_layers: int = 1,
        share_embeddings: bool = True,
    ) -> None:
        super().__init__(
            target, lambda: cut_layers(target, first_layers, last_layers, share_embeddings)
        )


def cut_layers(target: nn.Module, first: int, last: int, share_embeddings: bool) -> PretrainedLM:
    """Return a float32 copy of `target` with only its first and last decoder layers."""
    if not isinstance(target, PretrainedLM):
        raise ValueError("a drafter can be cut from a causal language model only")
    kept = [*range(first), *range(target.num_layers - last, target.num_layers)]
    if (
        first < 0
        or last < 0
        or not 0 < len(kept) <= target.num_layers
        or len(set(kept)) < len(kept)
    ):
        raise ValueError(
            f"first_layers {first} and last_layers {last} do not fit a target of "
            f"{target.num_layers} layers"
        )
    layers = getattr(target.model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"cannot cut layers from model type {target.config.model_type!r}")
    target.model.base_model.layers = nn.ModuleList(layers[i] for i in kept)
    try:
        model = copy.deepcopy(target.model)
    finally:
        target.model.base_model.layers = layers
    config = copy.deepcopy(target.config)
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [target.config.layer_types[i] for i in kept]
    model.config = model.base_model.config = config
    for index, layer in enumerate(model.base_model.layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    model.to(torch.float32).requires_grad_(True)
    if share_embeddings:
        model.get_input_embeddings().requires_grad_(False)
        model.get_output_embeddings().requires_grad_(False)
    return PretrainedLM.of(model)


def prefill_width(missing: int) -> int:
    """Round a number of tokens to read up to one of few widths, so that shapes recur."""
    width = 8
    while width < missing and width < 512:
        width *= 2
    return width
