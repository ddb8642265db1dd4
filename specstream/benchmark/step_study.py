"""The table of steps: what a denoising step of a drafter costs beside one of its target.

A bidirectional target reads the whole canvas in every step; a block drafter reads one block over
the keys and values of those before it.  How much that is worth depends on sizes and lengths only,
so untrained networks will do.  The drafter's step is timed whole, with what it draws and judges,
the target's as its pass alone: a verified draft asks no more of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from specstream.benchmark.rows import Machine, Row, StepRow, describe_machine
from specstream.benchmark.study import Study, say
from specstream.drafters.masked import MaskedDraftModel
from specstream.generation.costs import fastest
from specstream.generation.loading import find_device
from specstream.models.pretrained_masked import PretrainedMaskedLM
from specstream.sampling import Noise, Sampling
from specstream.structures import Canvas


@dataclass(frozen=True)
class StepStudy(Study):
    """Times a step of both models on canvases of several lengths, in turns; the least counts.

    The drafter's step is the first in the last block of a canvas whose other blocks are cached,
    as a pipeline asks for it; beside it a pass of the same network without a cache.

    Args:
        name: what the table calls the pair.
        target: makes the bidirectional network.
        drafter: makes the block network.
        lengths: of the canvases.
        batch_size: canvases that are filled together.
        dtype: of both, float32 or bfloat16.
        device: auto, cpu, cuda or cuda:N.
    """

    name: str
    target: Callable[[], nn.Module]
    drafter: Callable[[], nn.Module]
    lengths: list[int] = field(default_factory=lambda: [64, 128, 256, 512])
    batch_size: int = 1
    dtype: str = "bfloat16"
    device: str = "auto"

    def check(self) -> None:
        if not self.lengths or min(self.lengths) < 1 or self.batch_size < 1:
            raise ValueError("lengths and batch_size must be at least 1")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype {self.dtype!r} is not float32 or bfloat16")
        find_device(self.device)

    def run(self, arguments: Sequence[str]) -> Iterator[list[Row]]:
        place, dtype = find_device(self.device), getattr(torch, self.dtype)
        target, network = self.target(), self.drafter()
        for model, name in ((target, "target"), (network, "drafter")):
            if not isinstance(model, PretrainedMaskedLM) or model.form.mask_id is None:
                raise ValueError(f"the {name} must be a masked diffusion model with a mask_id")
            most = model.max_positions
            if most is not None and most < max(self.lengths):
                raise ValueError(f"the {name} has {most} positions, not {max(self.lengths)}")
            model.to(place, dtype).eval().requires_grad_(False)
        assert isinstance(target, PretrainedMaskedLM) and isinstance(network, PretrainedMaskedLM)
        if target.block_length is not None or network.block_length is None:
            raise ValueError("the target must be bidirectional and the drafter a block model")
        machine = describe_machine(place, self.dtype, arguments)
        for length in self.lengths:
            yield [self.measure(target, network, length, machine)]

    @torch.inference_mode()
    def measure(
        self, target: PretrainedMaskedLM, network: PretrainedMaskedLM, length: int, machine: Machine
    ) -> StepRow:
        """Time both steps on canvases of one length whose last block is masked."""
        assert network.block_length is not None
        tokens = torch.zeros(self.batch_size, length, dtype=torch.long, device=target.device)
        masked = torch.zeros_like(tokens, dtype=torch.bool)
        masked[:, -network.block_length :] = True
        tokens = tokens.masked_fill(masked, target.mask_id)
        lengths = torch.full((self.batch_size,), length, device=tokens.device)
        rows = torch.arange(self.batch_size, device=tokens.device)
        canvas = Canvas(tokens, masked, lengths, rows, torch.zeros_like(rows))
        drafter = MaskedDraftModel(target, lambda: network).eval()
        cache, noise = drafter.new_cache(self.batch_size, length), Noise(0, tokens.device)
        one = [1] * self.batch_size
        seconds = fastest(
            [
                lambda: target(tokens, lengths),
                lambda: network(tokens, lengths),
                lambda: drafter.propose(canvas, cache, one, Sampling(), noise).drafted,
            ]
        )
        say(f"{length} positions: {', '.join(f'{1000 * s:.2f} ms' for s in seconds)}")
        return StepRow(
            task=self.name,
            batch_size=self.batch_size,
            length=length,
            block_length=network.block_length,
            target_parameters=sum(p.numel() for p in target.parameters()),
            drafter_parameters=sum(p.numel() for p in network.parameters()),
            target_seconds=seconds[0],
            uncached_seconds=seconds[1],
            drafter_seconds=seconds[2],
            ratio=seconds[0] / seconds[2],
            machine=machine,
        )
