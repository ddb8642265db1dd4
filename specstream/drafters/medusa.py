"""Medusa heads: several tokens ahead from one state of the target (Cai et al. 2024, 2401.10774).

Which state says which token: of n committed tokens the last, at place n - 1, is the target's own
choice after its pass, so the newest state is that of place n - 2.  There the target's head said
token n - 1; head 1 says token n, the first to be drafted, and head k says token n + k - 1.  The
heads do not know what each other says, so the guesses of one depth are the same below every node
of the tree.

Shapes: B rows, H heads, R ranks, D hidden, V vocabulary.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specstream.drafters.base import Drafter
from specstream.drafters.features import FeatureBuffer
from specstream.drafters.static_tree import StaticTree, likeliest_paths, product_paths
from specstream.drafters.stored import read_tensors, write_tensors
from specstream.models.compilation import compile_shapes
from specstream.models.pretrained_lm import PretrainedLM
from specstream.processors import TextProcessor
from specstream.sampling import Noise, Sampling
from specstream.structures import MAX_DRAFT, Context, Law, Observation, TokenDraft

WEIGHTS = "medusa.safetensors"
DEFAULT_NODES = 24  # of the tree that is drafted unless one is given
ASSUMED_RANKS = 10  # guesses of each head that may enter it


class ResidualBlock(nn.Module):
    """x + SiLU(W x + b), the identity until it is trained."""

    def __init__(self, like: nn.Linear) -> None:
        super().__init__()
        size = like.in_features
        self.linear = nn.Linear(size, size, device=like.weight.device, dtype=like.weight.dtype)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return states (..., D) for states (..., D)."""
        hidden = hidden.to(self.linear.bias.dtype)  # that of the matrix may be int8
        return hidden + F.silu(self.linear(hidden))


class MedusaHead(nn.Module):
    """Residual blocks, each with weights of its own, and a copy of the target's head."""

    def __init__(self, head: nn.Linear, num_layers: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(ResidualBlock(head) for _ in range(num_layers)))
        self.output = copy.deepcopy(head).requires_grad_(True)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return logits (..., V) for the target's states after its final norm (..., D)."""
        return self.output(self.blocks(hidden))


