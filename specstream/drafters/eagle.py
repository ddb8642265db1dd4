"""EAGLE-3: one layer that reads the target's features, and trees that grow where it is sure.

Li et al. 2025 (EAGLE-3, arXiv 2503.01840) for the drafter, Li et al. 2024 (EAGLE-2, arXiv
2406.16858, section 4) for its trees.  The input at place i pairs the fused feature of place i with
the embedding of token i + 1, and says what token i + 2 is.  Beyond the places that the target has
been shown at, the drafter's own output stands in for the feature.

Reading order: `Eagle3`; its `grow` is the algorithm of a round, dynamic_tree its tree.

Shapes: B rows, T places, W width of the tree, K nodes drafted, S nodes expanded so far, D hidden,
F features of a place before they are fused, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specstream.drafters.base import Drafter
from specstream.drafters.draft_model import prefill_width
from specstream.drafters.dynamic_tree import Candidates, extended, joined, likeliest, rerank
from specstream.drafters.features import FeatureBuffer, check_layers
from specstream.drafters.stored import read_tensors, write_tensors
from specstream.models.cache import NodeTree, SlotCache, attention_mask, bucket
from specstream.models.compilation import compile_shapes
from specstream.models.eagle import EagleNetwork, layer_config
from specstream.models.pretrained_lm import PretrainedLM
from specstream.models.saving import whole
from specstream.processors import TextProcessor
from specstream.sampling import Noise, Sampling, penalised
from specstream.structures import MAX_DRAFT, Context, Law, Observation, TokenDraft

WEIGHTS = "eagle3.safetensors"


@dataclass(slots=True)
class EagleState:
    """What the drafter remembers of a batch."""

    features: FeatureBuffer  # fused, (B, C, D)
    slots: SlotCache  # slot i is place i; nodes of the running round stand behind the last place
    valid: list[int]  # places of each row whose keys and values come from the target's features


class Eagle3(Drafter):
    """A decoder layer over the target's features, drafting dynamic trees.

    `feature_layers` number outputs of the target's layers from 0, ascending; the number of layers
    means what its head reads.  The default is that of the paper's checkpoints, whose 2, L // 2 and
    L - 3 count the embeddings as 0: here 1, L // 2 - 1 and L - 4.  A target of less than seven
    layers has its first, middle and last read instead.

    At each depth the `width` likeliest paths are each continued by the `width` likeliest tokens, by
    the drafter's own law at temperature 1, and of all nodes found the `num_nodes` likeliest are
    verified (EAGLE-2).  The choice is a function of the text, so the draft is deterministic.  Width
    1 drafts chains.  `max_tokens` bounds the depth.

    `draft_vocab_size` restricts what can be drafted to the tokens most frequent in the training
    data (None: all); `intermediate_size` is the MLP's (None: the target's).  The embeddings are the
    target's, shared and frozen.  `weights` is the folder of a trained drafter; without it weights
    are drawn from `seed` alone and the head starts as the target's.
    """

    law = Law.DETERMINISTIC
    trees = True

    def __init__(
        self,
        target: nn.Module,
        feature_layers: Sequence[int] | None = None,
        width: int = 4,
        num_nodes: int = 16,
        max_tokens: int = 6,
        draft_vocab_size: int | None = None,
        intermediate_size: int | None = None,
        weights: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(target, PretrainedLM):
            raise ValueError("EAGLE-3 drafts for a causal language model only")
        self.feature_layers = chosen_layers(feature_layers, target.num_layers)
        size = target.vocab_size
        for name, value, most in (
            ("num_nodes", num_nodes, MAX_DRAFT - 1),
            ("max_tokens", max_tokens, MAX_DRAFT - 1),
            ("draft_vocab_size", draft_vocab_size, size),
            ("width", width, min(draft_vocab_size or size, MAX_DRAFT - 1)),
            ("intermediate_size", intermediate_size, None),
        ):
            if value is not None and (value < 1 or (most is not None and value > most)):
                accepted = "positive" if most is None else f"in 1..{most}"
                raise ValueError(f"{name} must be {accepted}, not {value}")
        self.width, self.num_nodes, self.max_tokens = width, num_nodes, max_tokens
        self.draft_vocab_size, self.intermediate_size = draft_vocab_size, intermediate_size
        self.borrowed = (target,)  # in a tuple: not a part of this module
        assert target.decoder  # refuses a model that shows no features
        config = layer_config(target.config, intermediate_size)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = EagleNetwork(config, len(self.feature_layers), size, draft_vocab_size)
        if weights is None:
            self._speak_of(self.network.draft_vocabulary)
        else:
            read_tensors(Path(weights, WEIGHTS), self.network.state_dict())
            self._check_vocabulary(Path(weights, WEIGHTS))

    def _speak_of(self, tokens: Tensor) -> None:
        weight = self.borrowed[0].head.weight
        assert isinstance(weight, Tensor)
        rows = whole(weight)
        self.network.speak_of(tokens, rows[tokens.to(rows.device)])

    def _check_vocabulary(self, path: Path) -> None:
        """Raise ValueError where `path` does not say which tokens of the target can be drafted."""
        if not self.network.reduced:
            return
        tokens, wanted = self.network.draft_vocabulary.tolist(), self.network.t2d.nonzero()[:, 0]
        if tokens != wanted.tolist():
            raise ValueError(
                f"{str(path)!r} is damaged: d2t and t2d must name the same {len(tokens)} tokens, "
                "ascending"
            )

    def restrict(self, counts: Tensor) -> None:
        """Draft only the tokens that `counts` (V,) of the training data finds most frequent.

        Of equally frequent ones the lowest ids; the head starts from the target's rows for them.
        """
        assert self.draft_vocab_size is not None
        best = counts.sort(descending=True, stable=True).indices[: self.draft_vocab_size]
        self._speak_of(best.sort().values.to(self.network.norm.weight.device))

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the target's embeddings (B, T, D) of tokens (B, T)."""
        return self.borrowed[0].model.get_input_embeddings()(tokens)

    # What the pipeline calls

    def new_cache(self, batch_size: int, capacity: int) -> EagleState:
        weight = self.network.norm.weight
        return EagleState(
            FeatureBuffer(batch_size, capacity, len(weight), weight.detach()),
            SlotCache(1, batch_size, capacity + self._beyond),
            [0] * batch_size,
        )

    @property
    def _caught_up(self) -> int:
        """Places read at the start of each round: all that the round before can have committed."""
        return self.max_tokens + 1

    @property
    def _beyond(self) -> int:
        """Slots that a round may write behind a row's last place."""
        return self._caught_up + (self.max_tokens - 1) * self.width

    def drafted(self, num_tokens: int) -> int:
        """Return the nodes K of a tree of height `num_tokens`: the same in every round."""
        found = self.width + (num_tokens - 1) * self.width**2 if num_tokens else 0
        return min(found, self.num_nodes)

    def num_slots(self, num_tokens: int) -> int:
        return self.drafted(num_tokens) + 1

    @torch.inference_mode()
    def read_prompt(self, features: Tensor, first: int, cache: EagleState) -> None:
        cache.features.read_prompt(self.network.fuse(features), first)

    @torch.inference_mode()
    def observe(self, observation: Observation, cache: EagleState) -> None:
        assert observation.features is not None
        fused = self.network.fuse(observation.features)
        cache.features.observe(replace(observation, features=fused))

    @torch.inference_mode()
    def propose(
        self,
        context: Context,
        cache: EagleState,
        num_tokens: int,
        sampling: Sampling,
        noise: Noise,
    ) -> TokenDraft:
        assert 0 < num_tokens <= self.max_tokens
        rows = [len(tokens) for tokens in context.history]
        self._catch_up(context, cache)
        view = bucket(max(rows) + self._beyond, cache.slots.capacity)
        run = self._compiled_grow if context.compiled else self.grow
        draft = run(context, cache, num_tokens, sampling, view)
        cache.valid = [n - 1 for n in rows]
        return draft

    @functools.cached_property
    def _compiled_grow(self) -> Callable[..., TokenDraft]:
        return compile_shapes(self.grow)

    def _catch_up(self, context: Context, cache: EagleState) -> None:
        """Read the places not yet read with the target's features, all but those of `grow`."""
        # Of n committed tokens the last place with a feature and a next token is n - 2.
        wanted = [len(tokens) - 1 - self._caught_up for tokens in context.history]
        behind = max(w - v for w, v in zip(wanted, cache.valid, strict=True))
        while behind > 0:
            width = min(prefill_width(behind), cache.slots.capacity)
            first = [max(min(v, w), 0) for v, w in zip(cache.valid, wanted, strict=True)]
            start = torch.tensor(first, device=context.lengths.device)
            start = start.clamp(max=cache.slots.capacity - width)
            view = bucket(max(first) + width, cache.slots.capacity)
            self._read(context, cache, start, width, view)
            cache.valid = [
                min(f + width, len(tokens) - 1)
                for f, tokens in zip(first, context.history, strict=True)
            ]
            behind = max(w - v for w, v in zip(wanted, cache.valid, strict=True))

    # One round

    def grow(
        self, context: Context, cache: EagleState, num_tokens: int, sampling: Sampling, view: int
    ) -> TokenDraft:
        """Return the best tree of height `num_tokens` below each row's last committed token.

        This is the part of `propose` with fixed shapes, which is compiled whole.  It first reads
        the places that the last round committed, over whatever that round's guesses had written
        there.  A row that wants less has the tree that it would have alone, whatever its neighbours
        want; a row of one token has no feature yet, and drafts nothing.
        """
        start = (context.lengths - 1 - self._caught_up).clamp(min=0)
        last = (context.lengths - 2 - start).clamp(min=0)
        hidden = self._read(context, cache, start, self._caught_up, view)
        hidden = hidden.take_along_dim(last[:, None, None], 1)  # (B, 1, D)
        seen = None if context.seen is None else context.seen[:, None]  # (B, 1, V)
        tokens, scores = (found.flatten(1) for found in self._children(hidden, sampling, seen))
        found = Candidates(tokens, scores, torch.full_like(tokens, -1), torch.ones_like(tokens))
        owners = torch.zeros_like(tokens)  # which of the nodes expanded last is the parent
        tree: NodeTree | None = None
        for depth in range(2, num_tokens + 1):
            newest = found.tokens.shape[1] - tokens.shape[1]  # the first candidate of this depth
            best = likeliest(scores, self.width)  # (B, W) those that are expanded
            nodes, owners = tokens.gather(1, best), owners.gather(1, best)
            tree = extended(tree, owners)
            if seen is not None:
                seen = seen.take_along_dim(owners[:, :, None], 1).scatter(
                    2, nodes[:, :, None], True
                )
            parents = hidden.take_along_dim(owners[:, :, None], 1)  # (B, W, D)
            hidden = self._expand(nodes, parents, context.lengths - 1, tree, cache.slots, view)
            children, steps = self._children(hidden, sampling, seen)  # (B, W, W)
            tokens = children.flatten(1)
            scores = (scores.gather(1, best)[:, :, None] + steps).flatten(1)
            above = (newest + best).repeat_interleave(self.width, 1)
            owners = torch.arange(self.width, device=tokens.device)
            owners = owners.repeat_interleave(self.width).expand_as(tokens)
            depths = torch.full_like(tokens, depth)
            found = joined(found, Candidates(tokens, scores, above, depths))
        num = self.drafted(num_tokens)
        heights = torch.where(context.lengths > 1, num_tokens, 0)
        if context.wanted is not None:
            heights = torch.minimum(heights, context.wanted)
        return rerank(found, num, heights, min(num_tokens, num))

    def _children(
        self, hidden: Tensor, sampling: Sampling, seen: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the likeliest tokens after nodes (B, T, D) and their log laws, (B, T, W) each."""
        vocabulary = self.network.draft_vocabulary
        logits = self.network.logits(hidden).float()
        if sampling.needs_history:
            assert seen is not None
            lowered = penalised(logits, sampling.repetition_penalty)
            logits = torch.where(seen[..., vocabulary], lowered, logits)
        best = logits.log_softmax(-1).topk(self.width)
        # Above 0 by rounding a path would seem likelier than its beginning.
        return vocabulary[best.indices], best.values.clamp(max=0.0)

    def _read(
        self, context: Context, cache: EagleState, start: Tensor, width: int, view: int
    ) -> Tensor:
        """Read `width` places from `start` (B,) on with the target's features: (B, width, D)."""
        places = start[:, None] + torch.arange(width, device=start.device)
        following = (places + 1).clamp(max=context.tokens.shape[1] - 1)
        return self._pass(
            context.tokens.gather(1, following),
            cache.features.window(start, width),
            places,
            places,
            attention_mask(places, view),
            cache.slots,
            view,
        )

    def _expand(
        self,
        nodes: Tensor,
        parents: Tensor,
        root: Tensor,
        tree: NodeTree,
        slots: SlotCache,
        view: int,
    ) -> Tensor:
        """Read nodes (B, W), the last of `tree`, below outputs `parents` (B, W, D): (B, W, D)."""
        num = tree.depths.shape[1]
        own = root[:, None] + torch.arange(num, device=root.device)  # (B, S) slots of the tree
        mask = attention_mask(own, view, None, tree)[:, :, -self.width :]
        places = root[:, None] + tree.depths[:, -self.width :]
        return self._pass(nodes, parents, places, own[:, -self.width :], mask, slots, view)

    def _pass(
        self,
        tokens: Tensor,
        features: Tensor,
        places: Tensor,
        slots: Tensor,
        mask: Tensor,
        cache: SlotCache,
        view: int,
    ) -> Tensor:
        """Run the network once over `cache`, whose `slots` (B, T) it writes; return (B, T, D)."""

        def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            keys, values = cache.layers[0].update(keys, values)
            return F.scaled_dot_product_attention(queries, keys, values, mask, enable_gqa=True)

        cache.open(slots, view)
        hidden = self.network(self.embed(tokens), features, places, attend)
        cache.close()
        return hidden

    # What is counted, checked, stored

    def extra_repr(self) -> str:
        """Name what a round costs: costs of one tree do not hold for another."""
        return f"width={self.width}, num_nodes={self.num_nodes}, max_tokens={self.max_tokens}"

    def extra_parameters(self) -> dict[str, int]:
        """Count what the drafter adds to the target, by part."""
        parts = {
            "fusion": self.network.fc,
            "layer": self.network.midlayer,
            "norm": self.network.norm,
            "head": self.network.lm_head,
        }
        return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}

    def check_target(self, target: nn.Module, processor: TextProcessor) -> None:
        own = self.borrowed[0]
        if not isinstance(target, PretrainedLM):
            raise ValueError("EAGLE-3 drafts for a causal language model only")
        for name, mine, other in (
            ("a vocabulary", own.vocab_size, target.vocab_size),
            ("a hidden size", own.config.hidden_size, target.config.hidden_size),
            ("a number of layers", own.num_layers, target.num_layers),
        ):
            if mine != other:
                raise ValueError(
                    f"Eagle3 is built for a target with {name} of {mine}, not one of {other}"
                )

    def save(self, folder: Path, processor: TextProcessor) -> dict[str, Any]:
        write_tensors(folder / WEIGHTS, self.network.state_dict())
        return {
            "class_path": "specstream.drafters.Eagle3",
            "init_args": {
                "feature_layers": list(self.feature_layers),
                "width": self.width,
                "num_nodes": self.num_nodes,
                "max_tokens": self.max_tokens,
                "draft_vocab_size": self.draft_vocab_size,
                "intermediate_size": self.intermediate_size,
                "weights": ".",
            },
        }


def chosen_layers(layers: Sequence[int] | None, num_layers: int) -> tuple[int, ...]:
    """Return the layers to read features from; ValueError for such that the target lacks."""
    if layers is None:
        usual = (1, num_layers // 2 - 1, num_layers - 4)
        few = tuple(sorted({0, num_layers // 2, num_layers - 1}))
        return usual if num_layers >= 7 else few
    return check_layers(layers, num_layers)
