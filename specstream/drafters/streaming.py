"""Speculative Streaming: the target drafts for itself (Bhendawade et al. 2024, arXiv 2402.11131).

In the upper layers of the target, R streams ride along with each node of a pass.  Stream j starts
as the node's hidden state plus a learned embedding of j (eq. 3, with the identity for f), attends
to what its node sees and to the streams 1..j of the same node (eq. 2), and says through the
target's own head which token comes j places after the node's next one.  So the pass that verifies
one tree drafts the next, and the streams of the last node that stood are the next draft.

Said otherwise than in the paper: stream j has the rotary place of its token, j after its node's;
the early exit goes through the target's final norm, and its loss counts as much as the next
token's; pruning keeps a fixed number of the likeliest nodes, where the paper has a threshold.

Two modes.  `shared`: streams and target were tuned together (one low-rank adapter, since merged
into the target), and the streams use the target's layers as they are.  `lossless`: the target is
frozen, and adapters act on the streams' positions only; they live in copies of the upper layers
that share the target's weights, so the target's own output is what it would be without streams.
Once they are no longer trained, decoding has them folded into weights of the streams' own.

Shapes: B rows, T nodes, M nodes kept, R streams, D hidden, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from specstream.drafters.base import Drafter
from specstream.drafters.static_tree import StaticTree, product_paths
from specstream.drafters.stored import read_tensors, write_tensors
from specstream.models.cache import NodeTree
from specstream.models.compilation import compile_shapes
from specstream.models.lora import (
    adapter_parameters,
    add_adapters,
    shared_copies,
    split_copies,
)
from specstream.models.pretrained_lm import PretrainedLM
from specstream.models.walk import Rider
from specstream.processors import TextProcessor
from specstream.sampling import Noise, Sampling
from specstream.structures import MAX_DRAFT, Context, Law, Observation, TokenDraft

WEIGHTS = "streams.safetensors"
PRUNING_RANK = 8  # of the early exit, as in the paper
MODES = ("lossless", "shared")


@dataclass(slots=True)
class StreamState:
    """The streams of the last node that stood in each row, once a pass has carried some."""

    riders: Tensor | None = None  # (B, R, D) after the final norm
    places: Tensor | None = None  # (B,) the node's place


class EarlyExit(nn.Module):
    """What a hidden state between the layers says of the next token, through a rank-8 correction.

    H(norm(h + U W h)) with the target's final norm and head: 2 * 8 * D parameters.
    """

    def __init__(self, hidden_size: int, rank: int = PRUNING_RANK) -> None:
        super().__init__()
        self.down = nn.Linear(hidden_size, rank, bias=False)
        self.up = nn.Linear(rank, hidden_size, bias=False)
        nn.init.normal_(self.down.weight, std=hidden_size**-0.5)
        nn.init.zeros_(self.up.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the corrected states (..., D), to be normed and read by the head."""
        return hidden + self.up(self.down(hidden.to(self.down.weight.dtype))).to(hidden.dtype)