class Medusa(Drafter):
    """Heads on the target's last state, whose best guesses fill a tree of fixed shape.

    Each of `num_heads` heads is `num_layers_per_head` residual blocks and an output projection
    that starts as the target's.  The tree is given by `paths`, ranks from the root, or by
    `branching`, so many children at each depth; by default it has the nodes that are likeliest
    under assumed accuracies, and `MedusaModule` measures better ones.  `weights` is the folder of
    trained heads; None starts afresh, which draws nothing: blocks are zero, outputs copied.  Raises
    ValueError for a target that is no causal LM, for sizes and trees that do not fit, and for
    weights of other heads.
    """

    law = Law.DETERMINISTIC
    trees = True

    def __init__(
        self,
        target: nn.Module,
        num_heads: int = 4,
        num_layers_per_head: int = 1,
        paths: Sequence[Sequence[int]] | None = None,
        branching: Sequence[int] | None = None,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(target, PretrainedLM):
            raise ValueError(
                f"Medusa heads sit on a causal language model, not on {type(target).__name__}"
            )
        if not 1 <= num_heads <= MAX_DRAFT:
            raise ValueError(f"num_heads must lie in 1..{MAX_DRAFT}, not {num_heads}")
        if num_layers_per_head < 1:
            raise ValueError(f"num_layers_per_head must be at least 1, not {num_layers_per_head}")
        if paths is not None and branching is not None:
            raise ValueError("give paths or branching, not both")
        head = target.head
        assert isinstance(head, nn.Linear)
        self.hidden_size, self.vocab_size = head.in_features, target.vocab_size
        self.num_layers_per_head = num_layers_per_head
        self.heads = nn.ModuleList(MedusaHead(head, num_layers_per_head) for _ in range(num_heads))
        self.feature_layers = (len(target.decoder.layers),)  # refuses what does not come apart
        if branching is not None:
            paths = product_paths(branching)
        self.hang(paths if paths is not None else default_paths(num_heads, self.vocab_size))
        if weights is not None:
            read_tensors(Path(weights, WEIGHTS), self.state_dict())

    @property
    def like(self) -> Tensor:
        """A tensor where the heads are, in the dtype in which they compute."""
        return self.get_parameter("heads.0.blocks.0.linear.bias")

    def hang(self, paths: Sequence[Sequence[int]]) -> None:
        """Draft the tree of `paths` from now on; ValueError for one that the heads cannot fill."""
        tree = StaticTree(paths)
        if tree.height > len(self.heads):
            raise ValueError(
                f"a tree of height {tree.height} needs as many heads, not {len(self.heads)}"
            )
        if tree.num_ranks > self.vocab_size:
            raise ValueError(
                f"a tree of {tree.num_ranks} ranks needs as many tokens, not {self.vocab_size}"
            )
        self.tree = tree.to(self.like.device)
        self.max_tokens = tree.height

    def new_cache(self, batch_size: int, capacity: int) -> FeatureBuffer:
        return FeatureBuffer(batch_size, capacity, self.hidden_size, self.like)

    def num_slots(self, num_tokens: int) -> int:
        return self.tree.cut(num_tokens) + 1

    def read_prompt(self, features: Tensor, first: int, cache: FeatureBuffer) -> None:
        cache.read_prompt(features, first)

    @torch.inference_mode()
    def propose(
        self,
        context: Context,
        cache: FeatureBuffer,
        num_tokens: int,
        sampling: Sampling,
        noise: Noise,
    ) -> TokenDraft:
        run = self._compiled_guess if context.compiled else self.guess
        newest = cache.window(context.lengths - 2, 1)[:, 0]  # (B, D)
        draft = self.tree.fill(run(newest, num_tokens), num_tokens)
        known = context.lengths >= 2  # after a prompt of one token there is no state yet
        return replace(draft, lengths=draft.lengths * known)

    def guess(self, hidden: Tensor, num_heads: int) -> Tensor:
        """Return the first heads' best tokens (B, H, R), best first, from states (B, D)."""
        ranks, heads = self.tree.num_ranks, list(self.heads)[:num_heads]
        return torch.stack([head(hidden).topk(ranks, -1).indices for head in heads], 1)

    @functools.cached_property
    def _compiled_guess(self) -> Callable[[Tensor, int], Tensor]:
        return compile_shapes(self.guess)

    def observe(self, observation: Observation, cache: FeatureBuffer) -> None:
        cache.observe(observation)

    def extra_parameters(self) -> dict[str, int]:
        """Count the heads: the paper's H (D^2 + D V), and what it leaves out.

        Left out are the D biases of each block, its further blocks' D^2, and the V biases of a
        target whose head has some.
        """
        blocks = sum(p.numel() for head in self.heads for p in head.blocks.parameters())
        outputs = sum(p.numel() for head in self.heads for p in head.output.parameters())
        return {"residual blocks": blocks, "heads": outputs}

    def check_target(self, target: nn.Module, processor: TextProcessor) -> None:
        expected = (self.feature_layers[0], self.hidden_size, self.vocab_size)
        found = None
        if isinstance(target, PretrainedLM):
            found = (target.num_layers, target.head.in_features, target.vocab_size)
        if found != expected:
            raise ValueError(
                "the Medusa heads are for a target of (layers, hidden size, vocabulary) "
                f"{expected}, not {found or type(target).__name__}"
            )

    def save(self, folder: Path, processor: TextProcessor) -> dict[str, Any]:
        write_tensors(folder / WEIGHTS, self.state_dict())
        return {
            "class_path": "specstream.drafters.Medusa",
            "init_args": {
                "num_heads": len(self.heads),
                "num_layers_per_head": self.num_layers_per_head,
                "paths": [list(path) for path in self.tree.paths],
                "weights": ".",
            },
        }


def default_paths(num_heads: int, vocab_size: int) -> list[tuple[int, ...]]:
    """Return a tree for heads whose accuracies are not known.

    Assumed, not measured: the best guess of head k is right with 0.6 * 0.8^(k - 1), and the guess
    of rank r is right 1 / r^2 times as often.
    """
    ranks = range(1, min(ASSUMED_RANKS, vocab_size) + 1)
    accuracies = [[0.6 * 0.8**depth / rank**2 for rank in ranks] for depth in range(num_heads)]
    return sparse_paths(accuracies, max(DEFAULT_NODES, num_heads))


def sparse_paths(accuracies: Sequence[Sequence[float]], num_nodes: int) -> list[tuple[int, ...]]:
    """Return the chain of best guesses, so that every head drafts, and the likeliest nodes beside.

    `accuracies` as in `likeliest_paths`; at least as many nodes as heads, fewer than `num_nodes`
    only where the accuracies have no more.
    """
    chain = [(0,) * depth for depth in range(1, len(accuracies) + 1)]
    beside = [path for path in likeliest_paths(accuracies, num_nodes) if path not in chain]
    return chain + beside[: num_nodes - len(chain)]
