"""A block drafter: all tokens of a draft from one pass of a small network (DFlash, DSpark).

The network (models/block_layers.py) reads hidden states of several target layers at every place
before the last committed token, and drafts from a block that starts with that token (Chen et al.
2026, DFlash, arXiv 2602.06036).  Each position of the block, the anchor's included, speaks of the
token after its own place, so K positions draft K tokens; that is the layout of DSpark (Cheng et
al. 2026, arXiv 2607.05147), where DFlash drafts one token fewer and leaves the anchor's unused.
DSpark's two heads (sequential.py) are options.

A feature layer of number i is the output of decoder layer i, from 0, as `models.walk` counts: the
same number in z-lab's `target_layer_ids`, one more (i + 1) in speculators'
`aux_hidden_state_layer_ids`.  The number of layers means the output of the final norm.

Shapes: B rows, C capacity, A blocks a row, K positions of a block, D hidden, V vocabulary, r rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from specstream.drafters.base import Drafter
from specstream.drafters.features import check_layers
from specstream.drafters.sequential import (
    ConfidenceHead,
    MarkovHead,
    confident_lengths,
    draw_in_turn,
    with_previous,
)
from specstream.drafters.stored import read_tensors, write_tensors
from specstream.models.block_layers import BlockNetwork, BlockShape, Injected
from specstream.models.cache import bucket
from specstream.models.compilation import compile_shapes
from specstream.models.pretrained_lm import PretrainedLM
from specstream.processors import TextProcessor
from specstream.sampling import Noise, Role, Sampling, draw, probabilities
from specstream.structures import MAX_DRAFT, Context, Law, Observation, TokenDraft

WEIGHTS = "block.safetensors"
SMALL_TARGET = 8  # targets of fewer layers are read from the first to the last


@dataclass(slots=True)
class BlockCache:
    """Keys and values that each layer makes of the features of every committed place but the last.

    What lies beyond is never read, and written by the pass that commits it; a draft writes nothing.
    """

    layers: list[Injected]  # (B, C, H, d)
    compiled: bool = False  # whether the pipeline runs its passes of fixed shape compiled

    @property
    def capacity(self) -> int:
        """Places of a row."""
        return self.layers[0][0].shape[1]


class BlockDrafter(Drafter):
    """Drafts a block of `block_size` tokens in one pass over the target's features.

    `feature_layers` defaults to five layers evenly spread from the second to the third last, as
    published, and in targets of fewer than eight layers to three from the first to the last.  The
    network has `num_layers` layers of the target's width; `num_heads`, `num_kv_heads` and
    `intermediate_size` default to the target's.  Embeddings and LM head are the target's own.

    Without `markov_rank` the law of a token does not depend on the drafted tokens before it; with
    it, a low-rank bias from the token before is added to its logits, and the tokens are drawn one
    after the other.  With `confidence` a row's draft ends before the first position up to which
    all tokens stand with an estimated probability below `confidence_threshold`, be it the first.
    `weights` is a folder written by `save`; fresh ones are drawn from `seed`.
    """

    law = Law.DRAWN

    def __init__(
        self,
        target: nn.Module,
        block_size: int = 8,
        num_layers: int = 2,
        feature_layers: Sequence[int] | None = None,
        num_heads: int | None = None,
        num_kv_heads: int | None = None,
        intermediate_size: int | None = None,
        rope_theta: float = 10_000.0,
        markov_rank: int = 0,
        confidence: bool = False,
        confidence_threshold: float = 0.0,
        weights: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(target, PretrainedLM):
            raise ValueError("a block drafter reads a causal language model's layers only")
        if not 2 <= block_size <= MAX_DRAFT:
            raise ValueError(f"block_size must lie in 2..{MAX_DRAFT}, not {block_size}")
        if markov_rank < 0:
            raise ValueError(f"markov_rank must be 0 (off) or positive, not {markov_rank}")
        if not 0 <= confidence_threshold <= 1 or (confidence_threshold and not confidence):
            raise ValueError(
                f"confidence_threshold {confidence_threshold} must lie in [0, 1], and needs "
                "confidence: true unless it is 0"
            )
        assert target.decoder  # refuses a model that does not come apart
        self.borrowed = (target,)  # in a tuple: not a part of this module
        self.feature_layers = _feature_layers(feature_layers, target.num_layers)
        self.max_tokens = block_size
        self.markov_rank, self.confidence_threshold = markov_rank, confidence_threshold
        config = target.config.get_text_config()
        heads = num_heads or config.num_attention_heads
        shape = BlockShape(
            block_size=block_size,
            num_features=len(self.feature_layers) * config.hidden_size,
            hidden_size=config.hidden_size,
            num_layers=num_layers,
            num_heads=heads,
            num_kv_heads=num_kv_heads or getattr(config, "num_key_value_heads", None) or heads,
            intermediate_size=intermediate_size
            or getattr(config, "intermediate_size", None)
            or 4 * config.hidden_size,
            rope_theta=rope_theta,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = BlockNetwork(shape)
            self.markov = MarkovHead(target.vocab_size, markov_rank) if markov_rank else None
            self.confidence = ConfidenceHead(shape.hidden_size, markov_rank) if confidence else None
        if weights is not None:
            read_tensors(Path(weights, WEIGHTS), self.state_dict())

    @property
    def target(self) -> PretrainedLM:
        """The model whose features, embeddings and head are used."""
        return self.borrowed[0]

    # What training and decoding compute alike

    def states(
        self, anchors: Tensor, places: Tensor, context: Sequence[Injected], seen: Tensor
    ) -> Tensor:
        """Return the states (B, A, K, D) of blocks after tokens (B, A) at `places` (B, A).

        `context` and `seen` are explained in `BlockNetwork`.
        """
        embedded = self.target.model.get_input_embeddings()(anchors)
        return self.network(embedded, places, context, seen)

    def logits(self, states: Tensor) -> Tensor:
        """Return logits (..., V) of states (..., D + r): the target's head, and the Markov bias."""
        size = self.network.shape.hidden_size
        logits = self._unbiased(states[..., :size])
        return logits if self.markov is None else logits + self.markov(states[..., size:])

    def _unbiased(self, hidden: Tensor) -> Tensor:
        return self.target.head(hidden.to(self.target.dtype))

    # Decoding

    def new_cache(self, batch_size: int, capacity: int) -> BlockCache:
        shape = self.network.shape
        size = (batch_size, capacity, shape.num_kv_heads, shape.head_size)
        empty = self.network.mask_embedding.detach()
        return BlockCache(
            [(empty.new_zeros(size), empty.new_zeros(size)) for _ in range(shape.num_layers)]
        )

    def read_prompt(self, features: Tensor, first: int, cache: BlockCache) -> None:
        start = torch.full((len(features),), first, device=features.device)
        self.append(features, start, cache)

    def observe(self, observation: Observation, cache: BlockCache) -> None:
        assert observation.features is not None
        run = self._compiled_append if cache.compiled else self.append
        run(observation.features, observation.start, cache)

    @torch.no_grad()
    def append(self, features: Tensor, start: Tensor, cache: BlockCache) -> None:
        """Write what the layers make of features (B, T, F) to places start (B,) + 0..T-1."""
        rows, width = features.shape[:2]
        places = start[:, None] + torch.arange(width, device=start.device)  # (B, T)
        offsets = torch.arange(rows, device=start.device)[:, None] * cache.capacity
        slots = (offsets + places).flatten()
        for made, stored in zip(self.network.inject(features, places), cache.layers, strict=True):
            for new, storage in zip(made, stored, strict=True):
                storage.flatten(0, 1).index_copy_(0, slots, new.flatten(0, 1).to(storage.dtype))

    @torch.inference_mode()
    def propose(
        self, context: Context, cache: BlockCache, num_tokens: int, sampling: Sampling, noise: Noise
    ) -> TokenDraft:
        cache.compiled = context.compiled
        longest = max(len(tokens) for tokens in context.history)
        run = self._compiled_draft if context.compiled else self.draft
        return run(context, cache, num_tokens, sampling, noise, bucket(longest, cache.capacity))

    def draft(
        self,
        context: Context,
        cache: BlockCache,
        num_tokens: int,
        sampling: Sampling,
        noise: Noise,
        view: int,
    ) -> TokenDraft:
        """Run the block over the first `view` places and draw; this part is compiled whole.

        The whole block is run however many tokens are asked for, as it was in training.
        """
        places = context.lengths[:, None] - 1  # (B, 1) of the anchors
        seen = torch.arange(view, device=places.device) < places  # (B, view)
        injected = [(keys[:, :view], values[:, :view]) for keys, values in cache.layers]
        anchors = context.tokens.gather(1, places)
        hidden = self.states(anchors, places, injected, seen[:, None])[:, 0, :num_tokens]
        coins = noise.uniform(context.prompts, context.elements(num_tokens), Role.DRAFT)
        base = self._unbiased(hidden)  # (B, K, V)
        if self.markov is None:
            known = None if context.seen is None else context.seen[:, None]
            probs = probabilities(base, sampling, known)
            tokens = draw(probs, coins)
        else:
            tokens, probs = draw_in_turn(base, self.markov, anchors, context.seen, coins, sampling)
        lengths = torch.full_like(context.lengths, num_tokens)
        if self.confidence is not None:
            before = torch.cat([anchors, tokens[:, :-1]], 1)  # (B, K)
            chances = self.confidence(with_previous(hidden, self.markov, before))
            lengths = confident_lengths(chances, self.confidence_threshold)
        return TokenDraft(tokens, probs, lengths)

    @functools.cached_property
    def _compiled_draft(self) -> Callable[..., TokenDraft]:
        return compile_shapes(self.draft)

    @functools.cached_property
    def _compiled_append(self) -> Callable[..., None]:
        return compile_shapes(self.append)

    # What is counted, checked, stored

    def extra_repr(self) -> str:
        """Name what a round costs: costs of one block do not hold for another."""
        return f"block_size={self.max_tokens}"

    def extra_parameters(self) -> dict[str, int]:
        """Count the drafter's own weights by part."""
        network = self.network
        parts: dict[str, nn.Module | None] = {
            "fusion": nn.ModuleList([network.fc, network.hidden_norm]),
            "layers": nn.ModuleList([network.layers, network.norm]),
            "markov head": self.markov,
            "confidence head": self.confidence,
        }
        counts = {
            name: sum(weight.numel() for weight in part.parameters())
            for name, part in parts.items()
            if part is not None
        }
        return counts | {"mask embedding": network.mask_embedding.numel()}

    def check_target(self, target: nn.Module, processor: TextProcessor) -> None:
        if target is not self.target:
            raise ValueError("a block drafter reads the target that it was built for, and no other")

    def save(self, folder: Path, processor: TextProcessor) -> dict[str, Any]:
        write_tensors(folder / WEIGHTS, self.state_dict())
        sizes = asdict(self.network.shape)
        del sizes["hidden_size"], sizes["num_features"]  # the target's, and the feature layers'
        return {
            "class_path": "specstream.drafters.BlockDrafter",
            "init_args": sizes
            | {
                "feature_layers": list(self.feature_layers),
                "markov_rank": self.markov_rank,
                "confidence": self.confidence is not None,
                "confidence_threshold": self.confidence_threshold,
                "weights": ".",
            },
        }


def _feature_layers(wanted: Sequence[int] | None, num_layers: int) -> tuple[int, ...]:
    """Return the feature layers: those that are wanted, or some spread over the target."""
    if wanted is None:
        small = num_layers < SMALL_TARGET
        first, last = (0, num_layers - 1) if small else (1, num_layers - 3)
        count = min(3, num_layers) if small else 5
        return tuple(round(first + i * (last - first) / max(count - 1, 1)) for i in range(count))
    return check_layers(wanted, num_layers)
