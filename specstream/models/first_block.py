"""First-block caching: what a transformer's later blocks add, kept of one call and used in another.

As first published in ParaAttention and taken up by `diffusers` (First Block Cache): from one noise
level to the next what the blocks after the first add to the hidden states changes little, so that a
call can run the first block alone and add what the others added before.  There one decision is made
for a whole batch and the memory is the network's own.  Here the caller keeps it, a row of numbers
for each state, so that rows may stand at steps of their own and go back to any of them, and the
network stays the same for whoever calls it next.

Shapes: R rows, S the shape of a state, T places of the sequence that the blocks see, D hidden.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from specstream.models.diffusers_network import DiffusersNetwork
from specstream.models.patch_transformer import PatchTransformer

if TYPE_CHECKING:
    from diffusers import ModelMixin

NAME = "first-block"
LEADER = "fbc_leader_block_hook"  # what `diffusers` calls the hook that decides


@dataclass(frozen=True, slots=True)
class BlockWord:
    """What a network said, and how: by all of its blocks or by the first."""

    output: Tensor  # (R, *S)
    first: Tensor  # (R, T, D) what the first block added
    rest: Tensor  # (R, T, D) what the others added, or were supposed to


class FirstBlock(ABC):
    """Runs a transformer with all of its blocks, or with the first and a memory of the others."""

    @abstractmethod
    def __call__(
        self,
        states: Tensor,
        times: Tensor,
        condition: Mapping[str, Tensor],
        rest: Tensor | None = None,
    ) -> BlockWord:
        """Return what is said of states (R, *S) at times (R, 1).

        With `rest` (R, T, D) by the first block alone, and that in place of what the others add.
        """


class PatchFirstBlock(FirstBlock):
    """Of a transformer of this package."""

    def __init__(self, network: PatchTransformer) -> None:
        if len(network.blocks) < 2:
            raise ValueError(f"{NAME}: the network has one block, which nothing would be saved of")
        self.network = network

    def __call__(
        self,
        states: Tensor,
        times: Tensor,
        condition: Mapping[str, Tensor],
        rest: Tensor | None = None,
    ) -> BlockWord:
        said = self.network.spoken(states, times, **condition, rest=rest)
        return BlockWord(said.output, said.begun - said.read, said.hidden - said.begun)


class DiffusersFirstBlock(FirstBlock):
    """Of a transformer of `diffusers`, by its own cache, which is taken off again after a call."""

    def __init__(self, network: DiffusersNetwork) -> None:
        name = type(network.model).__name__
        if len(network.models) > 1:
            raise ValueError(f"{NAME}: a pair of networks has no first block")
        blocks = [
            block
            for part in network.model.children()
            if isinstance(part, nn.ModuleList)
            for block in part
        ]
        if not hasattr(network.model, "enable_cache") or len(blocks) < 2:
            raise ValueError(f"{NAME}: diffusers caches no blocks of a {name}")
        self.network = network
        with self._hooked():
            pass  # refused here rather than in the first call

    def __call__(
        self,
        states: Tensor,
        times: Tensor,
        condition: Mapping[str, Tensor],
        rest: Tensor | None = None,
    ) -> BlockWord:
        self.network.check(condition)
        firsts: list[Tensor] = []
        with self._hooked() as leader:
            state = leader.state_manager.get_state()

            def decide(added: Tensor) -> bool:
                firsts.append(added)
                if rest is None:
                    return True
                places = added.shape[1]
                beside = rest[:, places:] if rest.shape[1] > places else None
                state.tail_block_residuals = (rest[:, :places], beside)
                return False

            leader._should_compute_remaining_blocks = decide
            output = self.network(states, times, **condition)
            parts = [part for part in state.tail_block_residuals if part is not None]
        assert isinstance(output, Tensor)
        return BlockWord(output, firsts[0], torch.cat(parts, 1))

    @contextmanager
    def _hooked(self) -> Iterator[Any]:
        """Let `diffusers` cache, and yield the hook that decides; it caches no more afterwards."""
        from diffusers import FirstBlockCacheConfig

        model: ModelMixin = self.network.model
        try:
            model.enable_cache(FirstBlockCacheConfig())
        except ValueError as error:
            kind = type(model).__name__
            raise ValueError(f"{NAME}: diffusers caches no blocks of a {kind}: {error}") from None
        try:
            with model.cache_context(NAME):
                yield find_leader(model)
        finally:
            model.disable_cache()


def find_leader(model: nn.Module) -> Any:
    """Return the hook of the first block, by which `diffusers` decides."""
    hooks = [getattr(part, "_diffusers_hook", None) for part in model.modules()]
    leaders = [found.get_hook(LEADER) for found in hooks if found is not None]
    return next(leader for leader in leaders if leader is not None)


def first_block(network: nn.Module) -> FirstBlock:
    """Return how to run a network by its first block; ValueError in one line where it has none."""
    if isinstance(network, PatchTransformer):
        return PatchFirstBlock(network)
    if isinstance(network, DiffusersNetwork):
        return DiffusersFirstBlock(network)
    raise ValueError(f"{NAME}: a {type(network).__name__} is no transformer")