class SpeculativeStreaming(Drafter):
    """Streams of a target as its drafter.

    `num_streams` (gamma) tokens are drafted at most; the streams ride in the top `stream_layers`
    layers (default: half).  A draft is the tree of `paths`, ranks of each stream's best tokens, or
    of `branching`, so many children at each depth.  With `kept_nodes` a pass goes on from the
    layer where streams join with only so many drafted nodes, the likeliest by the early exit
    ("parallel tree pruning").  `rank` and `alpha` size the adapters of mode `lossless`.
    """

    law = Law.DETERMINISTIC
    trees = True

    def __init__(
        self,
        target: nn.Module,
        num_streams: int = 4,
        stream_layers: int | None = None,
        mode: Literal["lossless", "shared"] = "lossless",
        rank: int = 32,
        alpha: float = 32.0,
        branching: Sequence[int] | None = None,
        paths: Sequence[Sequence[int]] | None = None,
        kept_nodes: int | None = None,
        weights: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(target, PretrainedLM):
            raise ValueError("streams ride in a causal language model's layers only")
        top, size = target.num_layers, target.config.hidden_size
        self.num_layers = stream_layers if stream_layers is not None else max(top // 2, 1)
        if mode not in MODES:
            raise ValueError(f"mode {mode!r} is not one of {', '.join(MODES)}")
        if rank < 1 or not 0 < alpha < math.inf:
            raise ValueError(f"rank {rank} must be at least 1 and alpha {alpha} be positive")
        if not 1 <= num_streams <= MAX_DRAFT or not 1 <= self.num_layers <= top:
            raise ValueError(
                f"num_streams {num_streams} must lie in 1..{MAX_DRAFT} and stream_layers "
                f"{self.num_layers} in 1..{top}, the target's layers"
            )
        if branching is not None and paths is not None:
            raise ValueError("give branching or paths, not both")
        if paths is None:
            paths = product_paths([1] * num_streams if branching is None else branching)
        self.tree = StaticTree(paths)
        if self.tree.height > num_streams:
            raise ValueError(
                f"a tree of height {self.tree.height} needs as many streams, not {num_streams}"
            )
        if self.tree.num_ranks > target.vocab_size:
            raise ValueError(
                f"a tree of {self.tree.num_ranks} ranks needs as many tokens, not "
                f"{target.vocab_size}"
            )
        if kept_nodes is not None and kept_nodes < 1:
            raise ValueError(f"kept_nodes must be at least 1, not {kept_nodes}")
        self.num_streams, self.max_tokens = num_streams, self.tree.height
        self.first_layer, self.kept_nodes = top - self.num_layers, kept_nodes
        self.mode, self.rank, self.alpha = mode, rank, alpha
        self.borrowed = (target,)  # in a tuple: not a part of this module
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embeddings = nn.Parameter(torch.randn(num_streams, size) * 0.02)
            self.early_exit = EarlyExit(size)
        self.copies: nn.ModuleList | None = None
        self.folded: nn.ModuleList | None = None  # what decodes in their place
        self.seated: int | None = None  # nodes before the first rider, while the copies run
        if mode == "lossless":
            self.copies = shared_copies(list(target.decoder.layers)[self.first_layer :])
            for addition in add_adapters(self.copies, rank, alpha, seed):
                addition.register_forward_hook(self._only_on_riders)
        else:
            assert target.decoder  # refuses a model that does not come apart
        if weights is not None:
            read_tensors(Path(weights, WEIGHTS), self.stored())

    @property
    def target(self) -> PretrainedLM:
        """The model that the streams ride in."""
        return self.borrowed[0]

    def new_cache(self, batch_size: int, capacity: int) -> StreamState:
        return StreamState()

    def num_slots(self, num_tokens: int) -> int:
        nodes = 1 + (self.tree.cut(num_tokens) if num_tokens else 0)
        kept = nodes if self.kept_nodes is None else min(nodes, 1 + self.kept_nodes)
        return nodes + kept * self.num_streams

    @torch.inference_mode()
    def propose(
        self,
        context: Context,
        cache: StreamState,
        num_tokens: int,
        sampling: Sampling,
        noise: Noise,
    ) -> TokenDraft:
        if cache.riders is None or cache.places is None:
            return TokenDraft(context.tokens[:, :0], None, torch.zeros_like(context.lengths))
        run = self._compiled_guess if context.compiled else self.guess
        draft = self.tree.fill(run(cache.riders[:, :num_tokens]), num_tokens)
        # Streams of an older place say nothing here: no draft for that row.
        fresh = cache.places == context.lengths - 2
        return TokenDraft(draft.tokens, None, draft.lengths * fresh, draft.parents, draft.height)

    def guess(self, riders: Tensor) -> Tensor:
        """Return each stream's best tokens (B, R, ranks), best first, from riders (B, R, D)."""
        return self.target.head(riders).topk(self.tree.num_ranks, -1).indices

    @functools.cached_property
    def _compiled_guess(self) -> Callable[[Tensor], Tensor]:
        return compile_shapes(self.guess)

    def observe(self, observation: Observation, cache: StreamState) -> None:
        cache.riders = observation.riders
        places = observation.start + observation.counts
        # A row that wanted no draft has streams only if a neighbour did: it must not use them.
        assert observation.wanted is not None, "streams ride in rounds that draft"
        cache.places = torch.where(observation.wanted > 0, places, -1)

    # What a rider is (models/walk.py)

    def attach(self) -> Rider:
        if self.copies is not None and self.folded is None and not self.training:
            layers = list(self.target.decoder.layers)[self.first_layer :]
            self.folded = split_copies(layers, self.copies, self._own_states)
        return self

    def train(self, mode: bool = True) -> SpeculativeStreaming:
        """Switch to training or decoding; what was folded is forgotten, because weights change."""
        self.unfold()
        return super().train(mode)

    def unfold(self) -> None:
        """Forget the folded adapters, and free their weights; the next decoding folds anew."""
        self.folded = None

    @property
    def upper_layers(self) -> Sequence[nn.Module] | None:
        """The layers in which the streams ride, if not the target's own; folded where it decodes.

        Training asks too: a trainer may set `training` itself, and not call `train`.
        """
        found = self.copies if self.training or self.folded is None else self.folded
        return None if found is None else list(found)

    def board(self, hidden: Tensor) -> Tensor:
        """Return the riders (..., R, D) of nodes with states (..., D) below the upper layers."""
        return hidden[..., None, :] + self.embeddings.to(hidden.dtype)

    def seat(self, num_nodes: int) -> None:
        """Say how many states before the first rider are the target's own."""
        self.seated = num_nodes

    def prune(self, hidden: Tensor, tokens: Tensor, tree: NodeTree, real: Tensor) -> Tensor | None:
        """Keep the nodes (B, M) whose paths the early exit finds likeliest; None keeps all.

        A path is at most as likely as its beginning, so an ancestor is never dropped before its
        descendant.  The choice depends on the prefix and the tree only, never on a coin, so a
        pruned tree is a deterministic draft as the whole one is.
        """
        if self.kept_nodes is None or tokens.shape[1] <= self.kept_nodes + 1:
            return None
        logits = self.target.head(self.target.decoder.norm(self.early_exit(hidden)))
        laws = logits.float().log_softmax(-1)  # (B, T, V)
        above = tree.depths[:, None, :] == tree.depths[:, :, None] - 1
        parents = (tree.ancestors & above).to(torch.uint8).argmax(2)  # (B, T), of the root itself
        steps = laws.flatten(1).gather(1, parents * laws.shape[2] + tokens).double()
        steps[:, 0] = 0.0
        chances = (tree.ancestors * steps[:, None, :]).sum(2)  # (B, T)
        order = torch.arange(tokens.shape[1], device=tokens.device)
        chances = torch.where(order < real[:, None], chances, -torch.inf)
        best = (chances - 1e-9 * order).topk(self.kept_nodes + 1, 1).indices
        return best.sort(1).values

    def _own_states(self) -> int:
        """Return how many states of the pass are the target's own."""
        assert self.seated is not None, "the copies run with riders only"
        return self.seated

    def _only_on_riders(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """Take an adapter's addition away from the target's own states."""
        count = self._own_states()
        own = torch.zeros_like(output[:, :count])
        return torch.cat([own, output[:, count:]], 1)

    # What is trained, counted, stored

    def stored(self) -> dict[str, Tensor]:
        """Return the drafter's own tensors by name, nothing of the target's."""
        tensors = {"embeddings": self.embeddings.data}
        tensors |= {f"early_exit.{k}": v for k, v in self.early_exit.state_dict().items()}
        if self.copies is not None:
            found = adapter_parameters(self.copies)
            tensors |= {f"copies.{name}": p.data for name, p in found.items()}
        return tensors

    def extra_repr(self) -> str:
        """Name what a round costs: costs of one shape do not hold for another."""
        return (
            f"num_streams={self.num_streams}, stream_layers={self.num_layers}, mode={self.mode}, "
            f"kept_nodes={self.kept_nodes}"
        )

    def extra_parameters(self) -> dict[str, int]:
        """Count what the drafter adds to the target: R D + 2 * 8 * D, and adapters of its own.

        In mode `shared` the adapters are the tuned target's.
        """
        adapters = adapter_parameters(self.copies) if self.copies is not None else {}
        return {
            "stream embeddings": self.embeddings.numel(),
            "early exit": sum(p.numel() for p in self.early_exit.parameters()),
            "stream adapters": sum(p.numel() for p in adapters.values()),
        }

    def check_target(self, target: nn.Module, processor: TextProcessor) -> None:
        if target is not self.target:
            raise ValueError("streams ride in the target that they were built for, not in another")

    def save(self, folder: Path, processor: TextProcessor) -> dict[str, Any]:
        write_tensors(folder / WEIGHTS, self.stored())
        return {
            "class_path": "specstream.drafters.SpeculativeStreaming",
            "init_args": {
                "num_streams": self.num_streams,
                "stream_layers": self.num_layers,
                "mode": self.mode,
                "rank": self.rank,
                "alpha": self.alpha,
                "paths": [list(path) for path in self.tree.paths],
                "kept_nodes": self.kept_nodes,
                "weights": ".",
            },
        }
